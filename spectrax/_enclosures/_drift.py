"""How far a weight has moved: a cheap bound on the norm of a difference."""

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jaxtyping import Array, Float, PyTree

from .._operators import FourierMultiplier, LatticeConvolution, Operator
from ._dense_form import as_real
from ._geometry import axes_of, grid_of
from ._rounding import (
    any_nonzero,
    flushed_below,
    frobenius,
    power_of_two,
    up,
    working_dtype,
)


def arrays_of(operator: Operator) -> PyTree[Array]:
    """The arrays of an operator, as data that a state can carry."""
    return eqx.filter(operator, eqx.is_inexact_array)


def drift_bound(operator: Operator, reference: PyTree[Array]) -> Float[Array, ""]:
    """An upper bound on the norm of the operator less what it was."""
    now = jtu.tree_leaves(arrays_of(operator))
    before = jtu.tree_leaves(reference)
    moves = [_distance(a, b) for a, b in zip(now, before, strict=True)]
    factor = _factor(operator)
    if factor is None:
        # Nothing is known of how the operator depends on its arrays.
        moved = jnp.stack(moves) > 0
        return jnp.where(jnp.any(moved), jnp.inf, 0.0).astype(working_dtype())
    (move,) = moves
    return jnp.where(move > 0, up(move * factor), 0)


def _factor(operator: Operator) -> float | None:
    """The norm is at most so many times the Frobenius norm of the one array."""
    if isinstance(operator, lx.MatrixLinearOperator):
        return 1.0
    if isinstance(operator, LatticeConvolution):
        # The symbol is a sum of one matrix for each tap.
        return operator.gain * _root(operator.kernel[0, 0, 0].size)
    function = getattr(operator, "fn", None)
    if isinstance(function, FourierMultiplier):
        return 1.0
    if isinstance(function, eqx.nn.Conv | eqx.nn.ConvTranspose):
        return grid_of(axes_of(function, operator))[1] * _root(
            function.weight[0, 0].size
        )
    return None


def _root(count: int) -> float:
    return count**0.5 * (1 + 1e-12)


def _distance(a: Array, b: Array) -> Float[Array, ""]:
    """The Frobenius norm of `a - b`, rounded up; zero only if they are equal."""
    flat_a, flat_b = (as_real(x.reshape(1, -1)) for x in (a, b))
    scale = power_of_two(jnp.max(jnp.abs(flat_a)) + jnp.max(jnp.abs(flat_b)))
    difference = flat_a / scale - flat_b / scale
    lost = 2 * flushed_below(a.dtype) * a.size
    moved = up(frobenius(difference) * scale) + lost
    return jnp.where(any_nonzero(difference), moved, 0)
