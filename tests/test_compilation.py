"""How often things are compiled: once, whatever the values are."""

import logging
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
from jaxtyping import Array

import spectrax

from .helpers import linear_norms, Net, perturbed


OPTIMIZED = True  # see conftest.py
wrap = eqx.nn.make_with_state(spectrax.wrap)


@pytest.fixture
def net(getkey):
    return Net(getkey())


def structure(tree: Any) -> Any:
    """Everything about a pytree except for the values of its arrays."""
    dynamic, static = eqx.partition(tree, eqx.is_array)
    return eqx.filter_eval_shape(lambda x: x, dynamic), static


class Traces:
    """A function that counts how often it is traced."""

    def __init__(self, function: Callable):
        self.count = 0

        def counted(*args):
            self.count += 1
            return function(*args)

        self.jitted = eqx.filter_jit(counted)

    def __call__(self, *args):
        return self.jitted(*args)


@pytest.fixture
def compiled(caplog):
    """The names of the functions that were compiled while another one ran."""

    def during(function: Callable[[], Any]) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.WARNING), jax.log_compiles():
            jax.block_until_ready(jtu.tree_leaves(eqx.filter(function(), eqx.is_array)))
        messages = [record.getMessage() for record in caplog.records]
        return [text for text in messages if text.startswith("Compiling ")]

    return during


@pytest.mark.parametrize(
    "constraint",
    [spectrax.Normalize(), spectrax.ClipToInitial(), spectrax.LearnableBound()],
    ids=["Normalize", "ClipToInitial", "LearnableBound"],
)
def test_a_training_step_is_traced_once(net, getkey, constraint):
    optimizer = optax.adam(1e-2)

    @Traces
    def step(model, state, opt_state, x):
        @eqx.filter_grad(has_aux=True)
        def gradient(model, state):
            y, state = model(x, state)
            return jnp.sum(y**2), state

        grads, state = gradient(model, state)
        with jax.numpy_dtype_promotion("standard"):  # optax relies on it
            updates, opt_state = optimizer.update(grads, opt_state)
        return eqx.apply_updates(model, updates), state, opt_state

    model, state = wrap(net, constraint=constraint)
    carry = model, state, optimizer.init(eqx.filter(model, eqx.is_inexact_array))
    shapes = structure(carry)
    for _ in range(4):
        carry = step(*carry, jr.normal(getkey(), (4,)))
        assert eqx.tree_equal(structure(carry), shapes)
    assert step.count == 1
    # Made anew, from other weights, it is the same program.
    model, state = wrap(Net(getkey()), constraint=constraint)
    opt_state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))
    step(model, state, opt_state, jnp.ones(4))
    assert step.count == 1


def test_inference_mode_is_another_program(net):
    """Which is how it can be free of the iteration."""
    call = Traces(lambda model, state, x: model(x, state))
    model, state = wrap(net)
    frozen = eqx.nn.inference_mode(model)
    x = jnp.ones(4)
    for _ in range(2):
        _, state = call(model, state, x)
        _, state = call(frozen, state, x)
    assert call.count == 2


def test_another_bound_is_the_same_program(net):
    @Traces
    def unwrap(model, state):
        return spectrax.unwrap(model, state)

    for bound in (0.5, 2.0, np.float64(3.0), jnp.asarray(4.0)):
        plain = unwrap(*wrap(net, constraint=spectrax.Clip(bound)))
        norms = linear_norms(plain)
        assert max(norms) <= bound * (1 + 1e-9)
        plain = unwrap(*wrap(net, constraint=spectrax.Clip(0.01 * bound)))
        assert linear_norms(plain) == pytest.approx([0.01 * float(bound)] * 2, rel=1e-9)
    assert unwrap.count == 1


def test_a_bound_changed_in_the_state_is_the_same_program(net):
    unwrap = Traces(spectrax.unwrap)
    model, state = wrap(net)
    assert linear_norms(unwrap(model, state)) == pytest.approx([1, 1], rel=1e-9)

    def is_constraint(node: Any) -> bool:
        return isinstance(node, spectrax.AbstractConstraint)

    def halved(node: Any) -> Any:
        return jtu.tree_map(lambda x: 0.5 * x, node) if is_constraint(node) else node

    state = jtu.tree_map(halved, state, is_leaf=is_constraint)
    assert linear_norms(unwrap(model, state)) == pytest.approx([0.5, 0.5], rel=1e-9)
    assert unwrap.count == 1


def test_eager_calls_compile_once(net, getkey, compiled):
    def use(model: spectrax.Wrapped, state: eqx.nn.State, x: Array) -> Any:
        state = spectrax.advance(model, state)
        plain = spectrax.unwrap(model, state)
        return plain(x), model(x, state), spectrax.wrap(net)

    x = jnp.ones(4)
    models = [wrap(net), wrap(perturbed(net, getkey()))]
    jax.clear_caches()
    assert compiled(lambda: use(*models[0], x)) != []
    assert compiled(lambda: use(*models[1], x)) == []


def test_layers_of_one_shape_share_their_programs(getkey, compiled):
    """A deep model takes no longer to compile, eagerly, than one of its layers."""

    def layers(number: int) -> list[eqx.nn.Linear]:
        return [eqx.nn.Linear(4, 4, key=getkey()) for _ in range(number)]

    one, deep = layers(1), layers(5)
    model, state = wrap(one)
    jax.clear_caches()
    assert len(compiled(lambda: spectrax.advance(model, state))) == 1

    def use(net: list[eqx.nn.Linear]) -> Any:
        model, state = wrap(net)
        return spectrax.unwrap(model, spectrax.advance(model, state))

    assert compiled(lambda: use(one)) != []
    assert compiled(lambda: use(deep)) == []


def test_certified_weights_share_their_programs(getkey, compiled):
    """Equal layers, and calls with other weights, are proven by one program."""
    net = [eqx.nn.Linear(4, 4, key=getkey()) for _ in range(2)]
    model, state = wrap(net)
    other = perturbed(model, getkey())

    def certify(model: spectrax.Wrapped) -> Any:
        return spectrax.unwrap(model, state, certified=True)

    jax.clear_caches()
    proofs = [text for text in compiled(lambda: certify(model)) if "_certified" in text]
    assert len(proofs) == 1
    assert compiled(lambda: certify(other)) == []
