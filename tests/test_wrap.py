"""`wrap`, `advance`, `unwrap` and the call, on layers and on whole models."""

import inspect
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest
from jaxtyping import Array, PRNGKeyArray

import spectrax

from .helpers import (
    clone,
    linear_norms,
    linear_weights,
    Net,
    perturbed,
    true_norm,
    with_norms,
)


wrap = eqx.nn.make_with_state(spectrax.wrap)
X = np.array([0.5, -1.0, 2.0, 0.25])


@pytest.fixture
def net(getkey):
    return Net(getkey())


@pytest.fixture
def stale(net, getkey):
    """A wrapped model whose weights have changed since its state was made."""
    model, state = wrap(net)
    return perturbed(model, getkey()), state


#
# Constraints on models whose code knows nothing of them
#


def test_one_layer(getkey):
    layer = eqx.nn.Linear(4, 2, key=getkey())
    model, state = wrap(layer)
    y, state = model(jnp.asarray(X), state)
    weight = np.asarray(layer.weight) / true_norm(layer.weight)
    np.testing.assert_allclose(y, weight @ X + np.asarray(layer.bias), rtol=1e-12)
    plain = spectrax.unwrap(model, state)
    assert isinstance(plain, eqx.nn.Linear)
    np.testing.assert_allclose(plain.weight, weight, rtol=1e-12)
    assert eqx.tree_equal(plain.bias, layer.bias)


@pytest.mark.parametrize(
    ("constraint", "norms"),
    [
        (spectrax.Normalize(0.5), (0.5, 0.5)),
        (spectrax.Normalize(3.0), (3.0, 3.0)),
        (spectrax.Clip(0.5), (0.5, 0.2)),
        (spectrax.Clip(3.0), (2.0, 0.2)),
        (spectrax.ClipToInitial(), (2.0, 0.2)),
        (spectrax.ClipToInitial(0.5), (1.0, 0.1)),
        (spectrax.LearnableBound(0.5), (0.5, 0.5)),
        (spectrax.LearnableBound(0.5, maximum=0.75), (0.5, 0.5)),
    ],
    ids=str,
)
def test_constraints(net, constraint, norms):
    net = with_norms(net, 2.0, 0.2)
    model, state = wrap(net, constraint=constraint)
    assert eqx.tree_equal(model.raw, net)
    y, state = model(jnp.asarray(X), state)
    plain = spectrax.unwrap(model, state)
    assert linear_norms(plain) == pytest.approx(norms, rel=1e-9)
    expected = with_norms(net, *norms)
    np.testing.assert_allclose(y, expected(jnp.asarray(X)), rtol=1e-9)


@pytest.mark.parametrize("final", [True, False])
def test_mlp(getkey, final):
    mlp = eqx.nn.MLP(4, 2, 4, 1, use_final_bias=final, key=getkey())
    model, state = wrap(mlp)
    y, state = model(jnp.asarray(X), state)
    assert linear_norms(spectrax.unwrap(model, state)) == pytest.approx([1, 1])
    np.testing.assert_allclose(y, with_norms(mlp, 1, 1)(jnp.asarray(X)), rtol=1e-9)


def test_the_class_and_its_methods_come_back(net):
    model, state = wrap(net)
    plain = spectrax.unwrap(model, state)
    assert type(plain) is Net
    expected = with_norms(net, 1, 1)
    x = jnp.asarray(X)
    np.testing.assert_allclose(plain.hidden(x), expected.hidden(x), rtol=1e-9)
    np.testing.assert_allclose(plain(x), expected(x), rtol=1e-9)


@pytest.mark.parametrize("inference", [True, False])
def test_sequential_with_dropout(getkey, inference):
    net = eqx.nn.Sequential(
        [
            eqx.nn.Linear(4, 4, key=getkey()),
            eqx.nn.Lambda(jnp.tanh),
            eqx.nn.Dropout(0.5, inference=inference),
            eqx.nn.Linear(4, 2, key=getkey()),
        ]
    )
    model, state = wrap(net)
    x, key = jnp.asarray(X), getkey()
    y, state = model(x, state, key=key)
    np.testing.assert_allclose(y, with_norms(net, 1, 1)(x, key=key), rtol=1e-9)
    other, _ = model(x, state, key=getkey())
    assert jnp.allclose(other, y) == inference


def test_sequential_with_a_wrapped_layer(getkey):
    first, second = (eqx.nn.Linear(4, n, key=getkey()) for n in (4, 2))

    def make() -> eqx.nn.Sequential:
        return eqx.nn.Sequential([spectrax.wrap(first), second])

    model, state = eqx.nn.make_with_state(make)()
    assert model.is_stateful()
    x = jnp.asarray(X)
    y, state = model(x, state)
    expected = second(with_norms(first, 1)(x))
    np.testing.assert_allclose(y, expected, rtol=1e-9)
    # Nothing is left to do, so that the container needs no state any more.
    plain = spectrax.unwrap(model, state)
    assert not plain.is_stateful()
    np.testing.assert_allclose(plain(x), expected, rtol=1e-9)


