"""Activations that keep gradients as long as they are."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from .._rules import register_layer
from ._lipschitz import EXACT_GELU, register_lipschitz_constant, TANH_GELU


def max_min(x: Float[Array, "..."], *, axis: int = 0) -> Float[Array, "..."]:
    """The larger and the smaller of each two neighbouring channels, in this order.

    `y[2i] = max(x[2i], x[2i + 1])` and `y[2i + 1] = min(x[2i], x[2i + 1])` (Anil et al.
    2019, section 4.2; MaxMin of Chernodub and Nowicki 2016).

    **Lipschitz constant:** 1, exactly, in every p-norm. The entries are those of `x` in
    another order, so that where it is differentiable, derivatives keep their length.

    **Arguments:**

    - `x`: an array with an even number of channels.
    - `axis`: that of the channels; the first, as in Equinox.

    **Returns:**

    An array of the same shape.

    **Cost:** two comparisons for each pair.

    **Raises:** `ValueError` if the number of channels is odd.

    !!! Example

        ```python
        import jax.numpy as jnp
        import spectrax

        print(spectrax.nn.max_min(jnp.array([1.0, 2.0, 4.0, 3.0])))  # [2. 1. 4. 3.]
        ```
    """
    first, second = _in_groups(x, 2, axis)
    larger, smaller = jnp.maximum(first, second), jnp.minimum(first, second)
    return _out_of_groups(jnp.stack([larger, smaller]), axis)


def group_sort(
    x: Float[Array, "..."], group_size: int, *, axis: int = 0
) -> Float[Array, "..."]:
    """Sorts the channels within groups of neighbours, the largest first (Anil et al.
    2019, section 4.2).

    With `group_size=2` it is [`spectrax.nn.max_min`][], and with all channels in one
    group the whole vector is sorted.

    **Lipschitz constant:** 1, exactly, in every p-norm. The entries are those of `x` in
    another order, so that where it is differentiable, derivatives keep their length.

    **Arguments:**

    - `x`: an array whose number of channels is a multiple of `group_size`.
    - `group_size`: channels in a group.
    - `axis`: that of the channels; the first, as in Equinox.

    **Returns:**

    An array of the same shape.

    **Cost:** a sort of each group.

    **Raises:** `ValueError` if `group_size` is below 1 or does not divide the number of
    channels.

    !!! Example

        ```python
        import jax.numpy as jnp
        import spectrax

        x = jnp.array([1.0, 2.0, 3.0, 5.0, 6.0, 4.0])
        print(spectrax.nn.group_sort(x, 3))  # [3. 2. 1. 6. 5. 4.]
        ```
    """
    groups = _in_groups(x, group_size, axis)
    return _out_of_groups(jnp.sort(groups, axis=0, descending=True), axis)


class HouseholderActivation(eqx.Module):
    """Reflects pairs of neighbouring channels that lie on one side of a line (Singla et
    al. 2021, section 5).

    With the unit vector `v = (sin(t/2), -cos(t/2))` of a pair, `y = x` where
    `v . x > 0`, and `y = x - 2 v (v . x)` elsewhere. The angles `t` are trained. At
    `t = pi/2`, where they start, it is [`spectrax.nn.max_min`][].

    **Lipschitz constant:** 1, exactly, in the 2-norm, whatever the angles. Where it is
    differentiable its Jacobian is orthogonal.

    **Arguments:**

    - `size`: the number of channels, even.
    - `angle`: where the angles start, in radians: one number, or one for each pair.
    - `axis`: that of the channels; the first, as in Equinox.

    In it is also `angles`, of shape `[size // 2]`.

    **Raises:** `ValueError` if `size` is odd or below 2; when it is called, if the
    input has another number of channels.

    !!! Example

        ```python
        import jax.numpy as jnp
        import spectrax

        activation = spectrax.nn.HouseholderActivation(4)
        print(activation(jnp.array([1.0, 2.0, 4.0, 3.0])))  # [2. 1. 4. 3.]
        ```
    """

    angles: Float[Array, " pairs"]
    size: int = eqx.field(static=True)
    axis: int = eqx.field(static=True)

    def __init__(
        self,
        size: int,
        *,
        angle: float | int | Float[Array, "..."] = math.pi / 2,
        axis: int = 0,
    ):
        if size < 2 or size % 2 != 0:
            raise ValueError(
                f"expected `size` to be even and at least 2, got {size}: channels are "
                "reflected in pairs."
            )
        self.angles = jnp.full(size // 2, angle, dtype=float)
        self.size = size
        self.axis = axis

    def __call__(
        self, x: Float[Array, "..."], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "..."]:
        """**Arguments:**

        - `x`: an array with `size` channels along `axis`.
        - `key`: not used; so that it can stand in `equinox.nn.Sequential`.

        **Returns:** an array of the same shape.
        """
        del key
        if x.ndim == 0 or x.shape[self.axis] != self.size:
            raise ValueError(
                f"expected {self.size} channels along axis {self.axis}, got shape "
                f"{x.shape}."
            )
        first, second = _in_groups(x, 2, self.axis)
        beside = (1,) * (x.ndim - 1)
        half = (self.angles / 2).astype(x.dtype).reshape(-1, *beside)
        sin, cos = jnp.sin(half), jnp.cos(half)
        # The pairs are the first axis of each of the two.
        along = jnp.minimum(sin * first - cos * second, 0)
        pair = jnp.stack([first - 2 * sin * along, second + 2 * cos * along])
        return _out_of_groups(pair, self.axis)


def scaled_gelu(
    x: Float[Array, "..."], *, approximate: bool = True
) -> Float[Array, "..."]:
    """GELU divided by its Lipschitz constant.

    The derivative of GELU is largest at `sqrt(2)`, where it is
    `(1 + erf(1)) / 2 + exp(-1) / sqrt(pi) = 1.128904...`; with the approximation by a
    hyperbolic tangent the largest is `1.128993...`, at `1.4185...`.

    **Lipschitz constant:** 1, exactly, in every p-norm.

    **Arguments:**

    - `x`: an array of any shape.
    - `approximate`: as in `jax.nn.gelu`.

    **Returns:**

    An array of the same shape.

    **Raises:** nothing.

    !!! Example

        ```python
        import jax
        import jax.numpy as jnp
        import spectrax

        print(jax.grad(spectrax.nn.scaled_gelu)(jnp.array(1.4185)))  # 1.0
        ```
    """
    constant = TANH_GELU if approximate else EXACT_GELU
    return jax.nn.gelu(x, approximate=approximate) / constant


def _in_groups(
    x: Float[Array, "..."], group_size: int, axis: int
) -> Float[Array, "group_size groups ..."]:
    """The first axis runs within a group."""
    channels = x.shape[axis] if x.ndim > 0 else 0
    if group_size < 1 or channels == 0 or channels % group_size != 0:
        raise ValueError(
            f"expected a multiple of {group_size} channels along axis {axis}, to be "
            f"taken in groups of {group_size}, got shape {x.shape}. Choose another "
            "group size, or another number of channels."
        )
    x = jnp.moveaxis(x, axis, 0)
    return jnp.moveaxis(x.reshape(-1, group_size, *x.shape[1:]), 1, 0)


def _out_of_groups(
    groups: Float[Array, "group_size groups ..."], axis: int
) -> Float[Array, "..."]:
    x = jnp.moveaxis(groups, 0, 1)
    return jnp.moveaxis(x.reshape(-1, *x.shape[2:]), 0, axis)


def _of_scaled_gelu(approximate: bool = True) -> float:  # noqa: FBT001, FBT002
    del approximate
    return 1.0


def _of_max_min(axis: int = 0) -> float:
    del axis
    return 1.0


def _of_group_sort(group_size: int, axis: int = 0) -> float:
    del group_size, axis
    return 1.0


register_lipschitz_constant(max_min, _of_max_min)
register_lipschitz_constant(group_sort, _of_group_sort)
register_lipschitz_constant(scaled_gelu, _of_scaled_gelu)
register_lipschitz_constant(HouseholderActivation, 1.0)
register_layer(HouseholderActivation, ())
