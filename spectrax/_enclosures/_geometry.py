"""Where a convolution of a given input size reads its input.

Of a convolution in the form of `_operators/_convolution.py`, on each axis

    y(i) = sum_t K_t x(stride i + dilation t - low),   0 <= i < outputs.

On the circle of `N` points, with `N` at least as large as `size` plus the overshoot on
either side and a multiple of the stride, the map with zeros around `x` is a part of the
circular one, whatever phase `exp(i shift)` the circle is closed with. The norm of that
is the largest `sigma(F(w))` over the frequencies `(2 pi j + shift) / N`, or over
`N / stride` of them for the kernel with its stride folded into channels.
"""

import dataclasses
import math

import numpy as np

from .._operators import Axis
from ._symbols import Grid


def grid_of(axes: tuple[Axis, ...]) -> tuple[Grid, float]:
    """The grid that bounds the norm, and the factor that belongs to it."""
    counts, shifted, factors = zip(*map(_circle, axes), strict=True)
    # A folded kernel has its dilation written out.
    step = tuple(axis.dilation if axis.stride == 1 else 1 for axis in axes)
    return Grid(counts, shifted, step), math.prod(factors)


def _extended(axis: Axis) -> tuple[Axis, float]:
    """The axis on the input with its padding written out, and the norm of writing it:
    the root of how often the most frequent entry appears.
    """
    padded = np.pad(np.arange(axis.size), (axis.low, axis.high), axis.mode)
    used = axis.stride * (axis.outputs - 1) + axis.dilation * (axis.taps - 1) + 1
    copies = np.bincount(padded[:used]).max()
    axis = dataclasses.replace(axis, size=len(padded), low=0, mode="zeros")
    return axis, math.sqrt(copies)


def _circle(axis: Axis) -> tuple[int, bool, float]:
    """Points on the circle of the folded lattice, whether shifted by pi, and the factor
    by which the map may exceed the circular one.
    """
    if axis.mode == "wrap" and axis.size % axis.stride == 0:
        # The outputs are those of the circular map; some may be there repeatedly.
        turns = -(-axis.outputs * axis.stride // axis.size)
        extended, factor = _extended(axis)
        if turns <= factor**2:
            return axis.size // axis.stride, False, math.sqrt(turns)
        return (*_circle(extended)[:2], factor)
    if axis.mode != "zeros":
        extended, factor = _extended(axis)
        return (*_circle(extended)[:2], factor)
    reach = max(axis.size + axis.low, axis.size + axis.high)
    return max(-(-reach // axis.stride), axis.outputs), True, 1.0