def test_a_wrapped_pytree_without_call(getkey):
    pair = {"a": eqx.nn.Linear(4, 4, key=getkey()), "b": [Net(getkey())]}
    model, state = wrap(pair)
    plain = spectrax.unwrap(model, spectrax.advance(model, state))
    assert type(plain) is dict
    assert linear_norms(plain) == pytest.approx([1, 1, 1], rel=1e-9)
    with pytest.raises(TypeError, match="'dict' object is not callable"):
        model(jnp.asarray(X), wrap(pair)[1])


def test_two_wrapped_models_in_a_pytree(getkey):
    critic, generator = Net(getkey()), Net(getkey())

    def make() -> dict:
        return {
            "critic": spectrax.wrap(critic),
            "rest": (spectrax.wrap(generator, constraint=spectrax.Normalize(2.0)),),
        }

    models, state = eqx.nn.make_with_state(make)()
    state = spectrax.advance(models, state)
    plain = spectrax.unwrap(models, state)
    assert type(plain["critic"]) is Net
    assert linear_norms(plain["critic"]) == pytest.approx([1, 1], rel=1e-9)
    assert linear_norms(plain["rest"]) == pytest.approx([2, 2], rel=1e-9)
    y, state = models["rest"][0](jnp.asarray(X), state)
    assert eqx.tree_equal(y, plain["rest"][0](jnp.asarray(X)), rtol=1e-9, atol=0.0)


class Outer(eqx.Module):
    """A user's own module that wraps a part of itself and passes the state on."""

    inner: spectrax.Wrapped
    head: eqx.nn.Linear

    def __init__(self, key: PRNGKeyArray):
        inner_key, head_key = jr.split(key)
        self.inner = spectrax.wrap(Net(inner_key))
        self.head = eqx.nn.Linear(2, 4, key=head_key)

    def __call__(self, x: Array, state: eqx.nn.State) -> tuple[Array, eqx.nn.State]:
        x, state = self.inner(x, state)
        return self.head(x), state


def test_inside_a_module(getkey):
    model, state = eqx.nn.make_with_state(Outer)(getkey())
    x = jnp.asarray(X)
    y, state = model(x, state)
    expected = with_norms(model.inner.raw, 1, 1)
    np.testing.assert_allclose(y, model.head(expected(x)), rtol=1e-9)

    plain = spectrax.unwrap(model, state)
    assert type(plain) is Outer
    y_plain, same = plain(x, state)
    assert same is state
    assert eqx.tree_equal(y_plain, y, rtol=1e-12, atol=0.0)
    np.testing.assert_allclose(plain.inner(x), expected(x), rtol=1e-9)
    assert eqx.tree_equal(plain.head, model.head)
    norms = linear_norms(plain.inner)
    assert norms == pytest.approx([1, 1], rel=1e-9)


class Stack(eqx.Module):
    """Three layers made by `filter_vmap`, scanned over."""

    layers: eqx.nn.Linear

    def __init__(self, key: PRNGKeyArray):
        keys = jr.split(key, 3)
        self.layers = eqx.filter_vmap(lambda key: eqx.nn.Linear(4, 4, key=key))(keys)

    def __call__(self, x: Array) -> Array:
        dynamic, static = eqx.partition(self.layers, eqx.is_array)

        def step(x: Array, layer: eqx.nn.Linear) -> tuple[Array, None]:
            return jnp.tanh(eqx.combine(layer, static)(x)), None

        return lax.scan(step, x, dynamic)[0]


@pytest.mark.parametrize(
    ("constraint", "bounds"),
    [
        (spectrax.Normalize(), [1, 1, 1]),
        (spectrax.Normalize(np.array([0.5, 1.0, 2.0])), [0.5, 1, 2]),
        (spectrax.Clip(jnp.array([0.5, 1.0, 2.0])), [0.5, 0.9, 0.9]),
        (spectrax.LearnableBound(jnp.array([0.5, 1.0, 2.0])), [0.5, 1, 2]),
    ],
    ids=["one bound", "Normalize", "Clip", "LearnableBound"],
)
def test_stacked_layers(getkey, constraint, bounds):
    net = Stack(getkey())
    scales = np.array([0.9 / true_norm(weight) for weight in net.layers.weight])
    weights = net.layers.weight * scales[:, None, None]
    net = eqx.tree_at(lambda net: net.layers.weight, net, weights)
    model, state = wrap(net, constraint=constraint)
    y, state = model(jnp.asarray(X), state)
    plain = spectrax.unwrap(model, state)
    norms = [true_norm(weight) for weight in plain.layers.weight]
    assert norms == pytest.approx(bounds, rel=1e-9)
    expected = X
    for weight, bias, bound in zip(weights, net.layers.bias, bounds, strict=True):
        scaled = np.asarray(weight) * (bound / 0.9)
        expected = np.tanh(scaled @ expected + np.asarray(bias))
    np.testing.assert_allclose(y, expected, rtol=1e-9)


