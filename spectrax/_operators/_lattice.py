"""A convolution at every input size at once.

On the infinite lattice a convolution is diagonalised by plane waves: at frequency `w`
it acts as the matrix `F(w) = sum_t K_t exp(i w.t)`, its symbol, and its norm is the
largest `sigma(F(w))`. A zero-padded convolution of any finite size, transposed or not,
is a compression of that operator, and a circular one has the norms of `F` on a grid of
frequencies, so the supremum over the frequencies bounds them all.
"""

import functools as ft
import math
from typing import cast

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array, Complex, Float, Inexact

from .._custom_types import DType
from .._dtypes import at_least_float32, real_dtype, unit_complex, widest
from ._products import accumulation_dtype


class LatticeConvolution(eqx.Module):
    """A convolution's linear part without an input size: on the infinite lattice.

    Its norm, `gain * max_w sigma(F(w))` over all frequencies `w` in `[0, 2 pi)^d`, is
    never below the norm of the convolution at any finite input size, and for zero
    padding it is the limit for large inputs. `F` is the symbol of the kernel after
    `stride` has been folded into channels (space to depth, which is unitary).

    `gain` is 1 for zero padding and for circular padding with stride 1. Other paddings
    repeat parts of the input, so that they can exceed the norm on the lattice, and
    `gain` is the factor by which that can happen over all input sizes; it is proven,
    not tight. Build the operator with `spectrax.layer_operator(layer, input_size=...)`
    if you know the size.

    It is not a `lineax` operator, as its vectors have no finite size. Its fields are
    data for the norms of this library; `spectrax.layer_operator` makes it.

    - `kernel`: `[groups, out, in, *taps]`, both channels per group, after `stride` has
        been folded.
    - `gain`: see above.

    **Raises:** `ValueError` if the kernel has no entries.
    """

    kernel: Inexact[Array, "groups out in *taps"]
    gain: float = eqx.field(static=True)

    def __check_init__(self) -> None:
        if 0 in self.kernel.shape:
            raise ValueError(
                "A convolution needs at least one group, one channel and one tap on "
                f"each axis, but its kernel has the shape {self.kernel.shape} "
                "`[groups, out, in, *taps]`."
            )

    def symbol(
        self, frequency: Float[Array, "points dim"]
    ) -> Complex[Array, "groups points out in"]:
        """The matrix `F(w)` of every group at each of the given frequencies."""
        phases = unit_complex(frequency @ self.tap_positions().T)
        groups, out, in_ = self.kernel.shape[:3]
        matrices = _product(phases, self.kernel.reshape(groups, out * in_, -1).mT)
        return matrices.reshape(groups, -1, out, in_)

    def amplitudes(
        self, u: Complex[Array, "points out"], v: Complex[Array, "points in"]
    ) -> Complex[Array, "points taps"]:
        """`u^H K_t v` for every tap `t` of a convolution with one group: what it has to
        be multiplied with `exp(i w.t)` to give `u^H F(w) v`.
        """
        _, out, in_ = self.kernel.shape[:3]
        partial = _product(jnp.conj(u), self.kernel[0].reshape(out, -1))
        partial = partial.reshape(u.shape[0], in_, -1)
        return jnp.einsum("pit,pi->pt", partial, v, precision="highest")

    def tap_positions(self) -> Float[Array, "taps dim"]:
        """The lattice points on which the kernel lives, one per row."""
        real = real_dtype(at_least_float32(self.kernel.dtype))
        axes = [jnp.arange(k, dtype=real) for k in self.kernel.shape[3:]]
        return jnp.stack(jnp.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(axes))

    @property
    def dim(self) -> int:
        """The number of spatial dimensions."""
        return self.kernel.ndim - 3


@accumulation_dtype.register
def _(operator: LatticeConvolution) -> DType:
    return widest(operator.kernel.dtype, jnp.complex64)


def _product(
    numbers: Complex[Array, "points a"], taps: Inexact[Array, "*groups a b"]
) -> Complex[Array, "*groups points b"]:
    """`numbers @ taps`. Real taps, a whole kernel, are not widened to complex ones."""
    if jnp.iscomplexobj(taps):
        return jnp.matmul(numbers, taps.astype(numbers.dtype), precision="highest")
    taps = taps.astype(real_dtype(numbers.dtype))
    both = jnp.concatenate([jnp.real(numbers), jnp.imag(numbers)])
    real, imaginary = jnp.split(jnp.matmul(both, taps, precision="highest"), 2, axis=-2)
    return lax.complex(real, imaginary)


