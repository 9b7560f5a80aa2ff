"""Training, averaging, saving and copying of wrapped models."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
import pytest
from jaxtyping import Array, PyTree

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


def predict(model: PyTree, state: eqx.nn.State, x: Array) -> tuple[Array, Any]:
    batched = jax.vmap(model, in_axes=(0, None), out_axes=(0, None))
    return batched(x, state)


def fit(output: Array, y: Array) -> Array:
    return jnp.mean((output - y) ** 2)


def grow(output: Array, y: Array) -> Array:
    """Hostile: the larger the output, the better."""
    del y
    return -jnp.mean(output**2)


def shrink(output: Array, y: Array) -> Array:
    del y
    return jnp.mean(output**2)


def make_step(
    optimizer: optax.GradientTransformation, loss: Callable, donate: str = "none"
) -> Callable:
    """A jitted step from (model, state, optimizer's state) to the next."""

    @eqx.filter_jit(donate=donate)
    def step(carry, x, y):
        model, state, opt_state = carry

        @eqx.filter_grad(has_aux=True)
        def gradient(model, state):
            output, state = predict(model, state, x)
            return loss(output, y), state

        grads, state = gradient(model, state)
        params = eqx.filter(model, eqx.is_inexact_array)
        with jax.numpy_dtype_promotion("standard"):  # optax relies on it
            updates, opt_state = optimizer.update(grads, opt_state, params)
        return eqx.apply_updates(model, updates), state, opt_state

    return step


def start(model: PyTree, state: eqx.nn.State, optimizer: Any) -> tuple[Any, Any, Any]:
    return model, state, optimizer.init(eqx.filter(model, eqx.is_inexact_array))


@pytest.fixture
def net(getkey):
    return Net(getkey())


@pytest.fixture
def data(getkey):
    return jr.normal(getkey(), (16, 4)), jr.normal(getkey(), (16, 2))


def train(model, state, data, optimizer, loss, num_steps=10):
    step = make_step(optimizer, loss)
    carry = start(model, state, optimizer)
    for _ in range(num_steps):
        carry = step(carry, *data)
    return carry[:2]


#
# What an optimizer reaches
#


@pytest.mark.parametrize("constraint", [spectrax.Normalize(0.7), spectrax.Clip(0.7)])
def test_weight_decay_leaves_fixed_bounds_alone(net, data, constraint):
    model, state = wrap(with_norms(net, 2.0, 2.0), constraint=constraint)
    optimizer = optax.adamw(1e-2, weight_decay=1.0)
    trained, state = train(model, state, data, optimizer, fit, num_steps=20)
    assert linear_norms(trained) != pytest.approx([2, 2], rel=0.01)
    for row in spectrax.summary(trained, state, enclosure=False):
        assert row.bound == 0.7
    state = spectrax.advance(trained, state)
    norms = linear_norms(spectrax.unwrap(trained, state))
    assert norms == pytest.approx([0.7, 0.7], rel=1e-6)


def test_a_learnable_bound_is_trained(net, data):
    x, y = data
    model, state = wrap(net, constraint=spectrax.LearnableBound(1.0))
    trained, state = train(model, state, (x, 20 * y), optax.adam(1e-1), fit)
    state = spectrax.advance(trained, state)
    table = spectrax.summary(trained, state, enclosure=False)
    # Targets so large ask for weights as large.
    assert all(row.bound > 1.5 for row in table)
    norms = linear_norms(spectrax.unwrap(trained, state))
    assert norms == pytest.approx([row.bound for row in table], rel=1e-6)


def test_the_gradient_of_a_learnable_bound(net):
    """`d loss / d raw = bound * d loss / d bound`, by a finite difference."""
    x = jnp.ones(4)

    def loss(model: spectrax.Wrapped) -> Array:
        return jnp.sum(spectrax.unwrap(model, state)(x) ** 2)

    model, state = wrap(net, constraint=spectrax.LearnableBound(2.0))
    gradient = eqx.filter_jit(eqx.filter_grad(loss))(model)
    (first, second), step = _trained_bounds(gradient), 1e-6
    for bounds, got in (((2 + step, 2.0), first), ((2.0, 2 + step), second)):
        higher = jnp.sum(with_norms(net, *bounds)(x) ** 2)
        base = jnp.sum(with_norms(net, 2.0, 2.0)(x) ** 2)
        slope = float(higher - base) / step
        assert float(got) == pytest.approx(2 * slope, rel=1e-4)


def _trained_bounds(model: PyTree) -> list[Array]:
    def is_bound(node: Any) -> bool:
        return isinstance(node, spectrax.LearnableBound)

    leaves = jtu.tree_leaves(model, is_leaf=is_bound)
    return [leaf.raw for leaf in leaves if is_bound(leaf)]


def test_clip_to_initial(net, data):
    model, state = wrap(net, constraint=spectrax.ClipToInitial())
    initial = linear_norms(net)
    # Nothing changes at the start, to the last bit.
    assert eqx.tree_equal(spectrax.unwrap(model, state), net)
    y, state = model(data[0][0], state)
    assert eqx.tree_equal(y, net(data[0][0]))

    grown, grown_state = train(model, clone(state), data, optax.adam(1e-1), grow)
    assert all(
        raw > 1.3 * norm for raw, norm in zip(linear_norms(grown), initial, strict=True)
    )
    grown_state = spectrax.advance(grown, grown_state)
    norms = linear_norms(spectrax.unwrap(grown, grown_state))
    assert norms == pytest.approx(initial, rel=1e-6)


def test_clipped_norms_can_shrink(net, data):
    """From above the bound to below it, where the weights are the raw ones."""
    model, state = wrap(with_norms(net, 1.5, 1.5), constraint=spectrax.Clip(1.0))
    assert linear_norms(spectrax.unwrap(model, state)) == pytest.approx([1, 1])
    optimizer = optax.chain(optax.add_decayed_weights(1.0), optax.sgd(0.1))
    shrunk, state = train(model, state, data, optimizer, shrink)
    plain = spectrax.unwrap(shrunk, spectrax.advance(shrunk, state))
    assert all(0 < norm < 0.9 for norm in linear_norms(plain))
    assert eqx.tree_equal(plain, shrunk.raw)


def test_normalized_weights_do_not_feel_their_size(net, data):
    """The gradient of a normalized weight is orthogonal to the weight."""
    model, state = wrap(net)

    @eqx.filter_jit
    @eqx.filter_grad
    def gradient(model):
        return fit(jax.vmap(spectrax.unwrap(model, state))(data[0]), data[1])

    slopes = linear_weights(gradient(model))
    for weight, slope in zip(linear_weights(net), slopes, strict=True):
        weight, slope = np.asarray(weight), np.asarray(slope)
        assert abs(np.sum(weight * slope)) < 1e-9 * np.sum(np.abs(weight * slope))
        assert np.max(np.abs(slope)) > 1e-6


#
# Tracking
#


@pytest.fixture(scope="module")
def run():
    """Training with Adam on random data, step by step: the raw model, the state with
    which it was used, and the averages of both."""
    keys = jr.split(jr.key(0), 3)
    mlp = eqx.nn.MLP(8, 8, 32, 2, dtype=jnp.float32, key=keys[0])
    data = [jr.normal(key, (64, 8), jnp.float32) for key in keys[1:]]
    optimizer = optax.adam(1e-2)
    step = make_step(optimizer, fit)
    model, state = wrap(mlp)
    carry, average = start(model, state, optimizer), (model, state)
    used = []

    @eqx.filter_jit
    def blend(old: PyTree, new: PyTree) -> PyTree:
        old, static = eqx.partition(old, eqx.is_inexact_array)
        new = eqx.filter(new, eqx.is_inexact_array)
        mean = jtu.tree_map(lambda a, b: 0.9 * a + 0.1 * b, old, new)
        return eqx.combine(mean, static)

    for _ in range(60):
        before = carry[0]
        carry = step(carry, *data)
        used.append((before, carry[1]))
        average = blend(average, carry[:2])
    return used, average


def test_the_norm_is_tracked(run):
    used, _ = run
    norms = np.array([linear_norms(spectrax.unwrap(*pair)) for pair in used])
    # The weights have moved by much more than their norm is off.
    moved = [
        true_norm(new - old) / true_norm(old)
        for old, new in zip(
            linear_weights(used[20][0]), linear_weights(used[-1][0]), strict=True
        )
    ]
    assert min(moved) > 0.1
    assert np.max(norms[20:]) <= 1 + 2e-3
    # Never above the norm, an estimate makes the weight too large and not too small.
    assert np.min(norms) >= 1 - 1e-5


def test_averages_of_a_model_and_its_state(run):
    used, (model, state) = run
    last = linear_weights(used[-1][0])
    assert not np.allclose(linear_weights(model)[1], last[1], rtol=0.01)
    # Averaged vectors lag behind averaged weights, by 2.5 % here; one step mends it.
    for num_steps, excess in ((0, 5e-2), (1, 5e-3), (3, 5e-4)):
        advanced = spectrax.advance(model, clone(state), num_steps=num_steps)
        norms = linear_norms(spectrax.unwrap(model, advanced))
        assert max(norms) <= 1 + excess
        assert min(norms) >= 1 - 1e-5
    # Averaged vectors are shorter than one, which must not be seen in the norm.
    shorter = jtu.tree_map(lambda x: 0.5 * x, state)
    bounds = [row.bound for row in spectrax.summary(model, shorter, enclosure=False)]
    norms = linear_norms(spectrax.unwrap(model, shorter))
    assert bounds == [0.5] * 3
    assert norms == pytest.approx([0.5] * 3, rel=5e-2)


#
# Saving and copying
#


@pytest.fixture(
    params=[spectrax.Normalize(0.5), spectrax.LearnableBound(0.5)],
    ids=["Normalize", "LearnableBound"],
)
def used(request, net, getkey):
    """A model whose state is not that of a newly wrapped one."""
    model, state = wrap(
        net,
        constraint=request.param,
        estimator=spectrax.PowerIteration(block_size=1),
    )
    model = perturbed(model, getkey())
    return model, spectrax.advance(model, state)


def through_a_file(model, state):
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, (model, state))
    file.seek(0)
    skeleton = wrap(
        Net(jr.key(0)),
        constraint=_constraint_like(model),
        estimator=spectrax.PowerIteration(block_size=1),
    )
    return eqx.tree_deserialise_leaves(file, skeleton)


