"""Decompositions of small matrices, for use under `vmap` too.

On the CPU a batched LAPACK call of JAX waits in the thread pool for the pool's own
threads. Two of them at a time, as for two stacks of layers in one model, can block each
other for ever. Under `vmap` these therefore take one matrix after the other there.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.lax as lax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float, Inexact


def _one_at_a_time_on_cpu(function: Callable[[Array], Any]) -> Callable[[Array], Any]:
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

    # Without derivatives, which `custom_vmap` could not transpose.
    return lambda matrix: call(lax.stop_gradient(matrix))


@_one_at_a_time_on_cpu
def cholesky(matrix: Inexact[Array, "n n"]) -> Inexact[Array, "n n"]:
    """The lower factor; NaN if `matrix`, of which the lower triangle is read, is not
    positive definite. Its derivative counts as zero, as that of all of these.
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
