"""The small linear algebra on blocks of vectors kept as rows.

Everything here stays finite where the vectors are finite, whatever their scale: rows
are divided by their largest entry before anything is squared.
"""

from typing import TypeVar

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Inexact, PRNGKeyArray

from .._custom_types import DType, Rows
from .._linalg import inverse_cholesky


_Tree = TypeVar("_Tree")


def _is_differentiable(x: object) -> bool:
    return isinstance(x, jax.Array) and eqx.is_inexact_array(x)


def stop_gradient(tree: _Tree) -> _Tree:
    """`lax.stop_gradient` on the arrays of any pytree; NumPy's have no derivative."""
    arrays, rest = eqx.partition(tree, _is_differentiable)
    return eqx.combine(lax.stop_gradient(arrays), rest)


def matmul(
    a: Inexact[Array, "*batch a b"], b: Inexact[Array, "*batch b c"]
) -> Inexact[Array, "*batch a c"]:
    """A product that no accelerator rounds to fewer bits than its dtype has."""
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def inner(a: Inexact[Array, "p n"], b: Inexact[Array, "q n"]) -> Inexact[Array, "p q"]:
    """`sum_k a_ik conj(b_jk)`: each row of `a` against each row of `b`."""
    return matmul(a, jnp.conj(b).T)


def normalize_rows(rows: Rows) -> tuple[Rows, Float[Array, " block"]]:
    """Rows of unit length, and the lengths they had. A zero row stays zero."""
    largest = jnp.max(jnp.abs(rows), axis=1)
    scale = jnp.where(largest > 0, largest, 1)
    scaled = rows / scale[:, None].astype(rows.dtype)
    # At least 1 for a nonzero row, so that no division can overflow.
    length = jnp.sqrt(jnp.sum(jnp.abs(scaled) ** 2, axis=1))
    divisor = jnp.where(length > 0, length, 1)[:, None].astype(rows.dtype)
    return scaled / divisor, scale * length


def scale_down(rows: Rows) -> tuple[Rows, Float[Array, ""]]:
    """The whole block divided by its largest absolute value, and that value."""
    largest = jnp.max(jnp.abs(rows))
    return rows / jnp.where(largest > 0, largest, 1).astype(rows.dtype), largest


def unit_rows(rows: Rows) -> tuple[Rows, Float[Array, " block"]]:
    """`normalize_rows` for rows whose squares neither overflow nor, if the row is to
    count, underflow: those of a block after `scale_down`. One pass less.
    """
    squares = jnp.real(
        jnp.einsum("ij,ij->i", rows, jnp.conj(rows), precision="highest")
    )
    length = jnp.sqrt(squares)
    divisor = jnp.where(length > 0, length, 1)[:, None].astype(rows.dtype)
    return rows / divisor, length


def orthonormalize(rows: Rows) -> Rows:
    """An orthonormal basis of the rows' span, by Cholesky on their Gram matrix.

    Expects rows of unit or zero length. A tiny multiple of the identity is added to the
    Gram matrix, so that a row which depends on those before it becomes (almost) zero
    instead of noise.
    """
    size = rows.shape[0]
    ridge = 10 * size * float(jnp.finfo(rows.dtype).eps)
    gram = inner(rows, rows) + ridge * jnp.eye(size, dtype=rows.dtype)
    # The small factor is inverted, as a triangular solve against long rows starts the
    # threads of LAPACK, which on a busy machine costs a hundred times the product.
    inverse = inverse_cholesky(gram)
    # `inverse @ rows` has the Gram matrix `I - ridge * slack`; half of that
    # added makes them orthonormal again, where they are not nearly dependent.
    slack = inner(inverse, inverse)
    return matmul(inverse + ridge / 2 * matmul(slack, inverse), rows)


def random_rows(key: PRNGKeyArray, block: int, size: int, dtype: DType) -> Rows:
    """Unit vectors, uniformly distributed on the (complex) sphere."""
    return normalize_rows(jr.normal(key, (block, size), dtype))[0]


def phase_of(numbers: Inexact[Array, "*shape"]) -> Inexact[Array, "*shape"]:
    """Each number divided by its absolute value; 1 for zero."""
    size = jnp.abs(numbers)
    safe = jnp.where(size > 0, size, 1).astype(numbers.dtype)
    return jnp.where(size > 0, numbers / safe, 1)


def keep_where(
    condition: Array, new: Inexact[Array, "block size"], old: Rows
) -> Inexact[Array, "block size"]:
    """Chooses row by row."""
    return jax.vmap(jnp.where)(condition, new, old)


def largest_of(values: Float[Array, " n"]) -> Float[Array, ""]:
    """The largest entry, NaN if there is one. Its derivative is that of one entry.

    The derivative of `jnp.max` compares the entries with the maximum. If the compiler
    computes them a second time for that, and rounds otherwise, none of them is equal,
    and the derivative is 0 / 0.
    """
    return values[jnp.argmax(lax.stop_gradient(values))]