def test_ensemble(getkey):
    keys = jr.split(getkey(), 3)

    @eqx.filter_jit
    @eqx.filter_vmap
    def make(key: PRNGKeyArray) -> tuple[spectrax.Wrapped, eqx.nn.State]:
        return wrap(eqx.nn.Linear(4, 4, key=key))

    model, state = make(keys)
    model = perturbed(model, getkey())
    x = jnp.asarray(X)

    @eqx.filter_jit
    @eqx.filter_vmap(in_axes=(eqx.if_array(0), eqx.if_array(0), None))
    def call(model, state, x):
        return model(x, state)

    @eqx.filter_jit
    @eqx.filter_vmap
    def inside(model, state):
        state = spectrax.advance(model, state, num_steps=30)
        return spectrax.unwrap(model, state)

    plain = inside(model, clone(state))
    expected = [np.asarray(weight) for weight in model.raw.weight]
    expected = [weight / true_norm(weight) for weight in expected]
    np.testing.assert_allclose(plain.weight, expected, rtol=1e-9)

    # Outside, the members are a stack.
    outside = spectrax.advance(model, clone(state), num_steps=30)
    plain = spectrax.unwrap(model, outside)
    np.testing.assert_allclose(plain.weight, expected, rtol=1e-9)
    assert len(spectrax.summary(model, outside, enclosure=False)) == 3

    y, state = call(model, spectrax.advance(model, state, num_steps=30), x)
    biases = np.asarray(model.module.bias)
    np.testing.assert_allclose(
        y, [w @ X + b for w, b in zip(expected, biases, strict=True)], rtol=1e-9
    )


class Tied(eqx.Module):
    """An embedding whose table is the weight of the last layer, too."""

    shared: eqx.nn.Shared

    def __init__(self, key: PRNGKeyArray):
        embedding_key, linear_key = jr.split(key)
        self.shared = eqx.nn.Shared(
            (
                eqx.nn.Embedding(4, 4, key=embedding_key),
                eqx.nn.Linear(4, 4, key=linear_key),
            ),
            where=lambda pair: pair[1].weight,
            get=lambda pair: pair[0].weight,
        )

    def __call__(self, token: Array) -> Array:
        embedding, linear = self.shared()
        return linear(embedding(token))


def test_tied_weights_are_one(getkey):
    net = Tied(getkey())
    model, state = wrap(net)
    assert (
        len(model.weights) == len(spectrax.summary(model, state, enclosure=False)) == 1
    )
    y, state = model(jnp.asarray(2), state)
    embedding, linear = net.shared()
    table = np.asarray(embedding.weight) / true_norm(embedding.weight)
    np.testing.assert_allclose(y, table @ table[2] + np.asarray(linear.bias), rtol=1e-9)
    embedding, linear = spectrax.unwrap(model, state).shared()
    assert embedding.weight is linear.weight
    assert true_norm(linear.weight) == pytest.approx(1, rel=1e-9)


def test_batches(stale):
    model, state = stale
    xs = jnp.asarray(np.stack([X, -X, 2 * X]))
    one, one_state = model(xs[1], clone(state))
    ys, state = jax.vmap(model, in_axes=(0, None), out_axes=(0, None))(xs, state)
    assert ys.shape == (3, 2)
    np.testing.assert_allclose(ys[1], one, rtol=1e-9)
    # The weights are the same for all, and so is the state.
    assert eqx.tree_equal(state, one_state, rtol=1e-9, atol=1e-9)


#
# Models with a state of their own
#


class Normed(eqx.Module):
    first: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    second: eqx.nn.Linear

    def __init__(self, key: PRNGKeyArray):
        first, second = jr.split(key)
        self.first = eqx.nn.Linear(4, 4, key=first)
        self.norm = eqx.nn.BatchNorm(4, axis_name="batch", mode="batch")
        self.second = eqx.nn.Linear(4, 2, key=second)

    def __call__(self, x: Array, state: eqx.nn.State) -> tuple[Array, eqx.nn.State]:
        x, state = self.norm(self.first(x), state)
        return self.second(jnp.tanh(x)), state


@eqx.filter_jit
def call_batch(model, xs, state):
    batched = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    return batched(xs, state)


def running_statistics(norm: eqx.nn.BatchNorm, state: eqx.nn.State):
    assert norm.batch_state_index is not None
    return state.get(norm.batch_state_index)


