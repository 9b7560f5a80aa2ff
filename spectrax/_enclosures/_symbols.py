"""The symbol of a convolution on a grid of frequencies, squared, with error bounds.

`F(w) = sum_t K_t exp(i w.t)` acts at the frequency `w`, and what is wanted are the
largest eigenvalues of `F^H F = sum_s C_s exp(i w.s)`, with the correlations
`C_s = sum_t K_t^H K_(t+s)` of the taps. These are few, and each is found once for all
frequencies; the matrices on the grid are then one product with a table of cosines and
sines, which numpy computes in float64.
"""

import itertools as it
import math
from collections.abc import Sequence

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Inexact

from .._norms._rows import matmul
from ._gram import HermitianStack
from ._products import gram, product
from ._rounding import frobenius, gamma, power_of_two, real_parts, up


class Grid(eqx.Module):
    """The frequencies `(2 pi j + shift) / count` on each axis, of the folded lattice.

    `count`: points on each axis. `shifted`: whether `shift` is pi or 0. `step`: how far
    apart the taps are.
    """

    count: tuple[int, ...] = eqx.field(static=True)
    shifted: tuple[bool, ...] = eqx.field(static=True)
    step: tuple[int, ...] = eqx.field(static=True)

    def even(self) -> "Grid":
        """With an even number of points where they are shifted: 0 and pi then are both
        halfway between two of them. Kernels often have their maximum at one of these,
        and the map, being finite, cannot reach it.
        """
        counts = zip(self.count, self.shifted, strict=True)
        count = tuple(n + n % 2 if shifted else n for n, shifted in counts)
        return Grid(count, self.shifted, self.step)

    def all_shifts(self) -> "list[Grid]":
        """Of all axes that may be shifted: both ways."""
        choices = [[False, True] if shifted else [False] for shifted in self.shifted]
        shifts = it.product(*choices)
        return [Grid(self.count, shifted, self.step) for shifted in shifts]

    def halves(self, *, symmetric: bool) -> np.ndarray:
        """The frequencies in units of `pi / count`, `[points, dim]`; if `symmetric`,
        one of each pair of opposite ones.
        """
        axes = [
            2 * np.arange(n) + int(shifted)
            for n, shifted in zip(self.count, self.shifted, strict=True)
        ]
        points = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(axes))
        if not symmetric:
            return points
        period = 2 * np.array(self.count)
        order = np.array([math.prod(period[axis + 1 :]) for axis in range(len(axes))])
        return points[points @ order <= (-points % period) @ order]

    def phases(self, points: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        """`exp(i w.s)` for each of the points and each of the offsets between taps."""
        phase = np.zeros((len(points), len(offsets)))
        for axis, (count, step) in enumerate(zip(self.count, self.step, strict=True)):
            # Whole multiples of `pi / count`, reduced before they are rounded.
            turns = np.outer(points[:, axis], offsets[:, axis] * step)
            phase = phase + ((turns + count) % (2 * count) - count) * np.pi / count
        return np.exp(1j * phase)


class Correlations(eqx.Module):
    """The matrices `C_s` of one group, `C_(-s) = C_s^H`, for `s = 0` and half of the
    others, and a bound on the sum of the Frobenius norms of all their errors.

    Of `K / scale`, in the smaller of the two channel dimensions.
    """

    real: Float[Array, "offsets n n"]
    imag: Float[Array, "offsets n n"] | None
    error: Float[Array, ""]
    scale: Float[Array, ""]
    offsets: tuple[tuple[int, ...], ...] = eqx.field(static=True)


def correlate(kernel: Inexact[Array, "out in *taps"]) -> Correlations:
    """The correlations of the taps of one group."""
    if kernel.shape[0] < kernel.shape[1]:
        kernel = jnp.swapaxes(kernel, 0, 1)
    taps = kernel.shape[2:]
    parts = real_parts(kernel)
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(part)) for part in parts]))
    scale = power_of_two(jnp.where(jnp.isfinite(largest), largest, 1))
    flat = [
        jnp.moveaxis(part, 1, -1).reshape(kernel.shape[0], -1) / scale for part in parts
    ]
    # All products of two taps at once: `[taps n, taps n]`.
    real, error = gram(jnp.concatenate(flat, axis=0))
    total = frobenius(real)
    imag = None
    if len(flat) == 2:
        imag, imag_error = product(flat[0].T, flat[1])
        imag = imag - imag.T
        error = error + 2 * imag_error
        total = total + frobenius(imag)
    offsets = _half(taps)
    count = math.prod(taps)
    # Summed over all pairs of taps, norms are at most `count` times that of the whole.
    error = up(count * up(error + gamma(count + 4, total.dtype) * total))
    return Correlations(
        _gathered(real, taps, offsets),
        None if imag is None else _gathered(imag, taps, offsets),
        error,
        scale,
        offsets,
    )


