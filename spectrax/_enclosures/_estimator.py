"""A certified upper bound at every step of training."""

from typing import Any, ClassVar

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from .._dtypes import at_least_float32
from .._norms import AbstractEstimator, Kind, PowerIteration
from .._norms._rows import stop_gradient
from .._operators import Operator
from ._drift import arrays_of, drift_bound
from ._enclose import check_provable
from ._enclosure import enclose_norm
from ._rounding import up


class GramState(eqx.Module):
    """What `GramIteration` carries.

    - `vectors`: singular vectors, for the derivative.
    - `reference`: the arrays of the operator when it was last certified.
    - `upper`: the bound that was proven then.
    """

    vectors: Any
    reference: PyTree[Array]
    upper: Float[Array, ""]


class GramIteration(AbstractEstimator[GramState]):
    """A certified upper bound on the norm: [`spectrax.enclose_norm`][] once, and after
    each update of the weight `upper + |W - W_certified|_F`, until that has drifted past
    a tolerance and the weight is certified anew.

    **Kind:** an upper bound, for the weight that it is asked about, whether or not the
    state has been advanced since the weight changed.

    **Derivatives:** `Re(u^H dA v)`, that of the norm, with singular vectors `u`, `v`
    that are carried as by [`spectrax.PowerIteration`][]. The bound itself jumps where
    it is certified anew; its derivative would be that of its slack as well.

    **Arguments:**

    - `tolerance`: the drift, relative to the bound, at which to certify anew; positive.
        Constrained weights are below their bound by as much. With 0.01 and Adam most
        updates of a large matrix are certified: an entrywise update of size `s` has
        Frobenius norm `s sqrt(out in)`.
    - `rtol`: as that of `enclose_norm`.
    - `block_size`: how many singular pairs to carry for the derivative.

    **Cost:** a power step, one pass over the weight and over its copy, which takes as
    much memory, and `enclose_norm` where the drift asks for it. Under `jax.vmap`, for a
    stack of layers, that is at every step.

    **Raises:** `ValueError` if `tolerance` is not positive or if `block_size < 1`, and,
    when a weight is wrapped, if its `view` is an operator without structure, for which
    there is no upper bound.

    !!! Example

        ```python
        import equinox as eqx
        import jax
        import spectrax

        layer = eqx.nn.Linear(8, 4, key=jax.random.key(0))
        model, state = spectrax.constrain(layer, estimator=spectrax.GramIteration())
        state = spectrax.advance(model, state)
        plain = spectrax.unwrap(model, state)
        ```
    """

    kind: ClassVar[Kind] = "upper bound"
    tolerance: float = eqx.field(static=True, default=1e-2)
    rtol: float | None = eqx.field(static=True, default=None)
    block_size: int = eqx.field(static=True, default=8)

    def __check_init__(self):
        if not self.tolerance > 0:
            raise ValueError(
                f"expected `tolerance` to be positive, got {self.tolerance}."
            )
        self._power()  # checks `block_size`

    def _power(self) -> PowerIteration:
        return PowerIteration(block_size=self.block_size)

    def init(self, operator: Operator, *, key: PRNGKeyArray) -> GramState:
        """Certified, with converged vectors."""
        check_provable(operator)
        vectors = self._power().init(operator, key=key)
        return GramState(vectors, *self._certify(operator))

    def advance(
        self, operator: Operator, state: GramState, *, num_steps: int | None = None
    ) -> GramState:
        """Power iteration, and a new certificate if the old one has drifted."""
        _check_dtypes(operator, state)
        operator = stop_gradient(operator)
        vectors = self._power().advance(operator, state.vectors, num_steps=num_steps)
        drift = drift_bound(operator, state.reference)
        reference, upper = lax.cond(
            drift > self.tolerance * state.upper,
            lambda: self._certify(operator, state.upper.dtype),
            lambda: (state.reference, state.upper),
        )
        return GramState(vectors, reference, upper)

    def sigma(self, operator: Operator, state: GramState) -> Float[Array, ""]:
        """The bound that was proven, and the drift since."""
        _check_dtypes(operator, state)
        estimate = self._power().sigma(operator, state.vectors)
        drift = drift_bound(stop_gradient(operator), state.reference)
        # A weight that has not moved keeps the very number.
        upper = jnp.where(drift == 0, state.upper, up(state.upper + drift))
        if upper.dtype != estimate.dtype:
            upper = up(upper.astype(estimate.dtype), 1)
        return stop_gradient(upper) + (estimate - stop_gradient(estimate))

    def residual(self, operator: Operator, state: GramState) -> Float[Array, ""]:
        """Of the vectors; the bound does not depend on it."""
        return self._power().residual(operator, state.vectors)

    def _certify(
        self, operator: Operator, dtype: Any = None
    ) -> tuple[PyTree[Array], Float[Array, ""]]:
        operator = stop_gradient(operator)
        upper = enclose_norm(operator, rtol=self.rtol).upper
        if dtype not in (None, upper.dtype):
            upper = up(upper.astype(dtype), 1)
        return arrays_of(operator), upper


def _check_dtypes(operator: Operator, state: GramState) -> None:
    """A bound proven of some numbers says nothing of the same ones, rounded."""
    got, expected = (
        [leaf.dtype for leaf in jtu.tree_leaves(tree)]
        for tree in (arrays_of(operator), state.reference)
    )
    if got != expected or at_least_float32(state.upper.dtype) != state.upper.dtype:
        raise TypeError(
            f"expected a weight of the dtypes {expected} in which it was certified, "
            f"with a bound of dtype float32 at least, got {got} and "
            f"{state.upper.dtype}: model or state were cast after wrapping. Constrain "
            "the model anew in its new dtype."
        )
