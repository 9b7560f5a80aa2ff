"""A bound that is given, or trained with the model."""

from typing import Any

from jaxtyping import Array, PRNGKeyArray, PyTree, Real

from .._constraints import AbstractConstraint, LearnableBound, Normalize
from .._norms import AbstractEstimator, PowerIteration
from .._wrap import with_constraints
from .._wrapped import Wrapped


class AdaptiveSpectralNorm(Wrapped):
    """Scales every weight of a layer or model so that its norm is a bound of your own,
    fixed or trained: `W * bound / sigma(W)`.

    The same as [`spectrax.wrap`][] with [`spectrax.Normalize`][] or
    [`spectrax.LearnableBound`][] for all weights. Each weight has its own bound, and so
    has each weight of a stack. For other bounds in other layers, call it on each of
    them, or use `wrap` with `where`.

    The trained bounds as they are now are `[c.target() for c in model.constraints]`,
    and stand in the table of [`spectrax.summary`][].

    **Kind:** as the estimator's; see [`spectrax.unwrap`][].

    **Arguments:**

    - `layer`: a layer or any pytree of layers, as for `wrap`.
    - `initial_bound`: the norm to have, positive and finite; if it is learnable, at the
        start. A number, or an array with one for each weight of a stack.
    - `learnable_bound`: whether the bounds are trained with the model. They are then
        among its trainable leaves.
    - `maximum`: what a learnable bound never reaches. `None` for no limit: training
        may then raise the bounds as far as the loss asks for it.
    - `estimator`: how the norms are found, as in `wrap`.
    - `key`: randomness of the starting vectors. Optional; a fixed key if not given.

    A [`spectrax.Wrapped`][], called as `y, state = model(*args, state)`.

    **Cost:** that of `wrap`.

    **Raises:** `ValueError` if `initial_bound` or `maximum` is not positive and finite,
    if `initial_bound >= maximum`, or if there is a `maximum` for a bound that is not
    learnable; and what `wrap` raises.

    !!! Example

        ```python
        import equinox as eqx
        import jax
        import spectrax

        key = jax.random.key(0)
        mlp = eqx.nn.MLP(64, 10, width_size=128, depth=2, key=key)
        model, state = eqx.nn.make_with_state(spectrax.nn.AdaptiveSpectralNorm)(
            mlp, initial_bound=2.0, learnable_bound=True, maximum=5.0
        )
        y, state = model(jax.numpy.ones(64), state)
        print([constraint.target() for constraint in model.constraints])  # 2 each
        ```
    """

    def __init__(
        self,
        layer: PyTree,
        *,
        initial_bound: float | int | Real[Array, "*stack"] = 1.0,
        learnable_bound: bool = False,
        maximum: float | None = None,
        estimator: AbstractEstimator = PowerIteration(),
        key: PRNGKeyArray | None = None,
    ):
        constraint = _bound(initial_bound, maximum, learnable=learnable_bound)
        module = with_constraints(
            layer, constraint=constraint, estimator=estimator, key=key
        )
        super().__init__(module)


def _bound(
    initial: Any, maximum: float | None, *, learnable: bool
) -> AbstractConstraint:
    if learnable:
        return LearnableBound(initial, maximum=maximum)
    if maximum is not None:
        raise ValueError(
            f"expected no `maximum` for a fixed bound, got {maximum}. Pass "
            "`learnable_bound=True` to train the bound below it, or leave it out."
        )
    return Normalize(initial)
