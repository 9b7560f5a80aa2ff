"""Covers of all frequencies by cells, and what one frequency says of those around it.

Let `S`, the supremum of `sigma(F(w))`, be attained at `w*`, with singular vectors `u`
and `v`, and let `d_a = (k_a - 1) / 2` for `k_a` taps. Along the line from `w*` in a
direction `x`, and apart from a phase, `g(t) = Re(u^H F(w* + t x) v)` is a real function
of exponential type `D = sum_a d_a |x_a|`: a sum of waves, after those have been
centred. It stays within `S`, and `g(0) = S`. So `g'^2 + D^2 g^2 <= D^2 S^2` (Duffin and
Schaeffer 1938), which is to say that the angle `arccos(g / S)` grows no faster than
`D t`. Hence, for any frequency `w` at all,

    sigma(F(w)) >= S cos(sum_a d_a |w_a - w*_a|)    if that sum is at most pi / 2.

A cell with centre `w` on which the sum stays within a radius `r` then has no such `w*`
if `sigma(F(w)) <= U cos(r)` and `S > U`. If this is so for each cell of a cover, then
`S <= U`.

(On a whole grid a product of cosines does, one for each axis, by going through the axes
one after the other. For a single cell it does not: `F(w) = cos(w_1 + w_2)` falls off
like the cosine of the sum.)

The places that a frequency excludes are a ball in the norm of that sum: in two
dimensions a diamond, with which the plane can be tiled as well as with squares. So axes
are taken two at a time, and a cell is a product of diamonds and at most one interval.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int


_ROUNDING = 2.0**-49


@dataclasses.dataclass(frozen=True)
class Cells:
    """Some cells, of any groups of a convolution.

    The centre of one is the frequency `2 pi numerator / denominator`, exactly, and it
    reaches `2 pi / denominator` to either side on each axis.

    - `degrees`: `d_a` for each axis, all positive.
    """

    group: Int[np.ndarray, " cells"]
    numerator: Int[np.ndarray, "cells dim"]
    denominator: Int[np.ndarray, "cells dim"]
    degrees: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.group)

    def __getitem__(self, chosen: slice | np.ndarray) -> "Cells":
        return Cells(
            self.group[chosen],
            self.numerator[chosen],
            self.denominator[chosen],
            self.degrees,
        )

    def radius(self) -> Float[np.ndarray, " cells"]:
        """An upper bound on `sum_a d_a |w_a - w*_a|` within each cell."""
        return np.sum(self._block_radii(), axis=1) * (1 + _ROUNDING)

    def cosine(self) -> Float[np.ndarray, " cells"]:
        """A lower bound on the cosine of the radius, and zero beyond `pi / 2`."""
        return np.maximum(np.cos(np.minimum(self.radius(), 2)) - _ROUNDING, 0)

    def split(self) -> "Cells":
        """Each cell as four, or two: its diamond, or interval, at half of its size."""
        blocks = _blocks(len(self.degrees))
        sizes = np.array([len(block) for block in blocks])
        # The block whose radius falls the most for each doubling of the cells.
        choice = np.argmax(self._block_radii() / sizes, axis=1)
        parts = [
            _halved(self[choice == i], block)
            for i, block in enumerate(blocks)
            if np.any(choice == i)
        ]
        return joined(parts)

    def _block_radii(self) -> Float[np.ndarray, "cells blocks"]:
        reach = 2 * math.pi * np.array(self.degrees) / self.denominator
        radii = [np.max(reach[:, block], axis=1) for block in _blocks(reach.shape[1])]
        return np.stack(radii, axis=1) if radii else np.zeros((len(self), 0))


def cover(degrees: tuple[float, ...], radius: float, *, symmetric: bool) -> Cells:
    """All frequencies, for one group, by cells of at most this radius.

    If `symmetric`, half of them, as `sigma` is the same at opposite frequencies.
    """
    dim = len(degrees)
    counts = _counts(degrees, radius)
    points = frequency_grid(counts, symmetric=symmetric)
    for block in _blocks(dim):
        # Every other point of a grid: those are the centres of the diamonds.
        points = points[np.sum(points[:, block], axis=1) % 2 == 0]
    group = np.zeros(len(points), int)
    return Cells(
        group, points, np.broadcast_to(np.array(counts, int), points.shape), degrees
    )


def frequency_grid(
    counts: Sequence[int], *, symmetric: bool
) -> Int[np.ndarray, "points dim"]:
    """All points of a grid; if `symmetric`, one of each pair of opposite ones."""
    dim = len(counts)
    points = np.indices(counts).reshape(dim, math.prod(counts)).T
    if not symmetric:
        return points
    order = np.array([math.prod(counts[axis + 1 :]) for axis in range(dim)], int)
    opposite = -points % np.array(counts, int)
    return points[points @ order <= opposite @ order]


def cover_size(degrees: tuple[float, ...], radius: float, *, symmetric: bool) -> float:
    """About how many cells there are in the cover."""
    blocks = len(_blocks(len(degrees)))
    count = math.prod(_counts(degrees, radius)) / 2**blocks
    return max(1.0, count / 2 if symmetric else count)


def joined(parts: list[Cells]) -> Cells:
    """One after the other."""
    return Cells(
        np.concatenate([part.group for part in parts]),
        np.concatenate([part.numerator for part in parts]),
        np.concatenate([part.denominator for part in parts]),
        parts[0].degrees,
    )


def _counts(degrees: tuple[float, ...], radius: float) -> list[int]:
    """An even number of steps on each axis, the radius shared among the axes."""
    shares = {axis: len(block) for block in _blocks(len(degrees)) for axis in block}
    return [
        2 * math.ceil(math.pi * d * len(degrees) / (radius * shares[axis]))
        for axis, d in enumerate(degrees)
    ]


def _blocks(dim: int) -> list[list[int]]:
    """The axes, two at a time."""
    return [list(range(i, min(i + 2, dim))) for i in range(0, dim, 2)]


def _halved(cells: Cells, block: list[int]) -> Cells:
    doubled = np.ones(cells.numerator.shape[1], int)
    doubled[block] = 2
    parts = []
    for axis in block:
        for step in (-1, 1):
            numerator = cells.numerator * doubled
            numerator[:, axis] += step
            denominator = cells.denominator * doubled
            parts.append(Cells(cells.group, numerator, denominator, cells.degrees))
    return joined(parts)
