"""The functional `normalize`."""

import equinox as eqx
import hypothesis
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import spectrax

from .helpers import make_matrix, matrices, true_norm


@eqx.filter_jit
def converged(weight: jax.Array) -> spectrax.PowerState:
    # As many pairs as the matrix has, hence exact.
    return spectrax.init_power_state(weight)


@eqx.filter_jit
def one_step(weight: jax.Array) -> spectrax.PowerState:
    state = spectrax.init_power_state(weight, block_size=1, num_steps=0)
    return spectrax.power_iterate(weight, state)


@eqx.filter_jit
def normalize(
    weight: jax.Array, state: spectrax.PowerState, bound: jax.Array
) -> jax.Array:
    return spectrax.normalize(weight, state, bound=bound)


WEIGHT = jnp.asarray(3 * make_matrix("gaussian", (5, 8), 1))
STATE = converged(WEIGHT)
ONE = jnp.array(1.0)


@hypothesis.given(
    matrices(
        [(5, 8)],
        kinds=["gaussian", "rank one", "repeated top", "hilbert", "one entry"],
        exponents=(-20, 0, 20),
    )
)
def test_norm_of_the_result_is_the_bound(drawn: np.ndarray):
    weight = jnp.asarray(drawn)
    for bound in (1.0, 0.3, 7.0):
        result = normalize(weight, converged(weight), jnp.array(bound))
        assert true_norm(result) == pytest.approx(bound, rel=1e-13)
        truth = drawn * (bound / true_norm(drawn))
        np.testing.assert_allclose(result, truth, rtol=1e-12, atol=0)


def test_bound_is_one_by_default():
    result = spectrax.normalize(WEIGHT, STATE)
    np.testing.assert_array_equal(result, spectrax.normalize(WEIGHT, STATE, bound=1.0))
    assert true_norm(result) == pytest.approx(1, rel=1e-13)


def test_smaller_weights_are_scaled_up():
    weight = WEIGHT / 100
    assert true_norm(normalize(weight, STATE, ONE)) == pytest.approx(1, rel=1e-13)


def test_result_exceeds_the_bound_by_the_error_of_sigma():
    state = one_step(WEIGHT)
    sigma = float(spectrax.singular_value(WEIGHT, state))
    result = true_norm(normalize(WEIGHT, state, ONE))
    assert result == pytest.approx(true_norm(WEIGHT) / sigma, rel=1e-13)
    assert result > 1


def test_vectors_that_point_away_do_not_change_the_sign():
    flipped = eqx.tree_at(lambda state: state.u, STATE, -STATE.u)
    result = normalize(WEIGHT, flipped, ONE)
    np.testing.assert_allclose(result, normalize(WEIGHT, STATE, ONE), rtol=1e-13)


def test_kernel_is_normalized_in_its_flattened_view():
    kernel = jr.normal(jr.key(1), (4, 3, 2, 5))
    state = converged(kernel.reshape(4, 30))
    result = spectrax.normalize(
        kernel, state, bound=2.0, view=spectrax.flattened_kernel
    )
    assert result.shape == kernel.shape
    flat = np.asarray(kernel).reshape(4, 30)
    truth = 2 * flat / true_norm(flat)
    np.testing.assert_allclose(result.reshape(4, 30), truth, rtol=1e-12)


def test_zero_weight_gives_zero_with_zero_derivatives():
    zero = jnp.zeros((5, 8))
    np.testing.assert_array_equal(normalize(zero, STATE, ONE), zero)

    def loss(weight: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(spectrax.normalize(weight, STATE)))

    np.testing.assert_array_equal(jax.jit(jax.grad(loss))(zero), zero)
    hessian = jax.jit(jax.hessian(loss))(zero)
    np.testing.assert_array_equal(hessian, np.zeros((5, 8, 5, 8)))


@pytest.mark.parametrize("exponent", [-320, -310, -300, 300])
def test_weights_at_the_end_of_the_range_stay_finite(exponent: int):
    # Down to 1e-308 the numbers are normal; below, there is no reciprocal.
    weight = jnp.asarray(np.asarray(WEIGHT) * 10.0**exponent)
    result = normalize(weight, STATE, ONE)
    assert np.all(np.isfinite(result))
    expected = 1.0 if abs(exponent) == 300 else 0.0
    assert true_norm(result) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "complex64"])
def test_dtype_is_kept_and_rounded_once(dtype: str):
    weight = WEIGHT.astype(dtype)
    state = converged(weight)
    result = normalize(weight, state, jnp.array(1.0, jnp.float32))
    assert result.dtype == weight.dtype
    exact = np.asarray(weight).astype(complex) / true_norm(weight)
    # Half of a unit in the last place of the dtype, and a little of float32.
    eps = float(jnp.finfo(dtype).eps)
    error = np.abs(np.asarray(result).astype(complex) - exact) / np.abs(exact)
    assert np.max(error) <= 0.5 * eps * (1 + 2**-6) + 2**-19 * (eps < 1e-5)


