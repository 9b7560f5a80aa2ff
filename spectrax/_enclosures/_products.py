"""Products of matrices together with a bound on their error.

In float64 the a-priori bound `gamma(k) |A| |B|` is small enough. In float32 it is not,
and the factors are split, `A = A1 + A2`, into a high part of so few bits that `A1 B1`
is exact in float32, whatever the order of its sums (Ozaki et al. 2012), and a rest.
Only the products with a rest are rounded, and they are smaller by about `2^-7`.

All errors are bounds on the Frobenius norm of the difference to the exact product.
"""

import math

import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._custom_types import DType
from .._norms._rows import matmul
from ._rounding import frobenius, gamma, power_of_two, unit_roundoff, up


_Error = Float[Array, ""]

# Contractions are cut to this length, so that high parts have 7 bits at least.
_CHUNK = 1024


def splits(dtype: DType) -> bool:
    """Whether products in this dtype have to be split for a useful bound."""
    return jnp.finfo(dtype).bits < 64


def product(
    a: Float[Array, "m k"], b: Float[Array, "k n"]
) -> tuple[Float[Array, "m n"], _Error]:
    """`a @ b` and a bound on its error. Entries are to be at most about 1."""
    if not splits(a.dtype):
        error = gamma(a.shape[1] + 2, a.dtype) * frobenius(a) * frobenius(b)
        return matmul(a, b), up(error)
    high, low = split(a, 1)
    b_high, b_low = split(b, 0)
    exact, sum_error = _high_product(high, b_high)
    rest = matmul(
        jnp.concatenate([high, low], axis=1), jnp.concatenate([b_low, b], axis=0)
    )
    rest_error = gamma(2 * a.shape[1] + 2, a.dtype) * (
        frobenius(high) * frobenius(b_low) + frobenius(low) * frobenius(b)
    )
    value = exact + rest
    last = 2 * unit_roundoff(a.dtype) * frobenius(value)
    return value, up(sum_error + rest_error + last)


def gram(a: Float[Array, "k n"]) -> tuple[Float[Array, "n n"], _Error]:
    """`a.T @ a`, exactly symmetric, and a bound on its error."""
    rows = a.shape[0]
    if not splits(a.dtype):
        value = matmul(a.T, a)
        error = up(gamma(rows + 2, a.dtype) * frobenius(a) ** 2)
        # The bound on the error is symmetric entry by entry, so that either triangle
        # may stand for both.
        return jnp.tril(value) + jnp.tril(value, -1).T, error
    chunks = math.ceil(rows / _CHUNK)
    if chunks == 1:
        return _gram_chunk(a)
    a = jnp.pad(a, ((0, chunks * _CHUNK - rows), (0, 0)))

    def add(i: Array, total: tuple[Array, Array]) -> tuple[Array, Array]:
        value, error = _gram_chunk(lax.dynamic_slice_in_dim(a, i * _CHUNK, _CHUNK))
        return total[0] + value, up(total[1] + error)

    columns = a.shape[1]
    zero = jnp.zeros((columns, columns), a.dtype), jnp.zeros((), a.dtype)
    value, error = lax.fori_loop(0, chunks, add, zero)
    sum_error = gamma(chunks + 2, a.dtype) * frobenius(a) ** 2
    return value, up(error + sum_error)


def _gram_chunk(a: Float[Array, "k n"]) -> tuple[Float[Array, "n n"], _Error]:
    # a.T a = high.T high + middle.T low + low.T middle, with middle = high + low / 2.
    high, low = split(a, 0)
    middle = high + low / 2
    half = matmul(middle.T, low)
    value = matmul(high.T, high) + (half + half.T)
    rest_error = gamma(a.shape[0] + 4, a.dtype) * frobenius(middle) * frobenius(low)
    last = 2 * unit_roundoff(a.dtype) * frobenius(value)
    return value, up(2 * rest_error + last)


def split(
    a: Float[Array, "m k"], axis: int
) -> tuple[Float[Array, "m k"], Float[Array, "m k"]]:
    """High and low parts, `a = high + low` exactly, for a contraction over `axis`.

    The entries of `high` are multiples of a power of two, one for each slice along
    `axis`, and those multiples are of at most `2^bits`, so that `_CHUNK` products of
    two of them add up to at most `2^24`, within which all integers are exact.
    """
    length = min(a.shape[axis], _CHUNK)
    bits = (jnp.finfo(a.dtype).nmant + 1 - math.ceil(math.log2(length))) // 2
    largest = jnp.max(jnp.abs(a), axis=axis, keepdims=True)
    quantum = power_of_two(largest) * 2.0 ** (1 - bits)
    # Products of two quanta must not be flushed; what is below this is left to the
    # low part.
    quantum = jnp.maximum(quantum, 2.0**-60)
    high = jnp.round(a / quantum) * quantum
    return high, a - high


def _high_product(
    a: Float[Array, "m k"], b: Float[Array, "k n"]
) -> tuple[Float[Array, "m n"], _Error]:
    """The product of two high parts: exact in each chunk, the sum of chunks rounded."""
    starts = range(0, a.shape[1], _CHUNK)
    parts = [matmul(a[:, i : i + _CHUNK], b[i : i + _CHUNK]) for i in starts]
    if len(parts) == 1:
        return parts[0], jnp.zeros((), a.dtype)
    error = gamma(len(parts) + 2, a.dtype) * frobenius(a) * frobenius(b)
    return sum(parts[1:], start=parts[0]), error
