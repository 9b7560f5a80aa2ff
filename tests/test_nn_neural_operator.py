"""The complete neural operator: every argument, and its bound from both sides."""

import functools as ft
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from jaxtyping import Array

import spectrax
import spectrax.nn as snn

from .helpers import clone, raw, trained_bounds, true_norm, unchecked


# How weights are constrained does not depend on how norms are found; a decomposition
# compiles fast.
_create = ft.partial(snn.create_spectral_neural_operator, estimator=spectrax.ExactSVD())


def _outline(*args, **options):
    """The model without numbers, and without compiling anything."""
    create = snn.create_spectral_neural_operator
    return eqx.filter_eval_shape(ft.partial(create, *args, **options))[0]


def _linear_weights(plain) -> list[Array]:
    return [layer.weight for layer in plain.layers]


@eqx.filter_jit
def _norms_and_outputs(function, x: Array) -> tuple[Array, Array]:
    """Those of the Jacobian at each of a batch; compiled once for all tests with the
    same architecture."""

    def norm(x: Array) -> Array:
        return jnp.linalg.norm(jax.jacfwd(function)(x).reshape(-1, x.size), 2)

    return jax.vmap(norm)(x), jax.vmap(function)(x)


# The bound.


@pytest.fixture(scope="module")
def small():
    """A model with weights as they might be after training, and its plain form."""
    model, state = _create(4, 4, (4, 4), 2, initial_bound=1.5, key=jr.key(2))
    raw, static = eqx.partition(model, eqx.is_inexact_array)
    leaves, structure = jax.tree.flatten(raw)
    noise = jr.split(jr.key(3), len(leaves))
    leaves = [
        leaf + jr.normal(key, leaf.shape)
        for leaf, key in zip(leaves, noise, strict=True)
    ]
    model = eqx.combine(jax.tree.unflatten(structure, leaves), static)
    state = spectrax.advance(model, state)
    return model, state, spectrax.unwrap(model, state)


@pytest.mark.parametrize("num_points", [1, 5])
def test_bound_holds_at_every_number_of_points(small, num_points, getkey):
    model, state, plain = small
    bound = float(plain.lipschitz_bound())
    np.testing.assert_allclose(model.lipschitz_bound(state), bound, rtol=1e-12)
    scales = jnp.geomspace(0.1, 30.0, 16)[:, None, None]
    x = scales * jr.normal(getkey(), (16, num_points, 4))
    norms, outputs = map(np.asarray, _norms_and_outputs(plain, x))
    assert np.max(norms) <= bound
    assert np.max(norms) > 1e-2 * bound
    moved = np.linalg.norm(outputs - outputs[::-1], axis=(1, 2))
    apart = np.linalg.norm(np.asarray(x - x[::-1]), axis=(1, 2))
    assert np.all(moved <= bound * apart)


def test_bound_is_the_product_of_its_parts(small):
    _, _, plain = small
    network = plain
    expected = np.prod([true_norm(weight) for weight in _linear_weights(plain)])
    np.testing.assert_allclose(expected, 1.5**3, rtol=1e-10)
    for block in network.blocks:
        attention = block.layer.attention
        heads, size = attention.num_heads, attention.size
        query = np.asarray(attention.query_proj.weight)
        both = [
            true_norm(np.asarray(value) @ rows.T)
            for value, rows in zip(
                attention.value_proj.weight,
                query.reshape(heads, -1, size),
                strict=True,
            )
        ]
        norm = true_norm(query) * max(both) * true_norm(attention.output_proj.weight)
        assert norm <= 1 + 1e-9
        weight = 1 / (1 + math.exp(-float(block.raw)))
        expected *= 1 - weight + weight * norm
    found = float(plain.lipschitz_bound())
    assert expected <= found <= expected * (1 + 1e-2)


def test_bound_is_attained(getkey):
    """All weights the identity: one point comes through unchanged."""
    model, state = _create(4, 4, (4, 4), 2, key=getkey())

    def weights(model):
        network = model
        attentions = [block.layer.attention for block in network.blocks]
        return (
            [layer.weight.weight for layer in network.layers]
            + [attention.query_proj.weight.weight for attention in attentions]
            + [attention.output_proj.weight.weight for attention in attentions]
        )

    def values(model):
        blocks = model.blocks
        return [block.layer.attention.value_proj.weight.weight for block in blocks]

    model = eqx.tree_at(weights, model, [jnp.eye(4)] * 7)
    model = eqx.tree_at(values, model, [jnp.eye(4).reshape(2, 2, 4)] * 2)
    state = spectrax.advance(model, state)
    plain = spectrax.unwrap(model, state)
    norms, _ = _norms_and_outputs(plain, jr.normal(getkey(), (16, 1, 4)))
    bound = float(plain.lipschitz_bound())
    np.testing.assert_allclose(norms, 1, rtol=1e-10)
    assert 1 <= bound <= 1 + 1e-3


def test_certified_weights_have_a_bound_of_one(getkey):
    model, state = _create(4, 4, (4,), 2, use_attention=False, key=getkey())
    plain = spectrax.unwrap(model, state, certified=True)
    assert plain.lipschitz_bound() <= 1