def test_batch_norm(getkey):
    key, xs = getkey(), jr.normal(getkey(), (8, 4))
    net, net_state = eqx.nn.make_with_state(Normed)(key)
    model, state = wrap(Normed(key))
    for _ in range(2):
        y, state = call_batch(model, xs, state)
        expected, net_state = call_batch(with_norms(net, 1, 1), xs, net_state)
    np.testing.assert_allclose(y, expected, rtol=1e-9)
    ours = running_statistics(model.module.norm, state)
    theirs = running_statistics(net.norm, net_state)
    assert eqx.tree_equal(ours, theirs, rtol=1e-9, atol=1e-12)
    # Unwrapped, it goes on with the state that it has in ours.
    plain = eqx.nn.inference_mode(spectrax.unwrap(model, state))
    frozen = eqx.nn.inference_mode(with_norms(net, 1, 1))
    y, state = call_batch(plain, xs, state)
    expected, net_state = call_batch(frozen, xs, net_state)
    np.testing.assert_allclose(y, expected, rtol=1e-9)


def test_a_trained_model_keeps_its_state(getkey):
    xs = 3 + jr.normal(getkey(), (8, 4))
    net, net_state = eqx.nn.make_with_state(Normed)(getkey())
    _, net_state = call_batch(net, xs, net_state)
    statistics = running_statistics(net.norm, net_state)
    model, state = wrap(net, state=net_state, constraint=spectrax.ClipToInitial())
    ours = running_statistics(model.module.norm, state)
    assert eqx.tree_equal(ours, statistics)
    y, state = call_batch(eqx.nn.inference_mode(model), xs, state)
    # The old state was only read.
    expected, _ = call_batch(eqx.nn.inference_mode(net), xs, net_state)
    assert eqx.tree_equal(y, expected)


def test_a_state_for_a_module_without_one(net, getkey):
    _, other = eqx.nn.make_with_state(Normed)(getkey())
    with pytest.raises(ValueError, match="expected `state` with a module that carries"):
        spectrax.wrap(net, state=other)


#
# One constraint for each
#


def test_a_constraint_and_an_estimator_for_each(net, getkey):
    model, state = wrap(
        net,
        where=lambda net: [net.second, net.first],
        constraint=[spectrax.Normalize(0.5), spectrax.LearnableBound(2.0)],
        estimator=(spectrax.ExactSVD(), spectrax.PowerIteration(block_size=1)),
    )
    plain = spectrax.unwrap(model, state)
    assert linear_norms(plain) == pytest.approx([2, 0.5], rel=1e-9)
    # Only the exact one is right without being told of the new weights.
    changed = perturbed(model, getkey())
    first, second = linear_norms(spectrax.unwrap(changed, state))
    assert second == pytest.approx(0.5, rel=1e-9)
    assert first > 2.01
    state = spectrax.advance(changed, state, num_steps=200)
    plain = spectrax.unwrap(changed, state)
    assert linear_norms(plain) == pytest.approx([2, 0.5], rel=1e-6)


def test_steps_of_the_estimator_and_of_advance(net, getkey):
    """An estimate from one vector takes the steps that it was told to take."""

    def error(num_steps: int | None, estimator_steps: int) -> float:
        estimator = spectrax.PowerIteration(estimator_steps, 1, init_steps=0)
        model, state = wrap(net.first, estimator=estimator)
        model = eqx.tree_at(linear_weights, model, [weight])
        state = spectrax.advance(model, state, num_steps=num_steps)
        return linear_norms(spectrax.unwrap(model, state))[0] - 1

    weight = jr.normal(getkey(), (4, 4))
    assert error(None, 1) == error(1, 4) > error(None, 4) == error(4, 1) > 1e-12
    assert error(0, 4) == error(None, 0) > error(None, 1)


def test_key_draws_the_starting_vectors(net):
    random = spectrax.PowerIteration(init_steps=0)
    model, state = wrap(net, estimator=random)
    same_model, same = wrap(net, estimator=random, key=jr.key(0))
    _, other = wrap(net, estimator=random, key=jr.key(1))
    assert eqx.tree_equal((model, state), (same_model, same))
    assert not eqx.tree_equal(state, other)


#
# Dtypes and derivatives
#


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_models(getkey, dtype):
    layer = eqx.nn.Linear(4, 4, dtype=dtype, key=getkey())
    model, state = wrap(layer)

    @eqx.filter_jit
    @eqx.filter_grad(has_aux=True)
    def step(model, state):
        y, state = model(jnp.asarray(X, dtype), state)
        return jnp.sum(y * y), (y, state)

    gradient, (y, state) = step(model, state)
    (weight,) = linear_weights(spectrax.unwrap(model, state))
    (slope,) = linear_weights(gradient)
    assert y.dtype == weight.dtype == slope.dtype == dtype
    assert 0 < true_norm(slope) < np.inf
    # Rounded once: half a unit in the last place of each entry, and no more.
    raw = np.asarray(layer.weight).astype(np.float64)
    np.testing.assert_allclose(
        np.asarray(weight).astype(np.float64),
        raw / np.linalg.norm(raw, 2),
        rtol=0.6 * float(jnp.finfo(dtype).eps),
    )


