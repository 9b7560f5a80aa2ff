"""Paths into pytrees: where a weight is, in a form that can be compared and pickled."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.tree_util as jtu
from jaxtyping import PyTree


# Steps from the root: ("attr", name) or ("item", index or key).
Path = tuple[tuple[str, Any], ...]


def as_path(key_path: tuple[Any, ...]) -> Path:
    """JAX's key path as plain data."""
    return tuple(_as_step(key) for key in key_path)


def _as_step(key: Any) -> tuple[str, Any]:
    if isinstance(key, jtu.GetAttrKey):
        return "attr", key.name
    if isinstance(key, jtu.SequenceKey):
        return "item", key.idx
    if isinstance(key, jtu.DictKey):
        return "item", key.key
    raise TypeError(
        "expected a model of modules, tuples, lists and dictionaries, got a pytree "
        f"node whose children have no names (key {key}). Register it with "
        "`jax.tree_util.register_pytree_with_keys`, with attribute or item keys."
    )


def path_string(path: Path) -> str:
    """As one writes it in Python, from the model on: `layers[0].weight`."""
    steps = (f".{step}" if kind == "attr" else f"[{step!r}]" for kind, step in path)
    return "".join(steps).removeprefix(".") or "(the model itself)"


def follow(tree: PyTree, path: Path) -> Any:
    """The node at the end of the path."""
    for kind, step in path:
        tree = getattr(tree, step) if kind == "attr" else tree[step]
    return tree


def replace(tree: PyTree, paths: list[Path], values: list[Any]) -> PyTree:
    """A copy of the tree with other nodes at the ends of the paths. The values are put
    in as they are, without a look inside.
    """
    new = dict(zip(paths, values, strict=True))
    # The same object may also be elsewhere: only the path tells.
    candidates = {id(follow(tree, path)) for path in paths}
    leaves, structure = jtu.tree_flatten_with_path(
        tree, is_leaf=lambda node: id(node) in candidates
    )
    replaced = [
        new.get(as_path(key_path), leaf) if id(leaf) in candidates else leaf
        for key_path, leaf in leaves
    ]
    return jtu.tree_unflatten(structure, replaced)


def nodes(
    tree: PyTree, is_node: Callable[[Any], bool]
) -> list[tuple[tuple[Any, ...], Any]]:
    """Every leaf with its key path, where nodes of the given kind count as leaves."""
    return jtu.tree_flatten_with_path(tree, is_leaf=is_node)[0]


def over_stack(function: Callable[..., Any], depth: int) -> Callable[..., Any]:
    """Maps over the first `depth` axes of every array among the arguments."""
    for _ in range(depth):
        function = eqx.filter_vmap(function)
    return function
