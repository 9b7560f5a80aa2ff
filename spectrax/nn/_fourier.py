"""The layer of the Fourier neural operator."""

import math
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Complex, Float, PRNGKeyArray

from .._dtypes import at_least_float32, widest
from .._operators import fourier_multiplier, FourierMultiplier
from .._rules import register_layer


class FourierLayer(eqx.Module):
    """The integral operator of the Fourier neural operator (Li et al. 2021, section 4),
    for functions on a periodic grid: of the discrete Fourier transform of the input it
    keeps the low frequencies `k`, multiplies the channels at each by a complex matrix,

        y = irfft(S(k) rfft(x)(k)),    |k_j| < modes[j],

    and drops all others. With `use_bypass=True` those are multiplied by a real matrix
    `W` instead of being dropped, and `S(k) + W` acts on the kept ones: the layer is
    then the sum of the integral operator and of a pointwise linear map, as in each
    block of Li et al. (2021, equation 2), as one operator with one weight.

    The matrices do not depend on the grid: the layer can be called at any resolution.
    The frequencies that a grid with `n` points carries without ambiguity are those up
    to `(n - 1) // 2`. Kept ones beyond that (that of Nyquist too) are left out on that
    grid, so that nothing is aliased.

    **Symbol:** a real input has the coefficient `conj(x(k))` at `-k`, and so must the
    output. Only frequencies with `k_last >= 0` have a matrix `R(k)` in the weight.
    Where `k_last = 0`, both `k` and `-k` have one, and the inverse transform to real
    numbers can only keep `S(k) = (R(k) + conj(R(-k))) / 2`, at zero the real part;
    elsewhere `S(k) = R(k)`. This `S`, the symbol, is what the layer and its norm are
    made of.

    **Norm:** exact, `max_k |S(k)|`, with a bypass `max(|W|, max_k |S(k) + W|)`, in the
    Euclidean norm over channels and grid points and on every grid that carries all the
    kept frequencies (and another, with a bypass). Proof: the discrete Fourier transform
    is a multiple of a unitary map, and turns the layer, extended to complex inputs,
    into one matrix for each frequency, `S(k)` at `k` and `conj(S(k))` at `-k`; the norm
    of a block-diagonal map is the largest of its blocks', and that of a real map does
    not change when it is extended to complex inputs. On smaller grids there are fewer
    blocks, so that the norm can only be lower. [`spectrax.wrap`][] constrains it. What
    [`spectrax.enclose_norm`][] proves is of the symbol as it is computed, in float32 or
    wider, whose entries are at most two roundings away from what the weight defines.

    **Weight:** real numbers, `[coefficients, out_channels, in_channels]`: the real
    parts of all `R(k)`, then the imaginary parts, then `W` if there is one. Of a
    complex array JAX's gradient is the conjugate of the direction of steepest ascent,
    and ordinary optimizers such as those of optax would walk the wrong way in the
    imaginary parts. Frequencies are in the order of `jax.numpy.fft.rfftn`: along all
    axes but the last `0, ..., m - 1, -(m - 1), ..., -1`, along the last
    `0, ..., m - 1`.

    **Arguments:**

    - `num_spatial_dims`: 1, 2 or 3; the number of axes of the grid.
    - `in_channels`, `out_channels`: the channels of the input and of the output.
    - `modes`: how many frequencies to keep, `0` to `modes - 1` and their opposites. One
        number for all axes of the grid, or one for each.
    - `use_bypass`: whether to add a pointwise linear map.
    - `use_bias`: whether to add a vector, the same at every point.
    - `dtype`: of the weight, a real floating-point dtype; JAX's default if not given.
    - `key`: randomness of the initial weight: uniform within
        `1 / sqrt(in_channels)` on either side of zero.

    Also stored: `weight` and `bias` (`None` without).

    **Cost:** two transforms of the input and a matrix product for each frequency.

    **Raises:** `ValueError` if `num_spatial_dims` is not 1, 2 or 3, if there are no
    channels or no modes, or if `modes` has another length; `TypeError` if `dtype` is
    not a real floating-point dtype.

    !!! Example

        ```python
        import equinox as eqx
        import jax
        import spectrax

        key = jax.random.key(0)
        layer = spectrax.nn.FourierLayer(2, 3, 4, modes=5, key=key)
        model, state = spectrax.constrain(layer)
        x = jax.random.normal(key, (3, 32, 48))
        y, state = model(x, state)  # [4, 32, 48]
        plain = spectrax.unwrap(model, state)
        box = spectrax.enclose_norm(spectrax.layer_operator(plain))
        print(box.lower, box.upper)  # around 1
        ```
    """

    weight: Float[Array, "*stack coefficients out in"]
    bias: Float[Array, "*stack out"] | None
    num_spatial_dims: int = eqx.field(static=True)
    in_channels: int = eqx.field(static=True)
    out_channels: int = eqx.field(static=True)
    modes: tuple[int, ...] = eqx.field(static=True)
    use_bypass: bool = eqx.field(static=True)
    use_bias: bool = eqx.field(static=True)

    def __init__(
        self,
        num_spatial_dims: int,
        in_channels: int,
        out_channels: int,
        modes: int | Sequence[int],
        *,
        use_bypass: bool = False,
        use_bias: bool = False,
        dtype: Any = None,
        key: PRNGKeyArray,
    ):
        dtype = jnp.zeros((), dtype).dtype
        _check(num_spatial_dims, in_channels, out_channels, dtype)
        self.num_spatial_dims = num_spatial_dims
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.modes = _per_axis(modes, num_spatial_dims)
        self.use_bypass = use_bypass
        self.use_bias = use_bias
        weight_key, bias_key = jr.split(key)
        limit = 1 / math.sqrt(in_channels)
        count = 2 * math.prod(_extents(self.modes)) + use_bypass
        shape = count, out_channels, in_channels
        self.weight = jr.uniform(weight_key, shape, dtype, -limit, limit)
        self.bias = (
            jr.uniform(bias_key, (out_channels,), dtype, -limit, limit)
            if use_bias
            else None
        )

    def __call__(
        self, x: Float[Array, "in *grid"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "out *grid"]:
        """The layer at the resolution of the input. Use `jax.vmap` for a batch.

        **Arguments:**

        - `x`: `[in_channels, *grid]`, real, with any grid of `num_spatial_dims` axes.
        - `key`: ignored, for compatibility with other layers.

        **Returns:**

        An array `[out_channels, *grid]`.

        **Raises:** `ValueError` if `x` has another number of axes or of channels, or no
        entries; `TypeError` if it is complex.
        """
        del key
        self._check_input(x)
        dtype = at_least_float32(self.weight.dtype, x.dtype)
        weight, wide = self.weight.astype(dtype), x.astype(dtype)
        grid = x.shape[1:]
        axes = tuple(range(1, x.ndim))
        kept = [min(m, (n + 1) // 2) for m, n in zip(self.modes, grid, strict=True)]
        symbol = _low(_symbol(weight, self.modes), kept, first=0)
        modes = _low(jnp.fft.rfftn(wide, axes=axes), kept, first=1)
        image = jnp.einsum("...oi,i...->o...", symbol, modes)
        y = jnp.fft.irfftn(_widen(image, kept, grid), s=grid, axes=axes)
        if self.use_bypass:
            y = y + jnp.tensordot(weight[-1], wide, axes=1)
        if self.bias is not None:
            y = y + self.bias.astype(dtype).reshape(-1, *(1,) * len(grid))
        return y.astype(widest(self.weight.dtype, x.dtype))

    def _check_input(self, x: Array) -> None:
        expected = (self.in_channels, *self.num_spatial_dims * ("n",))
        if x.ndim != len(expected) or x.shape[0] != self.in_channels or x.size == 0:
            raise ValueError(
                "expected an input with channels and then the grid, of shape "
                f"({', '.join(map(str, expected))}), got {x.shape}. Use `jax.vmap` for "
                "a batch."
            )
        if jnp.iscomplexobj(x):
            raise TypeError(
                f"expected a real input, got one of dtype {x.dtype}. Pass the real and "
                "the imaginary part as channels of their own."
            )


def _check(num_spatial_dims: int, in_channels: int, out_channels: int, dtype: Any):
    if num_spatial_dims not in (1, 2, 3):
        raise ValueError(
            f"expected `num_spatial_dims` to be 1, 2 or 3, got {num_spatial_dims}."
        )
    if in_channels < 1 or out_channels < 1:
        raise ValueError(
            "expected at least one channel, got "
            f"in_channels={in_channels}, out_channels={out_channels}."
        )
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"expected `dtype` to be a real floating-point dtype, got {dtype}. The "
            "complex matrices are stored as their real and imaginary parts."
        )


def _per_axis(modes: int | Sequence[int], num_spatial_dims: int) -> tuple[int, ...]:
    several = isinstance(modes, Sequence)
    found = tuple(modes) if several else (modes,) * num_spatial_dims
    if len(found) != num_spatial_dims or min(found) < 1:
        raise ValueError(
            "expected `modes` to be a positive number, or one for each of the "
            f"{num_spatial_dims} axes of the grid, got {modes}."
        )
    return found


def _extents(modes: Sequence[int]) -> tuple[int, ...]:
    """How many frequencies are kept along each axis, those of both signs counted."""
    *others, last = modes
    return (*(2 * m - 1 for m in others), last)


def _symbol(
    weight: Float[Array, "coefficients out in"], modes: tuple[int, ...]
) -> Complex[Array, "*frequencies out in"]:
    """`S(k)`: the matrices `R(k)`, those at `k_last = 0` made to fit each other."""
    extents = _extents(modes)
    count = math.prod(extents)
    matrices = lax.complex(weight[:count], weight[count : 2 * count])
    matrices = matrices.reshape(*extents, *weight.shape[1:])
    axes = tuple(range(len(modes) - 1))
    last = len(axes)
    plane, rest = jnp.split(matrices, [1], axis=last)
    opposite = jnp.roll(jnp.flip(plane, axes), 1, axes)
    plane = (plane + jnp.conj(opposite)) / 2
    return jnp.concatenate([plane, rest], axis=last)


def _low(
    array: Complex[Array, "..."], kept: Sequence[int], *, first: int
) -> Complex[Array, "..."]:
    """The frequencies below `kept`, of an array with those of `rfftn` along the axes
    from `first` on.
    """
    *others, last = kept
    for axis, count in enumerate(others, start=first):
        ends = [lax.slice_in_dim(array, 0, count, axis=axis)]
        if count > 1:
            size = array.shape[axis]
            ends.append(lax.slice_in_dim(array, size - count + 1, size, axis=axis))
        array = jnp.concatenate(ends, axis=axis)
    return lax.slice_in_dim(array, 0, last, axis=first + len(others))


def _widen(
    modes: Complex[Array, "channels *kept"], kept: Sequence[int], grid: Sequence[int]
) -> Complex[Array, "channels *frequencies"]:
    """The inverse: with zeros at all other frequencies of the grid."""
    *others, _ = kept
    for axis, (count, size) in enumerate(zip(others, grid, strict=False), start=1):
        low, high = jnp.split(modes, [count], axis=axis)
        shape = list(modes.shape)
        shape[axis] = size - 2 * count + 1
        zeros = jnp.zeros(shape, modes.dtype)
        modes = jnp.concatenate([low, zeros, high], axis=axis)
    missing = grid[-1] // 2 + 1 - kept[-1]
    return jnp.pad(modes, [(0, 0)] * len(grid) + [(0, missing)])


def _operator(
    layer: FourierLayer, weight: Float[Array, "coefficients out in"]
) -> FourierMultiplier:
    """The layer as one matrix for each kept frequency, and one for all others."""
    matrices = _symbol(weight.astype(at_least_float32(weight.dtype)), layer.modes)
    matrices = matrices.reshape(-1, *weight.shape[1:])
    if layer.use_bypass:
        bypass = weight[-1:].astype(matrices.dtype)
        matrices = jnp.concatenate([matrices + bypass, bypass])
    return fourier_multiplier(jnp.moveaxis(matrices, 0, -1))


register_layer(FourierLayer, view=_operator, ndim=3)
