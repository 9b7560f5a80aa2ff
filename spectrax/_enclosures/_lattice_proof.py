"""The norm of a convolution at every input size, enclosed without compiling anything.

By branch and bound over cells of frequencies (`_cells.py`), each of which is proven to
hold no larger value, or is split (`_hermitian.py` has the proof for one frequency).
How many that takes depends on how far from its supremum the symbol is: a cell may be
the larger, the smaller `sigma` is at its centre.
"""

import dataclasses
import math

import numpy as np
from jaxtyping import Float, Inexact

from .._namespace import one_thread
from ._cells import Cells, cover, cover_size, joined
from ._frequencies import best_peak, climb, Peak, sample
from ._hermitian import squared_symbols, SquaredSymbols


# Proofs for one frequency that may be tried, and for how many entries of matrices.
_MOST_TESTS = 2**14
_MOST_SMALL_TESTS, _MOST_ENTRIES = 2**18, 2**24
# Below this a relative width cannot be reached in float64.
_SMALLEST_WIDTH = 1e-12


@dataclasses.dataclass
class _Budget:
    """How many tests are left."""

    tests: int


def enclose_kernel(
    kernel: Inexact[np.ndarray, "groups out in *taps"], rtol: float
) -> tuple[float, float]:
    """Bounds on the largest `sigma(F(w))` over all frequencies and groups, in float64.

    For a kernel of any floating-point or complex dtype. NaNs if it is not finite.
    """
    kernel = in_float64(kernel)
    if not np.all(np.isfinite(kernel)):
        return math.nan, math.nan
    if not np.any(kernel):
        return 0.0, 0.0
    with one_thread():
        symbols = squared_symbols(kernel)
        lower, upper = _enclose(symbols, min(max(rtol, _SMALLEST_WIDTH), 0.5))
    return _down(lower * symbols.scale), _up(upper * symbols.scale)


def proves_kernel_below(
    kernel: Inexact[np.ndarray, "groups out in *taps"], limit: float
) -> bool:
    """Whether the largest `sigma(F(w))` is proven to be at most `limit`.

    Which takes the longer, the closer it comes to it.
    """
    kernel = in_float64(kernel)
    if not np.all(np.isfinite(kernel)):
        return False
    if not np.any(kernel):
        return limit >= 0
    with one_thread():
        symbols = squared_symbols(kernel)
        scaled = limit / symbols.scale * (1 - 2.0**-51)
        estimates, _ = sample(symbols)
        cells, budget = _first_cover(symbols, estimates, scaled)
        return len(_remaining(symbols, cells, scaled, 1e-3, budget)) == 0


def in_float64(
    kernel: Inexact[np.ndarray, "*shape"],
) -> Inexact[np.ndarray, "*shape"]:
    """Exactly as it is, in float64 or complex128."""
    return kernel.astype(complex if np.iscomplexobj(kernel) else float)


def _enclose(symbols: SquaredSymbols, rtol: float) -> tuple[float, float]:
    estimates, frequencies = sample(symbols)
    # A slope that is left costs little, as the bound is from `lower` upward.
    tolerance = min(rtol, 1e-3) / 100
    lower = _proven(symbols, best_peak(symbols, estimates, frequencies, tolerance))
    upper = lower * (1 + 0.98 * rtol)
    cells, budget = _first_cover(symbols, estimates, upper)
    growth = rtol / 16
    while True:
        finest = math.sqrt(rtol) / 4
        cells = _remaining(symbols, cells, upper, finest, budget)
        if len(cells) == 0:
            return lower, upper
        # The norm is larger than what was found, or there are too many cells left.
        if budget.tests > 0:
            lower = max(lower, _proven(symbols, _from_cell(symbols, cells, tolerance)))
        upper = max(lower * (1 + 0.98 * rtol), upper * (1 + growth))
        growth = min(2 * growth, 0.25)


def _remaining(
    symbols: SquaredSymbols,
    cells: Cells,
    upper: float,
    finest: float,
    budget: _Budget,
) -> Cells:
    """The cells, after some have been split, in which the norm may exceed `upper`.

    None are left if it is proven that it does not. Cells that are smaller than `finest`
    are not split, and none are once the budget is spent.
    """
    left = []
    while len(cells) > 0:
        passed = symbols.below(
            cells.group, cells.numerator, cells.denominator, upper * cells.cosine()
        )
        budget.tests -= len(cells)
        cells = cells[~passed]
        final = cells.radius() < finest
        left.append(cells[final])
        cells = cells[~final]
        if (
            len(cells) > 0
            and len(cells) * 2 ** min(2, len(symbols.taps)) > budget.tests
        ):
            budget.tests = 0
            left.append(cells)
            break
        if len(cells) > 0:
            cells = cells.split()
    return joined(left) if left else cells


def _first_cover(
    symbols: SquaredSymbols, estimates: Float[np.ndarray, "groups points"], upper: float
) -> tuple[Cells, _Budget]:
    """For each group the cover with which the fewest tests are to be expected."""
    degrees = tuple((k - 1) / 2 for k in symbols.taps)
    most = min(_MOST_SMALL_TESTS, max(_MOST_TESTS, _MOST_ENTRIES // symbols.size**2))
    if not degrees:
        groups = np.arange(len(estimates))
        nowhere = np.zeros((len(groups), 0), int)
        return Cells(groups, nowhere, nowhere, degrees), _Budget(most)
    radii = 1.3 * 0.94 ** np.arange(100)
    symmetric = symbols.symmetric
    sizes = [cover_size(degrees, r, symmetric=symmetric) for r in radii]
    radii = radii[
        np.array(sizes) * len(estimates) <= max(most / 2, sizes[0] * len(estimates))
    ]
    expected = np.array(sizes[: len(radii)])[:, None] * np.ones(len(estimates))
    fraction = np.array(sizes[: len(radii)])[:, None]
    for level in range(8):
        # The part of the frequencies at which a cell of that size fails.
        limits = upper * np.cos(radii / 2**level)
        failing = np.mean(estimates[None] > limits[:, None, None], axis=-1)
        expected = expected + fraction * failing * 2.0 ** (len(degrees) * (level + 1))
    choice = radii[np.argmin(expected, axis=0)]
    parts = []
    for group, radius in enumerate(choice):
        part = cover(degrees, float(radius), symmetric=symmetric)
        parts.append(dataclasses.replace(part, group=part.group + group))
    cells = joined(parts)
    return cells, _Budget(max(most, 2 * len(cells)))


def _from_cell(symbols: SquaredSymbols, cells: Cells, tolerance: float) -> Peak:
    """From the smallest of some cells uphill."""
    place = int(np.argmin(cells.radius()))
    turns = cells.numerator[place] / cells.denominator[place]
    group = int(cells.group[place])
    return climb(symbols, group, 2 * math.pi * turns, tolerance)


def _proven(symbols: SquaredSymbols, peak: Peak) -> float:
    return symbols.rayleigh_lower(
        peak.group, peak.numerator, peak.denominator, peak.vector
    )


def _up(value: float) -> float:
    """Not below the product of which this is the rounded value."""
    return math.nextafter(value, math.inf)


def _down(value: float) -> float:
    return max(0.0, math.nextafter(value, 0.0))