def test_gradient_is_equation_11_of_miyato():
    # (G - <G, W_bar> u v^T) / sigma, at vectors that have not converged.
    state = one_step(WEIGHT)
    cotangent = jr.normal(jr.key(2), WEIGHT.shape)
    bound = 2.0

    def loss(weight: jax.Array) -> jax.Array:
        return jnp.sum(cotangent * spectrax.normalize(weight, state, bound=bound))

    u, v, weight = (np.asarray(x) for x in (state.u[0], state.v[0], WEIGHT))
    sigma = u @ weight @ v
    bar = weight / sigma
    truth = (cotangent - np.sum(cotangent * bar) * np.outer(u, v)) * bound / sigma
    gradient = jax.jit(jax.grad(loss))(WEIGHT)
    np.testing.assert_allclose(gradient, truth, rtol=1e-11, atol=1e-13)
    # It changes nothing to first order to scale the weight.
    assert np.sum(gradient * weight) == pytest.approx(0, abs=1e-12)


def test_forward_derivative_agrees_with_reverse():
    tangent, cotangent = jr.normal(jr.key(3), (2, 5, 8))

    @jax.jit
    def both(weight: jax.Array) -> tuple[jax.Array, jax.Array]:
        function = lambda w: spectrax.normalize(w, STATE)  # noqa: E731
        _, forward = jax.jvp(function, (weight,), (tangent,))
        _, pullback = jax.vjp(function, weight)
        return jnp.sum(cotangent * forward), jnp.sum(tangent * pullback(cotangent)[0])

    forward, reverse = both(WEIGHT)
    assert abs(forward) > 1e-3
    assert forward == pytest.approx(float(reverse), rel=1e-12)


def test_second_derivative_holds_the_vectors_fixed():
    direction = jr.normal(jr.key(4), (5, 8))

    @jax.jit
    def second(weight: jax.Array) -> jax.Array:
        function = lambda w: spectrax.normalize(w, STATE)  # noqa: E731
        rate = lambda w: jax.jvp(function, (w,), (direction,))[1]  # noqa: E731
        return jax.jvp(rate, (weight,), (direction,))[1]

    sigma = true_norm(WEIGHT)
    slope = np.asarray(STATE.u[0]) @ np.asarray(direction) @ np.asarray(STATE.v[0])
    # Of W / s(W), with s linear: 2 W s'^2 / s^3 - 2 D s' / s^2.
    truth = 2 * WEIGHT * slope**2 / sigma**3 - 2 * direction * slope / sigma**2
    np.testing.assert_allclose(second(WEIGHT), truth, rtol=1e-10, atol=1e-12)


def test_vmap_agrees_with_a_loop():
    weights = jnp.stack([WEIGHT, 2 * WEIGHT[::-1], jnp.zeros((5, 8))])

    @eqx.filter_jit
    @eqx.filter_vmap
    def both(weight: jax.Array) -> jax.Array:
        return spectrax.normalize(weight, spectrax.init_power_state(weight))

    results = both(weights)
    for result, weight in zip(results[:2], weights, strict=False):
        truth = np.asarray(weight) / true_norm(weight)
        np.testing.assert_allclose(result, truth, rtol=1e-12)
    np.testing.assert_array_equal(results[2], np.zeros((5, 8)))


def test_derivative_with_respect_to_the_bound():
    rate = jax.jit(jax.jacfwd(lambda b: spectrax.normalize(WEIGHT, STATE, bound=b)))
    truth = np.asarray(WEIGHT) / true_norm(WEIGHT)
    np.testing.assert_allclose(rate(jnp.array(2.0)), truth, rtol=1e-12)


@pytest.mark.parametrize("bound", [0.0, -1.0, float("nan"), float("inf")])
def test_bounds_that_are_not_positive_and_finite_are_rejected(bound: float):
    message = f"expected `bound` to be positive and finite, got {bound}"
    with pytest.raises(ValueError, match=message):
        spectrax.normalize(WEIGHT, STATE, bound=bound)


def test_weights_that_are_no_matrices_need_a_view():
    with pytest.raises(ValueError, match=r"got one of shape \(2, 3, 4, 5\).* `view`"):
        spectrax.normalize(jnp.ones((2, 3, 4, 5)), STATE)


def test_state_of_another_weight_is_rejected():
    with pytest.raises(ValueError, match=r"`state.v` to hold vectors of shape \(9,\)"):
        spectrax.normalize(jnp.ones((5, 9)), STATE)