def test_complex_models(getkey):
    net = Net(getkey(), jnp.complex128)
    model, state = wrap(net)
    x = jnp.asarray(X + 1j * X[::-1])
    y, state = model(x, state)
    np.testing.assert_allclose(y, with_norms(net, 1, 1)(x), rtol=1e-9)

    def loss(weight, normalized):
        layer = eqx.tree_at(linear_weights, net.first, [weight])
        return jnp.sum(jnp.abs(normalized(layer)(x)) ** 4)

    first, first_state = wrap(net.first)

    def ours(layer):
        model = eqx.tree_at(
            lambda model: model.module.weight.weight, first, layer.weight
        )
        return spectrax.unwrap(model, first_state)

    def theirs(layer):
        norm = jnp.linalg.norm(layer.weight, 2).astype(layer.weight.dtype)
        return eqx.tree_at(linear_weights, layer, [layer.weight / norm])

    gradients = [
        jax.jit(jax.grad(loss), static_argnums=1)(net.first.weight, f)
        for f in (ours, theirs)
    ]
    np.testing.assert_allclose(*gradients, rtol=1e-9, atol=1e-12)


def with_fixed_vectors(net: Net):
    """A function that divides both weights `W` by `u^T W v`, for the singular vectors
    that they have in `net`: the definition of Miyato et al. by numpy."""
    vectors = []
    for weight in linear_weights(net):
        u, _, vt = np.linalg.svd(np.asarray(weight))
        vectors.append((jnp.asarray(u[:, 0]), jnp.asarray(vt[0])))

    def normalize(net):
        weights = [
            weight / (u @ weight @ v)
            for weight, (u, v) in zip(linear_weights(net), vectors, strict=True)
        ]
        return eqx.tree_at(linear_weights, net, weights)

    return normalize


def energy(net):
    return jnp.sum(net(jnp.asarray(X)) ** 2)


def test_gradient_goes_through_the_norm(net):
    model, state = wrap(net)
    gradient = eqx.filter_jit(
        eqx.filter_grad(lambda m: energy(spectrax.unwrap(m, state)))
    )(model)

    def reference(net):
        weights = [w / jnp.linalg.norm(w, 2) for w in linear_weights(net)]
        return energy(eqx.tree_at(linear_weights, net, weights))

    expected = eqx.filter_jit(eqx.filter_grad(reference))(net)
    assert eqx.tree_equal(gradient.raw, expected, rtol=1e-9, atol=1e-12)

    def call(model, state):
        return jnp.sum(model(jnp.asarray(X), state)[0] ** 2)

    gradient = eqx.filter_jit(eqx.filter_grad(call))(model, state)
    assert eqx.tree_equal(gradient.raw, expected, rtol=1e-9, atol=1e-12)


def test_hessian(net):
    model, state = wrap(net)
    normalize = with_fixed_vectors(net)

    def loss(model):
        y, _ = model(jnp.asarray(X), clone(state))
        return jnp.sum(y**2)

    def hessian(loss):
        return eqx.filter_jit(eqx.filter_hessian(loss))

    row = hessian(loss)(model).raw
    expected = hessian(lambda net: energy(normalize(net)))(net)
    for ours, theirs in (
        (row.first.weight.raw, expected.first.weight),
        (row.second.weight.raw, expected.second.weight),
    ):
        assert eqx.tree_equal(ours, theirs, rtol=1e-8, atol=1e-10)


def test_jvp_of_grad(net, getkey):
    model, state = wrap(net)
    normalize = with_fixed_vectors(net)
    tangent = jr.normal(getkey(), (4, 4))

    def curvature(function):
        def at(weight):
            return function(eqx.tree_at(lambda net: net.first.weight, net, weight))

        pushed = jax.jit(lambda w, t: jax.jvp(jax.grad(at), (w,), (t,))[1])
        return pushed(net.first.weight, tangent)

    def ours(net):
        changed = eqx.tree_at(linear_weights, model, linear_weights(net))
        return energy(spectrax.unwrap(changed, state))

    np.testing.assert_allclose(
        curvature(ours),
        curvature(lambda net: energy(normalize(net))),
        rtol=1e-8,
        atol=1e-10,
    )


def test_gradient_penalty(net):
    """The gradient, with respect to the weights, of one with respect to the input."""
    model, state = wrap(net)
    normalize = with_fixed_vectors(net)

    def penalty(net):
        slope = jax.grad(lambda x: jnp.sum(net(x) ** 3))(jnp.asarray(X))
        return (jnp.sqrt(jnp.sum(slope**2)) - 1) ** 2

    grad = lambda loss: eqx.filter_jit(eqx.filter_grad(loss))  # noqa: E731
    ours = grad(lambda m: penalty(spectrax.unwrap(m, state)))(model)
    theirs = grad(lambda net: penalty(normalize(net)))(net)
    assert eqx.tree_equal(ours.raw, theirs, rtol=1e-8, atol=1e-10)

    def called(model, state):
        slope = jax.grad(lambda x: jnp.sum(model(x, clone(state))[0] ** 3))
        return (jnp.sqrt(jnp.sum(slope(jnp.asarray(X)) ** 2)) - 1) ** 2

    ours = grad(called)(model, state)
    assert eqx.tree_equal(ours.raw, theirs, rtol=1e-8, atol=1e-10)


