"""`unwrap(..., certified=True)`, and a proven bound at every step of training."""

from typing import Any

import equinox as eqx
import jax
import jax.export
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
import pytest

import spectrax

from .convolutions import norm_at
from .helpers import clone, linear_weights, make_matrix, Net, perturbed, true_norm


OPTIMIZED = True  # see conftest.py
wrap = eqx.nn.make_with_state(spectrax.wrap)


def linear(matrix: np.ndarray, dtype: Any = jnp.float32) -> eqx.nn.Linear:
    layer = eqx.nn.Linear(matrix.shape[1], matrix.shape[0], key=jr.key(0), dtype=dtype)
    return eqx.tree_at(
        lambda tree: tree.weight, layer, jnp.asarray(matrix).astype(dtype)
    )


@eqx.filter_jit
def certified(model: Any, state: eqx.nn.State) -> Any:
    return spectrax.unwrap(model, state, certified=True)


@pytest.mark.parametrize(
    ("dtype", "constraint"),
    [
        (jnp.float32, spectrax.Normalize(0.7)),
        (jnp.bfloat16, spectrax.Clip(0.5)),
        (jnp.float64, spectrax.Normalize(1e-3)),
    ],
)
def test_weights_as_stored_are_within_the_bound(dtype: Any, constraint: Any):
    slack = 1e-2 if dtype == jnp.bfloat16 else 2e-5
    for kind in ("gaussian", "repeated top", "ones", "hilbert"):
        model, state = wrap(
            linear(make_matrix(kind, (12, 20), 3), dtype), constraint=constraint
        )
        plain = certified(model, state)
        assert plain.weight.dtype == dtype
        norm = true_norm(np.asarray(plain.weight.astype(jnp.float64)))
        assert (1 - slack) * constraint.bound <= norm <= constraint.bound


def test_a_stale_state_is_certified_too(getkey):
    layer = linear(make_matrix("gaussian", (12, 20), 3))
    model, state = wrap(layer, constraint=spectrax.Normalize(0.7))
    model = perturbed(model, getkey(), size=1.0)
    (stale,) = linear_weights(spectrax.unwrap(model, state))
    assert true_norm(stale) > 0.71
    (weight,) = linear_weights(certified(model, state))
    assert 0.69 <= true_norm(weight) <= 0.7


def test_clip_leaves_a_weight_below_its_bound_alone_to_the_last_bit():
    layer = linear(0.3 * make_matrix("gaussian", (12, 20), 3))
    model, state = wrap(layer, constraint=spectrax.Clip(2.0))
    assert jnp.array_equal(certified(model, state).weight, layer.weight)


def test_learned_bounds_and_zero_weights():
    layer = linear(make_matrix("gaussian", (12, 20), 3))
    model, state = wrap(layer, constraint=spectrax.LearnableBound(2.5))
    bound = float(model.constraints[0].target())
    assert 2.499 <= true_norm(certified(model, state).weight) <= bound
    model, state = wrap(linear(np.zeros((12, 20))))
    assert jnp.all(certified(model, state).weight == 0)


def test_stacks_have_a_bound_each():
    keys = jr.split(jr.key(1), 3)
    stack = eqx.filter_vmap(lambda key: eqx.nn.Linear(6, 5, key=key))(keys)
    bounds = jnp.array([0.5, 1.0, 2.0])
    model, state = wrap(stack, constraint=spectrax.Normalize(bounds))
    norms = [true_norm(weight) for weight in certified(model, state).weight]
    assert np.all(norms <= np.asarray(bounds))
    np.testing.assert_allclose(norms, bounds, rtol=2e-5)


def test_convolutions_at_every_size_and_at_one(getkey):
    conv = eqx.nn.Conv1d(2, 3, 3, padding=1, key=getkey(), dtype=jnp.float32)
    plain = certified(*wrap(conv))
    assert 0.98 <= spectrax.spectral_norm(spectrax.layer_operator(plain)) <= 1
    assert norm_at(plain, (9,)) <= 1
    plain = certified(*wrap(conv, input_size=(9,)))
    assert 0.9999 <= norm_at(plain, (9,)) <= 1


def test_certified_weights_carry_no_derivative():
    model, state = wrap(linear(make_matrix("gaussian", (12, 20), 3)))

    @eqx.filter_grad
    def gradient(model: Any) -> jax.Array:
        return jnp.sum(spectrax.unwrap(model, state, certified=True).weight ** 2)

    assert jnp.all(gradient(model).raw.weight == 0)


