"""Normalization of batches that divides by nothing."""

from collections.abc import Hashable, Sequence

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from .._dtypes import at_least_float32
from .._rules import register_layer
from ._lipschitz import register_lipschitz_constant


class BatchCentering(eqx.nn.StatefulLayer):
    """Subtracts the mean of each channel over the batch: `equinox.nn.BatchNorm` without
    the division by a standard deviation, which has no Lipschitz constant.

    While training, the mean is that over the batch and over all axes but the channels.
    At inference it is a running mean of those, in the state.

    **Lipschitz constant:** 1, exactly, in the 2-norm. While training, of the map from
    the whole batch to the whole batch, as an orthogonal projection (to which a bias is
    added): one output depends on all inputs. At inference, of the map of each input
    alone, as a translation.

    To be used inside of a `jax.vmap` with the same `axis_name`.

    **Arguments:**

    - `size`: the number of channels, the first axis of the input.
    - `axis_name`: the name of the batch axis, or a sequence of names.
    - `momentum`: how much of the running mean remains at each call, in `[0, 1)`.
    - `use_bias`: whether to add a trained bias to each channel.
    - `inference`: if `True`, the running mean is used and does not change. Set by
        `equinox.nn.inference_mode`.

    In it are also `bias` and the `memory` of the state.

    **Raises:** `ValueError` if `momentum` is not in `[0, 1)`; when it is called, if the
    number of channels is another. `NameError`, by JAX, outside of such a `jax.vmap`
    while training.

    !!! Example

        ```python
        import equinox as eqx
        import jax
        import spectrax

        make = eqx.nn.make_with_state(spectrax.nn.BatchCentering)
        layer, state = make(3, "batch")
        x = jax.random.normal(jax.random.key(0), (16, 3, 8, 8))
        batch = jax.vmap(
            layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None)
        )
        y, state = batch(x, state)  # each channel of y has mean 0
        ```
    """  # noqa: E501

    bias: Float[Array, " size"] | None
    memory: eqx.nn.StateIndex[tuple[Float[Array, " size"], Int[Array, ""]]]
    axis_name: Hashable | Sequence[Hashable] = eqx.field(static=True)
    momentum: float = eqx.field(static=True)
    size: int = eqx.field(static=True)
    inference: bool

    def __init__(
        self,
        size: int,
        axis_name: Hashable | Sequence[Hashable],
        *,
        momentum: float | int = 0.99,
        use_bias: bool = True,
        inference: bool = False,
    ):
        if not 0 <= momentum < 1:
            raise ValueError(
                f"expected `momentum` to be in [0, 1), got {momentum}. At 1 the "
                "running mean would stay at zero."
            )
        self.bias = jnp.zeros(size) if use_bias else None
        self.memory = eqx.nn.StateIndex((jnp.zeros(size), jnp.asarray(0)))
        # A static field has to be hashable.
        several = isinstance(axis_name, list)
        self.axis_name = tuple(axis_name) if several else axis_name
        self.momentum = momentum
        self.size = size
        self.inference = inference

    def __call__(
        self,
        x: Float[Array, "size *rest"],
        state: eqx.nn.State,
        *,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "size *rest"], eqx.nn.State]:
        """**Arguments:**

        - `x`: one input, an array of shape `[size, *rest]`.
        - `state`: with the running mean.
        - `key`: not used; so that it can stand in `equinox.nn.Sequential`.

        **Returns:** an array of the same shape, and the new state.
        """
        del key
        if x.ndim == 0 or x.shape[0] != self.size:
            raise ValueError(
                f"expected {self.size} channels on the first axis, got shape {x.shape}."
            )
        total, count = state.get(self.memory)
        if self.inference:
            # The running mean starts at zero: without its share, as in Adam.
            seen = 1 - self.momentum ** count.astype(total.dtype)
            mean = total / jnp.where(count == 0, 1, seen)
        else:
            wide = x.astype(at_least_float32(x.dtype))
            mean = lax.pmean(
                jnp.mean(wide, axis=tuple(range(1, x.ndim))), self.axis_name
            )
            kept = self.momentum * total
            total = kept + (1 - self.momentum) * mean.astype(total.dtype)
            state = state.set(self.memory, (lax.stop_gradient(total), count + 1))
        shift = -mean if self.bias is None else self.bias - mean.astype(self.bias.dtype)
        shift = shift.astype(x.dtype).reshape(-1, *(1,) * (x.ndim - 1))
        return x + shift, state


register_lipschitz_constant(BatchCentering, 1.0)
register_layer(BatchCentering, ())
