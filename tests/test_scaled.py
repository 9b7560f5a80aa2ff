"""Layers that scale their output in the place of their weight."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest
from jaxtyping import Array

import spectrax
from spectrax._scaled import ScaledLayer


OPTIMIZED = True  # see conftest.py


def wrap(module: Any) -> tuple[Any, eqx.nn.State]:
    return eqx.nn.make_with_state(spectrax.wrap)(module)


def _by_hand(model: spectrax.Wrapped, state: eqx.nn.State) -> Any:
    """`unwrap` for one layer: its weight over the norm that the state's vectors see."""
    layer = model.module
    (own,) = state.get(model.memory)
    weight = layer.weight / spectrax.singular_value(layer.weight, own.estimate)
    return eqx.tree_at(lambda layer: layer.weight, layer, weight)


_LAYERS = {
    "linear": lambda key: eqx.nn.Linear(5, 4, key=key),
    "no bias": lambda key: eqx.nn.Linear(5, 4, use_bias=False, key=key),
    "scalar out": lambda key: eqx.nn.Linear(5, "scalar", key=key),
    "scalar in": lambda key: eqx.nn.Linear("scalar", 4, key=key),
    "embedding": lambda key: eqx.nn.Embedding(5, 4, key=key),
}


def _input(name: str, key: Any) -> Array:
    if name == "embedding":
        return jnp.array([0, 3, 3])
    return jr.normal(key, (3,) if name == "scalar in" else (3, 5))


@pytest.mark.parametrize("name", _LAYERS)
def test_same_function_and_derivatives(name, getkey):
    model, state = wrap(_LAYERS[name](getkey()))
    x = _input(name, getkey())

    def loss(model: Any, unwrap: Any, *, lazy: bool) -> Array:
        plain = unwrap(model, state)
        assert (type(plain) is ScaledLayer) == lazy
        return jnp.sum(jnp.sin(jax.vmap(plain)(x)))

    got = eqx.filter_value_and_grad(loss)(model, spectrax.unwrap, lazy=True)
    expected = eqx.filter_value_and_grad(loss)(model, _by_hand, lazy=False)
    for a, b in zip(jtu.tree_leaves(got), jtu.tree_leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)


def test_second_derivatives(getkey):
    model, state = wrap(eqx.nn.Linear(3, 2, key=getkey()))
    x = jr.normal(getkey(), (4, 3))

    def loss(weight: Array, unwrap: Any) -> Array:
        new = eqx.tree_at(lambda model: model.module.weight, model, weight)
        return jnp.sum(jnp.sin(jax.vmap(unwrap(new, state))(x)))

    weight = model.module.weight
    got, expected = (
        jax.jit(jax.hessian(loss), static_argnums=1)(weight, unwrap)
        for unwrap in (spectrax.unwrap, _by_hand)
    )
    np.testing.assert_allclose(got, expected, rtol=1e-11, atol=1e-12)


def test_looks_like_the_scaled_layer(getkey):
    model, state = wrap(eqx.nn.MLP(4, 3, 8, 1, key=getkey()))
    x = jr.normal(getkey(), (4,))
    expected = spectrax.unwrap(model, state)

    @eqx.filter_jit
    @eqx.filter_value_and_grad(has_aux=True)
    def look(model: Any) -> tuple[Array, Any]:
        plain = spectrax.unwrap(model, state)
        first = plain.layers[0]
        assert type(first) is ScaledLayer
        assert isinstance(first, eqx.nn.Linear)
        assert first.in_features == 4
        assert "Linear" in repr(first)
        with pytest.raises(AttributeError, match="nonsense"):
            _ = first.nonsense
        arrays = jtu.tree_leaves(eqx.filter(plain, eqx.is_array))
        is_linear = lambda node: isinstance(node, eqx.nn.Linear)  # noqa: E731
        found = [n for n in jtu.tree_leaves(plain, is_leaf=is_linear) if is_linear(n)]
        doubled = eqx.tree_at(
            lambda net: net.layers[0].weight, plain, replace_fn=_twice
        )
        outputs = eqx.filter_jit(plain)(x), eqx.filter_vmap(plain)(x[None])[0]
        return jnp.sum(plain(x)), (plain, first.weight, arrays, found, doubled, outputs)

    (_, seen), _ = look(model)
    plain, weight, arrays, found, doubled, outputs = seen
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12)  # noqa: E731
    close(weight, expected.layers[0].weight)
    close(doubled.layers[0].weight, 2 * expected.layers[0].weight)
    assert len(found) == 2
    for tree in (arrays, jtu.tree_leaves(eqx.filter(plain, eqx.is_array))):
        for a, b in zip(
            tree, jtu.tree_leaves(eqx.filter(expected, eqx.is_array)), strict=True
        ):
            close(a, b)
    for output in (*outputs, plain(x)):
        close(output, expected(x))


def _twice(x: Array) -> Array:
    return 2 * x


def test_plain_layers_where_nothing_is_differentiated(getkey):
    model, state = wrap(eqx.nn.MLP(4, 3, 8, 1, key=getkey()))
    for unwrap in (spectrax.unwrap, eqx.filter_jit(spectrax.unwrap)):
        plain = unwrap(model, state)
        assert {type(layer) for layer in plain.layers} == {eqx.nn.Linear}
        assert jtu.tree_structure(plain) == jtu.tree_structure(model.module)


def test_only_layers_that_are_linear_in_their_weight(getkey):
    class Doubled(eqx.nn.Linear):
        def __call__(self, x: Array, *, key: Any = None) -> Array:
            del key
            return self.weight @ (self.weight.T @ x)

    keys = jr.split(getkey(), 2)
    stack = eqx.filter_vmap(lambda key: eqx.nn.Linear(3, 3, key=key))(keys)
    conv = eqx.nn.Conv1d(2, 2, 3, key=getkey())
    model, state = wrap((Doubled(3, 3, key=getkey()), stack, conv))

    @eqx.filter_grad
    def look(model: Any) -> Array:
        plain = spectrax.unwrap(model, state)
        assert [type(p) for p in plain] == [Doubled, eqx.nn.Linear, eqx.nn.Conv1d]
        return jnp.sum(plain[0](jnp.ones(3)))

    look(model)


def test_low_precision_is_rounded_once(getkey):
    layer = eqx.nn.Linear(64, 8, use_bias=False, dtype=jnp.bfloat16, key=getkey())
    model, state = wrap(layer)
    x = jr.normal(getkey(), (64,), jnp.bfloat16)

    @eqx.filter_grad(has_aux=True)
    def look(model: Any) -> tuple[Array, Array]:
        y = spectrax.unwrap(model, state)(x)
        return jnp.sum(y), y

    _, y = look(model)
    assert y.dtype == jnp.bfloat16
    exact = np.asarray(layer.weight, float) @ np.asarray(x, float)
    exact /= np.linalg.norm(np.asarray(layer.weight, float), 2)
    assert np.abs(np.asarray(y, float) - exact).max() <= 2e-2 * np.abs(exact).max()