def test_weights_that_are_not_finite_raise():
    model, state = wrap(linear(make_matrix("gaussian", (12, 20), 3)))
    broken = eqx.tree_at(
        lambda m: m.module.weight.weight,
        model,
        jnp.full((12, 20), jnp.nan, jnp.float32),
    )
    with pytest.raises(RuntimeError, match="no proof was found: it has a NaN"):
        spectrax.unwrap(broken, state, certified=True)
    # Where it is traced nothing can be raised, and nothing looks proven.
    assert jnp.all(jnp.isnan(certified(broken, state).weight))


def test_they_are_exported():
    model, state = wrap(linear(make_matrix("gaussian", (12, 20), 3)))
    dynamic, static = eqx.partition((model, state), eqx.is_array)
    leaves, structure = jax.tree.flatten(dynamic)

    @jax.jit
    def weight(leaves: list[jax.Array]) -> jax.Array:
        dynamic = jax.tree.unflatten(structure, leaves)
        return certified(*eqx.combine(dynamic, static)).weight

    exported = jax.export.export(weight)(leaves)
    # No program that calls back to Python can be saved.
    assert "callback" not in exported.mlir_module()
    assert jnp.array_equal(exported.call(leaves), weight(leaves))
    assert 0.999 <= true_norm(exported.call(leaves)) <= 1


def test_a_model_is_cast_before_it_is_certified():
    layer = linear(np.ones((3, 3)))
    model, state = wrap(layer)
    after = spectrax.unwrap(model, state, certified=True).weight.astype(jnp.bfloat16)
    model = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16) if eqx.is_inexact_array(x) else x, model
    )
    before = spectrax.unwrap(model, state, certified=True).weight
    assert before.dtype == jnp.bfloat16
    # 1/3 is between two numbers, of which the nearer one is too large.
    norms = [true_norm(np.asarray(w.astype(jnp.float64))) for w in (after, before)]
    assert 0.99 <= norms[1] <= 1 < norms[0]


def test_views_without_structure_raise():
    def matrix_free(weight: jax.Array) -> lx.FunctionLinearOperator:
        structure = jax.ShapeDtypeStruct((20,), weight.dtype)
        return lx.FunctionLinearOperator(lambda x: weight @ x, structure)

    layer = linear(make_matrix("gaussian", (12, 20), 3))
    model, state = wrap(layer, view=matrix_free)
    with pytest.raises(ValueError, match="`weight` cannot be certified: expected"):
        spectrax.unwrap(model, state, certified=True)
    with pytest.raises(ValueError, match="whose norm can be bounded from above"):
        wrap(layer, view=matrix_free, estimator=spectrax.GramIteration())


GRAM = spectrax.GramIteration(tolerance=0.05)


@eqx.filter_jit
def gram_run(
    operator: Any, moved: Any, num_steps: int | None = None
) -> tuple[jax.Array, jax.Array, jax.Array, Any, Any]:
    """Sigma at the start, with the old state and with the new one; both states."""
    before = GRAM.init(operator, key=jr.key(0))
    after = GRAM.advance(moved, before, num_steps=num_steps)
    sigma = GRAM.sigma
    stale, fresh = sigma(moved, before), sigma(moved, after)
    return sigma(operator, before), stale, fresh, before, after


@pytest.mark.parametrize("size", [0.0, 1e-3, 1.0, 1e5])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.complex64])
def test_gram_iteration_is_an_upper_bound_before_and_after_advancing(
    size: float, dtype: Any
):
    imaginary = dtype == jnp.complex64
    for kind in ("gaussian", "rank one", "zero", "repeated top"):
        matrix = make_matrix(kind, (12, 20), 4, imaginary=imaginary)
        change = size * make_matrix("gaussian", (12, 20), 5, imaginary=imaginary)
        weight, moved = (
            jnp.asarray(m).astype(dtype) for m in (matrix, matrix + change)
        )
        wide = jnp.complex128 if imaginary else jnp.float64
        truths = [true_norm(np.asarray(w.astype(wide))) for w in (weight, moved)]
        first, stale, fresh, *_ = gram_run(
            *map(lx.MatrixLinearOperator, (weight, moved))
        )
        assert truths[0] <= first <= (1 + 1e-4) * truths[0]
        assert truths[1] <= stale
        # Either certified anew, or within the tolerance of the old certificate.
        assert truths[1] <= fresh <= 1.12 * truths[1]