#
# The call
#


class Affine(eqx.Module):
    """Takes several arguments, and says which it was given beside the first."""

    layer: eqx.nn.Linear

    def __call__(self, x, *others, **options):
        return self.layer(x), others, options


def test_the_state_may_be_any_argument(getkey):
    module = Affine(eqx.nn.Linear(4, 4, key=getkey()))
    model, state = wrap(module)
    x = jnp.asarray(X)
    expected = with_norms(module.layer, 1)(x)
    for call in (
        lambda state: model(x, "a", state, scale=2),
        lambda state: model(x, state, "a", scale=2),
        lambda state: model(state, x, "a", scale=2),
        lambda state: model(x, "a", scale=2, state=state),
        lambda state: model(x, "a", ctx=state, scale=2),
    ):
        (y, others, options), state = call(state)
        assert isinstance(state, eqx.nn.State)
        np.testing.assert_allclose(y, expected, rtol=1e-9)
        assert others == ("a",)
        assert options == {"scale": 2}


class Counter(eqx.Module):
    """Counts its calls, and says where it was given the state."""

    layer: eqx.nn.Linear
    count: eqx.nn.StateIndex

    def __init__(self, key: PRNGKeyArray):
        self.layer = eqx.nn.Linear(4, 4, key=key)
        self.count = eqx.nn.StateIndex(jnp.asarray(0))

    def __call__(self, *args, **kwargs):
        named = [*enumerate(args), *kwargs.items()]
        (place,) = [name for name, arg in named if isinstance(arg, eqx.nn.State)]
        state = dict(named)[place]
        state = state.set(self.count, state.get(self.count) + 1)
        (x,) = [arg for _, arg in named if eqx.is_array(arg)]
        return (self.layer(x), place), state


def test_a_stateful_module_is_given_the_state_in_the_same_way(getkey):
    model, state = wrap(Counter(getkey()))
    x = jnp.asarray(X)
    calls = {
        1: lambda state: model(x, state),
        0: lambda state: model(state, x),
        "state": lambda state: model(x, state=state),
        "ctx": lambda state: model(x, ctx=state),
    }
    for place, call in calls.items():
        (y, seen), state = call(state)
        assert seen == place
        np.testing.assert_allclose(y, with_norms(model.raw.layer, 1)(x), rtol=1e-9)
    assert state.get(model.module.count) == len(calls)


def test_a_missing_state(net):
    model, state = wrap(net)
    for call in (lambda: model(jnp.asarray(X)), lambda: model(x=jnp.asarray(X))):
        with pytest.raises(TypeError, match=r"expected an `equinox.nn.State` among"):
            call()
    # Nothing was used up.
    model(jnp.asarray(X), state)


def test_a_call_is_advance_then_unwrap_then_the_module(stale):
    model, state = stale
    x = jnp.asarray(X)
    lagging = spectrax.unwrap(model, state)
    y, after = model(x, clone(state))
    advanced = spectrax.advance(model, state)
    assert eqx.tree_equal(after, advanced)
    lazy = spectrax.unwrap(model, advanced, lazy=True)
    assert eqx.tree_equal(y, lazy(x))
    plain = spectrax.unwrap(model, advanced)
    assert abs(linear_norms(lagging)[0] - 1) > 1e-3
    assert jnp.max(jnp.abs(y - lagging(x))) > 1e-3
    # Blocks as large as the matrix are exact after one step.
    assert linear_norms(plain) == pytest.approx([1, 1], rel=1e-6)


def test_one_unwrap_for_two_forwards(net):
    model, state = wrap(net)
    real, fake = jnp.asarray(X), jnp.asarray(X[::-1].copy())

    def loss(model, use_real, use_fake):
        plain = spectrax.unwrap(model, spectrax.advance(model, clone(state)))
        return use_real * jnp.sum(plain(real)) + use_fake * jnp.sum(plain(fake) ** 2)

    gradient = eqx.filter_jit(eqx.filter_grad(loss))
    both, only_real, only_fake = (
        linear_weights(gradient(model, *map(jnp.asarray, use)))
        for use in [(1.0, 1.0), (1.0, 0.0), (0.0, 1.0)]
    )
    for whole, one, other in zip(both, only_real, only_fake, strict=True):
        np.testing.assert_allclose(whole, one + other, rtol=1e-9, atol=1e-12)
        assert jnp.max(jnp.abs(one)) > 1e-6
        assert jnp.max(jnp.abs(other)) > 1e-6


