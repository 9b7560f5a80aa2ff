"""What networks share whose weights may be constrained."""

import abc
from typing import Any

import equinox as eqx
from jaxtyping import Array, Float, PRNGKeyArray

from .._constrained import constrained_weights
from .._wrapped import advance, unwrap


class AbstractNetwork(eqx.nn.StatefulLayer):
    """A network that is its own constrained model: some of its weights are
    [`spectrax.Constrained`][] nodes, or none once it is unwrapped.

    A subclass says what the network computes and how far it can tear two inputs apart,
    both for plain weights; state is taken care of here.
    """

    @abc.abstractmethod
    def forward(self, x: Any) -> Any:
        """The output of the plain network."""

    @abc.abstractmethod
    def plain_bound(self) -> Float[Array, ""]:
        """An upper bound on the Lipschitz constant of the plain network."""

    def is_stateful(self) -> bool:
        """Whether a state has to be passed: not once it is unwrapped."""
        return bool(constrained_weights(self))

    def __call__(
        self,
        x: Float[Array, "..."],
        state: eqx.nn.State | None = None,
        *,
        key: PRNGKeyArray | None = None,
    ) -> Any:
        """The output function for an input function. Use `jax.vmap` for a batch.

        **Arguments:**

        - `x`: the input, as the class says.
        - `state`: the model's state, which each call advances. Not needed by a plain or
            unwrapped network.
        - `key`: ignored, for compatibility with other layers.

        **Returns:**

        The output; if a state is passed, the pair of it and the new state.

        **Raises:** `TypeError` if a state is needed and there is none.
        """
        del key
        new_state = advance(self, state)
        y = unwrap(self, new_state, lazy=True).forward(x)
        return y if new_state is None else (y, new_state)

    def lipschitz_bound(self, state: eqx.nn.State | None = None) -> Float[Array, ""]:
        """A bound on the Lipschitz constant: `|f(x) - f(y)| <= bound |x - y|`, in the
        2-norm over all channels and points, at any number of points.

        **Kind:** an upper bound, from the norms that [`spectrax.enclose_norm`][] proves
        for the function that `spectrax.unwrap(model, state)` computes, up to the
        rounding of its evaluation.

        **Arguments:**

        - `state`: the model's state, which stays valid. Not needed by a plain or
            unwrapped network.

        **Returns:**

        A real scalar. It carries no derivative.

        **Cost:** an enclosure of each weight, in Fourier layers one for each frequency.

        **Raises:** `TypeError` if a state is needed and there is none; `ValueError` if
        the Lipschitz constant of an activation is not known.
        """
        return unwrap(self, state).plain_bound()
