"""From an Equinox layer of convolution to its operator: at one input size, or at every
size at once. Nothing else reads a layer's padding.
"""

import dataclasses
from collections.abc import Sequence

import equinox as eqx
import jax.lax as lax
from jaxtyping import Array, Inexact

from ._convolution import Axis, Convolution
from ._lattice import (
    boundary_gain,
    lattice_convolution,
    lattice_convolution_transpose,
    LatticeConvolution,
)


_MODES = {"REFLECT": "reflect", "REPLICATE": "edge", "CIRCULAR": "wrap"}


def convolution_operator(
    layer: eqx.nn.Conv,
    weight: Inexact[Array, "out in_per_group *taps"],
    input_size: Sequence[int] | None,
) -> Convolution | LatticeConvolution:
    """`layer` with this weight and without its bias."""
    if input_size is not None:
        axes = convolution_axes(layer, input_size)
        return Convolution(weight, axes, layer.groups, transposed=False)
    extent = tuple(e - 1 for e in _extents(layer))
    # With 'SAME' no input is padded by more than one of a single entry.
    padding = tuple(_padding(layer, (1,) * layer.num_spatial_dims))
    return lattice_convolution(
        weight,
        stride=layer.stride,
        dilation=layer.dilation,
        groups=layer.groups,
        gain=boundary_gain(layer.padding_mode, padding, extent, layer.stride),
    )


def convolution_transpose_operator(
    layer: eqx.nn.ConvTranspose,
    weight: Inexact[Array, "out in_per_group *taps"],
    input_size: Sequence[int] | None,
) -> Convolution | LatticeConvolution:
    """The same for a transposed convolution."""
    if input_size is not None:
        axes = convolution_transpose_axes(layer, input_size)
        return Convolution(weight, axes, layer.groups, transposed=True)
    return lattice_convolution_transpose(
        weight, stride=layer.stride, dilation=layer.dilation, groups=layer.groups
    )


def convolution_axes(layer: eqx.nn.Conv, input_size: Sequence[int]) -> tuple[Axis, ...]:
    """The axes of a layer with this input size."""
    size = _checked(layer, input_size)
    outputs = [
        (n + low + high - extent) // stride + 1
        for n, (low, high), extent, stride in zip(
            size, _padding(layer, size), _extents(layer), layer.stride, strict=True
        )
    ]
    lows = [low for low, _ in _padding(layer, size)]
    return _axes(layer, size, size, outputs, lows)


def convolution_transpose_axes(
    layer: eqx.nn.ConvTranspose, input_size: Sequence[int]
) -> tuple[Axis, ...]:
    """The same for a transposed convolution: of the map that it is the transpose of,
    from its output to its input.
    """
    outputs = _checked(layer, input_size)
    sizes, lows = [], []
    for axis, (n, extent) in enumerate(zip(outputs, _extents(layer), strict=True)):
        stride, more = layer.stride[axis], layer.output_padding[axis]
        if layer.padding == "VALID":
            low = high = 0
        elif isinstance(layer.padding, str):
            total = extent - stride + more
            total, more = max(total, 0), max(-total, 0)
            low = (total + (layer.padding == "SAME_LOWER")) // 2
            high = total - low
        else:
            low, high = layer.padding[axis]
        sizes.append(stride * (n - 1) + extent - low - high + more)
        lows.append(low)
    return _axes(layer, outputs, sizes, outputs, lows)


def _axes(
    layer: eqx.nn.Conv | eqx.nn.ConvTranspose,
    input_size: Sequence[int],
    sizes: Sequence[int],
    outputs: Sequence[int],
    lows: Sequence[int],
) -> tuple[Axis, ...]:
    if min(*sizes, *outputs) < 1:
        raise ValueError(
            "expected `input_size` to be large enough for an output, got "
            f"{tuple(input_size)} with a kernel of size {layer.kernel_size}, dilation "
            f"{layer.dilation}, and padding {layer.padding}."
        )
    axes = []
    for size, count, low, taps, stride, dilation in zip(
        sizes,
        outputs,
        lows,
        layer.kernel_size,
        layer.stride,
        layer.dilation,
        strict=True,
    ):
        mode = _MODES.get(layer.padding_mode, "zeros")
        axis = Axis(size, count, taps, stride, dilation, low, mode)
        padded = axis.low > 0 or axis.high > 0
        axes.append(axis if padded else dataclasses.replace(axis, mode="zeros"))
    return tuple(axes)


def _checked(
    layer: eqx.nn.Conv | eqx.nn.ConvTranspose, input_size: Sequence[int]
) -> tuple[int, ...]:
    size = tuple(input_size)
    if len(size) != layer.num_spatial_dims or any(n < 1 for n in size):
        raise ValueError(
            f"expected `input_size` to be {layer.num_spatial_dims} positive integers, "
            f"the spatial sizes of the layer's input without channels; got {size}."
        )
    return size


def _extents(layer: eqx.nn.Conv | eqx.nn.ConvTranspose) -> list[int]:
    """From the first tap to the last one."""
    pairs = zip(layer.dilation, layer.kernel_size, strict=True)
    return [d * (k - 1) + 1 for d, k in pairs]


def _padding(layer: eqx.nn.Conv, size: Sequence[int]) -> Sequence[tuple[int, int]]:
    if isinstance(layer.padding, str):
        return lax.padtype_to_pads(size, _extents(layer), layer.stride, layer.padding)
    return layer.padding
