"""A lower and an upper bound on one number, and what can be done with the pair."""

from collections.abc import Sequence

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._rounding import down, up


class Ends(eqx.Module):
    """`lower <= truth <= upper`, all nonnegative.

    - `lower`, `upper`: real scalars, NaN if anything is not finite.
    """

    lower: Float[Array, ""]
    upper: Float[Array, ""]

    def times(self, factor: Float[Array, ""] | float) -> "Ends":
        """Both ends times a nonnegative number, rounded outward."""
        factor = jnp.asarray(factor, self.upper.dtype)
        # Zero times infinity is zero here, and no product vanishes by underflow.
        vanishes = (factor == 0) | (self.upper == 0)
        vanishes = vanishes & ~jnp.isnan(factor) & ~jnp.isnan(self.upper)
        tiny = jnp.finfo(factor.dtype).tiny
        upper = jnp.maximum(up(self.upper * factor, 4), tiny)
        lower = down(self.lower * factor, 4)
        # Below the smallest normal number relative errors are large.
        lower = jnp.where(lower < 2 * tiny, 0, lower)
        lower = jnp.minimum(lower, jnp.finfo(factor.dtype).max)
        lower = jnp.where(vanishes, 0, lower)
        return Ends(lower, jnp.where(vanishes, 0, upper))


def intersection(parts: Sequence[Ends]) -> Ends:
    """What is known of a number if all of the given is."""
    lowers, uppers = zip(*((part.lower, part.upper) for part in parts), strict=True)
    return Ends(jnp.max(jnp.stack(lowers)), jnp.min(jnp.stack(uppers)))


def largest(parts: Ends) -> Ends:
    """The largest of many numbers, stacked along the first axis."""
    return Ends(jnp.max(parts.lower), jnp.max(parts.upper))