def test_inference_mode_freezes(stale):
    model, state = stale
    x = jnp.asarray(X)
    frozen = eqx.nn.inference_mode(model)
    before = clone(state)
    y, state = frozen(x, state)
    assert eqx.tree_equal(state, before)
    assert eqx.tree_equal(y, spectrax.unwrap(model, state, lazy=True)(x))
    state = spectrax.advance(frozen, state, num_steps=10)
    assert eqx.tree_equal(state, before)
    assert eqx.tree_equal(spectrax.unwrap(frozen, state, lazy=True)(x), y)

    thawed = eqx.nn.inference_mode(frozen, value=False)
    assert eqx.tree_equal(thawed, model)
    y_thawed, state = thawed(x, state)
    y_model, before = model(x, before)
    assert eqx.tree_equal((y_thawed, state), (y_model, before))
    assert jnp.max(jnp.abs(y_thawed - y)) > 1e-3


def test_inference_mode_of_one_of_two(getkey):
    nets = [Net(getkey()), Net(getkey())]
    models, state = eqx.nn.make_with_state(lambda: [spectrax.wrap(n) for n in nets])()
    models = perturbed(models, getkey())
    models = [models[0], eqx.nn.inference_mode(models[1])]
    before = linear_norms(spectrax.unwrap(models, state))
    after = linear_norms(spectrax.unwrap(models, spectrax.advance(models, state)))
    assert after[:2] == pytest.approx([1, 1], rel=1e-6)
    assert after[2:] == before[2:] != pytest.approx([1, 1], rel=1e-3)


#
# Errors
#


def test_an_old_state(net):
    model, state = wrap(net)
    x = jnp.asarray(X)
    _, new = model(x, state)
    for use in (
        lambda: model(x, state),
        lambda: model(x, state=state),
        lambda: spectrax.advance(model, state),
        lambda: spectrax.unwrap(model, state),
        lambda: spectrax.summary(model, state, enclosure=False),
        lambda: spectrax.wrap(model.raw, state=state),
    ):
        with pytest.raises(ValueError, match="old state|carries state"):
            use()
    newest = spectrax.advance(model, new)
    with pytest.raises(ValueError, match="Attempted to use old state"):
        model(x, new)
    with pytest.raises(ValueError, match="Attempted to use old state"):
        spectrax.unwrap(model, new)
    with pytest.raises(ValueError, match="Attempted to use old state"):
        spectrax.summary(model, new, enclosure=False)
    # Looking does not use it up.
    spectrax.unwrap(model, newest)
    spectrax.summary(model, newest, enclosure=False)
    model(x, newest)


def test_verbs_are_the_identity_on_plain_models(net, getkey):
    model, state = wrap(net)
    plain = spectrax.unwrap(model, state)
    for nothing in (net, plain, {"a": plain}, [1.0, "text"]):
        for any_state in (state, None):
            assert spectrax.advance(nothing, any_state) is any_state
            assert eqx.tree_equal(spectrax.unwrap(nothing, any_state), nothing)
            assert eqx.tree_equal(
                spectrax.unwrap(nothing, any_state, lazy=True), nothing
            )
    outer, state = eqx.nn.make_with_state(Outer)(getkey())
    once = spectrax.unwrap(outer, state)
    assert eqx.tree_equal(spectrax.unwrap(once, state), once)
    assert spectrax.advance(once, state) is state


class Agent(NamedTuple):
    actor: Any
    critic: Any


def test_named_tuples_of_models(getkey):
    """Their fields have names, but no code of theirs passes a state."""
    layers = [eqx.nn.Linear(3, 3, key=getkey()) for _ in range(2)]
    make = eqx.nn.make_with_state(lambda: Agent(*map(spectrax.wrap, layers)))
    plain = spectrax.unwrap(*make())
    assert isinstance(plain, Agent)
    assert [type(layer) for layer in plain] == [eqx.nn.Linear] * 2
    outer, state = eqx.nn.make_with_state(Outer)(getkey())
    both = spectrax.unwrap(Agent(outer, [outer]), state)
    assert isinstance(both.actor.inner, spectrax.Wrapped)
    assert isinstance(both.critic[0].inner, spectrax.Wrapped)


def test_a_model_in_the_carry_of_a_scan(getkey):
    layer = eqx.nn.Linear(3, 3, key=getkey())

    def body(carry: Any, _: None) -> tuple[Any, Array]:
        model, state, x = carry
        x, state = model(x, state)
        return (model, state, x), jnp.sum(x)

    start = (*spectrax.constrain(layer), jnp.ones(3))
    with pytest.raises(
        TypeError, match=r"`inference` .* to be True or False, got a tra"
    ):
        lax.scan(body, start, None, length=3)
    model, state, x = start
    arrays, static = eqx.partition(model, eqx.is_array)

    def arrays_only(carry: Any, _: None) -> tuple[Any, Array]:
        arrays, state, x = carry
        x, state = eqx.combine(arrays, static)(x, state)
        return (arrays, state, x), jnp.sum(x)

    _, sums = lax.scan(arrays_only, (arrays, state, x), None, length=3)
    assert jnp.all(jnp.isfinite(sums))


