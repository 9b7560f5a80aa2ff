"""What `wrap` knows of each layer type: which weights it has, and how they act.

The bound of a weight then means:

- Linear: `|W x - W y| <= bound |x - y|`, the layer's Lipschitz constant.
- Conv, ConvTranspose: the same for the convolution, at every input size.
- Embedding: the norm of the table as a map from one-hot vectors. Each embedding has at
  most that length, and any two differ by at most `sqrt(2)` times as much.
- GRUCell, LSTMCell: the norm of `weight_ih` (all gates stacked) as a map from the
  input, and of `weight_hh` as a map from the hidden state. Each gate's own part is then
  within the bound. The cell itself has no Lipschitz constant from that alone, as its
  gates multiply.
- MultiheadAttention, MLP: that of the Linear layers inside (the four projections with
  all heads stacked). Dot-product attention has no global Lipschitz constant.
"""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
from jaxtyping import Array

from ._operators import (
    as_operator,
    convolution_operator,
    convolution_transpose_operator,
    Operator,
)


InputSize = Sequence[int] | None
View = Callable[[Any, Array, InputSize], Operator]


class WeightRule(eqx.Module):
    """One weight of a layer type."""

    name: str
    ndim: int | None  # without stacked axes; None for that of a convolution
    view: View
    sized: bool  # whether the view depends on an input size

    def stack_ndim(self, layer: Any, weight: Array) -> int:
        """How many leading axes of the weight are a stack of layers."""
        if self.ndim is not None:
            return weight.ndim - self.ndim
        return weight.ndim - layer.num_spatial_dims - 2


_RULES: dict[type, tuple[WeightRule, ...]] = {}


def registered_type(layer: object) -> Any:
    """The layer's type, or the nearest class it inherits from that is registered."""
    return next((cls for cls in type(layer).__mro__ if cls in _RULES), None)


def rules_for(layer: object) -> tuple[WeightRule, ...] | None:
    """The rules of the layer's type, or of the nearest class it inherits from."""
    known = registered_type(layer)
    return None if known is None else _RULES[known]


def register_layer(
    layer_type: type,
    weights: str | Sequence[str] = "weight",
    *,
    view: Callable[[Any, Array], Operator | Array] | None = None,
    ndim: int = 2,
) -> None:
    """Teaches `wrap` a layer type.

    Subclasses are covered too, unless they are registered themselves. One that has a
    `__call__` of its own has to be, as it may do something else with the weight: `wrap`
    refuses it otherwise. Registering a type again replaces what was known of it;
    registering `weights=()` says that the type has none, so that `wrap` passes it by
    without a warning.

    **Arguments:**

    - `layer_type`: a class that is a pytree, such as an `equinox.Module`.
    - `weights`: the names of the attributes that hold its weights.
    - `view`: how a weight acts, a function `view(layer, weight)` to a matrix or an
        operator, linear in the weight. By default the weight is a matrix `[out, in]`.
        Of `layer`, use only what is not an array: in a stack the others are stacked.
    - `ndim`: how many axes a weight has. Further axes in front of them are those of a
        stack of layers, made by `equinox.filter_vmap`.

    **Raises:** `TypeError` if `layer_type` is not a class, `ValueError` if `ndim < 1`.

    !!! Example

        ```python
        import equinox as eqx
        import jax
        import spectrax
        from jaxtyping import Array


        class Bilinear(eqx.Module):
            kernel: Array  # [left, right]

            def __call__(self, x, y):
                return x @ self.kernel @ y


        spectrax.register_layer(Bilinear, "kernel")
        kernel = jax.random.normal(jax.random.key(0), (8, 5))
        model, state = spectrax.constrain(Bilinear(kernel))
        ```
    """
    if not isinstance(layer_type, type):
        raise TypeError(
            "expected `layer_type` to be a class, got an instance of "
            f"{type(layer_type).__name__}. Pass the class itself."
        )
    if ndim < 1:
        raise ValueError(f"expected `ndim` to be at least 1, got {ndim}.")
    names = (weights,) if isinstance(weights, str) else tuple(weights)
    _RULES[layer_type] = tuple(
        WeightRule(name, ndim, _as_view(view), sized=False) for name in names
    )


