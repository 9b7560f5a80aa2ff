"""Equinox's linear layers and convolutions with their norm under a constraint."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import equinox as eqx
from jaxtyping import PRNGKeyArray

from .._constraints import AbstractConstraint, Normalize
from .._norms import AbstractEstimator, PowerIteration
from .._wrap import with_constraints
from .._wrapped import Wrapped


class SpectralLinear(Wrapped):
    """`equinox.nn.Linear` with a constrained weight: `y = W̃ x + b`, where `W̃` is the
    weight `W` after `constraint`, by default `W / sigma(W)`.

    The same as `spectrax.wrap(eqx.nn.Linear(...))`, with the same raw weights for the
    same `key`. Its Lipschitz constant from the Euclidean norm to the Euclidean norm is
    the norm of `W̃`, which the constraint bounds. The bias plays no part in it.

    **Kind:** as the estimator's; see [`spectrax.unwrap`][].

    **Arguments:**

    - `in_features`: the length of the input `[in_features]`, or `"scalar"` for `[]`.
    - `out_features`: the length of the output, likewise.
    - `use_bias`: whether to add a bias.
    - `dtype`: of the weight and the bias. By default JAX's floating-point dtype.
    - `constraint`: what is done with the norm, as in [`spectrax.wrap`][].
    - `estimator`: how the norm is found, as in `wrap`.
    - `key`: randomness of the initial weights.

    A [`spectrax.Wrapped`][], called as `y, state = layer(x, state)`.

    **Cost:** that of `wrap`.

    **Raises:** what `equinox.nn.Linear` and `wrap` raise.

    **Source:** Miyato et al. (2018), equation 8.

    !!! Example

        ```python
        import equinox as eqx
        import jax
        import spectrax

        make = eqx.nn.make_with_state(spectrax.nn.SpectralLinear)
        layer, state = make(64, 128, key=jax.random.key(0))
        y, state = layer(jax.numpy.ones(64), state)
        ```
    """

    def __init__(
        self,
        in_features: int | Literal["scalar"],
        out_features: int | Literal["scalar"],
        use_bias: bool = True,  # noqa: FBT001, FBT002
        dtype: Any = None,
        *,
        constraint: AbstractConstraint = Normalize(),
        estimator: AbstractEstimator = PowerIteration(),
        key: PRNGKeyArray,
    ):
        layer = eqx.nn.Linear(in_features, out_features, use_bias, dtype, key=key)
        module = with_constraints(layer, constraint=constraint, estimator=estimator)
        super().__init__(module)


class AbstractSpectralConv(Wrapped):
    """A convolution of Equinox whose kernel is constrained: by default divided by the
    norm of the convolution. Abstract: what [`spectrax.nn.SpectralConv1d`][],
    [`spectrax.nn.SpectralConv2d`][] and [`spectrax.nn.SpectralConv3d`][] share.

    The same as `spectrax.wrap(eqx.nn.Conv2d(...))`, with the same raw weights for the
    same `key`. What is bounded is the norm of the map that the layer computes, with its
    stride, padding, dilation and groups, and so its Lipschitz constant in the Euclidean
    norm; not the norm of the flattened kernel.

    A [`spectrax.Wrapped`][], called as `y, state = layer(x, state)`.

    **Kind:** as the estimator's; see [`spectrax.unwrap`][].

    **Arguments:**

    - `in_channels`: channels of the input `[in_channels, *sizes]`.
    - `out_channels`: channels of the output.
    - `kernel_size`: of the kernel, a number or one for each spatial axis.
    - `stride`: likewise.
    - `padding`: a number, one or a pair for each axis, `"SAME"`, `"SAME_LOWER"` or
        `"VALID"`.
    - `dilation`: a number or one for each axis.
    - `groups`: the number of groups of channels.
    - `use_bias`: whether to add a bias to each channel.
    - `padding_mode`: `"ZEROS"`, `"REFLECT"`, `"REPLICATE"` or `"CIRCULAR"`.
    - `dtype`: of the kernel and the bias. By default JAX's floating-point dtype.
    - `constraint`: what is done with the norm, as in [`spectrax.wrap`][].
    - `estimator`: how the norm is found, as in `wrap`.
    - `input_size`: the spatial sizes of the input for which the norm is to be bounded.
        By default at every size.
    - `key`: randomness of the initial weights.

    Of each class: `kind`, Equinox's class of the layer.

    **Cost:** that of `wrap`.

    **Raises:** what Equinox's layer and `wrap` raise.
    """

    kind: eqx.AbstractClassVar[type[eqx.nn.Conv1d | eqx.nn.Conv2d | eqx.nn.Conv3d]]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
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
    ):
        layer = self.kind(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            use_bias,
            padding_mode,
            dtype,
            key=key,
        )
        module = with_constraints(
            layer, constraint=constraint, estimator=estimator, input_size=input_size
        )
        super().__init__(module)


class SpectralConv1d(AbstractSpectralConv):
    """`equinox.nn.Conv1d` with a constrained kernel, for inputs
    `[in_channels, length]`.

    **Arguments:** those of [`spectrax.nn.AbstractSpectralConv`][], with `input_size` as
    `(length,)`.

    !!! Example

        ```python
        import equinox as eqx
        import jax
        import spectrax

        make = eqx.nn.make_with_state(spectrax.nn.SpectralConv1d)
        layer, state = make(2, 4, 4, stride=2, padding=1, key=jax.random.key(0))
        y, state = layer(jax.numpy.ones((2, 8)), state)
        ```
    """

    kind: ClassVar = eqx.nn.Conv1d
    # Said again, as type checkers would take it for a dataclass's.
    __init__ = AbstractSpectralConv.__init__


class SpectralConv2d(AbstractSpectralConv):
    """`equinox.nn.Conv2d` with a constrained kernel, for inputs
    `[in_channels, height, width]`.

    **Arguments:** those of [`spectrax.nn.AbstractSpectralConv`][], with `input_size` as
    `(height, width)`.

    !!! Example

        ```python
        import equinox as eqx
        import jax
        import spectrax

        make = eqx.nn.make_with_state(spectrax.nn.SpectralConv2d)
        layer, state = make(2, 4, 3, padding=1, key=jax.random.key(0))
        y, state = layer(jax.numpy.ones((2, 4, 4)), state)
        ```
    """

    kind: ClassVar = eqx.nn.Conv2d
    # Said again, as type checkers would take it for a dataclass's.
    __init__ = AbstractSpectralConv.__init__


class SpectralConv3d(AbstractSpectralConv):
    """`equinox.nn.Conv3d` with a constrained kernel, for inputs
    `[in_channels, depth, height, width]`.

    **Arguments:** those of [`spectrax.nn.AbstractSpectralConv`][], with `input_size` as
    `(depth, height, width)`.

    !!! Example

        ```python
        import equinox as eqx
        import jax
        import spectrax

        make = eqx.nn.make_with_state(spectrax.nn.SpectralConv3d)
        layer, state = make(2, 4, 2, stride=2, key=jax.random.key(0))
        y, state = layer(jax.numpy.ones((2, 4, 4, 4)), state)
        ```
    """

    kind: ClassVar = eqx.nn.Conv3d
    # Said again, as type checkers would take it for a dataclass's.
    __init__ = AbstractSpectralConv.__init__