class SquaredSymbols(eqx.Module):
    """`F^H F` on many frequencies, as the products of a table with a few matrices.

    Each row of `weights` belongs to a frequency of one of the grids. `error` bounds the
    Frobenius norm of what each product is off by.
    """

    weights: Float[Array, "grids points terms"]
    matrices: Float[Array, "terms n n"]
    error: Float[Array, ""]

    def at(self, weights: Float[Array, "some terms"]) -> HermitianStack:
        """For some of the rows."""
        flat = self.matrices.reshape(self.matrices.shape[0], -1)
        return matmul(weights, flat).reshape(-1, *self.matrices.shape[1:])


def squared_symbols(
    correlations: Correlations, grids: list[Grid], *, symmetric: bool
) -> SquaredSymbols:
    """`F^H F` at the points of grids of one size; if `symmetric`, at half of them."""
    matrices = [correlations.real, _swapped(correlations.real)]
    if correlations.imag is not None:
        matrices += [correlations.imag, _swapped(correlations.imag)]
    matrices = jnp.concatenate(matrices)
    tables = [_weights(correlations, grid, symmetric=symmetric) for grid in grids]
    # A shifted grid may have fewer points without an opposite: its first are repeated.
    most = max(map(len, tables))
    tables = [np.concatenate([t, t[: most - len(t)]]) for t in tables]
    dtype = matrices.dtype
    sizes = jnp.stack([frobenius(matrix) for matrix in matrices])
    # No weight exceeds 1.5, and the table is off by less than 40 units of roundoff.
    rounding = 1.5 * gamma(len(matrices) + 44, dtype) * jnp.sum(sizes)
    error = up(2 * correlations.error + rounding)
    return SquaredSymbols(jnp.asarray(np.stack(tables), dtype), matrices, error)


def _weights(correlations: Correlations, grid: Grid, *, symmetric: bool) -> np.ndarray:
    """Of `P`, its transpose, `Q` and its transpose, `[points, terms]`: the real plus
    the imaginary part of `C z + (C z)^H`, for `C = P + iQ`, is that sum.
    """
    offsets = np.array(correlations.offsets)
    phases = grid.phases(grid.halves(symmetric=symmetric), offsets)
    # `C_0` only once.
    once = np.where(np.any(offsets != 0, axis=1), 1.0, 0.5)
    cosines, sines = np.real(phases) * once, np.imag(phases) * once
    plus, minus = cosines + sines, cosines - sines
    weights = [plus, minus]
    if correlations.imag is not None:
        weights += [minus, -plus]
    return np.concatenate(weights, axis=1)


def _half(taps: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Zero, and one of each pair of opposite offsets between two taps."""
    offsets = it.product(*(range(1 - k, k) for k in taps))
    return tuple(offset for offset in offsets if offset >= (0,) * len(taps))


def _gathered(
    products: Float[Array, "a a"],
    taps: tuple[int, ...],
    offsets: tuple[tuple[int, ...], ...],
) -> Float[Array, "offsets n n"]:
    """The sum of the products `[t, t']` with `t' - t = s`, for each offset `s`."""
    count = math.prod(taps)
    n = products.shape[0] // count
    blocks = products.reshape(count, n, count, n)
    positions = list(it.product(*map(range, taps)))
    place = {offset: i for i, offset in enumerate(offsets)}
    sums = np.zeros((len(offsets), count, count))
    for (a, t), (b, s) in it.product(enumerate(positions), repeat=2):
        offset = tuple(y - x for x, y in zip(t, s, strict=True))
        if offset in place:
            sums[place[offset], a, b] = 1
    flat = jnp.transpose(blocks, (0, 2, 1, 3)).reshape(count * count, -1)
    table = jnp.asarray(sums.reshape(len(offsets), -1), products.dtype)
    return matmul(table, flat).reshape(len(offsets), n, n)


def _swapped(matrices: Float[Array, "offsets n n"]) -> Float[Array, "offsets n n"]:
    return jnp.swapaxes(matrices, 1, 2)
