"""What the bound means for each layer type, and how types are taught.

Norms are computed exactly here: how layers are found and read does not depend on how
their norms are estimated, and a decomposition compiles fast.
"""

import importlib

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jaxtyping import Array

import spectrax

from .helpers import true_norm, unchecked


BOUND = 0.7


@pytest.fixture(autouse=True)
def _registry(monkeypatch):
    """What a test teaches is forgotten behind it."""
    rules = importlib.import_module("spectrax._rules")
    monkeypatch.setattr(rules, "_RULES", dict(rules._RULES))


def _constrained(layer, **options):
    """The layer with its constrained weights in place."""
    options = {"estimator": spectrax.ExactSVD(), **options}
    wrap = lambda layer: spectrax.wrap(  # noqa: E731
        layer, constraint=spectrax.Normalize(BOUND), **options
    )
    model, state = eqx.nn.make_with_state(wrap)(layer)
    return spectrax.unwrap(model, state)


def _assert_bound(weight, bound=BOUND):
    np.testing.assert_allclose(true_norm(weight), bound, rtol=1e-12)


# Linear.


@pytest.mark.parametrize(
    ("in_features", "out_features"),
    [(3, 5), (5, 3), (4, 4), ("scalar", 3), (3, "scalar")],
)
def test_linear(in_features, out_features, getkey):
    linear = eqx.nn.Linear(in_features, out_features, key=getkey())
    layer = _constrained(linear)
    assert layer.weight.shape == linear.weight.shape
    _assert_bound(layer.weight)
    np.testing.assert_array_equal(layer.bias, linear.bias)
    # The Lipschitz constant: no pair of inputs is torn further apart ...
    shape = () if in_features == "scalar" else (in_features,)
    x, y = jr.normal(getkey(), (2, 200, *shape))
    image = jax.vmap(layer)
    moved = np.linalg.norm(np.reshape(image(x) - image(y), (200, -1)), axis=1)
    apart = np.linalg.norm(np.reshape(x - y, (200, -1)), axis=1)
    assert np.all(moved <= BOUND * apart * (1 + 1e-12))
    # ... and one pair is torn that far.
    _, _, vh = np.linalg.svd(np.asarray(layer.weight))
    start = jnp.zeros(shape)
    end = jnp.asarray(vh[0].reshape(shape))
    torn = np.linalg.norm(layer(end) - layer(start))
    np.testing.assert_allclose(torn, BOUND, rtol=1e-10)


def test_linear_by_power_iteration(getkey):
    layer = _constrained(
        eqx.nn.Linear(6, 5, key=getkey()), estimator=spectrax.PowerIteration()
    )
    np.testing.assert_allclose(true_norm(layer.weight), BOUND, rtol=1e-8)


def test_operator_of_a_linear_layer_is_its_weight(getkey):
    linear = eqx.nn.Linear(3, 5, key=getkey())
    operator = spectrax.layer_operator(linear)
    np.testing.assert_array_equal(operator.as_matrix(), linear.weight)


# Embedding.


def test_embedding(getkey):
    embedding = eqx.nn.Embedding(12, 5, key=getkey())
    # Two rows that point away from each other, far longer than the others.
    weight = embedding.weight.at[3].set(jnp.arange(50.0, 55.0))
    weight = weight.at[7].set(-weight[3])
    layer = _constrained(eqx.tree_at(lambda e: e.weight, embedding, weight))
    _assert_bound(layer.weight)
    vectors = np.asarray(jax.vmap(layer)(jnp.arange(12)))
    lengths = np.linalg.norm(vectors, axis=1)
    assert np.all(lengths <= BOUND * (1 + 1e-12))
    apart = np.linalg.norm(vectors[:, None] - vectors[None], axis=2)
    assert np.all(apart <= np.sqrt(2) * BOUND * (1 + 1e-12))
    # The two come as far apart as it says, farther than one alone could be long.
    assert apart[3, 7] > 0.99 * np.sqrt(2) * BOUND


