"""Equinox's transposed convolutions with their norm under a constraint."""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
from jaxtyping import PRNGKeyArray

from .._constraints import AbstractConstraint, Normalize
from .._norms import AbstractEstimator, PowerIteration
from .._wrap import wrap
from .._wrapped import Wrapped


def SpectralConvTranspose1d(
    in_channels: int,
    out_channels: int,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    output_padding: int | Sequence[int] = 0,
    padding: str | int | Sequence[int] | Sequence[tuple[int, int]] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    use_bias: bool = True,  # noqa: FBT001, FBT002
    padding_mode: str = "ZEROS",
    dtype: Any = None,
    *,
    constraint: AbstractConstraint = Normalize(),
    estimator: AbstractEstimator = PowerIteration(),
    input_size: Sequence[int] | None = None,
    key: PRNGKeyArray,
) -> Wrapped:
    """`equinox.nn.ConvTranspose1d` whose kernel is constrained: by default
    divided by the norm of the transposed convolution.

    The same as `spectrax.wrap(eqx.nn.ConvTranspose1d(...))`, with the same raw weights
    for the same `key`. What is bounded is the norm of the map that the layer computes,
    with its stride, padding, dilation and groups, and so its Lipschitz constant in the
    Euclidean norm; not the norm of the flattened kernel.

    **Kind:** as the estimator's; see [`spectrax.unwrap`][].

    **Arguments:**

    - `in_channels`: channels of the input `[in_channels, length]`.
    - `out_channels`: channels of the output.
    - `kernel_size`: of the kernel, a number or one for each spatial axis.
    - `stride`: likewise.
    - `output_padding`: added to one side of the output, less than the stride.
    - `padding`: a number, one or a pair for each axis, `"SAME"`, `"SAME_LOWER"` or
        `"VALID"`.
    - `dilation`: a number or one for each axis.
    - `groups`: the number of groups of channels.
    - `use_bias`: whether to add a bias to each channel.
    - `padding_mode`: `"ZEROS"` or, with `padding="SAME"`, `"CIRCULAR"`.
    - `dtype`: of the kernel and the bias. By default JAX's floating-point dtype.
    - `constraint`: what is done with the norm, as in [`spectrax.wrap`][].
    - `estimator`: how the norm is found, as in `wrap`.
    - `input_size`: the spatial sizes `(length)` of the input for
        which the norm is to be bounded. By default at every size.
    - `key`: randomness of the initial weights.

    **Returns:**

    A [`spectrax.Wrapped`][], called as `y, state = layer(x, state)`.

    **Cost:** that of `wrap`.

    **Raises:** what `equinox.nn.ConvTranspose1d` and `wrap` raise.

    !!! Example

        ```python
        import equinox as eqx
        import jax
        import spectrax

        make = eqx.nn.make_with_state(spectrax.nn.SpectralConvTranspose1d)
        layer, state = make(4, 2, 4, stride=2, padding=1, key=jax.random.key(0))
        y, state = layer(jax.numpy.ones((4, 4)), state)
        ```
    """
    layer = eqx.nn.ConvTranspose1d(
        in_channels,
        out_channels,
        kernel_size,
        stride,
        output_padding,
        padding,
        dilation,
        groups,
        use_bias,
        padding_mode,
        dtype,
        key=key,
    )
    return wrap(
        layer, constraint=constraint, estimator=estimator, input_size=input_size
    )


