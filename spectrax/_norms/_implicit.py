"""The linear solve behind the derivatives of singular vectors."""

import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Bool, Inexact, PRNGKeyArray, PyTree

from ._rows import random_rows, stop_gradient


_Vector = Inexact[Array, " n"]


def solve_on_complement(
    gram: Callable[[_Vector], _Vector],
    u: _Vector,
    rhs: _Vector,
    key: PRNGKeyArray,
) -> tuple[_Vector, Bool[Array, ""]]:
    """Solves `(I - gram) x = rhs` for `x` orthogonal to `u`, and says whether it could.

    `gram` is Hermitian with largest eigenvalue 1, belonging to `u`, to which `rhs` is
    orthogonal. If 1 is a repeated eigenvalue there is no solution: `x` is then zero and
    the flag false.
    """

    def projected(x: _Vector) -> _Vector:
        return x - u * jnp.vdot(u, x)

    def shifted(x: _Vector) -> _Vector:
        y = projected(x)
        # The last term makes the operator definite on the line of `u` too.
        return projected(y - gram(y)) + u * jnp.vdot(u, x)

    probe = projected(random_rows(key, 1, u.size, u.dtype)[0])
    simple = _is_solution(_solve(shifted, stop_gradient(probe)))
    # Decided on the primal values alone, and before the solve, so that the solve stays
    # linear in `rhs` and never sees a singular system.
    return _solve(shifted, jnp.where(simple, projected(rhs), 0)), simple


def _is_solution(x: _Vector) -> Bool[Array, ""]:
    x = jax.lax.stop_gradient(x)
    largest = 1 / (1e3 * float(jnp.finfo(x.dtype).eps))
    return jnp.all(jnp.isfinite(x)) & (jnp.max(jnp.abs(x)) < largest)


def _solve(function: Callable[[_Vector], _Vector], rhs: _Vector) -> _Vector:
    """Conjugate gradients; a complex Hermitian system is solved as a real one."""
    if not jnp.iscomplexobj(rhs):
        return _conjugate_gradients(function, rhs)

    def real_function(pair: PyTree) -> PyTree:
        y = function(jax.lax.complex(*pair))
        return y.real, y.imag

    real, imaginary = _conjugate_gradients(real_function, (rhs.real, rhs.imag))
    return jax.lax.complex(real, imaginary)


def _conjugate_gradients(function: Callable[[PyTree], PyTree], rhs: PyTree) -> PyTree:
    operator = lx.FunctionLinearOperator(
        function, jax.eval_shape(lambda: rhs), lx.positive_semidefinite_tag
    )
    eps = float(jnp.finfo(jax.tree.leaves(rhs)[0].dtype).eps)
    solver = _InUnits(lx.CG(rtol=10 * eps, atol=10 * eps))
    return lx.linear_solve(operator, rhs, solver, throw=False).value


@eqx.filter_jit
def _without_nan(
    solver: lx.CG, state: Any, vector: PyTree, options: dict[str, Any]
) -> tuple[PyTree, Any, Any]:
    """What the solver finds, infinite where it breaks down, as it does on a singular
    system. One program, of which `jax_debug_nans` sees no more than the end.
    """
    solution, result, stats = solver.compute(state, vector, options)
    given = jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(vector)])
    broken = ft.partial(jnp.where, jnp.all(given), jnp.inf)
    solution = jax.tree.map(
        lambda leaf: jnp.where(jnp.isnan(leaf), broken(leaf), leaf), solution
    )
    return solution, result, stats


class _InUnits(lx.AbstractLinearSolver[Any]):
    """A solver that sees right sides whose largest entry is 1: its absolute tolerance
    is then a relative one, and nothing that it squares overflows or vanishes.

    To JAX the solution stays linear in the right side, as that of any solver does.
    """

    solver: lx.CG

    def init(self, operator: lx.AbstractLinearOperator, options: dict[str, Any]) -> Any:
        return self.solver.init(operator, options)

    def compute(self, state: Any, vector: PyTree, options: dict[str, Any]) -> Any:
        leaves = jax.tree.leaves(vector)
        largest = jnp.max(jnp.stack([jnp.max(jnp.abs(leaf)) for leaf in leaves]))
        usable = (largest > 0) & jnp.isfinite(largest)
        unit = jnp.where(usable, largest, 1)
        scaled = jax.tree.map(lambda leaf: leaf / unit, vector)
        solution, result, stats = _without_nan(self.solver, state, scaled, options)
        return jax.tree.map(lambda leaf: leaf * unit, solution), result, stats

    def transpose(self, state: Any, options: dict[str, Any]) -> Any:
        return self.solver.transpose(state, options)

    def conj(self, state: Any, options: dict[str, Any]) -> Any:
        return self.solver.conj(state, options)

    def assume_full_rank(self) -> bool:
        return self.solver.assume_full_rank()
