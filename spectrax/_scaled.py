"""Layers that scale what comes out of them in the place of their weight."""

from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.lax as lax
import jax.tree_util as jtu
from jaxtyping import Array, Float, Inexact

from ._constraints import apply_scale
from ._dtypes import widest


# Their output is the weight times something, plus a bias. Not their subclasses, whose
# calls may do more.
_LINEAR_IN_WEIGHT = (eqx.nn.Linear, eqx.nn.Embedding)


@jtu.register_pytree_with_keys_class
class ScaledLayer:
    """A layer whose weight is `scale * weight`, computed as `scale * (weight @ x)`: a
    scaled copy of a large weight costs more memory traffic than the layer itself.

    To JAX, to `isinstance` and in all its attributes it is the layer with the scaled
    weight: whatever flattens it finds that array, and has it unscaled no more.
    """

    def __init__(self, layer: Any, scale: Float[Array, ""] | None):
        self._layer = layer
        self._scale = scale

    @property
    def __class__(self) -> type:  # pyright: ignore[reportIncompatibleMethodOverride]
        return type(self._layer)

    def __call__(self, *args: Any, **kwargs: Any) -> Array:
        layer = self._layer
        if self._scale is None:
            return layer(*args, **kwargs)
        bias = getattr(layer, "bias", None)
        if bias is not None:
            layer = eqx.tree_at(lambda layer: layer.bias, layer, None)
        output = _scale_output(layer(*args, **kwargs), self._scale)
        return output if bias is None else output + bias.reshape(output.shape)

    def __getattr__(self, name: str) -> Any:
        # Only what the instance lacks; `_` keeps copies and probes from looping.
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._plain(), name)

    def __repr__(self) -> str:
        return repr(self._plain())

    def _plain(self) -> Any:
        if self._scale is None:
            return self._layer
        weight = apply_scale(self._layer.weight, self._scale)
        return eqx.tree_at(lambda layer: layer.weight, self._layer, weight)

    def tree_flatten_with_keys(
        self,
    ) -> tuple[tuple[tuple[Any, Any], ...], Any]:
        """The arrays of the layer with the scaled weight, by name."""
        plain = self._plain()
        # One level only, so that the structure is the same whatever stands below.
        children, structure = jtu.tree_flatten_with_path(
            plain, is_leaf=lambda node: node is not plain
        )
        return tuple((path[0], child) for path, child in children), structure

    @classmethod
    def tree_unflatten(cls, structure: Any, children: tuple[Any, ...]) -> "ScaledLayer":
        """The layer with whatever stands for its arrays, and nothing left to scale."""
        return cls(jtu.tree_unflatten(structure, children), None)


def scales_output(layer: object, weight: Any, scale: Any) -> bool:
    """Whether `ScaledLayer(layer, scale)` will do and saves something: where JAX is
    differentiating, as in the loss of a training step. Elsewhere a model is to have its
    scaled weights written once and for all.
    """
    differentiating = any(
        isinstance(x, jax.core.Tracer) and hasattr(x, "tangent")
        for x in (weight, scale)
    )
    return differentiating and scale.ndim == 0 and type(layer) in _LINEAR_IN_WEIGHT


def _scale_output(
    output: Inexact[Array, "..."], scale: Float[Array, ""]
) -> Inexact[Array, "..."]:
    """`scale * output`, rounded once.

    Written as a matrix product, since the derivative in `scale` then is one too, summed
    over the whole batch: several times faster on the CPU than its plain reductions.
    """
    wide = widest(output.dtype, scale.dtype)
    result = lax.dot_general(
        output.astype(wide)[..., None],
        scale.astype(wide)[None],
        (((output.ndim,), (0,)), ((), ())),
        precision=lax.Precision.HIGHEST,
    )
    return result.astype(output.dtype)
