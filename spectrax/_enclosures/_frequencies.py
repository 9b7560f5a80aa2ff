"""The search for the frequency at which the symbol of a convolution is largest.

Nothing is proven here: what is found is a place, a vector and some estimates, and the
proof holds whatever they are. It only succeeds sooner if they are good.
"""

import dataclasses
import math

import numpy as np
from jaxtyping import Complex, Float, Int

from ._cells import frequency_grid
from ._hermitian import SquaredSymbols


# Of all groups together.
_MOST_SAMPLES = 2**12
# Smaller matrices are decomposed, for larger ones there is Lanczos' method.
_SMALL = 48
_SAMPLE_STEPS, _CLIMB_STEPS = 14, 28
_STARTS, _MOST_CLIMBS = 3, 14
# Frequencies are whole multiples of this part of a turn, so that they are exact.
_TURN = 2**40


@dataclasses.dataclass(frozen=True)
class Peak:
    """A frequency, `2 pi numerator / denominator`, and a leading vector there."""

    group: int
    numerator: Int[np.ndarray, " dim"]
    denominator: Int[np.ndarray, " dim"]
    vector: Complex[np.ndarray, " n"]
    estimate: float


def sample(
    symbols: SquaredSymbols,
) -> tuple[Float[np.ndarray, "groups points"], Float[np.ndarray, "points dim"]]:
    """Estimates of `sigma(F(w))`, a little low, on a coarse grid of frequencies `w`."""
    groups = len(symbols.even)
    counts = [2 * k + 2 for k in symbols.taps]
    while math.prod(counts) * groups > _MOST_SAMPLES and max(counts) > 3:
        counts = [max(3, int(0.8 * count)) for count in counts]
    points = frequency_grid(counts, symmetric=symbols.symmetric)
    periods = np.broadcast_to(np.array(counts, int), points.shape)
    found = np.zeros((groups, len(points)))
    for group in range(groups):
        for start in range(0, len(points), symbols.chunk):
            some = slice(start, start + symbols.chunk)
            matrices = symbols.at(group, points[some], periods[some])
            found[group, some] = _leading_values(matrices)
    return np.sqrt(np.maximum(found, 0)), 2 * math.pi * points / periods


def best_peak(
    symbols: SquaredSymbols,
    estimates: Float[np.ndarray, "groups points"],
    frequencies: Float[np.ndarray, "points dim"],
    tolerance: float,
) -> Peak:
    """The best that is reached from the best of the samples, which lie apart."""
    peaks, starts = [], []
    spacing = math.pi / max(1.0, max(symbols.taps, default=1))
    for place in np.argsort(-estimates, axis=None)[:64]:
        group, point = np.unravel_index(place, estimates.shape)
        frequency = frequencies[point]
        if any(_distance(frequency, w) < spacing for g, w in starts if g == group):
            continue
        starts.append((group, frequency))
        peaks.append(climb(symbols, int(group), frequency, tolerance))
        if len(peaks) == _STARTS or not symbols.taps:
            break
    return max(peaks, key=lambda peak: peak.estimate)


def climb(
    symbols: SquaredSymbols,
    group: int,
    frequency: Float[np.ndarray, " dim"],
    tolerance: float,
) -> Peak:
    """From one frequency uphill, by a quasi-Newton method on the leading eigenvalue.

    It starts from the curvature that there would be if the vector stayed as it is.
    Steps end when the norm rises by less than `tolerance`, relative to itself.
    """
    vector = _start(symbols.size)
    value, slope, curvature, vector = _at(symbols, group, frequency, vector)
    for _ in range(_MOST_CLIMBS if symbols.taps else 0):
        step = np.linalg.solve(curvature, slope)
        # No further than to where a wave turns.
        longest = float(np.max(np.abs(step) * np.array(symbols.taps)))
        step = step / max(1.0, longest)
        trial = _at(symbols, group, frequency + step, vector)
        if trial[0] <= value:
            if trial[0] >= value * (1 - 1e-14):
                break
            curvature = 4 * curvature
            continue
        gain = (trial[0] - value) / trial[0]
        curvature = _updated(curvature, step, slope - trial[1])
        frequency, value, slope, vector = frequency + step, trial[0], trial[1], trial[3]
        if gain < tolerance:
            break
    turns = np.round(frequency / (2 * math.pi) * _TURN).astype(int) % _TURN
    estimate = math.sqrt(max(value, 0))
    return Peak(group, turns, np.full_like(turns, _TURN), vector, estimate)


_Local = tuple[
    float,
    Float[np.ndarray, " dim"],
    Float[np.ndarray, "dim dim"],
    Complex[np.ndarray, " n"],
]


