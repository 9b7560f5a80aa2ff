"""Equinox's transposed convolutions with their norm under a constraint."""

from collections.abc import Sequence
from typing import Any, ClassVar

import equinox as eqx
from jaxtyping import PRNGKeyArray

from .._constraints import AbstractConstraint, Normalize
from .._norms import AbstractEstimator, PowerIteration
from .._wrap import with_constraints
from .._wrapped import Wrapped


class AbstractSpectralConvTranspose(Wrapped):
    """A transposed convolution of Equinox whose kernel is constrained: by default
    divided by the norm of the transposed convolution. Abstract: what
    [`spectrax.nn.SpectralConvTranspose1d`][],
    [`spectrax.nn.SpectralConvTranspose2d`][] and
    [`spectrax.nn.SpectralConvTranspose3d`][] share.

    What is bounded, how it is called, kind, cost and what is raised are as with
    [`spectrax.nn.AbstractSpectralConv`][].

    **Arguments:** those of [`spectrax.nn.AbstractSpectralConv`][], with one more after
    `stride` and fewer modes:

    - `output_padding`: added to one side of the output, less than the stride.
    - `padding_mode`: `"ZEROS"` or, with `padding="SAME"`, `"CIRCULAR"`.
    """

    kind: eqx.AbstractClassVar[
        type[eqx.nn.ConvTranspose1d | eqx.nn.ConvTranspose2d | eqx.nn.ConvTranspose3d]
    ]

    def __init__(
        self,
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
    ):
        layer = self.kind(
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
        module = with_constraints(
            layer, constraint=constraint, estimator=estimator, input_size=input_size
        )
        super().__init__(module)


class SpectralConvTranspose1d(AbstractSpectralConvTranspose):
    """`equinox.nn.ConvTranspose1d` with a constrained kernel, for inputs
    `[in_channels, length]`.

    **Arguments:** those of [`spectrax.nn.AbstractSpectralConvTranspose`][], with
    `input_size` as `(length,)`.

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

    kind: ClassVar = eqx.nn.ConvTranspose1d
    # Said again, as type checkers would take it for a dataclass's.
    __init__ = AbstractSpectralConvTranspose.__init__


class SpectralConvTranspose2d(AbstractSpectralConvTranspose):
    """`equinox.nn.ConvTranspose2d` with a constrained kernel, for inputs
    `[in_channels, height, width]`.

    **Arguments:** those of [`spectrax.nn.AbstractSpectralConvTranspose`][], with
    `input_size` as `(height, width)`.

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

    kind: ClassVar = eqx.nn.ConvTranspose2d
    # Said again, as type checkers would take it for a dataclass's.
    __init__ = AbstractSpectralConvTranspose.__init__


class SpectralConvTranspose3d(AbstractSpectralConvTranspose):
    """`equinox.nn.ConvTranspose3d` with a constrained kernel, for inputs
    `[in_channels, depth, height, width]`.

    **Arguments:** those of [`spectrax.nn.AbstractSpectralConvTranspose`][], with
    `input_size` as `(depth, height, width)`.

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

    kind: ClassVar = eqx.nn.ConvTranspose3d
    # Said again, as type checkers would take it for a dataclass's.
    __init__ = AbstractSpectralConvTranspose.__init__