def _constraint_like(model: spectrax.Wrapped) -> spectrax.AbstractConstraint:
    """Of the same kind; the bound itself has to come from the file."""
    kinds = {0: spectrax.Normalize, 2: spectrax.LearnableBound}
    return kinds[len(_trained_bounds(model))](3.0)


def through_pickle(model, state):
    return pickle.loads(pickle.dumps((model, state)))


def through_deepcopy(model, state):
    return copy.deepcopy((model, state))


def through_flattening(model, state):
    leaves, treedef = jtu.tree_flatten((model, state))
    return jtu.tree_unflatten(treedef, leaves)


@pytest.mark.parametrize(
    "through", [through_a_file, through_pickle, through_deepcopy, through_flattening]
)
def test_round_trips(used, through):
    model, state = used
    again, again_state = through(model, clone(state))
    assert eqx.tree_equal((again, again_state), (model, state))
    x = jnp.ones(4)
    assert eqx.tree_equal(again(x, again_state), model(x, state))


def test_an_interrupted_run_is_the_same_run(net, data):
    """Three steps, a file, and three more steps are six steps, to the last bit."""
    optimizer = optax.adam(1e-2)
    step = make_step(optimizer, fit)
    estimator = spectrax.PowerIteration(block_size=1)

    def fresh(net: Net) -> tuple[Any, Any, Any]:
        return start(*wrap(net, estimator=estimator), optimizer)

    def run(carry: Any, num_steps: int) -> Any:
        for _ in range(num_steps):
            carry = step(carry, *data)
        return carry

    whole = run(fresh(net), 6)
    half = run(fresh(net), 3)
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, half)
    file.seek(0)
    restored = eqx.tree_deserialise_leaves(file, fresh(Net(jr.key(0))))
    assert eqx.tree_equal(run(restored, 3), whole)
    assert not eqx.tree_equal(half, whole)
    # The state matters: with a new one, the same weights take another course.
    model, _, opt_state = half
    _, state = wrap(net, estimator=spectrax.PowerIteration(1, 1, init_steps=0))
    assert not eqx.tree_equal(run((model, state, opt_state), 3)[0], whole[0])


