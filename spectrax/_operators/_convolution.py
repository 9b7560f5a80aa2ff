"""A convolution of one input size, in one form for all paddings.

On each axis, with `low` entries of padding in front,

    y(i) = sum_t K_t x(stride i + dilation t - low),   0 <= i < outputs,

where `x` has `size` entries and is extended beyond them in some mode. A transposed
convolution is the transpose of such a map, from its output to its input.
"""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Inexact

from ._lattice import (
    lattice_convolution,
    lattice_convolution_transpose,
    LatticeConvolution,
)
from ._lineax import register_without_structure


@dataclasses.dataclass(frozen=True)
class Axis:
    """One axis of a convolution of one input size,

        y(i) = sum_t K_t x(stride i + dilation t - low),   0 <= i < outputs.

    - `size`, `outputs`: how many entries `x` and `y` have.
    - `taps`, `stride`, `dilation`: as those of the layer.
    - `low`: how many entries of padding are in front.
    - `mode`: how `x` is extended, one of numpy's modes, or "zeros".
    """

    size: int
    outputs: int
    taps: int
    stride: int
    dilation: int
    low: int
    mode: Any

    @property
    def excess(self) -> int:
        """By how much the last entry that is read lies beyond the end of the input."""
        last = self.stride * (self.outputs - 1) + self.dilation * (self.taps - 1)
        return last - self.low - (self.size - 1)

    @property
    def high(self) -> int:
        """How far the outputs read beyond the end of the input, if they do."""
        return max(0, self.excess)


