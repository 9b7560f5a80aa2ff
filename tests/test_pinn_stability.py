"""The example of physics-informed networks: it runs, solves what it says that it
solves, and its derivatives through the norms are right.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import spectrax

from .scripts import EXAMPLES, load, ordinary_settings


@pytest.fixture
def example() -> ModuleType:
    return load(EXAMPLES / "pinn_stability.py")


@pytest.fixture
def as_a_user() -> Iterator[None]:
    with ordinary_settings():
        yield


@pytest.mark.usefixtures("as_a_user")
def test_smoke(example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "made" / "by the example"
    example.main(["--smoke", "--out", str(out)])
    image = (out / "pinn_stability.png").read_bytes()
    assert image.startswith(b"\x89PNG")
    assert len(image) > 10_000
    printed = capsys.readouterr().out
    for name in ("none", "fixed"):
        assert printed.count(f"\n{name} ") == 2 * len(example.FACTORS)  # two tables
    assert "No solution is steeper" in printed


@pytest.mark.parametrize("steps", ["0", "15"])
def test_steps_are_whole_chunks(
    example: ModuleType, steps: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit, match="2"):
        example.arguments(["--steps", steps])
    assert "multiple of 10" in capsys.readouterr().err


def test_the_solution_solves_the_equation(example: ModuleType):
    inner, edge = example.draw_points(jr.key(0))
    assert float(jnp.abs(inner).max()) < 1
    assert np.allclose(jnp.abs(edge).max(axis=1), 1)
    assert all(jnp.any(edge[:, axis] == end) for axis in (0, 1) for end in (-1, 1))
    assert float(eqx.filter_jit(example.loss)(example.exact, inner, edge)) < 1e-25
    gradients = jax.jit(jax.vmap(jax.grad(example.exact)))(inner)
    slopes = jnp.linalg.norm(gradients, axis=1)
    assert float(slopes.max()) < example.SLOPE
    steepest = jax.grad(example.exact)(jnp.array([0.0, 0.5]))
    assert float(jnp.linalg.norm(steepest)) == pytest.approx(example.SLOPE)


def test_third_derivatives_through_the_norms(example: ModuleType):
    """The gradient of a loss with second derivatives, through layers whose state is
    held fixed, against differences of the loss with decomposed weights. As the state is
    converged, both have the same derivative.
    """
    mlp = eqx.nn.MLP(2, "scalar", 4, depth=1, activation=jnp.sin, key=jr.key(0))
    model, state = eqx.nn.make_with_state(spectrax.wrap)(
        mlp, constraint=spectrax.LearnableBound(1.5)
    )
    state = spectrax.advance(model, state, num_steps=100)
    inner, edge = (points[:6] for points in example.draw_points(jr.key(1)))
    weights, static = eqx.partition(model, eqx.is_inexact_array)

    @jax.jit
    def wrapped_loss(weights):
        network = spectrax.unwrap(eqx.combine(weights, static), state)
        return example.loss(example.solution(network, 3.0), inner, edge)

    @eqx.filter_jit
    def plain_loss(network):
        return example.loss(example.solution(network, 3.0), inner, edge)

    def truth(weights):
        network = eqx.combine(weights, static).raw
        for i, bound in enumerate(weights.constraints):
            weight = np.asarray(network.layers[i].weight)
            weight = weight * math.exp(bound.raw) / np.linalg.norm(weight, 2)
            place = jnp.asarray(weight)
            network = eqx.tree_at(lambda net, i=i: net.layers[i].weight, network, place)
        return float(plain_loss(network))

    assert float(wrapped_loss(weights)) == pytest.approx(truth(weights), rel=1e-9)
    gradient = jax.grad(wrapped_loss)(weights)
    leaves, structure = jax.tree.flatten(weights)
    keys = jax.tree.unflatten(structure, list(jr.split(jr.key(2), len(leaves))))
    direction = jax.tree.map(lambda x, key: jr.normal(key, x.shape), weights, keys)
    found = sum(
        float(jnp.vdot(a, b))
        for a, b in zip(
            jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True
        )
    )
    step = 1e-5

    def moved(length):
        return jax.tree.map(lambda x, d: x + length * d, weights, direction)

    expected = (truth(moved(step)) - truth(moved(-step))) / (2 * step)
    assert abs(expected) > 0.1
    assert found == pytest.approx(expected, rel=1e-6)


def result(example: ModuleType, slope: float, limit: float):
    shape = len(example.FACTORS), 1, 1
    factors = np.array(example.FACTORS).reshape(shape)
    nothing = np.zeros((*shape, 1))
    return example.Result(
        nothing, nothing, np.zeros(shape), slope * factors, limit * factors
    )


def test_the_promise_can_be_broken(example: ModuleType):
    example.verify({"fixed": result(example, 0.9, 1.0)})
    with pytest.raises(SystemExit, match="fixed: slope 1.100000 exceeds 1.000000"):
        example.verify({"fixed": result(example, 1.1, 1.0)})
    with pytest.raises(SystemExit, match="slope nan exceeds"):
        example.verify({"fixed": result(example, math.nan, 1.0)})
    with pytest.raises(SystemExit, match="a proven bound is 1.100000 times"):
        example.verify({"fixed": result(example, 0.9, 1.1)})


def test_a_network_that_is_not_finite_has_no_bound(example: ModuleType):
    mlp = eqx.nn.MLP(2, "scalar", 4, depth=1, key=jr.key(0))
    assert 0 < example.proven_slope(mlp, 1.0) < math.inf
    broken = jax.tree.map(lambda x: x * jnp.nan if eqx.is_array(x) else x, mlp)
    assert example.proven_slope(broken, 1.0) == math.inf