def _at(
    symbols: SquaredSymbols,
    group: int,
    frequency: Float[np.ndarray, " dim"],
    start: Complex[np.ndarray, " n"],
) -> _Local:
    """The largest eigenvalue of `F^H F`, its slope, a positive curvature, a vector."""
    offsets = symbols.offsets
    angles = offsets @ frequency
    matrix = symbols.combined(group, np.cos(angles)[None], np.sin(angles)[None])
    if symbols.size <= _SMALL:
        vector = np.linalg.eigh(matrix[0])[1][:, -1]
    else:
        vector = _ritz(matrix, start[None], _CLIMB_STEPS)[1][0]
    value = float(np.vdot(vector, matrix[0] @ vector).real)
    even, odd = symbols.quadratic_forms(group, vector)
    slope = offsets.T @ (odd * np.cos(angles) - even * np.sin(angles))
    falls = even * np.cos(angles) + odd * np.sin(angles)
    values, vectors = np.linalg.eigh((offsets.T * falls) @ offsets)
    least = 1e-3 * max(value, 1e-200)
    curvature = (vectors * np.maximum(np.abs(values), least)) @ vectors.T
    return value, slope, curvature, vector


def _updated(
    curvature: Float[np.ndarray, "dim dim"],
    step: Float[np.ndarray, " dim"],
    change: Float[np.ndarray, " dim"],
) -> Float[np.ndarray, "dim dim"]:
    """The update of Broyden, Fletcher, Goldfarb and Shanno, where it stays positive."""
    image = curvature @ step
    along, before = float(step @ change), float(step @ image)
    if along <= 1e-3 * before:
        return curvature
    update = np.outer(change, change) / along - np.outer(image, image) / before
    return curvature + update


def _leading_values(
    matrices: Complex[np.ndarray, "points n n"],
) -> Float[np.ndarray, " points"]:
    size = matrices.shape[-1]
    if size <= _SMALL:
        return np.linalg.eigvalsh(matrices)[:, -1]
    start = np.broadcast_to(_start(size), matrices.shape[:2])
    return _ritz(matrices, start, _SAMPLE_STEPS)[0]


def _ritz(
    matrices: Complex[np.ndarray, "points n n"],
    start: Complex[np.ndarray, "points n"],
    steps: int,
) -> tuple[Float[np.ndarray, " points"], Complex[np.ndarray, "points n"]]:
    """The leading Ritz pairs of Krylov spaces, whose bases are orthogonalised twice."""
    basis = np.zeros((len(matrices), steps, matrices.shape[-1]), complex)
    projection = np.zeros((len(matrices), steps, steps), complex)
    vector = start
    for j in range(steps):
        basis[:, j] = vector
        image = (matrices @ vector[..., None])[..., 0]
        length = np.linalg.norm(image, axis=-1, keepdims=True)
        coefficients = _coefficients(basis, image)
        projection[:, j] = np.conj(coefficients)
        rest = image - _combination(basis, coefficients)
        rest = rest - _combination(basis, _coefficients(basis, rest))
        new = np.linalg.norm(rest, axis=-1, keepdims=True)
        # What rounding leaves is no direction: the space is invariant.
        exhausted = new <= 1e-13 * length
        vector = np.where(exhausted, 0, rest / np.where(exhausted, 1, new))
    # Row `j` holds the coefficients of the vectors up to `j`: the lower half.
    values, vectors = np.linalg.eigh(projection, UPLO="L")
    leading = _combination(basis, vectors[..., -1])
    length = np.linalg.norm(leading, axis=-1, keepdims=True)
    return values[:, -1], leading / np.where(length > 0, length, 1)


def _coefficients(
    basis: Complex[np.ndarray, "points steps n"],
    vector: Complex[np.ndarray, "points n"],
) -> Complex[np.ndarray, "points steps"]:
    return np.conj((basis @ np.conj(vector)[..., None])[..., 0])


def _combination(
    basis: Complex[np.ndarray, "points steps n"],
    coefficients: Complex[np.ndarray, "points steps"],
) -> Complex[np.ndarray, "points n"]:
    return (coefficients[:, None] @ basis)[:, 0]


def _start(size: int) -> Complex[np.ndarray, " n"]:
    """A vector that has something of every direction, the same at each call."""
    draw = np.random.default_rng(size).normal(size=(2, size))
    vector = draw[0] + 1j * draw[1]
    return vector / np.linalg.norm(vector)


def _distance(a: Float[np.ndarray, " dim"], b: Float[np.ndarray, " dim"]) -> float:
    """On the torus."""
    apart = (a - b + math.pi) % (2 * math.pi) - math.pi
    return float(np.max(np.abs(apart), initial=0.0))