def lattice_convolution(
    weight: Inexact[Array, "out in_per_group *taps"],
    *,
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    gain: float,
) -> LatticeConvolution:
    """The lattice operator of `equinox.nn.Conv` with this weight and configuration."""
    kernel = _folded(weight, stride=stride, dilation=dilation, groups=groups)
    return LatticeConvolution(kernel, gain)


def lattice_convolution_transpose(
    weight: Inexact[Array, "out in_per_group *taps"],
    *,
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> LatticeConvolution:
    """The same for `equinox.nn.ConvTranspose`.

    It is the transpose of a strided convolution from its output to its input, and an
    operator and its transpose have one norm. That convolution's kernel is also flipped,
    which turns a frequency into its opposite and so is left out.
    """
    out, in_per_group, *taps = weight.shape
    kernel = weight.reshape(groups, out // groups, in_per_group, *taps)
    kernel = jnp.swapaxes(kernel, 1, 2).reshape(
        groups * in_per_group, out // groups, *taps
    )
    return lattice_convolution(
        kernel, stride=stride, dilation=dilation, groups=groups, gain=1.0
    )


# One program where the caller is not compiled.
@ft.partial(jax.jit, static_argnames=("stride", "dilation", "groups"))
def _folded(
    weight: Inexact[Array, "out in_per_group *taps"],
    *,
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> Inexact[Array, "_groups _out _in *folded_taps"]:
    """The kernel of each group, with the stride in its input channels."""
    out, in_per_group, *taps = weight.shape
    kernel = weight.reshape(groups, out // groups, in_per_group, *taps)
    for axis, (s, d) in enumerate(zip(stride, dilation, strict=True), start=3):
        # Dilation alone only permutes the frequencies; with a stride it matters.
        if s > 1:
            kernel = _fold_stride(_dilate(kernel, axis, d), axis, s)
    return kernel


def _dilate(kernel: Array, axis: int, dilation: int) -> Array:
    config = [(0, 0, dilation - 1 if i == axis else 0) for i in range(kernel.ndim)]
    return lax.pad(kernel, jnp.zeros((), kernel.dtype), config)


def _fold_stride(kernel: Array, axis: int, stride: int) -> Array:
    """Writes tap `t = stride * a + r` as tap `a` of input channel `(channel, r)`."""
    extent = kernel.shape[axis]
    # A short kernel has no tap at some remainders.
    stride = min(stride, extent)
    blocks = math.ceil(extent / stride)
    pad = [(0, 0)] * kernel.ndim
    pad[axis] = (0, blocks * stride - extent)
    kernel = jnp.pad(kernel, pad)
    shape = (*kernel.shape[:axis], blocks, stride, *kernel.shape[axis + 1 :])
    kernel = jnp.moveaxis(kernel.reshape(shape), axis + 1, 3)
    shape = (*kernel.shape[:2], -1, *kernel.shape[4:])
    return kernel.reshape(cast(tuple[int, ...], shape))


def boundary_gain(
    padding_mode: str,
    padding: tuple[tuple[int, int], ...],
    extent: tuple[int, ...],
    stride: tuple[int, ...],
) -> float:
    """How far a padded convolution can exceed its lattice norm, over all input sizes.

    With `P` the total padding of an axis, `E` the kernel's extent less one, `s` the
    stride and `x` the unpadded signal:

    - zeros: the map is a compression of the lattice operator: 1.
    - circular: a stride-1 map is a circulant, of which at most `1 + max(0, P - E)`
        copies of each output exist. Striding keeps a subset of the outputs, and the
        stride-1 norm is at most `sqrt(s)` times the strided one.
    - reflect: the padded signal lies on the circle of `2n - 2` points, where every
        sample appears at most twice: a further `sqrt(2)`.
    - replicate: the padded signal, on the line, contains the edge samples
        `max(p_low, p_high) + 1` times; for inputs of size one the map is the sum of the
        taps, as in the circular case.
    """
    if padding_mode == "ZEROS":
        return 1.0
    gain = 1.0
    for (low, high), e, s in zip(padding, extent, stride, strict=True):
        if low == high == 0:
            continue
        circular = s * (1 + max(0, low + high - e))
        if padding_mode == "CIRCULAR":
            gain *= circular
        elif padding_mode == "REFLECT":
            gain *= 2 * circular
        else:
            gain *= max(max(low, high) + 1, circular)
    return math.sqrt(gain)