def test_gram_iteration_certifies_anew_only_past_the_tolerance():
    weight = jnp.asarray(make_matrix("gaussian", (12, 20), 4), jnp.float32)
    norm = true_norm(weight)
    unit = jnp.zeros((12, 20), jnp.float32).at[0, 0].set(norm)
    for move, anew in ((0.04, False), (0.06, True)):
        moved = weight + move * unit
        *_, before, after = gram_run(*map(lx.MatrixLinearOperator, (weight, moved)))
        assert (after.upper != before.upper) == anew
        reference = jax.tree.leaves(after.reference)[0]
        assert jnp.array_equal(reference, moved if anew else weight)


def test_gram_iteration_on_convolutions_and_fourier_multipliers(getkey):
    conv = eqx.nn.Conv1d(2, 2, 3, padding=1, key=getkey(), dtype=jnp.float32)
    moved = eqx.tree_at(lambda c: c.weight, conv, 1.3 * conv.weight)
    operators = [spectrax.layer_operator(c) for c in (conv, moved)]
    truth = float(spectrax.spectral_norm(operators[1]))
    _, stale, fresh, *_ = gram_run(*operators)
    assert truth <= fresh <= 1.011 * truth
    assert truth <= stale <= 3 * truth
    weight = jr.normal(getkey(), (3, 2, 4), jnp.complex64)
    operators = [spectrax.fourier_multiplier(c * weight) for c in (1, 1.01)]
    truth = np.linalg.svd(np.moveaxis(1.01 * weight, -1, 0), compute_uv=False).max()
    _, stale, fresh, *_ = gram_run(*operators)
    assert truth <= stale * (1 + 1e-6)
    assert truth <= fresh * (1 + 1e-6) <= 1.1 * truth


def test_operators_of_several_arrays_are_certified_at_each_change(getkey):
    a, b = jr.normal(getkey(), (3, 4)), jr.normal(getkey(), (4, 5))
    product = lx.MatrixLinearOperator(a) @ lx.MatrixLinearOperator(b)
    moved = lx.MatrixLinearOperator(a) @ lx.MatrixLinearOperator(1.001 * b)
    first, stale, fresh, *_ = gram_run(product, moved)
    truth = true_norm(a @ b)
    assert truth <= first * (1 + 1e-12) <= (1 + 1e-4) * truth
    assert stale == jnp.inf
    assert 1.001 * truth <= fresh * (1 + 1e-12) <= 1.0012 * truth


def test_the_derivative_is_that_of_the_norm():
    weight = jnp.asarray(make_matrix("gaussian", (12, 20), 4), jnp.float32)
    operator = lx.MatrixLinearOperator(weight)
    *_, state, _ = gram_run(operator, operator)

    def sigma(weight: jax.Array) -> jax.Array:
        return GRAM.sigma(lx.MatrixLinearOperator(weight), state)

    u, _, vh = np.linalg.svd(np.asarray(weight))
    np.testing.assert_allclose(
        jax.grad(sigma)(weight), np.outer(u[:, 0], vh[0]), atol=1e-4
    )


def test_training_with_gram_iteration_never_exceeds_the_bound(getkey):
    net = Net(getkey(), dtype=jnp.float32)
    model, state = wrap(net, estimator=spectrax.GramIteration(tolerance=0.2))

    @eqx.filter_jit
    def step(model: Any, state: eqx.nn.State, x: jax.Array) -> Any:
        @eqx.filter_value_and_grad(has_aux=True)
        def loss(model: Any, state: eqx.nn.State) -> Any:
            state = spectrax.advance(model, state)
            plain = spectrax.unwrap(model, state)
            return -jnp.sum(jax.vmap(plain)(x) ** 2), (state, plain)

        (_, (state, plain)), gradient = loss(model, state)
        model = eqx.apply_updates(model, jax.tree.map(lambda g: -0.05 * g, gradient))
        return model, state, plain

    x = jr.normal(getkey(), (8, 4), jnp.float32)
    for _ in range(8):
        model, state, plain = step(model, state, x)
        for weight in linear_weights(plain):
            assert 0.8 <= true_norm(weight) <= 1 + 1e-6
        # Also with the state that has not seen the update.
        for weight in linear_weights(spectrax.unwrap(model, clone(state))):
            assert true_norm(weight) <= 1 + 1e-6


@pytest.mark.parametrize("tolerance", [0.0, -1.0, float("nan")])
def test_gram_iteration_refuses_tolerances(tolerance: float):
    with pytest.raises(ValueError, match="expected `tolerance` to be positive"):
        spectrax.GramIteration(tolerance=tolerance)
    with pytest.raises(ValueError, match="expected `block_size` to be at least 1"):
        spectrax.GramIteration(block_size=0)