def test_operator_of_an_embedding_is_its_table(getkey):
    embedding = eqx.nn.Embedding(12, 5, key=getkey())
    operator = spectrax.layer_operator(embedding)
    np.testing.assert_allclose(
        true_norm(operator.as_matrix()), true_norm(embedding.weight), rtol=1e-12
    )
    table = np.asarray(embedding.weight)
    one_hot = np.eye(12)[4]
    np.testing.assert_array_equal(operator.as_matrix().T @ one_hot, table.T @ one_hot)


# Recurrent cells.


@pytest.mark.parametrize(
    ("kind", "gates"), [(eqx.nn.GRUCell, 3), (eqx.nn.LSTMCell, 4)], ids=["GRU", "LSTM"]
)
def test_recurrent_cell(kind, gates, getkey):
    cell = kind(3, 4, key=getkey())
    layer = _constrained(cell)
    assert layer.weight_ih.shape == (4 * gates, 3)
    assert layer.weight_hh.shape == (4 * gates, 4)
    for weight, raw in [
        (layer.weight_ih, cell.weight_ih),
        (layer.weight_hh, cell.weight_hh),
    ]:
        _assert_bound(weight)
        np.testing.assert_allclose(weight, raw * (BOUND / true_norm(raw)), rtol=1e-10)
        for gate in np.split(np.asarray(weight), gates):
            assert true_norm(gate) <= BOUND * (1 + 1e-12)


# Models of Linear layers.


def test_attention(getkey):
    sizes = {"key_size": 4, "value_size": 3, "output_size": 5}
    attention = eqx.nn.MultiheadAttention(
        2, 6, **sizes, qk_size=2, vo_size=4, key=getkey()
    )
    layer = _constrained(attention)
    projections = {
        name: getattr(layer, f"{name}_proj").weight
        for name in ("query", "key", "value", "output")
    }
    shapes = {name: weight.shape for name, weight in projections.items()}
    assert shapes == {"query": (4, 6), "key": (4, 4), "value": (8, 3), "output": (5, 8)}
    for weight in projections.values():
        _assert_bound(weight)
    x = jr.normal(getkey(), (7, 6))
    assert layer(x, x[:, :4], x[:, :3]).shape == (7, 5)


@pytest.mark.parametrize("in_size", [3, "scalar"])
@pytest.mark.parametrize("out_size", [2, "scalar"])
def test_mlp(in_size, out_size, getkey):
    mlp = eqx.nn.MLP(in_size, out_size, width_size=4, depth=2, key=getkey())
    layer = _constrained(mlp)
    assert len(layer.layers) == 3
    for linear in layer.layers:
        _assert_bound(linear.weight)


def test_mlp_with_scan_has_a_stack(getkey):
    mlp = eqx.nn.MLP(3, 2, width_size=4, depth=4, scan=True, key=getkey())
    layer = _constrained(mlp)
    first, hidden, last = layer.layers
    assert hidden.weight.shape == (3, 4, 4)
    raw_norms = [true_norm(weight) for weight in mlp.layers[1].weight]
    assert max(raw_norms) > 1.01 * min(raw_norms)
    for weight in [first.weight, *hidden.weight, last.weight]:
        _assert_bound(weight)
    # The same layers one by one give the same output.
    x = jr.normal(getkey(), (3,))
    y = jax.nn.relu(first(x))
    for weight, bias in zip(hidden.weight, hidden.bias, strict=True):
        y = jax.nn.relu(weight @ y + bias)
    np.testing.assert_allclose(layer(x), last(y), rtol=1e-12)


# Stacks.


def test_stack_of_linear_layers(getkey):
    make = eqx.filter_vmap(lambda key: eqx.nn.Linear(3, 4, key=key))
    stack = make(jr.split(getkey(), 3))
    sizes = jnp.array([1e-3, 1.0, 1e3])[:, None, None]
    stack = eqx.tree_at(lambda s: s.weight, stack, stack.weight * sizes)
    layer = _constrained(stack)
    for weight in layer.weight:
        _assert_bound(weight)
    np.testing.assert_array_equal(layer.bias, stack.bias)


