"""The node that stands in the place of a weight."""

import functools as ft
import pickle
import subprocess
import sys
import textwrap

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest

import spectrax

from .helpers import clone, linear_norms, Net, true_norm


def test_stands_where_the_weight_was(getkey):
    net = Net(getkey())
    model, state = spectrax.constrain(net)
    assert type(model.module) is Net
    node = model.module.first.weight
    assert isinstance(node, spectrax.Constrained)
    assert model.weights == (node, model.module.second.weight)
    assert node.weight is net.first.weight
    assert node.norm(state) == pytest.approx(true_norm(net.first.weight), rel=1e-6)
    assert node.bound(state) == 1
    assert eqx.tree_equal(
        node.unwrap(state), spectrax.unwrap(model, state).first.weight
    )
    assert model.module.first.bias is net.first.bias
    assert eqx.tree_equal(model.raw, net)


def test_parts_of_a_model_are_models(getkey):
    """`advance` and `unwrap` are one walk over the nodes of any pytree."""
    model, state = spectrax.constrain(Net(getkey()))
    whole = spectrax.unwrap(model, state)
    part = spectrax.unwrap(model.module.first, state)
    assert type(part) is eqx.nn.Linear
    assert eqx.tree_equal(part, whole.first)
    by_hand = spectrax.unwrap({"a": [model.module.second]}, state)
    assert eqx.tree_equal(by_hand["a"][0], whole.second)
    model = eqx.tree_at(
        lambda m: m.module.first.weight.weight, model, replace_fn=jnp.tril
    )
    state = spectrax.advance(model.module.first, state, num_steps=30)
    norms = linear_norms(spectrax.unwrap(model, state))
    assert norms == pytest.approx([1, 1], rel=1e-6)


def test_a_layer_can_be_replaced_by_a_plain_one(getkey):
    model, state = spectrax.constrain(Net(getkey()))
    head = eqx.nn.Linear(4, 2, key=getkey())
    module = eqx.tree_at(lambda net: net.second, model.module, head)
    model = spectrax.Wrapped(module)
    state = spectrax.advance(model, state)
    plain = spectrax.unwrap(model, state)
    assert eqx.tree_equal(plain.second, head)
    assert true_norm(plain.first.weight) == pytest.approx(1, rel=1e-6)
    assert len(spectrax.summary(model, state, enclosure=False)) == 1


def test_a_weight_in_the_place_of_a_node_is_noticed(getkey):
    """It would be constrained no more, and nobody would say so."""
    model, state = spectrax.constrain(Net(getkey()))
    array = jr.normal(getkey(), (4, 4))
    changed = eqx.tree_at(lambda m: m.module.first.weight, model, array)
    match = "expected a module with 2 constrained weights, .* got one with 1: others"
    with pytest.warns(UserWarning, match=match):
        plain = spectrax.unwrap(changed, state)
    assert plain.first.weight is array
    (alone, state) = spectrax.constrain(eqx.nn.Linear(4, 4, key=getkey()))
    changed = eqx.tree_at(lambda m: m.module.weight, alone, array)
    with pytest.warns(UserWarning, match="got one with 0"):
        assert type(spectrax.unwrap(changed, state)) is eqx.nn.Linear


def test_attributes_of_the_module(getkey):
    model, _ = spectrax.constrain(Net(getkey()))
    match = r"has no attribute 'first'. The module in it has: `model.module.first`"
    with pytest.raises(AttributeError, match=match):
        _ = model.first
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'$"):
        _ = model.nonsense


def test_eight_bits_are_too_few(getkey):
    net = jtu.tree_map(lambda x: x.astype(jnp.float8_e4m3fn), Net(getkey()))
    with pytest.raises(
        TypeError, match="`first.weight` to be of float16, bfloat16 or w"
    ):
        spectrax.constrain(net)


_LAYERS = {
    "linear": (lambda key: eqx.nn.Linear(3, 2, key=key), (jnp.ones(3),)),
    "conv": (lambda key: eqx.nn.Conv1d(2, 3, 2, key=key), (jnp.ones((2, 5)),)),
    "embedding": (lambda key: eqx.nn.Embedding(4, 3, key=key), (jnp.array(1),)),
    "gru": (lambda key: eqx.nn.GRUCell(3, 2, key=key), (jnp.ones(3), jnp.ones(2))),
    "fourier": (
        lambda key: spectrax.nn.FourierLayer(1, 2, 2, 2, key=key),
        (jnp.ones((2, 8)),),
    ),
}