def test_buffers_can_be_donated(net, data):
    optimizer = optax.adam(1e-2)
    donating = make_step(optimizer, fit, donate="all")
    carry = start(*wrap(net), optimizer)
    copied = jtu.tree_map(lambda x: x.copy() if eqx.is_array(x) else x, carry)
    x, y = data
    raw = carry[0].raw.first.weight
    for _ in range(3):
        carry = donating(carry, x.copy(), y.copy())
    assert raw.is_deleted()
    plain = make_step(optimizer, fit)
    for _ in range(3):
        copied = plain(copied, x, y)
    assert eqx.tree_equal(carry, copied, rtol=1e-12, atol=1e-12)


def _cast(tree: Any, dtype: Any) -> Any:
    """Every array of a real dtype, as mixed-precision frameworks do it."""
    real = lambda x: eqx.is_inexact_array(x) and not jnp.iscomplexobj(x)  # noqa: E731
    return jax.tree.map(lambda x: x.astype(dtype) if real(x) else x, tree)


@pytest.mark.parametrize("layer", ["linear", "conv"])
@pytest.mark.parametrize(
    ("model_dtype", "state_dtype"),
    [
        (jnp.bfloat16, jnp.float64),
        (jnp.float16, jnp.float16),
        (jnp.float32, jnp.float64),
        (jnp.float64, jnp.float32),
    ],
)
def test_dtypes_may_change_after_wrapping(layer, model_dtype, state_dtype, getkey):
    plain = {
        "linear": lambda key: eqx.nn.Linear(6, 5, key=key),
        "conv": lambda key: eqx.nn.Conv1d(3, 2, 3, key=key),
    }[layer](getkey())
    model, state = spectrax.constrain(plain)
    model, state = _cast(model, model_dtype), _cast(state, state_dtype)
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(state)]
    for _ in range(2):
        state = spectrax.advance(model, state)
    assert dtypes == [leaf.dtype for leaf in jax.tree.leaves(state)]
    got = spectrax.unwrap(model, state)
    assert got.weight.dtype == model_dtype
    norm = spectrax.spectral_norm(spectrax.layer_operator(_cast(got, jnp.float64)))
    np.testing.assert_allclose(
        norm, 1, rtol=2e-2 if model_dtype != jnp.float64 else 1e-5
    )


def test_a_state_whose_complex_arrays_were_cast(getkey):
    model, state = spectrax.constrain(eqx.nn.Conv1d(3, 2, 3, key=getkey()))
    halved = jax.tree.map(
        lambda x: x.real if eqx.is_array(x) and jnp.iscomplexobj(x) else x, state
    )
    with pytest.raises(TypeError, match="amplitudes of plane waves, got float64"):
        spectrax.unwrap(model, halved)


def test_a_certificate_holds_in_the_dtype_it_was_made_in(getkey):
    layer = eqx.nn.Linear(4, 3, key=getkey())
    model, state = spectrax.constrain(layer, estimator=spectrax.GramIteration())
    narrow, narrow_state = _cast(model, jnp.bfloat16), _cast(state, jnp.bfloat16)
    for verb in (spectrax.unwrap, spectrax.advance):
        for cast_state in (state, narrow_state):
            with pytest.raises(TypeError, match=r"in which it was certified.*bfloat16"):
                verb(narrow, cast_state)
