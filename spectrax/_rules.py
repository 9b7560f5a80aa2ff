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

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array

from ._operators import (
    as_operator,
    convolution_operator,
    convolution_transpose_operator,
    Operator,
)


InputSize = Sequence[int] | None


@dataclasses.dataclass(frozen=True, eq=False)
class BoundView:
    """A view of a weight with all that it has to know: `function(*before, weight,
    *after)`. It can be compared, hashed and pickled, as what is static has to be.

    `before` is at most a layer without its arrays, `after` at most an input size.
    """

    function: Callable[..., Operator | Array]
    before: tuple[Any, ...] = dataclasses.field(default=(), repr=False)
    after: tuple[Any, ...] = dataclasses.field(default=(), repr=False)

    def __call__(self, weight: Array) -> Operator:
        """How the weight acts."""
        return as_operator(self.function(*self.before, weight, *self.after))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BoundView):
            return NotImplemented
        ours, theirs = (
            (view.function, view.before, view.after) for view in (self, other)
        )
        return ours[0] == theirs[0] and bool(eqx.tree_equal(ours[1:], theirs[1:]))

    def __hash__(self) -> int:
        return hash((self.function, self.after))


class WeightRule(eqx.Module):
    """One weight of a layer type."""

    name: str
    ndim: int | None  # without stacked axes; None for that of a convolution
    # Of the layer and the weight, and if `sized` of the size of the input.
    view: Callable[..., Operator | Array]
    sized: bool = False
    products_only: bool = False

    def weight_ndim(self, layer: Any) -> int:
        """How many axes the weight of one layer has, without those of a stack."""
        return layer.num_spatial_dims + 2 if self.ndim is None else self.ndim

    def view_of(self, layer: Any, input_size: InputSize) -> BoundView:
        """How the weight of this layer acts."""
        size = None if input_size is None else tuple(input_size)
        after = (size,) if self.sized else ()
        return BoundView(self.view, (_without_arrays(layer),), after)


def _without_arrays(layer: Any) -> Any:
    def is_array(leaf: Any) -> bool:
        return isinstance(leaf, jax.Array | np.ndarray | np.generic)

    return eqx.filter(layer, is_array, inverse=True)


_RULES: dict[type, tuple[WeightRule, ...]] = {}


def registered_type(layer: object) -> Any:
    """The layer's type, or the nearest class it inherits from that is registered."""
    return next((cls for cls in type(layer).__mro__ if cls in _RULES), None)


def rules_for(layer: object) -> tuple[WeightRule, ...] | None:
    """The rules of the layer's type, or of the nearest class it inherits from."""
    known = registered_type(layer)
    return None if known is None else _RULES[known]


def acts_as_registered(layer: object) -> bool:
    """Whether a layer has the call of the type that it was registered as. A subclass
    with a call of its own may do with the weight what it likes.
    """
    known = registered_type(layer)
    return known is None or _call_of(type(layer)) is _call_of(known)


def _call_of(cls: type) -> Any:
    found = (vars(base).get("__call__") for base in cls.__mro__)
    return next((call for call in found if call is not None), None)


def register_layer(
    layer_type: type,
    weights: str | Sequence[str] = "weight",
    *,
    view: Callable[[Any, Array], Operator | Array] | None = None,
    ndim: int = 2,
    products_only: bool = False,
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
        `layer` comes without its arrays, with `None` in their places. To pickle a model
        that was constrained with it, define it in a module.
    - `ndim`: how many axes a weight has. Further axes in front of them are those of a
        stack of layers, made by `equinox.filter_vmap`.
    - `products_only`: whether the layer does nothing with its weights but `weight @ x`
        and `weight[index]`, so that [`spectrax.unwrap`][] may scale its outputs in
        their place if it is asked to be `lazy`.

    **Raises:** `TypeError` if `layer_type` is not a class or `view` is not a function,
    `ValueError` if `ndim < 1` or if a dataclass has no such field.

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
    if view is not None and not callable(view):
        raise TypeError(
            "expected `view` to be a function `view(layer, weight)` to a matrix or an "
            f"operator, got {view!r}."
        )
    names = (weights,) if isinstance(weights, str) else tuple(weights)
    if dataclasses.is_dataclass(layer_type):
        fields = [field.name for field in dataclasses.fields(layer_type)]
        if unknown := [name for name in names if name not in fields]:
            raise ValueError(
                f"expected `weights` to be fields of {layer_type.__name__}, got "
                f"{unknown}; it has {fields}."
            )
    view = _as_it_is if view is None else view
    _RULES[layer_type] = tuple(
        WeightRule(name, ndim, view, products_only=products_only) for name in names
    )


def _as_it_is(layer: Any, weight: Array) -> Array:
    del layer
    return weight


def array_rule(name: str) -> WeightRule:
    """For an array that a user points at in a layer of unknown type: a matrix."""
    return WeightRule(name, 2, _as_it_is)


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
    if weight.ndim != rule.weight_ndim(layer):
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
    return rule.view_of(layer, input_size)(weight)


def known_layers() -> str:
    """The registered types that have weights, for messages."""
    names = sorted(cls.__name__ for cls, rules in _RULES.items() if rules)
    return ", ".join(names)


def _register_convolution(layer_type: type, view: Callable[..., Operator]) -> None:
    _RULES[layer_type] = (WeightRule("weight", None, view, sized=True),)


register_layer(eqx.nn.Linear, products_only=True)
register_layer(eqx.nn.Embedding, products_only=True)
for _cell in (eqx.nn.GRUCell, eqx.nn.LSTMCell):
    register_layer(_cell, ("weight_ih", "weight_hh"), products_only=True)
_register_convolution(eqx.nn.Conv, convolution_operator)
_register_convolution(eqx.nn.ConvTranspose, convolution_transpose_operator)
# Their arrays scale or shift entries one by one; a spectral norm is not what they have.
for _elementwise in (eqx.nn.LayerNorm, eqx.nn.GroupNorm, eqx.nn.RMSNorm, eqx.nn.PReLU):
    register_layer(_elementwise, ())
