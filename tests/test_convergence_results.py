"""What says whether a norm converged, and bounds with a probability of failure."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
import pytest
import scipy.special

import spectrax

from .helpers import make_matrix, true_norm, unchecked


@eqx.filter_jit
def solve(operator: Any, **options: Any) -> spectrax.NormSolution:
    return spectrax.spectral_norm(operator, with_result=True, **options)


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_a_converged_norm_says_so(scale: float):
    matrix = jnp.asarray(scale * make_matrix("gaussian", (60, 50), 2))
    found = solve(matrix)
    norm = spectrax.spectral_norm(matrix)
    np.testing.assert_allclose(found.value, norm, rtol=1e-14)
    assert found.result == lx.RESULTS.successful
    # Some singular value is within the residual of the one that was found.
    values = np.linalg.svd(np.asarray(matrix), compute_uv=False)
    nearest = np.min(np.abs(values - float(found.value)))
    assert nearest <= (found.residual + 1e-14) * found.value
    assert found.residual <= 1e-11


def test_a_norm_that_has_not_converged_says_so():
    matrix = jnp.asarray(make_matrix("clustered top", (200, 200), 2))
    found = solve(matrix, max_steps=32)
    assert found.result == lx.RESULTS.max_steps_reached
    u_residual = found.residual
    assert 1e-9 < u_residual < 1
    assert found.value <= true_norm(matrix) * (1 + 1e-14)


def test_zero_and_numbers_that_are_not_finite():
    zero = solve(jnp.zeros((5, 8)))
    assert (zero.value, zero.residual) == (0, 0)
    assert zero.result == lx.RESULTS.successful
    broken = solve(jnp.zeros((5, 8)).at[0, 0].set(jnp.inf))
    assert jnp.isnan(broken.value)
    assert broken.result == lx.RESULTS.nonfinite_input


def test_the_result_of_a_convolution_at_every_size(getkey):
    conv = eqx.nn.Conv1d(2, 2, 3, key=getkey())
    operator = spectrax.layer_operator(conv)
    found = solve(operator)
    assert found.result == lx.RESULTS.successful
    np.testing.assert_allclose(found.value, spectrax.spectral_norm(operator))


def test_the_value_keeps_its_derivative():
    matrix = jnp.asarray(make_matrix("gaussian", (12, 20), 2))
    gradient = jax.grad(lambda m: spectrax.spectral_norm(m, with_result=True).value)
    np.testing.assert_allclose(
        gradient(matrix), jax.grad(spectrax.spectral_norm)(matrix)
    )


@pytest.mark.parametrize("method", ["lanczos", "power"])
def test_probable_bounds_hold_and_close_in(method: Any):
    matrix = jnp.asarray(make_matrix("repeated top", (40, 30), 1))
    keys = jr.split(jr.key(0), 200)
    truth = true_norm(matrix)
    excesses = []
    for num_steps in (20, 100):
        bounds = jax.vmap(
            lambda key, num_steps=num_steps: spectrax.probable_upper_bound(
                matrix, num_steps=num_steps, method=method, key=key
            )
        )(keys)
        assert jnp.all(bounds >= truth)
        excesses.append(float(jnp.max(bounds)) / truth - 1)
    assert excesses[1] < min(excesses[0] / 3, 0.1)


def test_the_failure_probability_is_an_upper_bound_on_failures():
    # One large singular value: a start close to orthogonal to it misses it.
    matrix = jnp.diag(jnp.concatenate([jnp.array([1.0]), jnp.full(199, 0.9)]))
    keys = jr.split(jr.key(0), 2000)
    for probability in (0.5, 0.9):
        bounds = jax.vmap(
            lambda key, p=probability: spectrax.probable_upper_bound(
                matrix, num_steps=3, failure_probability=p, method="power", key=key
            )
        )(keys)
        assert jnp.mean(bounds < 1) <= probability


@pytest.mark.parametrize("steps", [4, 30])
def test_the_theorem_on_the_power_method(steps: int):
    """For `diag(1, 1 - e, ...)` the exact probability is that of a beta variable."""
    n, error = 50, 0.3
    start = scipy.special.betainc  # x1^2 of a uniform start is beta(1/2, (n - 1)/2)
    # The quotient is below 1 - e/2 if x1^2 is below this share of the rest.
    decay = (1 - error) ** (2 * steps - 2)
    share = decay / (1 + decay)
    truth = start(0.5, (n - 1) / 2, share)
    gap = error / 2
    factor = min(0.824, 0.354 / np.sqrt(gap * (steps - 1)))
    assert truth <= factor * np.sqrt(n) * (1 - gap) ** (steps - 0.5)


def test_probable_bounds_of_any_operator(getkey):
    structure = jax.ShapeDtypeStruct((30,), jnp.float64)
    operator = lx.FunctionLinearOperator(jnp.cumsum, structure)
    truth = true_norm(np.tril(np.ones((30, 30))))
    bound = spectrax.probable_upper_bound(operator, key=getkey())
    assert truth <= bound <= 1.02 * truth
    matrix = jr.normal(getkey(), (6, 9), jnp.complex128)
    bound = spectrax.probable_upper_bound(matrix, key=getkey())
    assert true_norm(matrix) <= bound <= 1.02 * true_norm(matrix)
    assert spectrax.probable_upper_bound(jnp.zeros((5, 8)), key=getkey()) == 0
    few = spectrax.probable_upper_bound(matrix, num_steps=3, key=getkey())
    assert few == jnp.inf


def test_refused_arguments(getkey):
    matrix, key = jnp.eye(3), getkey()
    bound = spectrax.probable_upper_bound
    with pytest.raises(ValueError, match="expected `num_steps` to be at least 2"):
        bound(matrix, num_steps=1, key=key)
    for probability in (0.0, 1.0, float("nan")):
        with pytest.raises(ValueError, match="`failure_probability` to be between"):
            bound(matrix, failure_probability=probability, key=key)
    method: Any = "qr"
    with unchecked(), pytest.raises(ValueError, match="\"power\", got 'qr'"):
        bound(matrix, method=method, key=key)
    lattice = spectrax.layer_operator(eqx.nn.Conv1d(1, 1, 2, key=key))
    with pytest.raises(TypeError, match="between spaces of finite size"):
        bound(lattice, key=key)
