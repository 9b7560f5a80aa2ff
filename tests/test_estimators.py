"""`PowerIteration` and `ExactSVD`: what `wrap` is told to use."""

from typing import Any

import equinox as eqx
import hypothesis
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import lineax as lx
import numpy as np
import pytest

import spectrax

from .helpers import KINDS, make_matrix, matrices, true_norm


WIDE = jnp.asarray(make_matrix("gaussian", (5, 8), 1))
LARGE = jnp.asarray(make_matrix("gaussian", (60, 50), 2))
KEY = jr.key(0)
ESTIMATORS = [spectrax.PowerIteration(), spectrax.ExactSVD()]


def operator_of(weight: jax.Array) -> lx.MatrixLinearOperator:
    return lx.MatrixLinearOperator(weight)


@eqx.filter_jit
def run(
    estimator: spectrax.AbstractEstimator,
    weight: jax.Array,
    num_steps: int | None = None,
) -> tuple[Any, jax.Array, jax.Array]:
    """Init, advance, sigma and residual."""
    operator = operator_of(weight)
    state = estimator.init(operator, key=KEY)
    state = estimator.advance(operator, state, num_steps=num_steps)
    return state, estimator.sigma(operator, state), estimator.residual(operator, state)


def assert_equal(a: Any, b: Any):
    assert jtu.tree_structure(a) == jtu.tree_structure(b)
    jtu.tree_map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dtype", ["float32", "float64", "complex128", "bfloat16"])
def test_sigma_is_the_norm_of_small_matrices(
    estimator: spectrax.AbstractEstimator, dtype: str
):
    eps = 2.0**-52 if dtype in ("float64", "complex128") else 2.0**-23

    @hypothesis.given(matrices([(5, 8)], imaginary=dtype == "complex128"))
    @hypothesis.settings(max_examples=15)
    def check(drawn: np.ndarray):
        weight = jnp.asarray(drawn.astype(jnp.dtype(dtype)))
        _, sigma, residual = run(estimator, weight)
        assert sigma.shape == residual.shape == ()
        expected = "float64" if eps < 1e-10 else "float32"
        assert sigma.dtype == residual.dtype == expected
        truth = true_norm(weight)
        assert truth * (1 - 50 * eps) <= sigma <= truth * (1 + 50 * eps)
        # The ridge that keeps a block's basis from breaking down limits it.
        assert 0 <= residual < 3e4 * eps

    check()


@pytest.mark.parametrize("estimator", ESTIMATORS)
@hypothesis.given(drawn=matrices([(5, 8)], exponents=(-20, 0, 20)))
@hypothesis.settings(max_examples=15)
def test_first_state_of_a_small_matrix_is_exact(
    estimator: spectrax.AbstractEstimator, drawn: np.ndarray
):
    weight = jnp.asarray(drawn)
    _, sigma, residual = run(estimator, weight, 0)
    assert float(sigma) == pytest.approx(true_norm(drawn), rel=1e-14)
    assert residual < 1e-13


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("imaginary", [False, True])
def test_gradient_is_that_of_the_norm(
    estimator: spectrax.AbstractEstimator, imaginary: bool
):
    weight = make_matrix("gaussian", (5, 8), 5, imaginary=imaginary)
    left, _, right = np.linalg.svd(weight)
    gradient = jax.jit(jax.grad(lambda w: run(estimator, w)[1]))(jnp.asarray(weight))
    # JAX's convention: the conjugate of u v^H.
    truth = np.outer(left[:, 0], right[0]).conj()
    np.testing.assert_allclose(gradient, truth, rtol=0, atol=1e-11)


def test_exact_svd_has_the_derivatives_of_the_norm():
    exact = jax.jit(jax.hessian(lambda w: run(spectrax.ExactSVD(), w)[1]))(WIDE)
    svd = lambda w: jnp.linalg.svd(w, compute_uv=False)[0]  # noqa: E731
    truth = jax.jit(jax.hessian(svd))(WIDE)
    assert np.max(np.abs(truth)) > 0.1
    np.testing.assert_allclose(exact, truth, rtol=0, atol=1e-10)
    zero = jax.jit(jax.hessian(lambda w: run(spectrax.PowerIteration(), w)[1]))(WIDE)
    np.testing.assert_array_equal(zero, np.zeros_like(zero))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_zero_and_nan_weights(estimator: spectrax.AbstractEstimator):
    _, sigma, residual = run(estimator, jnp.zeros((5, 8)))
    assert sigma == residual == 0
    assert np.isnan(run(estimator, WIDE.at[0, 0].set(jnp.nan))[1])
    slope = jax.grad(lambda w: run(estimator, w)[1])
    assert np.all(np.isfinite(slope(jnp.zeros((5, 8)))))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_vmap_agrees_with_a_loop(estimator: spectrax.AbstractEstimator):
    stack = jnp.asarray(np.stack([make_matrix(kind, (5, 8), 3) for kind in KINDS]))
    _, sigmas, residuals = eqx.filter_vmap(lambda w: run(estimator, w))(stack)
    truth = [true_norm(weight) for weight in stack]
    np.testing.assert_allclose(sigmas, truth, rtol=1e-13, atol=0)
    np.testing.assert_allclose(residuals, 0, atol=1e-11)


# PowerIteration


