"""Weights that are scaled where they are multiplied by, and not before."""

import copy
import pickle
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
import pytest
from jaxtyping import Array

import spectrax


def _by_hand(model: spectrax.Wrapped, state: eqx.nn.State) -> Any:
    """`unwrap` for one layer: its weights over the norms that the vectors see."""

    def normalized(node: Any) -> Any:
        if not isinstance(node, spectrax.Constrained):
            return node
        vectors = state.get(node.memory).vectors
        return node.weight / spectrax.singular_value(node.weight, vectors)

    is_leaf = lambda node: isinstance(node, spectrax.Constrained)  # noqa: E731
    return jtu.tree_map(normalized, model.module, is_leaf=is_leaf)


_LAYERS = {
    "linear": lambda key: eqx.nn.Linear(5, 4, key=key),
    "no bias": lambda key: eqx.nn.Linear(5, 4, use_bias=False, key=key),
    "scalar out": lambda key: eqx.nn.Linear(5, "scalar", key=key),
    "scalar in": lambda key: eqx.nn.Linear("scalar", 4, key=key),
    "embedding": lambda key: eqx.nn.Embedding(5, 4, key=key),
    "gru": lambda key: eqx.nn.GRUCell(5, 4, key=key),
    "lstm": lambda key: eqx.nn.LSTMCell(5, 4, key=key),
}


def _inputs(name: str, key: Any) -> tuple[Any, ...]:
    if name == "embedding":
        return (jnp.array([0, 3, 3]),)
    x = jr.normal(key, (3,) if name == "scalar in" else (3, 5))
    hidden = jnp.cos(jnp.arange(12.0)).reshape(3, 4)
    return {"gru": (x, hidden), "lstm": (x, (hidden, hidden))}.get(name, (x,))


def _is_lazy(node: Any) -> bool:
    return isinstance(node, spectrax.ScaledWeight)


def _lazy_in(tree: Any) -> int:
    return sum(map(_is_lazy, jtu.tree_leaves(tree, is_leaf=_is_lazy)))


@pytest.mark.parametrize("name", _LAYERS)
def test_same_function_and_derivatives(name, getkey):
    layer = _LAYERS[name](getkey())
    model, state = spectrax.constrain(layer)
    inputs = _inputs(name, getkey())

    def loss(model: Any, unwrap: Any) -> Array:
        outputs = jax.vmap(unwrap(model, state))(*inputs)
        return sum(
            (jnp.sum(jnp.sin(y)) for y in jtu.tree_leaves(outputs)), jnp.zeros(())
        )

    def lazily(model: Any, state: eqx.nn.State) -> Any:
        plain = spectrax.unwrap(model, state, lazy=True)
        assert type(plain) is type(layer)
        assert _lazy_in(plain) == len(model.weights)
        return plain

    value_and_grad = eqx.filter_value_and_grad(loss)
    got = value_and_grad(model, lazily)
    for unwrap in (_by_hand, spectrax.unwrap):
        expected = value_and_grad(model, unwrap)
        for a, b in zip(jtu.tree_leaves(got), jtu.tree_leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)


def test_second_derivatives(getkey):
    model, state = spectrax.constrain(eqx.nn.Linear(3, 2, key=getkey()))
    x = jr.normal(getkey(), (4, 3))

    def loss(weight: Array, lazy: bool) -> Array:  # noqa: FBT001
        new = eqx.tree_at(lambda model: model.module.weight.weight, model, weight)
        plain = spectrax.unwrap(new, state, lazy=lazy)
        return jnp.sum(jnp.sin(jax.vmap(plain)(x)))

    hessian = jax.jit(jax.hessian(loss), static_argnums=1)
    got, expected = (hessian(model.raw.weight, lazy) for lazy in (True, False))
    np.testing.assert_allclose(got, expected, rtol=1e-11, atol=1e-12)


