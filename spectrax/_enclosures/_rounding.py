"""What rounding can do, and how to stay on the safe side of it.

The standard model: an operation on floating-point numbers returns the exact result
times `1 + d`, `|d| <= u`, with `u` the unit roundoff, half of the machine epsilon; a
result below the smallest normal number may be flushed to zero. A sum of `k` products is
then off by at most `gamma(k) = k u / (1 - k u)` times the sum of their absolute values,
in whatever order they are added (Higham 2002, section 3.1).

Everything here is for values scaled to about 1, so that what is flushed to zero, at
most `k * 2^-126` in a sum of `k` products, is far below one `u` of the largest entries.
"""

import math

import jax
import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Inexact

from .._custom_types import DType


def working_dtype() -> DType:
    """float64 if it is enabled, otherwise float32."""
    return jnp.float64 if jax.config.read("jax_enable_x64") else jnp.float32


def real_parts(values: Inexact[Array, "..."]) -> list[Float[Array, "..."]]:
    """The real part and, of complex values, the imaginary one, in that dtype."""
    parts = [values]
    if jnp.iscomplexobj(values):
        parts = [jnp.real(values), jnp.imag(values)]
    return [part.astype(working_dtype()) for part in parts]


def unit_roundoff(dtype: DType) -> float:
    """The largest relative error of one rounding."""
    return float(jnp.finfo(dtype).eps) / 2


def gamma(count: int, dtype: DType) -> float:
    """The relative error of a sum of `count` products; infinite if unbounded."""
    error = count * unit_roundoff(dtype)
    # A little more than `error / (1 - error)`, as it is itself computed.
    return math.inf if error >= 0.5 else error / (1 - error) * (1 + 1e-12)


def up(
    value: Float[Array, "*shape"] | float, roundings: int = 16
) -> Float[Array, "*shape"]:
    """At least the exact value of a nonnegative expression of so many roundings."""
    value = jnp.asarray(value)
    return value * (1 + 2 * roundings * unit_roundoff(value.dtype))


def down(value: Float[Array, "*shape"], roundings: int = 16) -> Float[Array, "*shape"]:
    """The other way: at most the exact value."""
    return value * (1 - 2 * roundings * unit_roundoff(value.dtype))


def frobenius(values: Float[Array, "..."]) -> Float[Array, ""]:
    """An upper bound on the root of the sum of squares of all entries."""
    total, error = _sum_of_squares(values)
    # Squares that were flushed to zero.
    lost = math.sqrt(values.size) * math.sqrt(float(jnp.finfo(values.dtype).tiny))
    return up(jnp.sqrt(total) * (1 + error) + lost)


def frobenius_lower(values: Float[Array, "..."]) -> Float[Array, ""]:
    """A lower bound on it."""
    total, error = _sum_of_squares(values)
    return down(jnp.sqrt(total) * (1 - error))


def _sum_of_squares(values: Float[Array, "..."]) -> tuple[Float[Array, ""], float]:
    """The sum, and a bound on its relative error.

    Summed along the last axis first, and then over the rest: the barrier keeps the
    stages apart, so that the error grows with their lengths and not with the product.
    """
    if values.ndim == 1:
        values = _folded(values)
    partial = jnp.sum(jnp.square(values), axis=-1)
    total = jnp.sum(lax.optimization_barrier(partial))
    return total, gamma(values.shape[-1] + partial.size + 2, values.dtype)


def _folded(values: Float[Array, " n"]) -> Float[Array, "_ _"]:
    """The entries of a vector in about as many rows as columns, with zeros after."""
    width = max(1, math.isqrt(values.size))
    return jnp.pad(values, (0, -values.size % width)).reshape(-1, width)


def power_of_two(value: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The power of two at or below a positive value, such that its inverse is normal.

    For zero, values below the smallest normal number, infinity and NaN: the nearest
    power of two that is allowed.
    """
    finfo = jnp.finfo(value.dtype)
    integer = jnp.uint32 if finfo.bits == 32 else jnp.uint64
    bits = lax.bitcast_convert_type(value, integer)
    exponent = (bits >> finfo.nmant) & jnp.asarray(2**finfo.nexp - 1, integer)
    largest = jnp.asarray(2**finfo.nexp - 3, integer)
    exponent = jnp.clip(exponent, jnp.asarray(1, integer), largest)
    return lax.bitcast_convert_type(exponent << finfo.nmant, value.dtype)


def flushed_below(dtype: DType) -> float:
    """Entries of this dtype that may be taken for zero have smaller absolute values."""
    # Subnormal numbers of float16 are normal ones of float32.
    return 0.0 if dtype == jnp.float16 else float(jnp.finfo(dtype).tiny)


def any_nonzero(values: Inexact[Array, "..."]) -> Bool[Array, ""]:
    """Whether any entry is nonzero, those below the smallest normal number included,
    which comparisons and arithmetic may take for zero.
    """
    if jnp.iscomplexobj(values):
        values = jnp.stack([jnp.real(values), jnp.imag(values)])
    # Byte by byte: a compiler may turn a test of the whole word into a comparison with
    # 0.0. The sign, in the last byte, does not count.
    parts = lax.bitcast_convert_type(values, jnp.uint8)
    mask = jnp.full(parts.shape[-1], 0xFF, jnp.uint8).at[-1].set(0x7F)
    return jnp.any(parts & mask.reshape((1,) * values.ndim + (-1,)) != 0)
