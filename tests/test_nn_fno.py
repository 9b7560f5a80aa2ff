"""The Fourier neural operator: its architecture, and a bound that holds on every grid.

The truth is the dense Jacobian, whose norm at any input is a lower bound on the
Lipschitz constant, and pairs of inputs.
"""

import functools as ft
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import spectrax
from spectrax.nn import FNO

from .helpers import clone, trained_bounds, true_norm


# In one space dimension and narrow: what is tested here are the parts put together.
make = ft.partial(FNO, 1, 2, 1, 4, 3, 2)


def wrapped(key, **options):
    return eqx.nn.make_with_state(make)(key=key, **options)


def weights(model):
    """Of the constrained layers of an unwrapped model, as functions of one dimension
    have them: matrices, and those of each frequency."""
    network = model
    linear = [network.lifting, network.hidden, network.projection]
    blocks = [spectrax.layer_operator(block).matrices() for block in network.blocks]
    return [layer.weight[None] for layer in linear] + blocks


def norms(model):
    """By numpy."""
    return [
        np.linalg.norm(np.asarray(matrices), 2, axis=(1, 2)).max()
        for matrices in weights(model)
    ]


@eqx.filter_jit
def jacobian_norms(model, xs):
    def norm(x):
        jacobian = jax.jacrev(model)(x)
        return jnp.linalg.norm(jacobian.reshape(math.prod(jacobian.shape[:2]), -1), 2)

    return jax.vmap(norm)(xs)


def test_architecture(getkey):
    """Against the formula, in numpy."""
    model = make(
        constraint=None,
        activation=jnp.tanh,
        padding=0.5,
        output_scale=3.0,
        key=getkey(),
    )
    network = model
    assert len(network.blocks) == 2
    x = jr.normal(getkey(), (2, 6))

    def affine(layer, y):
        return np.asarray(layer.weight) @ y + np.asarray(layer.bias)[:, None]

    y = affine(network.lifting, np.asarray(x))
    y = y + affine(network.position, np.linspace(0, 1, 6)[None])
    y = np.concatenate([y, np.zeros((4, 3))], axis=1)
    for block in network.blocks:
        assert block.use_bypass
        y = np.tanh(np.asarray(block(jnp.asarray(y))))
    y = np.tanh(affine(network.hidden, y[:, :6]))
    y = 3 * affine(network.projection, y)
    np.testing.assert_allclose(model(x), y, rtol=1e-12)


def test_plain_has_no_state(getkey):
    model = make(constraint=None, key=getkey())
    assert not model.is_stateful()
    expected = np.prod(norms(model))
    np.testing.assert_allclose(model.lipschitz_bound(), expected, rtol=1e-3)
    assert model.lipschitz_bound() >= expected


def test_bound_holds_on_every_grid(getkey):
    model, state = wrapped(getkey(), output_scale=5.0, padding=0.3)
    plain = spectrax.unwrap(model, state)
    np.testing.assert_allclose(norms(plain), 1, rtol=1e-6)
    bound = float(plain.lipschitz_bound())
    assert 5 * np.prod(norms(plain)) <= bound <= 5 * (1 + 1e-3)
    for n in (1, 2, 5, 8):
        found = jacobian_norms(plain, 3 * jr.normal(getkey(), (4, 2, n)))
        assert found.max() <= bound


def test_bound_is_reached_by_a_network_that_can(getkey):
    """With matrices that are all multiples of one direction, nothing is lost between
    the layers, on no grid."""
    model = make(
        constraint=None, activation=jax.nn.relu, output_scale=2.0, key=getkey()
    )

    def aligned(layer):
        weight = jnp.zeros_like(layer.weight)
        return eqx.tree_at(
            lambda layer: layer.weight, layer, weight.at[..., 0, 0].set(1)
        )

    def parts(model):
        n = model
        return [n.lifting, n.hidden, n.projection, *n.blocks]

    model = eqx.tree_at(parts, model, [aligned(layer) for layer in parts(model)])
    network = model
    # The bypass and the integral operator act in the same direction: 1 + |1 + i|.
    bound = 2 * float(np.abs(2 + 1j)) ** len(network.blocks)
    np.testing.assert_allclose(model.lipschitz_bound(), bound, rtol=1e-3)
    # All activations on: the whole network is linear there.
    x = jnp.full((2, 8), 100.0)
    (found,) = jacobian_norms(model, x[None])
    assert found <= bound
    np.testing.assert_allclose(found, bound, rtol=1e-6)


def test_activation_counts(getkey):
    """An activation of constant 1/4, once behind each block and once at the end."""
    plain = make(constraint=None, activation=jax.nn.sigmoid, key=getkey())
    expected = 0.25**3 * np.prod(norms(plain))
    np.testing.assert_allclose(plain.lipschitz_bound(), expected, rtol=1e-3)
    model, state = wrapped(getkey(), activation=jax.nn.sigmoid, output_scale=64.0)
    np.testing.assert_allclose(model.lipschitz_bound(state), 1.0, rtol=1e-3)


def test_states_and_unwrapping(getkey):
    model, state = wrapped(getkey())
    x = jr.normal(getkey(), (2, 7))
    y, state = model(x, state)
    plain = spectrax.unwrap(model, state)
    assert isinstance(plain, FNO)
    np.testing.assert_allclose(plain(x), y, rtol=1e-12)
    again, _ = plain(x, clone(state))
    np.testing.assert_array_equal(plain(x), again)
    np.testing.assert_allclose(
        model.lipschitz_bound(state), plain.lipschitz_bound(), rtol=1e-12
    )
    batch = jnp.stack([x, 2 * x])
    np.testing.assert_allclose(jax.vmap(plain)(batch)[0], y, rtol=1e-10)