def test_stands_for_the_scaled_array(getkey):
    model, state = spectrax.constrain(eqx.nn.Linear(5, 4, key=getkey()))
    weight = spectrax.unwrap(model, state, lazy=True).weight
    array = spectrax.unwrap(model, state).weight
    assert isinstance(weight, spectrax.ScaledWeight)
    assert (weight.shape, weight.ndim, weight.dtype) == ((4, 5), 2, array.dtype)
    x, many = jr.normal(getkey(), (5,)), jr.normal(getkey(), (5, 3))
    index = jnp.array([2, 0])
    for got, expected in (
        (weight @ x, array @ x),
        (weight @ many, array @ many),
        (weight[1], array[1]),
        (weight[index, 1:], array[index, 1:]),
        (jnp.asarray(weight), array),
        (jnp.sum(weight, axis=0), jnp.sum(array, axis=0)),
        (jnp.einsum("ij,j->i", weight, x), array @ x),
        (many.T @ weight.T, many.T @ array.T),
        (array.T @ weight, array.T @ array),
        (np.asarray(array.T) @ weight, array.T @ array),
        (weight.reshape(2, 10), array.reshape(2, 10)),
        (2 * weight - weight / 3 + abs(-weight), 2 * array - array / 3 + abs(array)),
        (weight**2 + (1 - weight), array**2 + (1 - array)),
        (jnp.stack(list(weight)), array),
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-13)
    assert len(weight) == 4
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = weight.nonsense


def test_arrays_unless_asked_for(getkey):
    """The result does not depend on who traces it."""
    net = eqx.nn.MLP(4, 3, 8, 1, key=getkey())
    model, state = spectrax.constrain(net)
    reference = spectrax.unwrap(model, state)
    arrays = lambda tree: eqx.filter(tree, eqx.is_array)  # noqa: E731
    inner = optax.sgd(0.1, momentum=0.9)
    inner_state = inner.init(arrays(reference))
    x = jr.normal(getkey(), (4,))

    def distance(plain: Any) -> Array:
        squares = jax.tree.map(lambda a, b: jnp.sum((a - b) ** 2), *map(arrays, plain))
        return sum(jax.tree.leaves(squares), jnp.zeros(()))

    def uses(model: Any) -> tuple[Array, Any]:
        plain = spectrax.unwrap(model, state)
        assert jtu.tree_structure(plain) == jtu.tree_structure(net)
        mean = optax.incremental_update(arrays(plain), arrays(reference), 0.5)
        teacher = eqx.combine(mean, reference)
        either = jax.lax.cond(x[0] > 0, lambda: arrays(plain), lambda: arrays(net))
        gradient = arrays(eqx.filter_grad(lambda net: jnp.sum(net(x)))(plain))
        update, _ = inner.update(gradient, inner_state)
        student = eqx.apply_updates(plain, update)
        value = distance((plain, reference)) + jnp.sum(teacher(x)) + jnp.sum(student(x))
        return value + jnp.sum(either.layers[0].weight), plain

    expected, _ = uses(model)
    grad = eqx.filter_value_and_grad
    for transformed in (
        grad(uses, has_aux=True),
        grad(eqx.filter_jit(uses), has_aux=True),
        eqx.filter_jit(grad(uses, has_aux=True)),
        grad(eqx.filter_checkpoint(uses), has_aux=True),
    ):
        (value, plain), _ = transformed(model)
        np.testing.assert_allclose(value, expected, rtol=1e-9)
        assert eqx.tree_equal(plain, reference, rtol=1e-9, atol=1e-12)
        for copied in (copy.deepcopy(plain), pickle.loads(pickle.dumps(plain.layers))):
            assert jtu.tree_structure(copied) in map(
                jtu.tree_structure, (plain, plain.layers)
            )


def test_layers_that_may_do_more_have_arrays(getkey):
    class Doubled(eqx.nn.Linear):
        def __call__(self, x: Array, *, key: Any = None) -> Array:
            del key
            return self.weight @ (self.weight.T @ x)

    keys = jr.split(getkey(), 2)
    stack = eqx.filter_vmap(lambda key: eqx.nn.Linear(3, 3, key=key))(keys)
    conv = eqx.nn.Conv1d(2, 2, 3, key=getkey())
    net = (Doubled(3, 3, key=getkey()), stack, conv)
    spectrax.register_layer(Doubled)
    model, state = spectrax.constrain(net)
    plain = spectrax.unwrap(model, state, lazy=True)
    assert jtu.tree_structure(plain) == jtu.tree_structure(net)