def SpectralConvTranspose2d(
    in_channels: int,
    out_channels: int,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    output_padding: int | Sequence[int] = 0,
    padding: str | int | Sequence[int] | Sequence[tuple[int, int]] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    use_bias: bool = True,  # noqa: FBT001, FBT002
    padding_mode: str = "ZEROS",
    dtype: Any = None,
    *,
    constraint: AbstractConstraint = Normalize(),
    estimator: AbstractEstimator = PowerIteration(),
    input_size: Sequence[int] | None = None,
    key: PRNGKeyArray,
) -> Wrapped:
    """`equinox.nn.ConvTranspose2d` whose kernel is constrained: by default
    divided by the norm of the transposed convolution.

    The same as `spectrax.wrap(eqx.nn.ConvTranspose2d(...))`, with the same raw weights
    for the same `key`. What is bounded is the norm of the map that the layer computes,
    with its stride, padding, dilation and groups, and so its Lipschitz constant in the
    Euclidean norm; not the norm of the flattened kernel.

    **Kind:** as the estimator's; see [`spectrax.unwrap`][].

    **Arguments:**

    - `in_channels`: channels of the input `[in_channels, height, width]`.
    - `out_channels`: channels of the output.
    - `kernel_size`: of the kernel, a number or one for each spatial axis.
    - `stride`: likewise.
    - `output_padding`: added to one side of the output, less than the stride.
    - `padding`: a number, one or a pair for each axis, `"SAME"`, `"SAME_LOWER"` or
        `"VALID"`.
    - `dilation`: a number or one for each axis.
    - `groups`: the number of groups of channels.
    - `use_bias`: whether to add a bias to each channel.
    - `padding_mode`: `"ZEROS"` or, with `padding="SAME"`, `"CIRCULAR"`.
    - `dtype`: of the kernel and the bias. By default JAX's floating-point dtype.
    - `constraint`: what is done with the norm, as in [`spectrax.wrap`][].
    - `estimator`: how the norm is found, as in `wrap`.
    - `input_size`: the spatial sizes `(height, width)` of the input for
        which the norm is to be bounded. By default at every size.
    - `key`: randomness of the initial weights.

    **Returns:**

    A [`spectrax.Wrapped`][], called as `y, state = layer(x, state)`.

    **Cost:** that of `wrap`.

    **Raises:** what `equinox.nn.ConvTranspose2d` and `wrap` raise.

    !!! Example

        ```python
        import equinox as eqx
        import jax
        import spectrax

        make = eqx.nn.make_with_state(spectrax.nn.SpectralConvTranspose2d)
        layer, state = make(4, 2, 3, padding=1, key=jax.random.key(0))
        y, state = layer(jax.numpy.ones((4, 4, 4)), state)
        ```
    """
    layer = eqx.nn.ConvTranspose2d(
        in_channels,
        out_channels,
        kernel_size,
        stride,
        output_padding,
        padding,
        dilation,
        groups,
        use_bias,
        padding_mode,
        dtype,
        key=key,
    )
    return wrap(
        layer, constraint=constraint, estimator=estimator, input_size=input_size
    )


def SpectralConvTranspose3d(
    in_channels: int,
    out_channels: int,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    output_padding: int | Sequence[int] = 0,
    padding: str | int | Sequence[int] | Sequence[tuple[int, int]] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    use_bias: bool = True,  # noqa: FBT001, FBT002
    padding_mode: str = "ZEROS",
    dtype: Any = None,
    *,
    constraint: AbstractConstraint = Normalize(),
    estimator: AbstractEstimator = PowerIteration(),
    input_size: Sequence[int] | None = None,
    key: PRNGKeyArray,
) -> Wrapped:
    """`equinox.nn.ConvTranspose3d` whose kernel is constrained: by default
    divided by the norm of the transposed convolution.

    The same as `spectrax.wrap(eqx.nn.ConvTranspose3d(...))`, with the same raw weights
    for the same `key`. What is bounded is the norm of the map that the layer computes,
    with its stride, padding, dilation and groups, and so its Lipschitz constant in the
    Euclidean norm; not the norm of the flattened kernel.

    **Kind:** as the estimator's; see [`spectrax.unwrap`][].

    **Arguments:**

    - `in_channels`: channels of the input `[in_channels, depth, height, width]`.
    - `out_channels`: channels of the output.
    - `kernel_size`: of the kernel, a number or one for each spatial axis.
    - `stride`: likewise.
    - `output_padding`: added to one side of the output, less than the stride.
    - `padding`: a number, one or a pair for each axis, `"SAME"`, `"SAME_LOWER"` or
        `"VALID"`.
    - `dilation`: a number or one for each axis.
    - `groups`: the number of groups of channels.
    - `use_bias`: whether to add a bias to each channel.
    - `padding_mode`: `"ZEROS"` or, with `padding="SAME"`, `"CIRCULAR"`.
    - `dtype`: of the kernel and the bias. By default JAX's floating-point dtype.
    - `constraint`: what is done with the norm, as in [`spectrax.wrap`][].
    - `estimator`: how the norm is found, as in `wrap`.
    - `input_size`: the spatial sizes `(depth, height, width)` of the input for
        which the norm is to be bounded. By default at every size.
    - `key`: randomness of the initial weights.

    **Returns:**

    A [`spectrax.Wrapped`][], called as `y, state = layer(x, state)`.

    **Cost:** that of `wrap`.

    **Raises:** what `equinox.nn.ConvTranspose3d` and `wrap` raise.

    !!! Example

        ```python
        import equinox as eqx
        import jax
        import spectrax

        make = eqx.nn.make_with_state(spectrax.nn.SpectralConvTranspose3d)
        layer, state = make(4, 2, 2, stride=2, key=jax.random.key(0))
        y, state = layer(jax.numpy.ones((4, 4, 4, 4)), state)
        ```
    """
    layer = eqx.nn.ConvTranspose3d(
        in_channels,
        out_channels,
        kernel_size,
        stride,
        output_padding,
        padding,
        dilation,
        groups,
        use_bias,
        padding_mode,
        dtype,
        key=key,
    )
    return wrap(
        layer, constraint=constraint, estimator=estimator, input_size=input_size
    )