def _as_view(view: Callable[[Any, Array], Operator | Array] | None) -> View:
    def full_view(layer: object, weight: Array, input_size: InputSize) -> Operator:
        del input_size
        return as_operator(weight if view is None else view(layer, weight))

    return full_view


def array_rule(name: str) -> WeightRule:
    """For an array that a user points at in a layer of unknown type: a matrix."""
    return WeightRule(name, 2, _as_view(None), sized=False)


def layer_operator(layer: object, *, input_size: InputSize = None) -> Operator:
    """The linear part of a layer, as an operator: its weight's action without the bias.

    **Arguments:**

    - `layer`: a layer with one weight, of a type that `wrap` knows.
    - `input_size`: for convolutions, the spatial sizes of the input (without channels).
        The result is then a matrix-free `lineax` operator from `[in_channels, *sizes]`
        to the layer's output, with its padding, stride, dilation and groups. With
        `None` it is the convolution at every input size at once, a
        [`spectrax.LatticeConvolution`][]. Not for other layers.

    **Returns:**

    A `lineax.AbstractLinearOperator` or a `LatticeConvolution`, linear in the weight.
    Differentiate with respect to the layer.

    **Raises:** `TypeError` if the layer's type is unknown, `ValueError` if it has
    several weights or none, if they are stacked, or if `input_size` does not fit.

    !!! Example

        ```python
        import equinox as eqx
        import jax
        import spectrax

        conv = eqx.nn.Conv2d(3, 8, 3, padding=1, key=jax.random.key(0))
        operator = spectrax.layer_operator(conv, input_size=(8, 8))
        state = spectrax.init_power_state(operator)
        print(spectrax.singular_value(operator, state))
        ```
    """
    rules = rules_for(layer)
    if rules is None:
        raise TypeError(
            f"expected a layer of a known type, got {type(layer).__name__}. Known are "
            f"{known_layers()}; teach it with `spectrax.register_layer`."
        )
    if len(rules) != 1:
        names = [rule.name for rule in rules]
        raise ValueError(
            f"expected a layer with one weight, got {type(layer).__name__} with "
            f"{names}. Pass the weight itself: it is a matrix."
        )
    (rule,) = rules
    weight = getattr(layer, rule.name)
    if rule.stack_ndim(layer, weight) != 0:
        raise ValueError(
            f"expected one layer, got a stack of them: the weight has shape "
            f"{weight.shape}. Use `equinox.filter_vmap(spectrax.layer_operator)`, or "
            "index the stack."
        )
    if input_size is not None and not rule.sized:
        raise ValueError(
            f"expected no `input_size` for {type(layer).__name__}, whose weight acts "
            f"in the same way whatever the input; got {tuple(input_size)}."
        )
    return rule.view(layer, weight, input_size)


def known_layers() -> str:
    """The registered types that have weights, for messages."""
    names = sorted(cls.__name__ for cls, rules in _RULES.items() if rules)
    return ", ".join(names)


def _register_convolution(layer_type: type, view: View) -> None:
    _RULES[layer_type] = (WeightRule("weight", None, view, sized=True),)


register_layer(eqx.nn.Linear)
register_layer(eqx.nn.Embedding)
register_layer(eqx.nn.GRUCell, ("weight_ih", "weight_hh"))
register_layer(eqx.nn.LSTMCell, ("weight_ih", "weight_hh"))
_register_convolution(eqx.nn.Conv, convolution_operator)
_register_convolution(eqx.nn.ConvTranspose, convolution_transpose_operator)
# Their arrays scale or shift entries one by one; a spectral norm is not what they have.
for _elementwise in (eqx.nn.LayerNorm, eqx.nn.GroupNorm, eqx.nn.RMSNorm, eqx.nn.PReLU):
    register_layer(_elementwise, ())