def test_power_iteration_is_made_of_the_functions():
    estimator = spectrax.PowerIteration(num_steps=3, block_size=4, init_steps=5)
    operator = operator_of(LARGE)

    @eqx.filter_jit
    def by_hand() -> tuple[Any, Any, Any]:
        first = spectrax.init_power_state(LARGE, key=KEY, block_size=4, num_steps=5)
        three = spectrax.power_iterate(LARGE, first, num_steps=3)
        one = spectrax.power_iterate(LARGE, first, num_steps=1)
        return first, three, one

    @eqx.filter_jit
    def by_estimator() -> tuple[Any, Any, Any]:
        first = estimator.init(operator, key=KEY)
        three = estimator.advance(operator, first)
        return first, three, estimator.advance(operator, first, num_steps=1)

    hand, own = by_hand(), by_estimator()
    for a, b in zip(jtu.tree_leaves(own), jtu.tree_leaves(hand), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-10)
    # All three numbers matter.
    assert hand[0].u.shape == (4, 60)
    assert np.max(np.abs(hand[1].v - hand[2].v)) > 1e-3


def test_defaults_are_one_step_of_eight_pairs_from_a_start_of_32_steps():
    default = spectrax.PowerIteration()
    assert default == spectrax.PowerIteration(num_steps=1, block_size=8, init_steps=32)
    assert_equal(
        run(default, LARGE),
        run(spectrax.PowerIteration(1, 8, 32), LARGE),
    )


def test_zero_steps_advance_nothing():
    operator = operator_of(WIDE)
    estimator = spectrax.PowerIteration(num_steps=0)
    state = eqx.filter_jit(estimator.init)(operator, key=KEY)
    assert_equal(estimator.advance(operator, state), state)
    moving = spectrax.PowerIteration()
    assert_equal(moving.advance(operator, state, num_steps=0), state)


def test_key_chooses_the_random_start():
    estimator = spectrax.PowerIteration(init_steps=0)
    states = [estimator.init(operator_of(WIDE), key=jr.key(i)) for i in (0, 1)]
    assert np.all(states[0].v != states[1].v)


def test_residual_is_that_of_the_leading_pair():
    # Not converged: positive, and what the definition says.
    estimator = spectrax.PowerIteration(init_steps=2, block_size=2)
    state, sigma, residual = run(estimator, LARGE)
    u, v, weight = (np.asarray(x) for x in (state.u[0], state.v[0], LARGE))
    sigma, residual = float(sigma), float(residual)
    assert sigma == pytest.approx(u @ weight @ v, rel=1e-12)
    truth = np.linalg.norm(weight.T @ u - sigma * v) / sigma
    assert truth > 1e-2
    assert residual == pytest.approx(truth, rel=1e-10)
    # It says how far the next singular value is at most: there is one this close.
    values = np.linalg.svd(weight, compute_uv=False)
    assert np.min(np.abs(values - sigma)) <= truth * sigma


def test_residual_vanishes_as_it_converges():
    estimator = spectrax.PowerIteration(init_steps=0)
    residuals = [float(run(estimator, LARGE, num_steps=n)[2]) for n in (1, 10, 200)]
    assert residuals[0] > 1e-2 > residuals[1] > 1e-9
    assert residuals[2] < 1e-11


@pytest.mark.parametrize("exponent", [-20, 20])
def test_residual_is_relative(exponent: int):
    estimator = spectrax.PowerIteration(block_size=1, init_steps=0)
    weight = WIDE.astype(jnp.float32)
    expected = float(run(estimator, weight)[2])
    assert expected > 1e-3
    got = float(run(estimator, weight * np.float32(10.0**exponent))[2])
    assert got == pytest.approx(expected, rel=1e-4)


def test_advance_carries_no_derivative():
    estimator = spectrax.PowerIteration(block_size=2, init_steps=0)

    def vectors(weight: jax.Array) -> jax.Array:
        state = run(estimator, weight)[0]
        return sum(jnp.sum(x**3) for x in jtu.tree_leaves(state))

    np.testing.assert_array_equal(jax.grad(vectors)(WIDE), np.zeros((5, 8)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_steps": -1}, "expected `num_steps` to be at least 0, got -1"),
        ({"init_steps": -2}, "expected `init_steps` to be at least 0, got -2"),
        ({"block_size": 0}, "expected `block_size` to be at least 1, got 0"),
    ],
)
def test_arguments_out_of_range_are_rejected(arguments: dict[str, int], message: str):
    with pytest.raises(ValueError, match=message):
        spectrax.PowerIteration(**arguments)


def test_negative_steps_of_one_advance_are_rejected():
    estimator = spectrax.PowerIteration(init_steps=0)
    state = estimator.init(operator_of(WIDE), key=KEY)
    with pytest.raises(ValueError, match="`num_steps` to be at least 0, got -1"):
        estimator.advance(operator_of(WIDE), state, num_steps=-1)


# ExactSVD


def test_exact_svd_carries_nothing():
    operator = operator_of(WIDE)
    estimator = spectrax.ExactSVD()
    state = estimator.init(operator, key=KEY)
    assert jtu.tree_leaves(state) == []
    assert jtu.tree_leaves(estimator.advance(operator, state, num_steps=5)) == []


@pytest.mark.parametrize("kind", KINDS)
def test_exact_svd_needs_no_convergence(kind: str):
    weight = make_matrix(kind, (60, 50), 4)
    sigma = run(spectrax.ExactSVD(), jnp.asarray(weight))[1]
    assert abs(float(sigma) - true_norm(weight)) <= 1e-14


def test_exact_svd_of_an_operator_without_a_matrix():
    space = jax.ShapeDtypeStruct((8,), jnp.float64)
    operator = lx.FunctionLinearOperator(lambda x: WIDE @ x, space)
    sigma = jax.jit(lambda: spectrax.ExactSVD().sigma(operator, ()))()
    assert sigma == pytest.approx(true_norm(WIDE), rel=1e-13)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_estimators_are_configuration_without_arrays(
    estimator: spectrax.AbstractEstimator,
):
    assert jtu.tree_leaves(estimator) == []
    assert hash(estimator) == hash(type(estimator)())
