"""Which weights of a model `wrap` constrains."""

import warnings
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from ._rules import (
    acts_as_registered,
    array_rule,
    known_layers,
    registered_type,
    rules_for,
    WeightRule,
)
from ._tree import as_path, follow, nodes, Path, path_string


class _Marked:
    """Stands for a leaf of the model while `where` looks at it."""

    def __init__(self, path: Path):
        self.path = path


def rule_at(model: PyTree, path: Path) -> tuple[Any, WeightRule]:
    """The layer that a weight belongs to, and the rule for the weight.

    An array that no layer is known to have as a weight is taken for a matrix, or a
    stack of matrices.
    """
    kind, name = path[-1] if path else ("item", "")
    layer = follow(model, path[:-1])
    for rule in rules_for(layer) or ():
        if kind == "attr" and rule.name == name:
            return layer, rule
    return None, array_rule(str(name))


def find_weights(model: PyTree) -> list[Path]:
    """The weights of all layers of known types. Warns of matrices that are none."""
    paths, strangers = search_weights(model)
    if not paths:
        raise ValueError(
            "expected a model with a weight to constrain, found none. It has the "
            f"layers {_layers_of(model)} and the arrays {_arrays_of(model)}; known "
            f"layers are {known_layers()}. Teach `wrap` your layer with "
            "`spectrax.register_layer`, or point at an array with `where`."
        )
    if strangers:
        names = ", ".join(path_string(path) for path in strangers)
        warnings.warn(
            "`spectrax.wrap` leaves these arrays as they are, as it knows no layer "
            f"that has them as weights: {names}. To constrain them use "
            "`spectrax.register_layer` or `where`; to silence this, name what you want "
            "with `where`.",
            stacklevel=5,
        )
    return paths


def search_weights(node: PyTree, root: Path = ()) -> tuple[list[Path], list[Path]]:
    """The weights below a node, and the matrices outside all known layers."""
    rules = rules_for(node)
    paths, strangers = [], []
    for rule in rules or ():
        if not _is_elsewhere(getattr(node, rule.name)):
            paths.append((*root, ("attr", rule.name)))

    def is_inner(inner: Any) -> bool:
        if isinstance(inner, eqx.nn.StateIndex):
            return True
        return inner is not node and rules_for(inner) is not None

    for key_path, inner in nodes(node, is_inner):
        path = (*root, *as_path(key_path))
        if rules_for(inner) is not None and inner is not node:
            inner_paths, inner_strangers = search_weights(inner, path)
            paths += inner_paths
            strangers += inner_strangers
        elif rules is None and eqx.is_inexact_array(inner) and inner.ndim >= 2:
            strangers.append(path)
    return paths, strangers


def _is_elsewhere(weight: Any) -> bool:
    """Whether the weight has been taken away, as by `equinox.nn.Shared`."""
    return weight is None or type(weight).__name__ == "SharedNode"


def select_weights(
    model: PyTree, where: Callable[[PyTree], Any]
) -> tuple[list[list[Path]], bool]:
    """The weights in each of the nodes that `where` returns, and whether it returned a
    sequence of them.
    """
    marked = jtu.tree_map_with_path(lambda keys, _: _Marked(as_path(keys)), model)
    chosen = where(marked)
    several = isinstance(chosen, list | tuple)
    targets = list(chosen) if several else [chosen]
    if not targets:
        raise ValueError(
            "expected `where` to select at least one layer or array, got an empty "
            f"{type(chosen).__name__}. Leave `where` out for every known layer."
        )
    return [_weights_in(model, target) for target in targets], several


def _weights_in(model: PyTree, target: Any) -> list[Path]:
    if isinstance(target, _Marked):
        return [target.path]
    leaves = jtu.tree_leaves(target)
    if not leaves or not all(isinstance(leaf, _Marked) for leaf in leaves):
        raise TypeError(
            "expected `where` to select layers or arrays of the model, got "
            f"{target!r} of type {type(target).__name__}. Return nodes of the model, "
            "as in `where=lambda model: model.layers[0]`."
        )
    inside = {leaf.path for leaf in leaves}
    paths = [path for path in search_weights(model)[0] if path in inside]
    if not paths:
        raise ValueError(
            f"expected `where` to select something with a weight to constrain, got a "
            f"{type(target).__name__} with the arrays {_arrays_of(target, model)}; "
            f"known layers are {known_layers()}. Teach `wrap` your layer with "
            "`spectrax.register_layer`, or select the array itself."
        )
    return paths