def test_tied_weights(getkey):
    one, two = (eqx.nn.Linear(4, 4, key=getkey()) for _ in range(2))
    tied = eqx.nn.Shared((one, two), lambda p: p[1].weight, lambda p: p[0].weight)
    model, state = spectrax.constrain(tied)
    x = jr.normal(getkey(), (4,))
    first, second = spectrax.unwrap(model, state, lazy=True)()
    assert _lazy_in((first, second)) == 2
    expected, _ = spectrax.unwrap(model, state)()
    for got, bias in ((first(x), one.bias), (second(x), two.bias)):
        np.testing.assert_allclose(got, expected.weight @ x + bias, rtol=1e-12)


@pytest.mark.parametrize("around", ["jit", "checkpoint", "vmap", "scan", "cond"])
def test_no_scaled_copy_in_any_program(around, getkey):
    """A call of the wrapped model multiplies nothing of the weight's shape."""
    model, state = spectrax.constrain(eqx.nn.Linear(7, 6, use_bias=False, key=getkey()))
    xs = jr.normal(getkey(), (5, 7))

    def loss(model: Any, x: Array) -> Array:
        return jnp.sum(jnp.sin(spectrax.unwrap(model, state, lazy=True)(x)))

    def all_losses(model: Any, xs: Array) -> Array:
        if around == "jit":
            return jnp.sum(eqx.filter_jit(jax.vmap(loss, (None, 0)))(model, xs))
        if around == "checkpoint":
            return eqx.filter_checkpoint(loss)(model, xs[0])
        if around == "vmap":
            return jnp.sum(eqx.filter_vmap(loss, in_axes=(None, 0))(model, xs))
        if around == "scan":
            return jnp.sum(jax.lax.map(lambda x: loss(model, x), xs))
        return jax.lax.cond(xs[0, 0] > 0, lambda: loss(model, xs[0]), lambda: xs[1, 0])

    program = str(jax.make_jaxpr(all_losses)(model, xs))
    scaled = [line for line in program.splitlines() if "f64[6,7] = mul" in line]
    assert not scaled
    eager = str(jax.make_jaxpr(lambda m: spectrax.unwrap(m, state))(model))
    assert "f64[6,7] = mul" in eager


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("norm", [1e-5, 1e-3, 1.0, 200.0, 2e3])
def test_low_precision_is_as_accurate_as_the_array(dtype, norm, getkey):
    weight = jr.normal(getkey(), (8, 64))
    weight = (norm * weight / jnp.linalg.norm(weight, 2)).astype(dtype)
    layer = eqx.nn.Linear(64, 8, use_bias=False, dtype=dtype, key=getkey())
    layer = eqx.tree_at(lambda layer: layer.weight, layer, weight)
    model, state = spectrax.constrain(layer)
    x = jr.normal(getkey(), (64,), jnp.float32)
    x = (400 * x / jnp.linalg.norm(x)).astype(dtype)

    @eqx.filter_value_and_grad(has_aux=True)
    def look(model: Any, lazy: bool) -> tuple[Array, Array]:  # noqa: FBT001
        y = spectrax.unwrap(model, state, lazy=lazy)(x)
        return jnp.sum(y.astype(jnp.float32)) * 1e-5, y

    exact = np.asarray(weight, float) @ np.asarray(x, float)
    exact /= np.linalg.norm(np.asarray(weight, float), 2)
    errors = []
    for lazy in (True, False):
        (_, y), gradient = look(model, lazy)
        assert y.dtype == dtype
        assert jnp.all(jnp.isfinite(gradient.raw.weight))
        errors.append(np.abs(np.asarray(y, float) - exact).max())
    eps = float(jnp.finfo(dtype).eps)
    assert errors[0] <= max(errors[1], eps * np.abs(exact).max())


def test_lazy_and_certified_exclude_each_other(getkey):
    model, state = spectrax.constrain(eqx.nn.Linear(3, 2, key=getkey()))
    with pytest.raises(ValueError, match="expected `lazy` or `certified`, got both"):
        spectrax.unwrap(model, state, lazy=True, certified=True)
