"""Pooling with a known Lipschitz constant."""

import math
from fractions import Fraction

import equinox as eqx
from jaxtyping import Array, Float, PRNGKeyArray

from ._lipschitz import (
    lipschitz_constant,
    register_lipschitz_constant,
    rounded_root,
)


class ScaledPool(eqx.Module):
    """Average or maximum pooling divided by its Lipschitz constant.

    In the 2-norm pooling has these constants, over all sizes of the input, with windows
    of `k` entries at every `s`-th place; for several axes they are multiplied:

    - Maximum: `sqrt(ceil(k / s))`, as an entry can be the largest of all windows that
        it is in. 1 if they do not overlap.
    - Average: `sqrt(k + 2 sum_{0 < m s < k} (k - m s)) / k`, from the lengths of the
        overlaps of windows. `1 / sqrt(k)` if they do not overlap: by as much a
        constant input becomes shorter, and this layer does not make it so.

    Padding, with zeros for averages and `-inf` for maxima, and `use_ceil` do not raise
    them.

    **Lipschitz constant:** 1, exactly, in the 2-norm over all sizes of the input.
    `spectrax.nn.lipschitz_constant(pool)` is that of the pool itself.

    **Arguments:**

    - `pool`: an `equinox.nn.AvgPool1d/2d/3d` or `equinox.nn.MaxPool1d/2d/3d`.

    **Raises:** `TypeError` for another layer, `ValueError` if a stride is below 1.

    !!! Example

        ```python
        import equinox as eqx
        import jax
        import spectrax

        pool = spectrax.nn.ScaledPool(eqx.nn.AvgPool2d(2, stride=2))
        y = pool(jax.numpy.ones((3, 8, 8)))  # all 2, and as long as the input
        ```
    """

    pool: eqx.nn.Pool

    def __init__(self, pool: eqx.nn.Pool):
        if not isinstance(pool, _AVERAGES + _MAXIMA):
            raise TypeError(
                "expected an average or maximum pool of `equinox.nn` with windows of "
                f"one size, got {type(pool).__name__}."
            )
        lipschitz_constant(pool)
        self.pool = pool

    def __call__(
        self, x: Float[Array, "channels ..."], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "channels ..."]:
        """**Arguments:**

        - `x`: an array of shape `[channels, *sizes]`.
        - `key`: not used; so that it can stand in `equinox.nn.Sequential`.

        **Returns:** an array of shape `[channels, *smaller_sizes]`.
        """
        del key
        return self.pool(x) / lipschitz_constant(self.pool)


def _of_maximum(pool: eqx.nn.Pool) -> float:
    """Each entry is in at most so many windows, and moves each by its own change."""
    windows = [math.ceil(Fraction(k, s)) for k, s in _windows(pool)]
    return rounded_root(Fraction(math.prod(windows)))


def _of_average(pool: eqx.nn.Pool) -> float:
    """With `A` the pool along one axis, `A A^T` is a Toeplitz matrix of the lengths of
    overlaps over `k^2`, which are not negative: the supremum of its norms over all
    sizes is their sum.
    """
    square = Fraction(1)
    for k, s in _windows(pool):
        overlaps = [k - m for m in range(s, k, s)]
        square *= Fraction(k + 2 * sum(overlaps), k * k)
    return rounded_root(square)


def _windows(pool: eqx.nn.Pool) -> list[tuple[int, int]]:
    """Size and stride along each axis."""
    if min(*pool.stride, *pool.kernel_size) < 1:
        raise ValueError(
            "expected windows and strides of at least 1, got "
            f"kernel_size={pool.kernel_size} and stride={pool.stride}."
        )
    return list(zip(pool.kernel_size, pool.stride, strict=True))


_AVERAGES = (eqx.nn.AvgPool1d, eqx.nn.AvgPool2d, eqx.nn.AvgPool3d)
_MAXIMA = (eqx.nn.MaxPool1d, eqx.nn.MaxPool2d, eqx.nn.MaxPool3d)
for _average, _maximum in zip(_AVERAGES, _MAXIMA, strict=True):
    register_lipschitz_constant(_average, _of_average)
    register_lipschitz_constant(_maximum, _of_maximum)
register_lipschitz_constant(ScaledPool, 1.0)