# Arguments.


def test_without_attention_points_do_not_see_each_other(getkey):
    key = getkey()
    x = jr.normal(getkey(), (5, 4))
    both = jnp.stack([x, x.at[0].add(1.0)])
    for use_attention in (False, True):
        model, _ = _create(4, 4, (4,), 2, use_attention=use_attention, key=key)
        plain = raw(model)
        same = np.equal(*eqx.filter_jit(eqx.filter_vmap(plain))(both))
        assert not np.any(same[0])
        assert np.all(same[1:]) != use_attention
        assert len(plain.blocks) == use_attention


def test_sizes_and_heads(getkey):
    network = raw(_outline(3, 2, (6, 12), 3, key=getkey()))
    shapes = [layer.weight.shape for layer in network.layers]
    assert shapes == [(6, 3), (12, 6), (2, 12)]
    values = [block.layer.attention.value_proj.weight.shape for block in network.blocks]
    assert values == [(3, 2, 6), (3, 4, 12)]
    for num_points in (1, 4):
        x = jax.ShapeDtypeStruct((num_points, 3), float)
        output = eqx.filter_eval_shape(lambda network, x: network(x), network, x)
        assert output.shape == (num_points, 2)


def test_initial_bound_is_that_of_linear_layers(getkey):
    for adaptive in (False, True):
        model, state = _create(
            3, 2, (4,), 2, initial_bound=2, use_adaptive_bounds=adaptive, key=getkey()
        )
        plain = spectrax.unwrap(model, state)
        for weight in _linear_weights(plain):
            np.testing.assert_allclose(true_norm(weight), 2, rtol=1e-10)
        attention = plain.blocks[0].layer.attention
        np.testing.assert_allclose(
            true_norm(attention.query_proj.weight), 1, rtol=1e-10
        )
        rows = spectrax.summary(model, state, enclosure=False)
        assert [row.bound for row in rows][:2] == pytest.approx([2, 2])


def test_activation_is_used_and_counted(getkey):
    key = getkey()
    bounds = []
    for activation in (snn.max_min, jax.nn.silu, eqx.nn.PReLU(3.0)):
        model, state = _create(
            4, 4, (4, 4), 2, activation=activation, use_attention=False, key=key
        )
        plain = spectrax.unwrap(model, state)
        bounds.append(float(plain.lipschitz_bound()))
        first, second, last = plain.layers
        expected = last(activation(second(activation(first(jnp.ones(4))))))
        found = plain(jnp.ones((1, 4)))[0]
        np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert bounds == pytest.approx([1, 1.0998393**2, 9], rel=1e-3)


def test_estimator_is_used(getkey):
    model = _outline(3, 2, (4,), 2, key=getkey())
    assert spectrax.constrained_weights(model)[0].estimator == spectrax.PowerIteration()
    model = _outline(3, 2, (4,), 2, estimator=spectrax.ExactSVD(), key=getkey())
    assert all(
        w.estimator == spectrax.ExactSVD() for w in spectrax.constrained_weights(model)
    )


def test_keys_make_different_weights(getkey):
    first, second = getkey(), getkey()
    models = [_create(3, 2, (4,), 2, key=key)[0] for key in (first, first, second)]
    weights = [jax.tree.leaves(eqx.filter(model, eqx.is_array)) for model in models]
    for one, same, other in zip(*weights, strict=True):
        np.testing.assert_array_equal(one, same)
        # But for the weight of the average.
        assert one.ndim == 0 or np.all(one != other)


# Training.


def _train(model, state, steps: int):
    """Towards outputs three times as long as the inputs."""
    x = jr.normal(jr.key(7), (4, 5, 4))
    target = 3 * x
    optimizer = optax.sign_sgd(0.03)
    slots = optimizer.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, state, slots):
        def loss(model, state):
            state = spectrax.advance(model, state)
            plain = spectrax.unwrap(model, state)
            return jnp.mean(jnp.square(jax.vmap(plain)(x) - target)), state

        (value, state), gradient = eqx.filter_value_and_grad(loss, has_aux=True)(
            model, state
        )
        updates, slots = optimizer.update(gradient, slots)
        return eqx.apply_updates(model, updates), state, slots, value

    values = []
    for _ in range(steps):
        model, state, slots, value = step(model, state, slots)
        values.append(float(value))
    return model, spectrax.advance(model, state), values


def test_adaptive_bounds_are_trained():
    model, state = _create(4, 4, (4,), 2, use_adaptive_bounds=True, key=jr.key(1))
    start = float(model.lipschitz_bound(state))
    trained, state, values = _train(model, state, 40)
    assert values[-1] < 0.7 * values[0]
    learned = [
        float(constraint.target())
        for constraint in trained_bounds(trained)
        if constraint is not None
    ]
    assert len(learned) == 2
    assert min(learned) > 1.2
    plain = spectrax.unwrap(trained, state)
    norms = [true_norm(weight) for weight in _linear_weights(plain)]
    np.testing.assert_allclose(norms, learned, rtol=1e-10)
    # What is certified follows, and holds.
    bound = float(plain.lipschitz_bound())
    assert 1.4 * start < bound <= np.prod(learned) * (1 + 1e-2)
    norms, _ = _norms_and_outputs(plain, jr.normal(jr.key(0), (16, 5, 4)))
    assert np.max(norms) <= bound
    # The weights of the averages are trained as well.
    assert trained.blocks[0].raw != model.blocks[0].raw