def test_coordinates_are_not_constrained(getkey):
    model, state = wrapped(getkey())
    table = spectrax.summary(model, state, enclosure=False)
    assert len(table) == 5
    assert [path for path, _ in table.unconstrained] == ["position.weight"]
    plain = spectrax.unwrap(model, state)
    larger = eqx.tree_at(
        lambda model: model.position.weight,
        plain,
        replace_fn=lambda weight: 100 * weight,
    )
    assert larger.lipschitz_bound() == plain.lipschitz_bound()
    x = jr.normal(getkey(), (2, 5))
    assert not np.allclose(larger(x), plain(x))


def test_learned_bounds_are_trained(getkey):
    """They grow where the loss asks for more than the first bounds allow, and the
    certified bound goes with them."""
    constraint = spectrax.LearnableBound(1.0)
    model, state = wrapped(getkey(), constraint=constraint)
    optimizer = optax.adam(3e-2)
    opt_state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))
    xs = jr.normal(getkey(), (8, 2, 8))
    ys = 30 * xs[:, :1]

    @eqx.filter_jit
    def step(model, state, opt_state):
        state = spectrax.advance(model, state)

        def loss(model):
            plain = spectrax.unwrap(model, state)
            return jnp.mean((jax.vmap(plain)(xs) - ys) ** 2)

        value, gradient = eqx.filter_value_and_grad(loss)(model)
        with jax.numpy_dtype_promotion("standard"):  # optax relies on it
            updates, opt_state = optimizer.update(gradient, opt_state)
        return eqx.apply_updates(model, updates), state, opt_state, value

    values = []
    for _ in range(60):
        model, state, opt_state, value = step(model, state, opt_state)
        values.append(value)
    assert values[-1] < 0.5 * values[0]
    learned = np.prod([c.target() for c in trained_bounds(model)])
    assert learned > 2
    state = spectrax.advance(model, state)
    bound = model.lipschitz_bound(state)
    np.testing.assert_allclose(bound, learned, rtol=2e-3)
    plain = spectrax.unwrap(model, state)
    assert jacobian_norms(plain, xs).max() <= bound


def test_hessian_with_respect_to_the_input(getkey):
    """Of a smooth network, against finite differences of its gradient."""
    model, state = wrapped(getkey(), activation=jnp.tanh)
    plain = spectrax.unwrap(model, state)
    x = jr.normal(getkey(), (2, 3))

    def energy(x):
        return jnp.sum(plain(x) ** 2)

    gradient = jax.jit(jax.grad(energy))
    hessian = jax.jit(jax.hessian(energy))(x)
    step = 1e-5
    direction = jr.normal(getkey(), x.shape)
    ends = gradient(x + step * direction), gradient(x - step * direction)
    expected = (ends[0] - ends[1]) / (2 * step)
    np.testing.assert_allclose(
        jnp.tensordot(hessian, direction, 2), expected, rtol=1e-5, atol=1e-8
    )


@pytest.mark.parametrize("dims", [2, 3])
def test_more_dimensions(dims, getkey):
    options = {"constraint": None, "padding": 0.25, "coordinates": dims == 3}
    model = FNO(dims, 1, 2, 2, 2, 1, **options, key=getkey())
    assert (model.position is None) == (dims == 2)
    grid = (4, 3, 3)[:dims]
    x = jr.normal(getkey(), (1, *grid))

    @jax.jit
    def flat(x):
        return model(x.reshape(1, *grid)).ravel()

    assert flat(x.ravel()).shape == (2 * math.prod(grid),)
    jacobian = jax.jit(jax.jacrev(flat))(x.ravel())
    assert 0 < true_norm(jacobian) <= np.prod(norms(model)) * (1 + 1e-12)


# Errors.


def test_unknown_activation_raises(getkey):
    with pytest.raises(ValueError, match="an activation of known Lipschitz constant"):
        make(activation=lambda x: x**2, key=getkey())
    plain = make(activation=lambda x: x**2, constraint=None, key=getkey())
    with pytest.raises(ValueError, match="an activation of known Lipschitz constant"):
        plain.lipschitz_bound()


def test_without_the_state_raises(getkey):
    model, _ = wrapped(getkey())
    with pytest.raises(
        TypeError, match="`equinox.nn.State` of a constrained model, got"
    ):
        model.lipschitz_bound()
    with pytest.raises(
        TypeError, match="`equinox.nn.State` of a constrained model, got None"
    ):
        model(jnp.zeros((2, 4)))


@pytest.mark.parametrize(
    ("width", "depth", "options", "message"),
    [
        (0, 1, {}, "`width` and `depth` to be positive, got 0 and 1"),
        (2, 0, {}, "`width` and `depth` to be positive, got 2 and 0"),
        (2, 1, {"padding": -0.1}, "a fraction of the grid, not negative, got -0.1"),
        (2, 1, {"padding": math.nan}, "a fraction of the grid, not negative, got nan"),
        (2, 1, {"output_scale": 0.0}, "`output_scale` to be positive.* got 0.0"),
        (2, 1, {"output_scale": math.inf}, "`output_scale` to be positive.* got inf"),
    ],
)
def test_bad_arguments(width, depth, options, message, getkey):
    with pytest.raises(ValueError, match=message):
        FNO(1, 1, 1, width, 1, depth, **options, key=getkey())
