"""Decompositions of small matrices, for use under `vmap` too.

On the CPU a batched LAPACK call of JAX waits in the thread pool for the pool's own
threads. Two of them at a time, as for two stacks of layers in one model, can block each
other for ever. Under `vmap` these therefore take one matrix after the other there, or
call no LAPACK. What else goes wrong when such a call is spread over the pool:
https://github.com/jax-ml/jax/issues/39292.

None of those with LAPACK has a derivative: that of a decomposition is not finite where
values repeat, and whatever here is differentiable has a rule of its own.
"""

import functools as ft
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.lax as lax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float, Inexact

from ._custom_types import AnyArray
from ._namespace import namespace


def _one_at_a_time_on_cpu(function: Callable[[Array], Any]) -> Callable[[Array], Any]:
    """One matrix after the other under `vmap` on a CPU, and an error if differentiated,
    also because JAX could not transpose what `custom_vmap` makes.
    """
    call = custom_vmap(function)

    @call.def_vmap
    def _(axis_size: int, in_batched: Sequence[bool], matrices: Array) -> Any:
        del axis_size, in_batched  # There is one argument, and so it is batched.
        result = lax.platform_dependent(
            matrices,
            cpu=lambda matrices: lax.map(call, matrices),
            default=jax.vmap(function),
        )
        return result, jax.tree.map(lambda _: True, result)

    @jax.custom_jvp
    @ft.wraps(function)
    def undifferentiable(matrix: Array) -> Any:
        return call(matrix)

    @undifferentiable.defjvp
    def _(primals: tuple[Array], tangents: tuple[Array]) -> Any:
        del primals, tangents
        raise TypeError(
            f"expected no derivative of `spectrax._linalg.{function.__name__}`, which "
            "has none; one was asked for. Apply `jax.lax.stop_gradient` to its "
            "argument, or differentiate `spectrax.spectral_norm` or "
            "`spectrax.singular_value`."
        )

    return undifferentiable


@_one_at_a_time_on_cpu
def cholesky(matrix: Inexact[Array, "n n"]) -> Inexact[Array, "n n"]:
    """The lower factor; NaN if `matrix`, of which the lower triangle is read, is not
    positive definite.
    """
    return lax.linalg.cholesky(matrix, symmetrize_input=False)


@_one_at_a_time_on_cpu
def inverse_cholesky(matrix: Inexact[Array, "n n"]) -> Inexact[Array, "n n"]:
    """The inverse of the lower factor."""
    factor = lax.linalg.cholesky(matrix, symmetrize_input=False)
    identity = jnp.eye(matrix.shape[0], dtype=matrix.dtype)
    return lax.linalg.triangular_solve(factor, identity, left_side=True, lower=True)


@_one_at_a_time_on_cpu
def eigh(
    matrix: Inexact[Array, "n n"],
) -> tuple[Float[Array, " n"], Inexact[Array, "n n"]]:
    """Eigenvalues in increasing order, and eigenvectors as columns. The lower triangle
    is read.
    """
    values, vectors = jnp.linalg.eigh(matrix, symmetrize_input=False)
    return values, vectors


@_one_at_a_time_on_cpu
def svd(
    matrix: Inexact[Array, "m n"],
) -> tuple[Inexact[Array, "m r"], Float[Array, " r"], Inexact[Array, "r n"]]:
    """The thin decomposition `u, sigma, v^H`, with `sigma` decreasing."""
    u, sigma, vh = jnp.linalg.svd(matrix, full_matrices=False)
    return u, sigma, vh


def solve(
    matrix: Float[AnyArray, "*batch n n"], right: Float[AnyArray, "*batch n"]
) -> tuple[Float[AnyArray, "*batch n"], Float[AnyArray, "*batch n"]]:
    """The solution of a small linear system, and the pivots, by Gaussian elimination in
    the order of the rows, without LAPACK: differentiable, also of NumPy's arrays.

    A symmetric matrix is positive definite if and only if all pivots are positive, and
    then the order is a good one. For others the solution may be inaccurate, or not
    finite. Where a pivot is zero its row is left as it is: an axis of which neither
    the matrix nor the right side knows anything has the solution zero.
    """
    xp = namespace(matrix)
    size = right.shape[-1]
    rows = [matrix[..., i, :] for i in range(size)]
    # Apart, so that what is linear in the right side is seen to be.
    values = [right[..., i] for i in range(size)]
    pivots = []
    for i in range(size):
        pivot = rows[i][..., i]
        safe = xp.where(pivot == 0, 1, pivot)
        rows[i], values[i] = rows[i] / safe[..., None], values[i] / safe
        for j in range(size):
            if j != i:
                factor = rows[j][..., i]
                rows[j] = rows[j] - factor[..., None] * rows[i]
                values[j] = values[j] - factor * values[i]
        pivots.append(pivot)
    return xp.stack(values, axis=-1), xp.stack(pivots, axis=-1)