@pytest.mark.parametrize("name", _LAYERS)
def test_called_without_being_unwrapped(name, getkey):
    make, x = _LAYERS[name]
    model, _ = spectrax.constrain(make(getkey()))
    match = r"expected a model without constraints, .*spectrax.unwrap\(model, state\)"
    with pytest.raises((TypeError, AttributeError), match=match):
        model.module(*x)


_USES = {
    "matmul": lambda w: w @ jnp.ones(4),
    "from the left": lambda w: np.ones(4) @ w,
    "arithmetic": lambda w: 2 * w,
    "a function": jnp.sum,
    "an index": lambda w: w[0],
    "an attribute": lambda w: w.T,
}


@pytest.mark.parametrize("use", _USES.values(), ids=_USES)
def test_is_no_array(use, getkey):
    model, _ = spectrax.constrain(Net(getkey()))
    with pytest.raises((TypeError, AttributeError), match="its attribute `weight`"):
        use(model.module.first.weight)
    assert not hasattr(model.module.first.weight, "shape")
    with pytest.raises(AttributeError, match="'Constrained' object has no attribute"):
        _ = model.module.first.weight.nonsense


def test_where_inside_of_a_node(getkey):
    model, _ = spectrax.constrain(Net(getkey()))
    with pytest.raises(ValueError, match="`first.weight` is constrained already"):
        spectrax.constrain(model, where=lambda m: m.module.first.weight.weight)


def test_the_state_of_another_model(getkey):
    model, _ = spectrax.constrain(Net(getkey()))
    _, other = spectrax.constrain(eqx.nn.Linear(4, 4, key=getkey()))
    for verb in (spectrax.advance, spectrax.unwrap, spectrax.summary):
        with pytest.raises(
            ValueError, match="expected the state of this model, got one"
        ):
            verb(model, clone(other))
    # One that was never made with its state has none either.
    with pytest.raises(ValueError, match="`equinox.nn.make_with_state` around"):
        spectrax.unwrap(spectrax.wrap(Net(getkey())), other)


def test_views_can_be_compared(getkey):
    a, b = (
        spectrax.constrain(eqx.nn.Conv1d(2, 3, 3, stride=s, key=getkey()))[0].weights[0]
        for s in (1, 1)
    )
    assert a.view == b.view
    assert hash(a.view) == hash(b.view)
    c = spectrax.constrain(eqx.nn.Conv1d(2, 3, 3, stride=2, key=getkey()))[0].weights[0]
    assert a.view != c.view
    sized = spectrax.constrain(eqx.nn.Conv1d(2, 3, 3, key=getkey()), input_size=(8,))[0]
    assert a.view != sized.weights[0].view
    assert a.view != "a view"
    # What was compiled for one model serves another of the same form.
    count = 0

    @eqx.filter_jit
    def norms(model, state):
        nonlocal count
        count += 1
        return [node.norm(state) for node in model.weights]

    for _ in range(2):
        norms(*spectrax.constrain(Net(getkey())))
    assert count == 1


_KNOWN_ONLY_THERE = """
import pickle, sys
import equinox as eqx, jax, jax.numpy as jnp, spectrax
import layers_of_theirs
assert not layers_of_theirs.registered
with open(sys.argv[1], "rb") as file:
    model, state = pickle.load(file)
state = spectrax.advance(model, state)
norm = jnp.linalg.norm(spectrax.unwrap(model, state).kernel.T, 2)
(row,) = spectrax.summary(model, state)
assert row.layer == "Theirs" and row.upper < 1.001, row
print(float(norm))
"""

_MODULE = """
import equinox as eqx
from jaxtyping import Array

registered = False

class Theirs(eqx.Module):
    kernel: Array

def view(layer, kernel):
    return kernel.T
"""