def test_nothing_to_summarize(net):
    model, state = wrap(net)
    plain = spectrax.unwrap(model, state)
    match = "`spectrax.summary` expected a model with something constrained in it, got "
    for nothing, name in ((net, "Net"), (plain, "Net"), ({"a": plain}, "dict")):
        with pytest.raises(ValueError, match=f"{match}{name} with nothing"):
            spectrax.summary(nothing, state)


@pytest.mark.parametrize("verb", [spectrax.advance, spectrax.unwrap])
def test_a_constrained_model_needs_its_state(net, verb):
    model, _ = wrap(net)
    with pytest.raises(TypeError, match=r"State` of a constrained model, got None"):
        verb(model, None)


def test_constrain_is_wrap_made_with_its_state(net):
    options = {"constraint": spectrax.Clip(0.5), "key": jax.random.key(3)}
    got = spectrax.constrain(net, **options)
    assert eqx.tree_equal(got, eqx.nn.make_with_state(spectrax.wrap)(net, **options))


def test_a_negative_number_of_steps(net):
    model, state = wrap(net)
    with pytest.raises(ValueError, match="`num_steps` to be at least 0, got -1"):
        spectrax.advance(model, state, num_steps=-1)
    # The failed call left the state as it was.
    spectrax.advance(model, state)


def test_wrapping_twice(net, getkey):
    model, _ = wrap(net)
    with pytest.raises(ValueError, match="`first.weight` is constrained already"):
        spectrax.wrap(model)
    with pytest.raises(ValueError, match=r"`\[1\]\['a'\].first.weight` is constr"):
        spectrax.wrap((net, {"a": model}))
    outer, _ = eqx.nn.make_with_state(Outer)(getkey())
    with pytest.raises(ValueError, match="`inner.first.weight` is constrained already"):
        spectrax.wrap(outer, where=lambda outer: outer.head)


def test_wrapping_again_what_was_unwrapped(getkey):
    model, state = eqx.nn.make_with_state(Outer)(getkey())
    plain = spectrax.unwrap(model, state)
    again, state = wrap(plain, constraint=spectrax.Normalize(0.5))
    norms = linear_norms(spectrax.unwrap(again, state))
    assert norms == pytest.approx([0.5, 0.5, 0.5], rel=1e-9)


# Without the type checks that the tests have, as a user calls it.
unchecked_wrap = inspect.unwrap(spectrax.wrap)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("constraint", spectrax.Normalize),
        ("constraint", 1.0),
        ("constraint", [spectrax.Normalize(), spectrax.Clip]),
        ("estimator", spectrax.PowerIteration),
        ("estimator", spectrax.Normalize()),
    ],
    ids=["class", "number", "class in a list", "estimator class", "no estimator"],
)
def test_what_is_no_constraint_or_estimator(net, name, value):
    where = lambda net: [net.first, net.second]  # noqa: E731
    match = f"expected `{name}` to be a spectrax {name} .* Pass an instance, with its"
    with pytest.raises(TypeError, match=match):
        unchecked_wrap(net, where=where, **{name: value})


def test_an_input_size_without_a_convolution(net):
    with pytest.raises(
        ValueError, match=r"`input_size` with a convolution .* \(8, 8\)"
    ):
        spectrax.wrap(net, input_size=(8, 8))


def test_bounds_that_fit_no_stack(net, getkey):
    match = r"`bound` to be a number or an array that broadcasts to \(3,\).*\(2,\)"
    bound = np.array([1.0, 2.0])
    with pytest.raises(ValueError, match=match):
        spectrax.wrap(Stack(getkey()), constraint=spectrax.Clip(bound))
    with pytest.raises(ValueError, match=r"broadcasts to \(\), one value"):
        spectrax.wrap(net, constraint=spectrax.Normalize(bound))


@pytest.mark.parametrize("bound", [0.0, -1.0, np.inf, np.nan, np.array([1.0, 0.0])])
def test_bounds_that_are_not_positive(bound):
    match = "to be positive and finite, got "
    with pytest.raises(ValueError, match="expected `bound` " + match):
        spectrax.Normalize(bound)
    with pytest.raises(ValueError, match="expected `bound` " + match):
        spectrax.Clip(bound)
    with pytest.raises(ValueError, match="expected `bound` " + match):
        spectrax.LearnableBound(bound)


def test_the_state_of_a_fixed_bound_is_no_parameter(net):
    """Only raw weights, biases and trained bounds are in the model."""
    for constraint in (
        spectrax.Normalize(),
        spectrax.Clip(),
        spectrax.ClipToInitial(),
    ):
        model, _ = wrap(net, constraint=constraint)
        leaves = jtu.tree_leaves(eqx.filter(model, eqx.is_array))
        assert eqx.tree_equal(leaves, jtu.tree_leaves(eqx.filter(net, eqx.is_array)))
    model, _ = wrap(net, constraint=spectrax.LearnableBound())
    shapes = [leaf.shape for leaf in jtu.tree_leaves(eqx.filter(model, eqx.is_array))]
    assert sorted(shapes) == [(), (), (2,), (2, 4), (4,), (4, 4)]
