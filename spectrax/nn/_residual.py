"""A residual connection that does not raise the Lipschitz constant."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._lipschitz import lipschitz_constant, register_lipschitz_constant


class ResidualAverage(eqx.Module):
    """The weighted average of a layer and the identity: `(1 - a) x + a f(x)`.

    The sum `x + f(x)` of a residual network has a Lipschitz constant of up to 2 where
    `f` has 1, and 2^depth after many; the average keeps it at 1.

    **Lipschitz constant:** at most `(1 - a) + a L`, in every norm, with `L` that of the
    layer; so 1 if the layer has 1 or less. `spectrax.nn.lipschitz_constant` gives it
    where it knows `L`.

    **Arguments:**

    - `layer`: a function or module `f` whose output has the shape of its input.
    - `weight`: `a`, in `[0, 1]`.
    - `learnable`: if `True`, the weight is trained, from `weight` on: it is
        `sigmoid(raw)`, which stays between 0 and 1.

    In it are also `raw`, `None` if nothing is trained, and `fixed`, the given weight.

    **Raises:** `ValueError` if `weight` is not in `[0, 1]`, or, for a learnable one, is
    0 or 1; when it is called, if the layer changes the shape.

    !!! Example

        ```python
        import equinox as eqx
        import jax
        import spectrax

        key = jax.random.key(0)
        block = spectrax.nn.ResidualAverage(eqx.nn.Linear(8, 8, key=key), 0.3)
        model, state = spectrax.constrain(block)
        y, state = model(jax.random.normal(key, (8,)), state)
        ```
    """

    layer: Callable[..., Any]
    raw: Float[Array, ""] | None
    fixed: float = eqx.field(static=True)

    def __init__(
        self,
        layer: Callable[..., Any],
        weight: float | int = 0.5,
        *,
        learnable: bool = False,
    ):
        if not 0 <= weight <= 1:
            raise ValueError(
                f"expected `weight` to be in [0, 1], got {weight}: outside, the "
                "average is an extrapolation and its Lipschitz constant above 1."
            )
        if learnable and weight in (0, 1):
            raise ValueError(
                "expected a learnable `weight` to start between 0 and 1, got "
                f"{weight}, which it approaches but never has."
            )
        self.layer = layer
        self.raw = jnp.log(weight) - jnp.log1p(-weight) if learnable else None
        self.fixed = float(weight)

    def weight(self) -> Float[Array, ""]:
        """The weight of the layer as it is now."""
        if self.raw is None:
            return jnp.asarray(self.fixed)
        return jax.nn.sigmoid(self.raw)

    def __call__(
        self, x: Float[Array, "..."], *args: Any, **kwargs: Any
    ) -> Float[Array, "..."]:
        """**Arguments:** the input, and further ones that are handed to the layer.

        **Returns:** an array of the shape of `x`.
        """
        y = self.layer(x, *args, **kwargs)
        if y.shape != x.shape:
            raise ValueError(
                "expected a layer whose output has the shape of its input, to be "
                f"averaged with it, got {x.shape} to {y.shape}."
            )
        weight = self.weight().astype(x.dtype)
        return (1 - weight) * x + weight * y


def _of_average(block: ResidualAverage) -> Float[Array, ""]:
    weight = block.weight()
    return (1 - weight) + weight * lipschitz_constant(block.layer)


register_lipschitz_constant(ResidualAverage, _of_average)
