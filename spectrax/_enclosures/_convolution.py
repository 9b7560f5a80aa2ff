"""The enclosure of the norm of a convolution, of one input size or of all."""

import math

import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact

from .._operators import Axis, LatticeConvolution
from ._dense import rayleigh_lower
from ._ends import Ends, largest
from ._geometry import grid_of
from ._gram import gram_iteration, real_form
from ._rounding import any_nonzero, down, flushed_below, up
from ._symbols import correlate, Grid, squared_symbols, SquaredSymbols


# Squarings: the Frobenius norm of a power of order 128 exceeds the eigenvalue by its
# root of that order, a few 1e-4 for the spectra of Gaussian kernels.
_STEPS = 6
# Entries of the matrices that are worked on at once, such that they stay in the cache.
_CHUNK_ENTRIES = 2**18
# Grids on which a squaring takes no more operations are tried with every shift.
_FEW_OPERATIONS = 2**25
# Frequencies that a grid for all input sizes may have.
MOST_POINTS = 2**13


def enclose_lattice(operator: LatticeConvolution, *, rtol: float) -> Ends:
    """The supremum over all input sizes.

    Between the points of a grid `sigma(F(w))` exceeds its largest value there by a
    factor of `1 / cos(pi (k - 1) / (2 N))` on each axis at most. Let `w` be where it is
    largest, with singular vectors `u` and `v`; then `Re(u^H F v)`, apart from a phase,
    is a trigonometric polynomial of degree `(k - 1) / 2` at its maximum, and falls off
    from there no faster than a cosine of that degree (M. Riesz 1914).
    """
    taps = operator.kernel.shape[3:]
    counts = _fine_enough(taps, rtol / 2)
    grid = Grid(counts, (False,) * len(taps), (1,) * len(taps))
    found = _on_grids(operator.kernel, [grid])
    between = math.prod(
        1 / math.cos(math.pi * (k - 1) / (2 * n))
        for k, n in zip(taps, counts, strict=True)
    )
    factor = operator.gain * between * (1 + 1e-12)
    # Any frequency of the lattice is nearly reached by inputs large enough.
    return Ends(found.lower, found.times(factor).upper)


def enclose_correlation(
    folded: LatticeConvolution, axes: tuple[Axis, ...]
) -> Float[Array, ""]:
    """An upper bound at one input size; `folded` is the same map on the lattice."""
    grid, factor = grid_of(axes)
    # Every shift is valid where one is; for small inputs they differ most.
    channels = min(folded.kernel.shape[1:3])
    few = math.prod(grid.count) * channels**3 <= _FEW_OPERATIONS
    grids = grid.all_shifts() if few else [grid.even()]
    return _on_grids(folded.kernel, grids).times(factor * (1 + 1e-12)).upper


def _on_grids(kernel: Inexact[Array, "groups out in *taps"], grids: list[Grid]) -> Ends:
    """The largest `sigma(F(w))` over a grid, and over the groups. Of several grids of
    one size the upper end is that of the best.
    """
    return largest(lax.map(lambda group: _group_on_grids(group, grids), kernel))


def _group_on_grids(kernel: Inexact[Array, "out in *taps"], grids: list[Grid]) -> Ends:
    finite = jnp.all(jnp.isfinite(kernel))
    kernel = jnp.where(finite, kernel, 0)
    correlations = correlate(kernel)
    symmetric = not jnp.iscomplexobj(kernel)
    symbols = squared_symbols(correlations, grids, symmetric=symmetric)
    lowers, uppers = lax.map(
        lambda weights: _largest_eigenvalue(symbols, weights), symbols.weights
    )
    ends = Ends(jnp.sqrt(jnp.max(lowers)), up(jnp.sqrt(jnp.min(uppers))))
    # Taps that were flushed to zero before they could be scaled.
    count = math.prod(kernel.shape[2:])
    tiny = flushed_below(kernel.dtype) * count
    tiny *= math.sqrt(kernel.shape[0] * kernel.shape[1])
    dtype = ends.upper.dtype
    off = up(jnp.asarray(tiny, dtype)) / correlations.scale
    ends = Ends(jnp.maximum(down(ends.lower) - off, 0), up(ends.upper + off))
    ends = ends.times(correlations.scale)
    upper = jnp.maximum(ends.upper, jnp.finfo(dtype).tiny)
    upper = jnp.where(any_nonzero(kernel), upper, 0)
    lower = jnp.minimum(ends.lower, jnp.finfo(dtype).max)
    return Ends(jnp.where(finite, lower, jnp.nan), jnp.where(finite, upper, jnp.nan))


def _largest_eigenvalue(
    symbols: SquaredSymbols, weights: Float[Array, "points terms"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Bounds on the largest eigenvalue over a grid, a few of its points at a time."""
    points, size = weights.shape[0], symbols.matrices.shape[-1]
    chunk = min(points, max(1, _CHUNK_ENTRIES // size**2))
    fill = -points % chunk
    weights = jnp.concatenate([weights, weights[:fill]])

    def best_of(weights: Array) -> tuple[Array, Array, Array]:
        bounds, powers = gram_iteration(symbols.at(weights), _STEPS)
        best = jnp.argmax(bounds)
        return bounds[best], weights[best], _longest_column(powers[best])

    chunks = weights.reshape(-1, chunk, weights.shape[1])
    bounds, rows, columns = lax.map(best_of, chunks)
    best = jnp.argmax(bounds)
    matrix = real_form(symbols.at(rows[best][None])[0])
    lower = rayleigh_lower(matrix, columns[best]) - symbols.error
    return jnp.maximum(lower, 0), up(bounds[best] + symbols.error)


def _longest_column(power: Float[Array, "n n"]) -> Float[Array, " _"]:
    """Close to the leading eigenvector, as a high power has nearly rank one. Of unit
    length, up to rounding.
    """
    real = real_form(power)
    column = real[:, jnp.argmax(jnp.sum(jnp.square(real), axis=0))]
    length = jnp.linalg.norm(column)
    return column / jnp.where(length > 0, length, 1)


def _fine_enough(taps: tuple[int, ...], excess: float) -> tuple[int, ...]:
    """A grid between whose points the symbol rises by no more than `excess`."""
    degrees = [(k - 1) / 2 for k in taps]
    moving = sum(k > 1 for k in taps)
    if moving == 0:
        return (1,) * len(taps)
    angle = math.acos((1 + excess) ** (-1 / moving))
    counts = [max(1, math.ceil(math.pi * d / angle)) for d in degrees]
    most = [4 * (k - 1) if k > 1 else 1 for k in taps]
    while math.prod(counts) > 2 * MOST_POINTS and counts != most:
        counts = [max(m, n - 1) for n, m in zip(counts, most, strict=True)]
    return tuple(counts)
