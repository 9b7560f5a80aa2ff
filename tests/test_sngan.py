"""The GAN's example: it runs, and what it measures is what it says."""

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
import scipy.linalg

import spectrax

from .scripts import example_script


@pytest.fixture(scope="module")
def example() -> Iterator[ModuleType]:
    """The example as a module, under the settings of a user who has set none."""
    with example_script("sngan") as module:
        yield module


def dense_norm(layer: eqx.nn.Conv2d | eqx.nn.Linear, *shape: int) -> float:
    """Of the layer's Jacobian at this input size, in float64."""
    jacobian = jax.jacobian(layer)(jnp.zeros(shape))
    matrix = np.asarray(jacobian, np.float64).reshape(-1, math.prod(shape))
    return float(np.linalg.norm(matrix, 2))


def test_smoke(example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "made" / "by the example"
    example.main(["--smoke", "--out", str(out)])
    for name in ("sngan.png", "sngan_samples.png"):
        image = (out / name).read_bytes()
        assert image.startswith(b"\x89PNG")
        assert len(image) > 10_000
    lines = capsys.readouterr().out.splitlines()
    known = {line.split()[0]: float(line.split()[2]) for line in lines[4:7]}
    assert known["held-out"] < known["shuffled"] < known["uniform"]
    bounds = [float(line.split()[-2]) for line in lines if ", seed 0" in line]
    free, constrained = bounds
    assert constrained == pytest.approx(example.BOUND**3, rel=0.1)
    assert free != pytest.approx(example.BOUND**3, rel=0.1)


def test_one_step_for_real_and_fake(example: ModuleType):
    """The state after an update is that of a single `advance` before it."""
    args = example.arguments(["--smoke"])
    players = example.first_players(args, 0, constrained=True)
    leaves, treedef = jax.tree.flatten(players.state)
    expected = spectrax.advance(players.critic, jax.tree.unflatten(treedef, leaves))
    real = jr.normal(jr.key(0), (example.BATCH_SIZE, *example.IMAGE))
    noise = jr.normal(jr.key(1), (example.BATCH_SIZE, example.LATENT_SIZE))
    rates = example.Rates(jnp.asarray(2e-4), jnp.asarray(3e-2))
    after, loss = example.train_step(players, rates, real, noise)
    for found, wanted in zip(
        jax.tree.leaves(after.state), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert 0 < loss < 4
    # The same loss in numpy, from the outputs of the critic as it was.
    critic = spectrax.unwrap(players.critic, expected)
    fake = jax.vmap(players.generator)(noise)
    on_real, on_fake = (np.asarray(jax.vmap(critic)(x)) for x in (real, fake))
    hinge = np.maximum(1 - on_real, 0).mean() + np.maximum(1 + on_fake, 0).mean()
    assert float(loss) == pytest.approx(hinge, rel=1e-4)


def test_lipschitz_bound(example: ModuleType):
    critic = example.Critic(channels=4, key=jr.key(0))
    first, second, last = critic.layers
    norms = [
        dense_norm(first, 1, 8, 8),
        dense_norm(second, 4, 8, 8),
        dense_norm(last, 128),
    ]
    bound = example.lipschitz_bound(critic)
    assert math.prod(norms) <= bound <= 1.2 * math.prod(norms)


def test_frechet_distance(example: ModuleType):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(50, 5)), rng.normal(size=(40, 5)) @ rng.normal(size=(5, 5))
    a, b = np.cov(x.T), np.cov(y.T)
    mean = np.sum((x.mean(0) - y.mean(0)) ** 2)
    expected = mean + np.trace(a + b - 2 * scipy.linalg.sqrtm(a @ b).real)
    assert example.frechet_distance(x, y) == pytest.approx(expected)
    assert example.frechet_distance(x, x + 2) == pytest.approx(5 * 2**2)


def test_judge(example: ModuleType):
    data = example.load_data(0)
    judge = example.Judge(data, 0)
    assert judge.accuracy > 0.95
    real = judge(data.test)
    assert real.nearest == pytest.approx(1)
    assert real.classes > 9.9
    assert real.confidence > 0.9
    copies = judge(data.train)
    assert copies.nearest == 0
    assert copies.distance == pytest.approx(0, abs=1e-6)
    ones = judge(data.test[data.test_labels == 1])
    assert ones.classes < 2
    assert ones.distance > 10 * real.distance
    broken = judge(np.where(data.test == -1, np.nan, data.test))
    assert broken.distance == math.inf


def test_shuffled_keeps_each_pixel(example: ModuleType):
    images = np.arange(20.0).reshape(5, 1, 2, 2)
    mixed = example.shuffled(images, 5, 0)
    np.testing.assert_array_equal(np.sort(mixed, axis=0), images)
    assert not np.array_equal(mixed, images)
    together = mixed.reshape(5, 4) // 4  # from which image each pixel is
    assert any(len(set(row)) > 1 for row in together)


def run(example: ModuleType, *qualities: tuple[float, float], loss: float = 1.0):
    steps = np.arange(len(qualities))
    measured = [example.Quality(*quality, 1.0, 1.0) for quality in qualities]
    ones = np.ones(len(steps))
    return example.Run(steps, loss * ones, ones, measured, np.zeros((4, 1, 8, 8)))


def test_failure(example: ModuleType):
    assert not example.failed(run(example, (9.9, 5.1)), 10)
    assert example.failed(run(example, (10.1, 9.0)), 10)
    assert example.failed(run(example, (9.9, 4.9)), 10)
    assert example.failed(run(example, (9.9, 5.1), loss=math.nan), 10)
    # Only the last quarter counts.
    assert not example.failed(run(example, *[(50.0, 1.0)] * 3, (1.0, 9.0)), 10)
    assert example.failed(run(example, *[(1.0, 9.0)] * 3, (50.0, 1.0)), 10)


def test_grid(example: ModuleType):
    images = np.arange(64.0)[:, None, None, None] * np.ones((64, 1, 8, 8))
    tiles = example.grid(images)
    assert tiles.shape == (72, 72)
    assert tiles[0, 10] == 1  # second in the first row
    assert tiles[9, 0] == 8  # first in the second row
    assert tiles[8, 0] == -1