class Convolution(lx.AbstractLinearOperator):
    """A convolution of one input size, or a transposed one: what
    [`spectrax.layer_operator`][] makes of a layer and an `input_size`. Its products are
    those of the layer without its bias, bit for bit, and its transpose is another one.

    - `weight`: `[out, in per group, *taps]`, as in the layer.
    - `axes`: size, stride, dilation and padding on each axis. Of a transposed
        convolution those of the map that it transposes.
    - `groups`: into how many the channels are divided.
    - `transposed`: whether it is a transposed convolution.
    """

    weight: Inexact[Array, "out in_per_group *taps"]
    axes: tuple[Axis, ...] = eqx.field(static=True)
    groups: int = eqx.field(static=True)
    transposed: bool = eqx.field(static=True)

    def mv(self, vector: Inexact[Array, "in *size"]) -> Inexact[Array, "out *sizes"]:
        """The layer's output, without its bias."""
        return self._spread(vector) if self.transposed else self._gathered(vector)

    def as_matrix(self) -> Inexact[Array, "out_size in_size"]:
        """Column by column."""
        structure, count = self.in_structure(), self.in_size()
        basis = jnp.eye(count, dtype=structure.dtype).reshape(count, *structure.shape)
        return jax.vmap(self.mv)(basis).reshape(count, -1).T

    def transpose(self) -> "Convolution":
        """Along the same axes, from outputs to inputs."""
        kernel = _transposed(self.grouped())
        weight = kernel.reshape(-1, *kernel.shape[2:])
        return Convolution(weight, self.axes, self.groups, not self.transposed)

    def in_structure(self) -> jax.ShapeDtypeStruct:
        """Channels and sizes."""
        return self._structure(self.weight.shape[1] * self.groups, self.transposed)

    def out_structure(self) -> jax.ShapeDtypeStruct:
        """Channels and sizes."""
        return self._structure(self.weight.shape[0], not self.transposed)

    def grouped(self) -> Inexact[Array, "groups out in *taps"]:
        """The weight, by groups."""
        out, *rest = self.weight.shape
        return self.weight.reshape(self.groups, out // self.groups, *rest)

    def kernel(self) -> Inexact[Array, "groups out in *taps"]:
        """`K` in the form above, by groups."""
        return _transposed(self.grouped()) if self.transposed else self.grouped()

    def on_lattice(self) -> LatticeConvolution:
        """The same without edges, its stride in the channels."""
        stride = tuple(axis.stride for axis in self.axes)
        dilation = tuple(axis.dilation for axis in self.axes)
        config = {"stride": stride, "dilation": dilation, "groups": self.groups}
        if self.transposed:
            return lattice_convolution_transpose(self.weight, **config)
        return lattice_convolution(self.weight, **config, gain=1.0)

    def _structure(self, channels: int, outputs: bool) -> jax.ShapeDtypeStruct:  # noqa: FBT001
        sizes = (axis.outputs if outputs else axis.size for axis in self.axes)
        return jax.ShapeDtypeStruct((channels, *sizes), self.weight.dtype)

    def _gathered(
        self, x: Inexact[Array, "in *size"]
    ) -> Inexact[Array, "out *outputs"]:
        """The form above."""
        widths = [(0, 0) if a.mode == "zeros" else (a.low, a.high) for a in self.axes]
        x = _padded(x, self.axes, widths)
        padding = [
            # No more of the input is cut off than it takes for so many outputs.
            (a.low, max(a.excess, min(0, a.excess + a.stride - 1)))
            if a.mode == "zeros"
            else (0, 0)
            for a in self.axes
        ]
        return self._convolved(x, padding, strides=[a.stride for a in self.axes])

    def _spread(self, x: Inexact[Array, "in *outputs"]) -> Inexact[Array, "out *size"]:
        """Its transpose: the input with zeros between its entries, convolved."""
        repeats, padding, widths = [], [], []
        for a in self.axes:
            before = a.dilation * (a.taps - 1) - a.low
            after = a.size + a.low - a.stride * (a.outputs - 1) - 1
            periodic = a.mode == "wrap" and a.size == a.stride * a.outputs
            if periodic and min(before, after) >= 0:
                # On a circle of outputs as well, so that they are what is repeated.
                repeats.append((before // a.stride, after // a.stride))
                padding.append((before % a.stride, after % a.stride))
                widths.append((0, 0))
                continue
            width = (0, 0) if a.mode == "zeros" else (a.low, a.high)
            repeats.append((0, 0))
            padding.append((before + width[0], after + width[1]))
            widths.append(width)
        x = _padded(x, self.axes, repeats)
        dilation = [a.stride for a in self.axes]
        y = self._convolved(x, padding, lhs_dilation=dilation)
        if not any(map(any, widths)):
            return y
        # What was read from the padding belongs to where the padding had it from.
        (y,) = jax.linear_transpose(
            lambda x: _padded(x, self.axes, widths), self.out_structure()
        )(y)
        return y

    def _convolved(
        self,
        x: Inexact[Array, "in *size"],
        padding: list[tuple[int, int]],
        *,
        strides: list[int] | None = None,
        lhs_dilation: list[int] | None = None,
    ) -> Inexact[Array, "out *sizes"]:
        ones = [1] * len(self.axes)
        y = lax.conv_general_dilated(
            x[None],
            self.weight,
            window_strides=ones if strides is None else strides,
            padding=padding,
            lhs_dilation=lhs_dilation,
            rhs_dilation=[axis.dilation for axis in self.axes],
            feature_group_count=self.groups,
        )
        return y[0]


def _padded(
    x: Inexact[Array, "channels *size"],
    axes: tuple[Axis, ...],
    widths: list[tuple[int, int]],
) -> Inexact[Array, "channels *sizes"]:
    """With some entries more on either side, on all axes in the one mode there is."""
    modes = {a.mode for a, width in zip(axes, widths, strict=True) if any(width)}
    return jnp.pad(x, [(0, 0), *widths], *modes) if modes else x


def _transposed(
    kernel: Inexact[Array, "groups out in *taps"],
) -> Inexact[Array, "groups in out *taps"]:
    kernel = jnp.swapaxes(kernel, 1, 2)
    return jnp.flip(kernel, axis=tuple(range(3, kernel.ndim)))


register_without_structure(Convolution)


@lx.conj.register
def _(operator: Convolution) -> Convolution:
    return eqx.tree_at(lambda o: o.weight, operator, jnp.conj(operator.weight))