def test_stack_of_stacks_of_embeddings(getkey):
    make = eqx.filter_vmap(eqx.filter_vmap(lambda key: eqx.nn.Embedding(5, 3, key=key)))
    layer = _constrained(make(jr.split(getkey(), (2, 2))))
    for weight in layer.weight.reshape(4, 5, 3):
        _assert_bound(weight)


def test_stack_of_convolutions(getkey):
    make = eqx.filter_vmap(lambda key: eqx.nn.Conv1d(2, 2, 3, padding=1, key=key))
    stack = make(jr.split(getkey(), 3))
    layer = _constrained(stack, input_size=(5,))
    for i in range(3):
        conv = jax.tree.map(lambda x, i=i: x[i] if eqx.is_array(x) else x, layer)
        images = jax.vmap(lambda x, c=conv: c(x) - c.bias)(
            jnp.eye(10).reshape(10, 2, 5)
        )
        _assert_bound(np.asarray(images).reshape(10, -1))


# Layers without a matrix.


@pytest.mark.parametrize(
    "layer",
    [
        eqx.nn.LayerNorm((2, 3)),
        eqx.nn.GroupNorm(2, 4),
        eqx.nn.RMSNorm((2, 3)),
        eqx.nn.PReLU(),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_elementwise_layers_are_passed_by(layer, getkey):
    model = (eqx.nn.Linear(3, 3, key=getkey()), layer)
    linear, kept = _constrained(model)
    _assert_bound(linear.weight)
    assert eqx.tree_equal(kept, layer)
    with pytest.raises(ValueError, match=r"with one weight.*with \[\]"):
        spectrax.layer_operator(layer)


# Teaching layers.


class Tensor(eqx.Module):
    """Further classes inherit from it, so that each test has one of its own."""

    weight: Array


def test_a_registered_weight_is_a_matrix_by_default(getkey):
    class Mine(Tensor):
        pass

    model = Mine(jr.normal(getkey(), (4, 3)))
    with pytest.raises(TypeError, match="layer of a known type, got Mine"):
        spectrax.layer_operator(model)
    spectrax.register_layer(Mine)
    _assert_bound(_constrained(model).weight)
    np.testing.assert_array_equal(
        spectrax.layer_operator(model).as_matrix(), model.weight
    )


def test_register_several_weights(getkey):
    class LowRank(eqx.Module):
        left: Array
        right: Array
        other: Array

    spectrax.register_layer(LowRank, ("left", "right"))
    model = LowRank(*(jr.normal(getkey(), (4, 3)) for _ in range(3)))
    layer = _constrained(model)
    _assert_bound(layer.left)
    _assert_bound(layer.right)
    np.testing.assert_array_equal(layer.other, model.other)
    with pytest.raises(
        ValueError, match=r"one weight, got LowRank with \['left', 'right'\]"
    ):
        spectrax.layer_operator(model)


def test_register_a_view(getkey):
    class Heads(Tensor):
        num_heads: int = eqx.field(static=True)

    def view(layer, weight):
        return weight.reshape(layer.num_heads * 2, 4)

    spectrax.register_layer(Heads, view=view, ndim=3)
    model = Heads(jr.normal(getkey(), (3, 2, 4)), 3)
    _assert_bound(np.asarray(_constrained(model).weight).reshape(6, 4))
    np.testing.assert_array_equal(
        spectrax.layer_operator(model).as_matrix(), model.weight.reshape(6, 4)
    )


def test_register_a_view_to_an_operator(getkey):
    class Kernel(Tensor):
        pass

    def view(layer, weight):
        del layer
        return spectrax.flattened_kernel(weight)

    spectrax.register_layer(Kernel, view=view, ndim=4)
    # A stack of two: the view sees each alone.
    model = Kernel(jr.normal(getkey(), (2, 3, 2, 3, 3)))
    for weight in _constrained(model).weight:
        _assert_bound(np.asarray(weight).reshape(3, -1))


def test_axes_beyond_ndim_are_a_stack(getkey):
    class Stacked(Tensor):
        pass

    spectrax.register_layer(Stacked)
    model = Stacked(jr.normal(getkey(), (2, 3, 4, 3)))
    for weight in _constrained(model).weight.reshape(6, 4, 3):
        _assert_bound(weight)


def test_a_type_registered_without_weights_is_passed_by(getkey):
    class Table(Tensor):
        pass

    model = (eqx.nn.Linear(3, 3, key=getkey()), Table(jr.normal(getkey(), (4, 3))))
    with pytest.warns(UserWarning, match=r"\[1\]\.weight"):
        _constrained(model)
    spectrax.register_layer(Table, ())
    # Warnings are errors here.
    linear, table = _constrained(model)
    _assert_bound(linear.weight)
    np.testing.assert_array_equal(table.weight, model[1].weight)


def test_subclasses_are_what_the_nearest_registered_class_is(getkey):
    class Base(Tensor):
        pass

    class Child(Base):
        pass

    class Grandchild(Child):
        pass

    def transposed_sum(layer, weight):
        del layer
        return weight.T + weight.T

    spectrax.register_layer(Base)
    spectrax.register_layer(Child, view=transposed_sum)
    weight = jr.normal(getkey(), (4, 3))
    shapes = {
        kind: spectrax.layer_operator(kind(weight)).as_matrix().shape
        for kind in (Base, Child, Grandchild)
    }
    assert shapes == {Base: (4, 3), Child: (3, 4), Grandchild: (3, 4)}
    _assert_bound(_constrained(Base(weight)).weight)
    _assert_bound(_constrained(Grandchild(weight)).weight, BOUND / 2)


def test_subclass_of_an_equinox_layer(getkey):
    class Named(eqx.nn.Linear):
        def describe(self) -> str:
            return "a layer"

    class Scaled(Named):
        def __call__(self, x, *, key=None):
            return 2 * super().__call__(x, key=key)

    class Inner(Scaled):
        pass

    _assert_bound(_constrained(Named(3, 4, key=getkey())).weight)
    for layer in (Scaled(3, 4, key=getkey()), Inner(3, 4, key=getkey())):
        name = type(layer).__name__
        match = (
            rf"as that of Linear does, got {name}, which has a `__call__` of its own"
        )
        with pytest.raises(ValueError, match=match):
            _constrained({"layers": [layer]})
        # A view of the user's own says how it acts.
        model, state = spectrax.constrain(layer, view=lambda weight: 2 * weight)
        plain = spectrax.unwrap(model, state)
        np.testing.assert_allclose(np.linalg.norm(plain.weight, 2), 0.5, rtol=1e-6)
    spectrax.register_layer(Scaled, view=lambda layer, weight: 2 * weight)  # noqa: ARG005
    for layer in (Scaled(3, 4, key=getkey()), Inner(3, 4, key=getkey())):
        _assert_bound(_constrained(layer).weight, BOUND / 2)


@pytest.mark.filterwarnings("ignore:`spectrax.wrap` leaves these arrays")
@pytest.mark.parametrize("around", ["WeightNorm", "SpectralNorm"])
def test_weights_that_are_transformed_again_are_refused(around, getkey):
    layer = eqx.nn.GRUCell(3, 4, key=getkey())

    def make() -> spectrax.Wrapped:
        if around == "WeightNorm":
            inner = eqx.nn.WeightNorm(layer, "weight_ih")
        else:
            inner = eqx.nn.SpectralNorm(layer, "weight_ih", key=jr.key(0))
        return spectrax.wrap({"cells": [inner]}, where=where)

    where = None
    match = (
        rf"\['cells'\]\[0\].layer.weight_ih`, which `equinox.nn.{around}` transforms"
    )
    with pytest.raises(ValueError, match=match):
        eqx.nn.make_with_state(make)()
    # The other weight acts as it is.
    where = lambda net: net["cells"][0].layer.weight_hh  # noqa: E731
    model, _ = eqx.nn.make_with_state(make)()
    assert len(model.weights) == 1


def test_registering_fields_that_are_not_there():
    class Layer(eqx.Module):
        kernel: jax.Array

    with pytest.raises(
        ValueError, match=r"of Layer, got \['nope'\]; it has \['kernel'\]"
    ):
        spectrax.register_layer(Layer, "nope")
    with (
        unchecked(),
        pytest.raises(TypeError, match="expected `view` to be a function"),
    ):
        spectrax.register_layer(Layer, "kernel", view="nope")


def test_registering_again_replaces(getkey):
    class Fickle(Tensor):
        pass

    model = Fickle(jr.normal(getkey(), (4, 3)))
    spectrax.register_layer(Fickle, view=lambda layer, weight: 2 * weight)  # noqa: ARG005
    _assert_bound(_constrained(model).weight, BOUND / 2)
    spectrax.register_layer(Fickle)
    _assert_bound(_constrained(model).weight)
    spectrax.register_layer(Fickle, ())
    with pytest.raises(ValueError, match="a model with a weight to constrain"):
        _constrained(model)


def test_known_layers_are_named_in_errors():
    class Unheard(Tensor):
        pass

    class Heard(Tensor):
        pass

    model = Unheard(jnp.ones((2, 2)))
    spectrax.register_layer(Heard)
    with pytest.raises(
        TypeError, match=r"got Unheard\. Known are .*Conv, .*Heard, .*Linear"
    ) as caught:
        spectrax.layer_operator(model)
    # Those without weights are of no use to anybody.
    assert "LayerNorm" not in str(caught.value)


# Errors.


@pytest.mark.parametrize("not_a_layer", [None, 3.0, jnp.ones((2, 2)), [1]])
def test_operator_of_an_unknown_type_raises(not_a_layer):
    with pytest.raises(TypeError, match="expected a layer of a known type, got"):
        spectrax.layer_operator(not_a_layer)


def test_operator_of_several_weights_raises(getkey):
    cell = eqx.nn.GRUCell(3, 4, key=getkey())
    with pytest.raises(ValueError, match=r"GRUCell with \['weight_ih', 'weight_hh'\]"):
        spectrax.layer_operator(cell)


@pytest.mark.parametrize(
    "make",
    [
        lambda key: eqx.nn.Linear(3, 4, key=key),
        lambda key: eqx.nn.Conv2d(3, 4, 3, key=key),
        lambda key: eqx.nn.ConvTranspose1d(3, 4, 3, key=key),
    ],
    ids=["Linear", "Conv", "ConvTranspose"],
)
def test_operator_of_a_stack_raises(make, getkey):
    stack = eqx.filter_vmap(make)(jr.split(getkey(), 2))
    with pytest.raises(ValueError, match=r"got a stack of them.*shape \(2, 4, "):
        spectrax.layer_operator(stack)


def test_operators_of_a_stack(getkey):
    make = eqx.filter_vmap(lambda key: eqx.nn.Linear(3, 4, key=key))
    stack = make(jr.split(getkey(), 2))
    operators = eqx.filter_vmap(spectrax.layer_operator)(stack)
    norms = eqx.filter_vmap(spectrax.spectral_norm)(operators)
    np.testing.assert_allclose(norms, [true_norm(w) for w in stack.weight], rtol=1e-12)


def test_input_size_for_a_layer_without_one_raises(getkey):
    linear = eqx.nn.Linear(3, 4, key=getkey())
    with pytest.raises(ValueError, match=r"no `input_size` for Linear.*got \(3,\)"):
        spectrax.layer_operator(linear, input_size=(3,))


def test_registering_an_instance_raises(getkey):
    linear = eqx.nn.Linear(3, 4, key=getkey())
    with (
        unchecked(),
        pytest.raises(TypeError, match="a class, got an instance of Linear"),
    ):
        spectrax.register_layer(linear)  # pyright: ignore


@pytest.mark.parametrize("ndim", [0, -1])
def test_registering_with_too_few_axes_raises(ndim):
    class Mine(Tensor):
        pass

    with pytest.raises(ValueError, match=f"`ndim` to be at least 1, got {ndim}"):
        spectrax.register_layer(Mine, ndim=ndim)


def test_an_array_with_fewer_axes_than_registered_raises(getkey):
    class Deep(Tensor):
        pass

    spectrax.register_layer(Deep, view=lambda _, weight: weight[0], ndim=3)
    with pytest.raises(ValueError, match=r"`weight`.*got shape \(4, 3\)"):
        _constrained(Deep(jr.normal(getkey(), (4, 3))))
