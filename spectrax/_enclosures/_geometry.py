"""Where a convolution of a given input size reads its input.

Every convolution here is brought into one form, on each axis

    y(i) = sum_t K_t x(stride i + dilation t - low),   0 <= i < outputs,

where `x` has `size` entries and is extended beyond them by a padding. A transposed
convolution is the transpose of such a map, from its output to its input.

On the circle of `N` points, with `N` at least as large as `size` plus the overshoot on
either side and a multiple of the stride, the map with zeros around `x` is a part of the
circular one, whatever phase `exp(i shift)` the circle is closed with. The norm of that
is the largest `sigma(F(w))` over the frequencies `(2 pi j + shift) / N`, or over
`N / stride` of them for the kernel with its stride folded into channels.
"""

import dataclasses
import math
from typing import Any

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import lineax as lx
import numpy as np
from jaxtyping import Array, Inexact

from ._symbols import Grid


_MODES = {"REFLECT": "reflect", "REPLICATE": "edge", "CIRCULAR": "wrap"}


@dataclasses.dataclass(frozen=True)
class Axis:
    """One axis of a convolution in the form above; `mode` is numpy's, or "zeros"."""

    size: int
    outputs: int
    taps: int
    stride: int
    dilation: int
    low: int
    mode: Any

    @property
    def high(self) -> int:
        """How far the outputs read beyond the end of the input, if they do."""
        last = self.stride * (self.outputs - 1) + self.dilation * (self.taps - 1)
        return max(0, last - self.low - (self.size - 1))

    def extended(self) -> tuple["Axis", float]:
        """The axis on the input with its padding written out, and the norm of writing
        it: the root of how often the most frequent entry appears.
        """
        padded = np.pad(np.arange(self.size), (self.low, self.high), self.mode)
        used = self.stride * (self.outputs - 1) + self.dilation * (self.taps - 1) + 1
        copies = np.bincount(padded[:used]).max()
        axis = dataclasses.replace(self, size=len(padded), low=0, mode="zeros")
        return axis, math.sqrt(copies)

    def circle(self) -> tuple[int, bool, float]:
        """Points on the circle of the folded lattice, whether shifted by pi, and the
        factor by which the map may exceed the circular one.
        """
        if self.mode == "wrap" and self.size % self.stride == 0:
            # The outputs are those of the circular map; some may be there repeatedly.
            turns = -(-self.outputs * self.stride // self.size)
            axis, factor = self.extended()
            if turns <= factor**2:
                return self.size // self.stride, False, math.sqrt(turns)
            return (*axis.circle()[:2], factor)
        if self.mode != "zeros":
            axis, factor = self.extended()
            return (*axis.circle()[:2], factor)
        reach = max(self.size + self.low, self.size + self.high)
        return max(-(-reach // self.stride), self.outputs), True, 1.0


def axes_of(
    layer: eqx.nn.Conv | eqx.nn.ConvTranspose, operator: lx.AbstractLinearOperator
) -> tuple[Axis, ...]:
    """The axes of a layer with the sizes of the operator whose function it is."""
    in_size = operator.in_structure().shape[1:]
    return correlation_axes(layer, in_size, operator.out_structure().shape[1:])


def correlation_axes(
    layer: eqx.nn.Conv | eqx.nn.ConvTranspose,
    in_size: tuple[int, ...],
    out_size: tuple[int, ...],
) -> tuple[Axis, ...]:
    """The axes of a layer with these input and output sizes."""
    transposed = isinstance(layer, eqx.nn.ConvTranspose)
    lows = _transposed_lows(layer) if transposed else _lows(layer, in_size)
    if transposed:
        in_size, out_size = out_size, in_size
    mode = _MODES.get(layer.padding_mode, "zeros")
    axes = []
    for a, low in enumerate(lows):
        axis = Axis(
            size=in_size[a],
            outputs=out_size[a],
            taps=layer.kernel_size[a],
            stride=layer.stride[a],
            dilation=layer.dilation[a],
            low=low,
            mode=mode,
        )
        padded = axis.low > 0 or axis.high > 0
        axes.append(axis if padded else dataclasses.replace(axis, mode="zeros"))
    return tuple(axes)


def correlation_kernel(
    layer: eqx.nn.Conv | eqx.nn.ConvTranspose,
) -> Inexact[Array, "groups out in *taps"]:
    """The kernel in the form above, by groups."""
    weight = layer.weight
    out, in_per_group, *taps = weight.shape
    kernel = weight.reshape(layer.groups, out // layer.groups, in_per_group, *taps)
    if isinstance(layer, eqx.nn.ConvTranspose):
        kernel = jnp.swapaxes(kernel, 1, 2)
        kernel = jnp.flip(kernel, axis=tuple(range(3, kernel.ndim)))
    return kernel


def grid_of(axes: tuple[Axis, ...]) -> tuple[Grid, float]:
    """The grid that bounds the norm, and the factor that belongs to it."""
    counts, shifted, factors = zip(*(axis.circle() for axis in axes), strict=True)
    # A folded kernel has its dilation written out.
    step = tuple(axis.dilation if axis.stride == 1 else 1 for axis in axes)
    return Grid(counts, shifted, step), math.prod(factors)


def _lows(layer: eqx.nn.Conv, in_size: tuple[int, ...]) -> list[int]:
    padding = layer.padding
    if isinstance(padding, str):
        extents = [
            d * (k - 1) + 1
            for d, k in zip(layer.dilation, layer.kernel_size, strict=True)
        ]
        padding = lax.padtype_to_pads(in_size, extents, layer.stride, padding)
    return [low for low, _ in padding]


def _transposed_lows(layer: eqx.nn.ConvTranspose) -> list[int]:
    """The padding that the transpose, an ordinary convolution, has in front."""
    if layer.padding == "VALID":
        return [0] * layer.num_spatial_dims
    if not isinstance(layer.padding, str):
        return [low for low, _ in layer.padding]
    lows = []
    for k, s, d, a in zip(
        layer.kernel_size,
        layer.stride,
        layer.dilation,
        layer.output_padding,
        strict=True,
    ):
        total = max(0, d * (k - 1) - s + a + 1)
        lows.append((total + (layer.padding == "SAME_LOWER")) // 2)
    return lows