def test_fixed_bounds_stay():
    model, state = _create(4, 4, (4,), 2, key=jr.key(1))
    assert all(constraint is None for constraint in trained_bounds(model))
    trained, state, values = _train(model, state, 10)
    assert values[-1] < values[0]
    assert trained.lipschitz_bound(state) <= 1 + 1e-2
    plain = spectrax.unwrap(trained, state)
    for weight in _linear_weights(plain):
        np.testing.assert_allclose(true_norm(weight), 1, rtol=1e-10)


def test_state_advances_and_batches_share_it(small, getkey):
    model, state, plain = small
    x = jr.normal(getkey(), (16, 5, 4))

    @eqx.filter_jit
    def call(model, x, state):
        return jax.vmap(model, in_axes=(0, None), out_axes=(0, None))(x, state)

    y, new_state = call(model, x, clone(state))
    np.testing.assert_allclose(y, _norms_and_outputs(plain, x)[1], rtol=1e-10)
    np.testing.assert_allclose(call(model, x, new_state)[0], y, rtol=1e-10)


def test_hessian_with_respect_to_inputs(getkey):
    model, state = _create(2, 1, (4,), 2, activation=jnp.tanh, key=getkey())

    def total(x):
        return jnp.sum(model(x, clone(state))[0])

    x = jr.normal(getkey(), (2, 2))
    hessian = jax.jit(jax.hessian(total))(x).reshape(4, 4)
    np.testing.assert_allclose(hessian, hessian.T, atol=1e-12)
    step = 1e-5
    slope = jax.jit(jax.grad(total))
    for i, unit in enumerate(jnp.eye(4).reshape(4, 2, 2)):
        difference = (slope(x + step * unit) - slope(x - step * unit)) / (2 * step)
        np.testing.assert_allclose(hessian[i], difference.ravel(), atol=1e-7)


# Errors.


@pytest.mark.parametrize(
    ("input_dim", "output_dim", "hidden_dims", "match"),
    [
        (3, 2, (), r"at least one hidden layer.*hidden_dims=\(\)"),
        (0, 2, (4,), "at least one channel everywhere, got input_dim=0"),
        (3, 2, (4, 0), r"at least one channel everywhere.*\(4, 0\)"),
        (3, -1, (4,), "output_dim=-1"),
    ],
)
def test_impossible_sizes_raise(input_dim, output_dim, hidden_dims, match, getkey):
    with pytest.raises(ValueError, match=match):
        _create(input_dim, output_dim, hidden_dims, 2, key=getkey())


@pytest.mark.parametrize("num_heads", [0, 4])
def test_heads_that_do_not_divide_raise(num_heads, getkey):
    match = rf"heads that divides all hidden_dims.*num_heads={num_heads}.*\(4, 6\)"
    with pytest.raises(ValueError, match=match):
        _create(3, 2, (4, 6), num_heads, key=getkey())
    # Without attention it does not matter.
    _outline(3, 2, (4, 6), num_heads, use_attention=False, key=getkey())


def test_odd_sizes_with_max_min_raise(getkey):
    with pytest.raises(ValueError, match="a multiple of 2 channels"):
        _create(3, 2, (5,), 5, key=getkey())


def test_unknown_activation_raises(getkey):
    with pytest.raises(ValueError, match="known Lipschitz constant, got"):
        _create(3, 2, (4,), 2, activation=jnp.exp, key=getkey())


def test_activation_that_changes_the_channels_raises(getkey):
    with pytest.raises(ValueError, match=r"number of channels, got 4 to \(\)"):
        _create(3, 2, (4,), 2, activation=jax.nn.logsumexp, key=getkey())


@pytest.mark.parametrize("adaptive", [False, True])
def test_impossible_bound_raises(adaptive, getkey):
    with pytest.raises(ValueError, match="to be positive and finite, got -1"):
        _create(
            3, 2, (4,), 2, initial_bound=-1, use_adaptive_bounds=adaptive, key=getkey()
        )


@pytest.mark.parametrize("shape", [(4,), (5, 2), (2, 5, 4), (0, 4)])
def test_inputs_of_another_shape_raise(small, shape):
    _, _, plain = small
    with unchecked(), pytest.raises(ValueError, match=r"shape \[points, 4\], got"):
        plain(jnp.ones(shape))


def test_without_state_raises(small):
    model, _, _ = small
    with pytest.raises(TypeError, match=r"expected the `equinox.nn.State` of a const"):
        model(jnp.ones((4, 3)))
    with pytest.raises(
        TypeError, match="`equinox.nn.State` of a constrained model, got"
    ):
        model.lipschitz_bound()
