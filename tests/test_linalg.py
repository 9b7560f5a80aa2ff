"""Small decompositions under `vmap`."""

import re
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import spectrax
from spectrax._linalg import cholesky, eigh, inverse_cholesky, solve, svd


OPTIMIZED = True  # see conftest.py


def _matrices(getkey: Any, dtype: Any) -> jax.Array:
    factors = np.asarray(jr.normal(getkey(), (2, 3, 5, 5), dtype))
    return jnp.asarray(factors @ factors.mT.conj() + 0.1 * np.eye(5))


@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
def test_stacks(dtype, getkey):
    matrices = _matrices(getkey, dtype)
    twice = lambda function: jax.vmap(jax.vmap(function))(matrices)  # noqa: E731
    factors = np.linalg.cholesky(matrices)
    np.testing.assert_allclose(twice(cholesky), factors, atol=1e-12)
    inverses = np.linalg.inv(factors)
    np.testing.assert_allclose(twice(inverse_cholesky), inverses, atol=1e-11)
    values, vectors = twice(eigh)
    values, vectors = np.asarray(values), np.asarray(vectors)
    rebuilt = (vectors * values[..., None, :]) @ vectors.mT.conj()
    np.testing.assert_allclose(rebuilt, matrices, atol=1e-11)
    assert np.all(np.diff(values, axis=-1) >= 0)
    wide = np.asarray(matrices)[..., :3, :]
    u, sigma, vh = map(np.asarray, jax.vmap(jax.vmap(svd))(jnp.asarray(wide)))
    np.testing.assert_allclose((u * sigma[..., None, :]) @ vh, wide, atol=1e-11)
    np.testing.assert_allclose(sigma, np.linalg.svd(wide)[1], atol=1e-11)


def test_no_batched_calls_that_could_wait_for_each_other(getkey):
    """On the CPU two batched LAPACK calls at a time can wait for each other's threads
    for ever: those of two convolutions, or of two stacks of layers.
    """
    if jax.default_backend() != "cpu":
        pytest.skip("batched calls are right for other devices")
    conv = eqx.nn.Conv1d(4, 4, 3, key=getkey())
    stack = eqx.filter_vmap(lambda key: eqx.nn.Linear(4, 4, key=key))(
        jr.split(getkey(), 3)
    )
    model, state = eqx.nn.make_with_state(spectrax.wrap)((conv, stack))
    step = eqx.filter_jit(lambda model, state: spectrax.advance(model, state))
    text = step.lower(model, state).compile().compiled.as_text()
    calls = [line for line in text.splitlines() if "lapack" in line]
    assert calls
    for line in calls:
        shapes = re.findall(r"\b[fc]\d+\[([\d,]*)\]", line.split("custom-call(")[0])
        for shape in shapes:
            sizes = [int(size) for size in shape.split(",")]
            assert len(sizes) <= 2 or set(sizes[:-2]) == {1}, line


@pytest.mark.parametrize("function", [cholesky, inverse_cholesky, eigh, svd])
def test_derivatives_raise(function, getkey):
    (matrix, *_), *_ = _matrices(getkey, np.float64)
    total = lambda m: sum(x.sum() for x in jax.tree.leaves(function(m)))  # noqa: E731
    message = f"expected no derivative of `spectrax._linalg.{function.__name__}`"
    forward = lambda m: jax.jvp(total, (m,), (m,))  # noqa: E731
    stack = lambda m: jax.vmap(total)(m[None]).sum()  # noqa: E731
    for attempt in (
        jax.grad(total),
        forward,
        jax.grad(jax.jit(total)),
        jax.grad(stack),
    ):
        with pytest.raises(TypeError, match=message):
            attempt(matrix)
    with pytest.raises(TypeError, match=message):
        jax.vmap(jax.grad(total))(matrix[None])
    # What is held fixed may be decomposed.
    fixed = lambda m: total(jax.lax.stop_gradient(m)) + m.sum()  # noqa: E731
    np.testing.assert_array_equal(jax.grad(fixed)(matrix), jnp.ones_like(matrix))
    stack = lambda m: jax.vmap(fixed)(m[None]).sum()  # noqa: E731
    np.testing.assert_array_equal(jax.grad(jax.jit(stack))(matrix), jnp.ones((5, 5)))


def test_a_step_has_no_derivative_in_its_vectors(getkey):
    matrix = jr.normal(getkey(), (4, 3))
    state = spectrax.init_power_state(matrix, num_steps=0)

    def value(state: spectrax.PowerState) -> jax.Array:
        return spectrax.singular_value(matrix, spectrax.power_iterate(matrix, state))

    for leaf in jax.tree.leaves(jax.grad(value)(state)):
        assert jnp.all(leaf == 0)


@pytest.mark.parametrize("to_array", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_solve(to_array, getkey):
    matrices = to_array(_matrices(getkey, np.float64)[..., :3, :3])
    right = to_array(jr.normal(getkey(), (2, 3, 3)))
    solution, pivots = solve(matrices, right)
    expected = np.linalg.solve(matrices, np.asarray(right)[..., None])[..., 0]
    np.testing.assert_allclose(solution, expected, rtol=1e-10)
    np.testing.assert_allclose(
        np.prod(pivots, axis=-1), np.linalg.det(matrices), rtol=1e-10
    )
    assert isinstance(solution, type(matrices))


def test_pivots_tell_whether_a_matrix_is_positive_definite():
    random = np.random.default_rng(0)
    matrices = random.standard_normal((400, 3, 3))
    matrices = (
        matrices + matrices.mT + random.uniform(0, 6, 400)[:, None, None] * np.eye(3)
    )
    _, pivots = solve(matrices, np.zeros((400, 3)))
    definite = np.linalg.eigvalsh(matrices)[:, 0] > 0
    assert 50 < definite.sum() < 350
    np.testing.assert_array_equal(np.all(pivots > 0, axis=1), definite)


def test_solve_leaves_an_axis_without_curvature():
    matrix, right = jnp.diag(jnp.array([2.0, 0.0, 4.0])), jnp.array([2.0, 0.0, 2.0])
    np.testing.assert_array_equal(solve(matrix, right)[0], [1.0, 0.0, 0.5])