def test_a_pickled_model_where_its_layer_was_never_registered(tmp_path, monkeypatch):
    (tmp_path / "layers_of_theirs.py").write_text(textwrap.dedent(_MODULE))
    monkeypatch.syspath_prepend(tmp_path)
    import layers_of_theirs  # pyright: ignore[reportMissingImports]

    spectrax.register_layer(
        layers_of_theirs.Theirs, "kernel", view=layers_of_theirs.view
    )
    kernel = jr.normal(jr.key(0), (4, 3), jnp.float32)
    pair = spectrax.constrain(layers_of_theirs.Theirs(kernel))
    (tmp_path / "pair").write_bytes(pickle.dumps(pair))
    run = subprocess.run(
        [sys.executable, "-c", _KNOWN_ONLY_THERE, str(tmp_path / "pair")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) == pytest.approx(1, rel=1e-5)


_CONSTRAINTS = {
    "another bound": (spectrax.Normalize(0.5), 0.5),
    "another kind": (spectrax.Clip(0.25), 0.25),
    "trained": (spectrax.LearnableBound(2.0), 2.0),
    "that of now": (spectrax.ClipToInitial(0.5), None),
}


@pytest.mark.parametrize(
    ("constraint", "norm"), _CONSTRAINTS.values(), ids=_CONSTRAINTS
)
def test_another_constraint(constraint, norm, getkey):
    net = Net(getkey())
    model, state = spectrax.constrain(net, constraint=spectrax.Normalize(3.0))
    new_model, new_state = spectrax.with_constraint(model, state, constraint)
    assert eqx.tree_equal(new_model.raw, net)
    for before, after in zip(model.weights, new_model.weights, strict=True):
        vectors = state.get(before.memory).vectors
        assert eqx.tree_equal(vectors, new_state.get(after.memory).vectors)
    raw = linear_norms(net)
    expected = [norm] * 2 if norm is not None else [0.5 * sigma for sigma in raw]
    plain = spectrax.unwrap(new_model, new_state)
    assert linear_norms(plain) == pytest.approx(expected, rel=1e-6)
    # The old pair still works, and so does the new one in training.
    assert linear_norms(spectrax.unwrap(model, state)) == pytest.approx(
        [3, 3], rel=1e-6
    )
    _, newer = new_model(jnp.ones(4), new_state)
    assert jtu.tree_structure(newer) == jtu.tree_structure(
        spectrax.with_constraint(model, state, constraint)[1]
    )


def test_another_bound_compiles_nothing_anew(getkey):
    model, state = spectrax.constrain(Net(getkey()))
    count = 0

    @eqx.filter_jit
    def norms(model, state):
        nonlocal count
        count += 1
        return linear_bounds(model, state)

    def linear_bounds(model, state):
        return [node.bound(state) for node in model.weights]

    assert norms(model, state) == [1, 1]
    model, state = spectrax.with_constraint(model, state, spectrax.Normalize(0.5))
    assert norms(model, state) == [0.5, 0.5]
    assert count == 1


def test_another_constraint_for_some(getkey):
    model, state = spectrax.constrain(Net(getkey()))
    change = ft.partial(spectrax.with_constraint, model, state)
    few = change(spectrax.Clip(0.5), where=lambda m: m.module.second)
    assert linear_norms(spectrax.unwrap(*few)) == pytest.approx([1, 0.5], rel=1e-6)
    layers = lambda m: [m.module.second, m.module.first]  # noqa: E731
    each = change([spectrax.Clip(0.5), spectrax.Normalize(2.0)], where=layers)
    assert linear_norms(spectrax.unwrap(*each)) == pytest.approx([2, 0.5], rel=1e-6)
    with pytest.raises(
        ValueError, match="expected a model with constrained weights, g"
    ):
        change(spectrax.Clip(0.5), where=lambda m: m.module.second.bias)
    with pytest.raises(
        ValueError, match="expected a model with constrained weights, g"
    ):
        spectrax.with_constraint(Net(getkey()), state, spectrax.Clip(0.5))
    with pytest.raises(ValueError, match="expected one `constraint`, or as many as"):
        change([spectrax.Clip(0.5)], where=layers)


def test_state_of_the_module_is_kept(getkey):
    """Another constraint leaves the running statistics of a model alone."""

    class Normed(eqx.Module):
        linear: eqx.nn.Linear
        norm: eqx.nn.BatchNorm

        def __call__(self, x, state):
            return self.norm(self.linear(x), state)

    def make(key):
        norm = eqx.nn.BatchNorm(3, axis_name="batch", mode="ema")
        return spectrax.wrap(Normed(eqx.nn.Linear(4, 3, key=key), norm))

    model, state = eqx.nn.make_with_state(make)(getkey())
    call = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    _, state = call(jr.normal(getkey(), (5, 4)), state)
    index = model.module.norm.ema_state_index
    new_model, new_state = spectrax.with_constraint(model, state, spectrax.Clip(0.5))
    new_index = new_model.module.norm.ema_state_index
    assert eqx.tree_equal(state.get(index), new_state.get(new_index))
