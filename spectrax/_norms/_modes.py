"""The norm of a matrix for each Fourier mode: the largest of theirs."""

import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Float, Inexact, PRNGKeyArray

from .._operators import FourierMultiplier
from ._converged import converged_norm, converged_residual, dense_norm, reference_norm
from ._power import PowerState
from ._rows import largest_of
from ._triplet import differentiable_norm, triplet_residual, TripletFinder
from ._vectors import (
    init_vectors,
    PowerStateLike,
    step_vectors,
    vectors_residual,
    vectors_value,
)


# Of the matrices, each of which is followed on its own.
_MOST_PAIRS_PER_MODE = 2


@init_vectors.register
def _(
    operator: FourierMultiplier, key: PRNGKeyArray, block_size: int, num_steps: int
) -> PowerStateLike:
    block = min(block_size, _MOST_PAIRS_PER_MODE)

    def init(matrix: Inexact[Array, "out in"]) -> PowerStateLike:
        return init_vectors(lx.MatrixLinearOperator(matrix), key, block, num_steps)

    return jax.vmap(init)(operator.matrices())


@step_vectors.register
def _(
    operator: FourierMultiplier, vectors: PowerStateLike, num_steps: int
) -> PowerStateLike:
    def step(matrix: Inexact[Array, "out in"], vectors: PowerState) -> PowerStateLike:
        return step_vectors(lx.MatrixLinearOperator(matrix), vectors, num_steps)

    return jax.vmap(step)(operator.matrices(), _checked(operator, vectors))


@vectors_value.register
def _(operator: FourierMultiplier, vectors: PowerStateLike) -> Float[Array, ""]:
    return largest_of(_values(operator, _checked(operator, vectors)))


@vectors_residual.register
def _(operator: FourierMultiplier, vectors: PowerStateLike) -> Float[Array, ""]:
    def residual(
        matrix: Inexact[Array, "out in"], vectors: PowerState
    ) -> Float[Array, ""]:
        return vectors_residual(lx.MatrixLinearOperator(matrix), vectors)

    vectors = _checked(operator, vectors)
    leading = jnp.argmax(_values(operator, vectors))
    return jax.vmap(residual)(operator.matrices(), vectors)[leading]


@converged_norm.register
def _(operator: FourierMultiplier, find: TripletFinder) -> Float[Array, ""]:
    return largest_of(_norms(operator, find))


@converged_residual.register
def _(operator: FourierMultiplier, find: TripletFinder) -> Float[Array, ""]:
    leading = operator.matrices()[jnp.argmax(_norms(operator, find))]
    return triplet_residual(lx.MatrixLinearOperator(leading), find)


@reference_norm.register
def _(operator: FourierMultiplier) -> float:
    return dense_norm(operator.matrices())


def _values(operator: FourierMultiplier, vectors: PowerState) -> Float[Array, " modes"]:
    def value(matrix: Inexact[Array, "out in"], vectors: PowerState) -> Array:
        return vectors_value(lx.MatrixLinearOperator(matrix), vectors)

    return jax.vmap(value)(operator.matrices(), vectors)


def _norms(operator: FourierMultiplier, find: TripletFinder) -> Float[Array, " modes"]:
    def norm(matrix: Inexact[Array, "out in"]) -> Float[Array, ""]:
        return differentiable_norm(lx.MatrixLinearOperator(matrix), find)

    return jax.vmap(norm)(operator.matrices())


def _checked(operator: FourierMultiplier, state: PowerStateLike) -> PowerState:
    expected = operator.matrices().shape[:1]
    got = state.u.shape[:1] if isinstance(state, PowerState) else type(state).__name__
    if not isinstance(state, PowerState) or got != expected:
        raise ValueError(
            "expected a `PowerState` with an axis in front for the modes of the "
            f"Fourier multiplier, {expected}, got {got}. Make the state with "
            "`spectrax.init_power_state(operator)` for an operator of this shape."
        )
    return state
