"""Independent truth, and the matrices on which norms go wrong."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import equinox as eqx
import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, config, PRNGKeyArray, PyTree

import spectrax


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """Without the check of annotations: users have none, and see our own messages."""
    before, config.jaxtyping_disable = config.jaxtyping_disable, True
    try:
        yield
    finally:
        config.jaxtyping_disable = before


def examples(count: int) -> hypothesis.settings:
    """So many examples, or a hundred times as many with `--thorough`."""
    factor = hypothesis.settings().max_examples / 25
    return hypothesis.settings(max_examples=round(count * factor))


def is_thorough() -> bool:
    """Whether the tests were started with `--thorough`."""
    return hypothesis.settings().max_examples > 25


def true_norm(matrix: Any) -> float:
    """The spectral norm by a dense SVD in float64 or complex128."""
    matrix = np.asarray(matrix)
    wide = np.complex128 if np.iscomplexobj(matrix) else np.float64
    return float(np.linalg.norm(matrix.astype(wide), 2))


# Kinds of matrices, all of norm about 1 before they are scaled.
KINDS = (
    "gaussian",
    "zero",
    "rank one",
    "repeated top",
    "clustered top",
    "one entry",
    "hilbert",
    "ones",
)


def make_matrix(
    kind: str, shape: tuple[int, int], seed: int, *, imaginary: bool = False
) -> np.ndarray:
    """A matrix of the given kind, of dtype float64 or complex128."""
    rng = np.random.default_rng(seed)

    def gaussian(*size: int) -> np.ndarray:
        real = rng.normal(size=size)
        return real + 1j * rng.normal(size=size) if imaginary else real

    m, n = shape
    k = min(shape)
    if kind == "gaussian":
        return gaussian(m, n) / np.sqrt(m + n)
    if kind == "zero":
        return 0 * gaussian(m, n)
    if kind == "rank one":
        left, right = gaussian(m), gaussian(n)
        return np.outer(left, right) / np.linalg.norm(left) / np.linalg.norm(right)
    if kind in ("repeated top", "clustered top"):
        left, _ = np.linalg.qr(gaussian(m, k))
        right, _ = np.linalg.qr(gaussian(n, k))
        values = np.linspace(1, 0.1, k)
        gap = 0.0 if kind == "repeated top" else 1e-4
        values[: (k + 1) // 2] = 1 - gap * np.arange((k + 1) // 2)
        return (left * values) @ right.conj().T
    if kind == "one entry":
        matrix = 0 * gaussian(m, n)
        matrix[rng.integers(m), rng.integers(n)] = 1
        return matrix
    if kind == "hilbert":
        i, j = np.indices(shape)
        return (1 / (1 + i + j)).astype(gaussian(1).dtype)
    assert kind == "ones"
    return (np.ones(shape) / np.sqrt(m * n)).astype(gaussian(1).dtype)


def matrices(
    shapes: Sequence[tuple[int, int]],
    *,
    kinds: Sequence[str] = KINDS,
    exponents: Sequence[int] = (0,),
    imaginary: bool = False,
) -> st.SearchStrategy[np.ndarray]:
    """Draws one of the kinds, in one of the shapes, times ten to one of the powers."""
    return st.builds(
        lambda kind, shape, seed, exponent: (
            make_matrix(kind, shape, seed, imaginary=imaginary) * 10.0**exponent
        ),
        st.sampled_from(kinds),
        st.sampled_from(shapes),
        st.integers(0, 2**32 - 1),
        st.sampled_from(exponents),
    )


class Net(eqx.Module):
    """A model with two weights, of shapes 4x4 and 2x4, and a method beside the call."""

    first: eqx.nn.Linear
    second: eqx.nn.Linear

    def __init__(self, key: PRNGKeyArray, dtype: Any = None):
        first, second = jr.split(key)
        self.first = eqx.nn.Linear(4, 4, dtype=dtype, key=first)
        self.second = eqx.nn.Linear(4, 2, dtype=dtype, key=second)

    def hidden(self, x: Array) -> Array:
        return jnp.tanh(self.first(x))

    def __call__(self, x: Array) -> Array:
        return self.second(self.hidden(x))


def linear_weights(model: PyTree) -> list[Array]:
    """The weights of all `equinox.nn.Linear` in a pytree, raw if it is wrapped."""

    def is_linear(node: Any) -> bool:
        return isinstance(node, eqx.nn.Linear)

    def raw(weight: Any) -> Any:
        return weight.weight if isinstance(weight, spectrax.Constrained) else weight

    leaves = jtu.tree_leaves(model, is_leaf=is_linear)
    return [raw(leaf.weight) for leaf in leaves if is_linear(leaf)]


def raw(model: PyTree) -> PyTree:
    """The model with its raw weights."""

    def is_node(node: Any) -> bool:
        return isinstance(node, spectrax.Constrained)

    return jtu.tree_map(
        lambda node: node.weight if is_node(node) else node, model, is_leaf=is_node
    )


def trained_bounds(model: PyTree) -> list[Any]:
    """Of each constrained weight the constraint if it is trained."""
    return [node.constraint for node in spectrax.constrained_weights(model)]


def linear_norms(model: PyTree) -> list[float]:
    """The true norms of those weights."""
    return [true_norm(weight) for weight in linear_weights(model)]


def with_norms(model: PyTree, *norms: float) -> PyTree:
    """The model with its weights scaled to the given true norms, by numpy alone."""
    weights = [
        jnp.asarray(np.asarray(weight) * (norm / true_norm(weight)))
        for weight, norm in zip(linear_weights(model), norms, strict=True)
    ]
    return eqx.tree_at(linear_weights, model, weights)


def perturbed(model: PyTree, key: PRNGKeyArray, size: float = 0.3) -> PyTree:
    """The model with noise added to those weights, as after a large update."""
    weights = [
        weight + size * jr.normal(jr.fold_in(key, i), weight.shape, weight.dtype)
        for i, weight in enumerate(linear_weights(model))
    ]
    return eqx.tree_at(linear_weights, model, weights)


def clone(state: eqx.nn.State) -> eqx.nn.State:
    """The same state, which stays valid when the other is used up."""
    leaves, treedef = jtu.tree_flatten(state)
    return jtu.tree_unflatten(treedef, leaves)
