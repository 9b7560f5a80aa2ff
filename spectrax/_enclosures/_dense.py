"""The enclosure of the norm of a matrix."""

import math

import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Inexact, Int, PRNGKeyArray

from .._linalg import eigh
from .._norms._rows import matmul, random_rows
from ._cholesky import eigenvalue_bound
from ._dense_form import as_real
from ._ends import Ends
from ._products import gram, product
from ._rounding import (
    any_nonzero,
    down,
    flushed_below,
    frobenius,
    gamma,
    power_of_two,
    unit_roundoff,
    up,
)


_BASIS_SIZE = 32


def enclose_matrix(
    matrix: Inexact[Array, "m n"],
    error: Float[Array, ""] | float,
    key: PRNGKeyArray,
    *,
    rtol: float,
    max_attempts: int,
) -> Ends:
    """Both ends for every matrix within `error` of the given one, in Frobenius norm."""
    real = as_real(matrix)
    if real.shape[0] < real.shape[1]:
        real = real.T
    largest = jnp.max(jnp.abs(real))
    finite = jnp.isfinite(largest)
    scale = power_of_two(jnp.where(finite, largest, 1))
    scaled = jnp.where(finite, real / scale, 0)
    square, square_error = gram(scaled)
    vector, bound = _certify(square, key, rtol, max_attempts)
    upper = jnp.minimum(jnp.sqrt(up(bound + square_error)), _cheap_upper(scaled))
    lower = jnp.sqrt(jnp.maximum(rayleigh_lower(square, vector) - square_error, 0))
    # Entries that were flushed to zero before they could be scaled.
    tiny = flushed_below(matrix.dtype) * math.sqrt(real.size)
    off = up(error + jnp.asarray(tiny, real.dtype)) / scale
    lower = down(jnp.maximum(down(lower) - up(off), 0)) * scale
    upper = up(up(upper) + up(off)) * scale
    lower = jnp.minimum(lower, jnp.finfo(real.dtype).max)
    upper = jnp.maximum(upper, jnp.finfo(real.dtype).tiny)
    zero = ~any_nonzero(matrix) & (jnp.asarray(error) == 0)
    upper = jnp.where(zero, 0, upper)
    return Ends(jnp.where(finite, lower, jnp.nan), jnp.where(finite, upper, jnp.nan))


def _certify(
    square: Float[Array, "n n"], key: PRNGKeyArray, rtol: float, max_attempts: int
) -> tuple[Float[Array, " n"], Float[Array, ""]]:
    """An approximate leading eigenvector, and an upper bound on the eigenvalue."""
    size = square.shape[0]
    u = unit_roundoff(square.dtype)
    margin = max(rtol / 20, 8 * math.sqrt(size) * u)
    basis_size = min(_BASIS_SIZE, size)

    def unfinished(carry: tuple[Array, Array, Array, Array]) -> Bool[Array, ""]:
        _, _, proven, attempt = carry
        return ~proven & (attempt < max_attempts)

    def attempt(
        carry: tuple[Array, Array, Array, Int[Array, ""]],
    ) -> tuple[Array, Array, Array, Int[Array, ""]]:
        vector, _, _, count = carry
        vector, value = _lanczos(square, vector, basis_size)
        # More room for the proof at each attempt after the second.
        room = margin * 2.0 ** jnp.maximum(count - 1, 0).astype(value.dtype)
        theta = jnp.maximum(value * (1 + room), u)
        bound, proven = eigenvalue_bound(square, theta)
        return vector, bound, proven, count + 1

    start = random_rows(key, 1, size, square.dtype)[0]
    unbounded = jnp.asarray(jnp.inf, square.dtype)
    nothing = start, unbounded, jnp.zeros((), bool), jnp.asarray(0)
    vector, bound, _, _ = lax.while_loop(unfinished, attempt, nothing)
    return vector, bound


def _lanczos(
    square: Float[Array, "n n"], start: Float[Array, " n"], size: int
) -> tuple[Float[Array, " n"], Float[Array, ""]]:
    """The leading Ritz pair of a Krylov space, its basis orthogonalised in full."""

    def extend(
        j: Int[Array, ""], carry: tuple[Array, Array, Array]
    ) -> tuple[Array, Array, Array]:
        basis, projection, vector = carry
        basis = basis.at[j].set(vector)
        image = matmul(square, vector[:, None])[:, 0]
        coefficients = basis @ image
        projection = projection.at[j].set(coefficients)
        rest = image - coefficients @ basis
        rest = rest - (basis @ rest) @ basis
        length = jnp.linalg.norm(rest)
        # What rounding leaves is no direction: the space is invariant.
        exhausted = length <= 16 * eps * jnp.linalg.norm(image)
        vector = jnp.where(exhausted, 0, rest / jnp.where(exhausted, 1, length))
        return basis, projection, vector

    n = square.shape[0]
    eps = float(jnp.finfo(square.dtype).eps)
    zeros = jnp.zeros((size, n), square.dtype), jnp.zeros((size, size), square.dtype)
    basis, projection, _ = lax.fori_loop(0, size, extend, (*zeros, start))
    # Row `j` holds the coefficients of the vectors up to `j`: the lower half.
    values, vectors = eigh(projection)
    vector = vectors[:, -1] @ basis
    length = jnp.linalg.norm(vector)
    return vector / jnp.where(length > 0, length, 1), values[-1]


def rayleigh_lower(
    square: Float[Array, "n n"], vector: Float[Array, " n"]
) -> Float[Array, ""]:
    """At most the largest eigenvalue: `v^T G v / |v|^2`, rounded down."""
    column = vector[:, None]
    image, image_error = product(square, column)
    quotient, quotient_error = product(column.T, image)
    length = frobenius(vector)
    numerator = quotient[0, 0] - up(quotient_error + length * image_error)
    return down(jnp.maximum(numerator, 0) / jnp.maximum(up(length**2), 0.5))


def _cheap_upper(matrix: Float[Array, "m n"]) -> Float[Array, ""]:
    """The Frobenius norm, or the root of the largest row sum times column sum."""
    sizes = jnp.abs(matrix)
    error = gamma(sum(matrix.shape), sizes.dtype)
    rows = jnp.max(jnp.sum(sizes, axis=1)) * (1 + error)
    columns = jnp.max(jnp.sum(sizes, axis=0)) * (1 + error)
    return jnp.minimum(frobenius(matrix), up(jnp.sqrt(up(rows * columns))))
