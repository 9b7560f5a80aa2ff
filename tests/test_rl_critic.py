"""The example of Q-learning: it learns from what it should, and normalizes as told."""

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

from .scripts import example_script


@pytest.fixture(scope="module")
def example() -> Iterator[ModuleType]:
    """The example as a module, under the settings of a user who has set none."""
    with example_script("rl_critic") as module:
        yield module


def test_smoke(example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "made" / "by the example"
    example.main(["--smoke", "--out", str(out), "--steps", "600"])
    image = (out / "rl_critic.png").read_bytes()
    assert image.startswith(b"\x89PNG")
    assert len(image) > 10_000
    rows = [line for line in capsys.readouterr().out.splitlines() if line[:4] == "0.01"]
    assert [line.split()[1] for line in rows] == list(example.VARIANTS)
    none, penultimate, everything = (
        [float(norm) for norm in line.replace(",", "").split()[-3:]] for line in rows
    )
    assert everything == pytest.approx([1, 1, 1], abs=0.05)
    assert penultimate[1] == pytest.approx(1, abs=0.05)
    free = [*none, penultimate[0], penultimate[2]]
    assert all(abs(norm - 1) > 0.2 for norm in free), free


def test_needs_two_seeds(example: ModuleType, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="2"):
        example.arguments(["--seeds", "1"])
    assert "two seeds or more" in capsys.readouterr().err


def transitions(example: ModuleType, *shape: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    return example.Transition(
        rng.normal(size=(*shape, 4)).astype(np.float32),
        rng.integers(2, size=shape),
        rng.normal(size=shape).astype(np.float32),
        rng.normal(size=(*shape, 4)).astype(np.float32),
        rng.random(shape) < 0.5,
        rng.random(shape) < 0.7,
    )


def q_values(network: eqx.nn.MLP, agent: int, x: np.ndarray) -> list[np.ndarray]:
    """The outputs of the layers of one agent, in numpy."""
    outputs = [x]
    for i, layer in enumerate(network.layers):
        inputs = outputs[-1] if i == 0 else np.maximum(outputs[-1], 0)
        weight, bias = np.asarray(layer.weight[agent]), np.asarray(layer.bias[agent])
        outputs.append(inputs @ weight.T + bias)
    return outputs


def test_update_is_q_learning(example: ModuleType):
    """Against the derivative of the loss in the last bias, in numpy."""
    optimizer = optax.sgd(1.0)
    keys = jr.split(jr.key(0), 2)
    agents = example.first_agents(None, optimizer, keys=keys)
    other = example.first_agents(None, optimizer, keys=jr.split(jr.key(1), 2))
    agents = agents._replace(target=other.target)
    batch = transitions(example, 2, 16)
    updated, value = example.make_update(optimizer)(agents, batch)
    for agent in range(2):
        mine = example.Transition(*(field[agent] for field in batch))
        *_, hidden, values = q_values(agents.network, agent, mine.observation)
        future = q_values(agents.target, agent, mine.next_observation)[-1].max(axis=1)
        goal = mine.reward + np.where(mine.terminated, 0, 0.99 * future)
        taken = values[np.arange(16), mine.action]
        slope = np.where(mine.valid, np.clip(taken - goal, -1, 1), 0) / 16
        one_hot = np.eye(2)[mine.action]
        last, new = agents.network.layers[-1], updated.network.layers[-1]
        moved = np.asarray(last.bias[agent] - new.bias[agent])
        np.testing.assert_allclose(moved, slope @ one_hot, atol=1e-5)
        moved = np.asarray(last.weight[agent] - new.weight[agent])
        expected = (slope[:, None] * one_hot).T @ np.maximum(hidden, 0)
        np.testing.assert_allclose(moved, expected, atol=1e-5)
        assert float(value[agent]) == pytest.approx(taken.mean(), abs=1e-5)


def test_synchronize_copies_the_constrained_weights(example: ModuleType):
    optimizer = optax.sgd(1.0)
    agents = example.first_agents(
        example.VARIANTS["penultimate"], optimizer, keys=jr.split(jr.key(0), 2)
    )
    raw = agents.network.raw.layers[1].weight
    larger = eqx.tree_at(
        lambda agents: agents.network.module.layers[1].weight.weight, agents, 3 * raw
    )
    target = example.synchronize(larger).target
    # The vectors in the state are those of the weight before, whatever its scale.
    expected = np.linalg.norm(np.asarray(target.layers[1].weight), 2, axis=(1, 2))
    np.testing.assert_allclose(expected, 1, rtol=1e-2)
    assert jnp.array_equal(target.layers[2].weight, raw_weight(larger, 2))


def raw_weight(agents, layer: int):
    return agents.network.raw.layers[layer].weight


def test_memory_keeps_the_last(example: ModuleType, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(example, "CAPACITY", 3)
    memory = example.Memory(2)
    rng = np.random.default_rng(0)
    for time in range(5):
        batch = transitions(example, 2, seed=time)
        agents = np.arange(2)
        memory.add(*batch._replace(action=10 * time + agents, reward=1.0 * agents))
        drawn = memory.sample(rng)
        assert drawn.observation.shape == (2, example.BATCH_SIZE, 4)
        times = range(max(0, time - 2), time + 1)
        for agent in agents:  # each its own, and all that it remembers
            assert set(drawn.action[agent].tolist()) == {10 * t + agent for t in times}
            assert set(drawn.reward[agent].tolist()) == {agent}


def test_exploration_ends(example: ModuleType):
    assert example.epsilon(0) == 1
    assert example.epsilon(0.1) == pytest.approx(0.51)
    assert example.epsilon(0.2) == pytest.approx(0.02)
    assert example.epsilon(1) == 0.02
