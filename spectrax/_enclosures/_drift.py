"""How far a weight has moved: a cheap bound on the norm of a difference."""

import functools as ft

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jaxtyping import Array, Float, PyTree

from .._operators import Operator
from ._dense_form import as_real
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
    factor = perturbation_factor(operator)
    if factor is None:
        # Nothing is known of how the operator depends on its arrays.
        moved = jnp.stack(moves) > 0
        return jnp.where(jnp.any(moved), jnp.inf, 0.0).astype(working_dtype())
    move = ft.reduce(lambda a, b: up(a + b), moves)
    return jnp.where(move > 0, up(move * factor), 0)


@ft.singledispatch
def perturbation_factor(operator: Operator) -> float | None:
    """How far a change of an operator's arrays moves it: if they change by `d` in
    Frobenius norm (of several, the sum), the norm of the change is at most so many
    times `d`.

    **Kind:** an upper bound, rounding included.

    **Arguments:**

    - `operator`: of any kind; it has to be linear in its arrays. By default nothing is
        known.

    **Returns:** the factor, or `None` where there is none or none is known.

    **Raises:** nothing.
    """
    del operator
    return None


@perturbation_factor.register
def _(operator: lx.MatrixLinearOperator) -> float:
    del operator
    return 1.0


def root_up(count: int) -> float:
    """Of a count, at least."""
    return count**0.5 * (1 + 1e-12)


def _distance(a: Array, b: Array) -> Float[Array, ""]:
    """The Frobenius norm of `a - b`, rounded up; zero only if they are equal."""
    flat_a, flat_b = (as_real(x.reshape(1, -1)) for x in (a, b))
    scale = power_of_two(jnp.max(jnp.abs(flat_a)) + jnp.max(jnp.abs(flat_b)))
    difference = flat_a / scale - flat_b / scale
    lost = 2 * flushed_below(a.dtype) * a.size
    moved = up(frobenius(difference) * scale) + lost
    return jnp.where(any_nonzero(difference), moved, 0)