def check_weight(model: PyTree, path: Path, *, with_view: bool) -> Array:
    """The array at the path, if it is one that can be constrained, in a layer that
    uses it as its rule says, or as a view that the user gave does.
    """
    weight = follow(model, path)
    name = path_string(path)
    _check_acts_as_it_is(model, path)
    if not with_view:
        _check_call(follow(model, path[:-1]) if path else None, name)
    if not isinstance(weight, jax.Array):
        raise TypeError(
            f"expected the weight `{name}` to be a JAX array, got "
            f"{type(weight).__name__}. Select the array, or convert it with "
            "`jax.numpy.asarray`."
        )
    if not eqx.is_inexact_array(weight):
        raise TypeError(
            f"expected the weight `{name}` to be of floating-point or complex dtype, "
            f"got {weight.dtype}. Leave it out with `where`, or convert it."
        )
    if jnp.finfo(weight.dtype).bits < 16:
        raise TypeError(
            f"expected the weight `{name}` to be of float16, bfloat16 or wider, got "
            f"{weight.dtype}, which JAX does not compute with. Constrain the model "
            "in a wider dtype, and cast what `spectrax.unwrap` returns."
        )
    layer, rule = rule_at(model, path)
    if weight.ndim < max(2, rule.weight_ndim(layer)):
        raise ValueError(
            f"expected the weight `{name}` to have at least two axes, got shape "
            f"{weight.shape}: a scalar or a vector is no linear map between vectors. "
            "Leave it out with `where`."
        )
    owner = follow(model, path[:-1]) if path else None
    if layer is None and rules_for(owner):
        raise ValueError(
            f"expected a weight of {type(owner).__name__}, got `{name}`, which is not: "
            f"its weights are {[rule.name for rule in rules_for(owner) or ()]}. Select "
            "one of these, or the layer."
        )
    return weight


def _check_acts_as_it_is(model: PyTree, path: Path) -> None:
    """Whatever is claimed of a weight that is transformed again is not true of the one
    that acts.
    """
    for i in range(len(path)):
        outer = follow(model, path[:i])
        if not isinstance(outer, eqx.nn.WeightNorm | eqx.nn.SpectralNorm):
            continue
        if path[i:] == (("attr", "layer"), ("attr", outer.weight_name)):
            raise ValueError(
                "expected a weight that acts as it is, got "
                f"`{path_string(path)}`, which `equinox.nn.{type(outer).__name__}` "
                "transforms again at each call. Use the layer inside of it in its "
                "place, or leave it out with `where`."
            )


def _check_call(layer: Any, name: str) -> None:
    """A subclass with a call of its own may do with the weight what it likes."""
    if acts_as_registered(layer):
        return
    known, own = registered_type(layer), type(layer)
    raise ValueError(
        f"expected the weight `{name}` to act as that of {known.__name__} does, got "
        f"{own.__name__}, which has a `__call__` of its own. Say how its weight acts, "
        f"with `spectrax.register_layer({own.__name__}, view=...)` or with `view`, or "
        "leave it out with `where`."
    )


def _layers_of(model: PyTree) -> list[str]:
    found: set[str] = set()

    def visit(node: Any) -> bool:
        if isinstance(node, eqx.Module):
            found.add(type(node).__name__)
        return False

    jtu.tree_leaves(model, is_leaf=visit)
    return sorted(found)


def _arrays_of(tree: PyTree, model: PyTree | None = None) -> list[str]:
    """The arrays of a tree, or those of the model that a marked tree stands for."""
    named = []
    for key_path, leaf in jtu.tree_flatten_with_path(tree)[0]:
        path = leaf.path if isinstance(leaf, _Marked) else as_path(key_path)
        value = follow(model, path) if isinstance(leaf, _Marked) else leaf
        if eqx.is_array(value):
            named.append(f"{path_string(path)} {value.shape}")
    return named
