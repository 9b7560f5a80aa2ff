"""Convolutions as operators: at one input size, or at every size at once."""

import functools as ft
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.random as jr
import lineax as lx
from jaxtyping import Array, Inexact

from .._custom_types import LinearOperator
from ._lattice import (
    boundary_gain,
    lattice_convolution,
    lattice_convolution_transpose,
    LatticeConvolution,
)


def convolution_operator(
    layer: eqx.nn.Conv,
    weight: Inexact[Array, "out in_per_group *taps"],
    input_size: Sequence[int] | None,
) -> LinearOperator | LatticeConvolution:
    """`layer` with this weight and without its bias."""
    if input_size is not None:
        return _at_size(layer, weight, input_size)
    extent = tuple(
        d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)
    )
    return lattice_convolution(
        weight,
        stride=layer.stride,
        dilation=layer.dilation,
        groups=layer.groups,
        gain=boundary_gain(
            layer.padding_mode, _largest_padding(layer, extent), extent, layer.stride
        ),
    )


def convolution_transpose_operator(
    layer: eqx.nn.ConvTranspose,
    weight: Inexact[Array, "out in_per_group *taps"],
    input_size: Sequence[int] | None,
) -> LinearOperator | LatticeConvolution:
    """The same for a transposed convolution."""
    if input_size is not None:
        return _at_size(layer, weight, input_size)
    return lattice_convolution_transpose(
        weight, stride=layer.stride, dilation=layer.dilation, groups=layer.groups
    )


def _at_size(
    layer: eqx.nn.Conv | eqx.nn.ConvTranspose,
    weight: Inexact[Array, "out in_per_group *taps"],
    input_size: Sequence[int],
) -> lx.FunctionLinearOperator:
    size = tuple(input_size)
    if len(size) != layer.num_spatial_dims or any(n < 1 for n in size):
        raise ValueError(
            f"expected `input_size` to be {layer.num_spatial_dims} positive integers, "
            f"the spatial sizes of the layer's input without channels; got {size}."
        )
    structure = jax.ShapeDtypeStruct((layer.in_channels, *size), weight.dtype)
    linear = eqx.tree_at(lambda conv: conv.weight, _without_bias(layer), weight)
    if 0 in jax.eval_shape(linear, structure).shape:
        raise ValueError(
            f"expected `input_size` to be large enough for an output, got {size} with "
            f"a kernel of size {layer.kernel_size}, dilation {layer.dilation}, and "
            f"padding {layer.padding}."
        )
    # The layer itself is the function, so that padding, stride and the rest mean here
    # exactly what they mean there.
    return lx.FunctionLinearOperator(linear, structure, closure_convert=False)


def _without_bias(
    layer: eqx.nn.Conv | eqx.nn.ConvTranspose,
) -> eqx.nn.Conv | eqx.nn.ConvTranspose:
    """The same layer built anew with `use_bias=False` and an abstract weight."""
    config = {
        "num_spatial_dims": layer.num_spatial_dims,
        "in_channels": layer.in_channels,
        "out_channels": layer.out_channels,
        "kernel_size": layer.kernel_size,
        "stride": layer.stride,
        "padding": layer.padding,
        "dilation": layer.dilation,
        "groups": layer.groups,
        "use_bias": False,
        "padding_mode": layer.padding_mode,
    }
    if isinstance(layer, eqx.nn.ConvTranspose):
        make = ft.partial(
            eqx.nn.ConvTranspose, **config, output_padding=layer.output_padding
        )
    else:
        make = ft.partial(eqx.nn.Conv, **config)
    return eqx.filter_eval_shape(make, key=jr.key(0))


def _largest_padding(
    layer: eqx.nn.Conv, extent: tuple[int, ...]
) -> tuple[tuple[int, int], ...]:
    """The padding of each axis; for 'SAME', the most that any input size gets."""
    if layer.padding == "VALID":
        return ((0, 0),) * layer.num_spatial_dims
    if isinstance(layer.padding, str):
        return tuple((e // 2, e - e // 2) for e in extent)
    return layer.padding
