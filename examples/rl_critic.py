"""Deep Q-learning with spectral normalization of one chosen layer, of all, or of none.

Learns to balance a pole (Gymnasium's CartPole-v1) with a small Q-network, at an
ordinary and at a high learning rate. Gogianu et al. (2021) found that to normalize one
layer, the one before the output, helps where to normalize all of them harms. Prints the
returns and the values that the network believes in, and draws the returns.

    python examples/rl_critic.py [--out DIR] [--seed N] [--seeds N] [--steps N]
        [--smoke]
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree
from matplotlib.figure import Figure
from tqdm import tqdm

import spectrax


ENVIRONMENT = "CartPole-v1"  # a reward of 1 for each step; over after 500
OBSERVATION_SIZE, NUM_ACTIONS, LONGEST = 4, 2, 500

# What is normalized: nothing, or what `where` chooses in the network.
VARIANTS: dict[str, Callable[[eqx.nn.MLP], Any] | None] = {
    "none": None,
    "penultimate": lambda network: network.layers[-2],
    "all": lambda network: network.layers,
}
LEARNING_RATES = (1e-3, 1e-2)

WIDTH = 64
DISCOUNT = 0.99
# Rewards are scaled so that a discounted return is at most 1, and observations by the
# position and the angle at which the pole has fallen, and by usual speeds.
REWARD_SCALE = 1 - DISCOUNT
OBSERVATION_SCALE = np.asarray([2.4, 3.0, 0.21, 3.0], np.float32)
BATCH_SIZE = 64
CAPACITY = 10_000  # transitions that are remembered
SYNC_EVERY = 100  # steps, until the target is renewed
START = 500  # steps before the first update
EPSILON = 1.0, 0.02, 0.2  # from, to, in this part of all steps


class Transition(NamedTuple):
    """What an agent remembers of a step."""

    observation: Float[Array, "*batch 4"]
    action: Int[Array, "*batch"]
    reward: Float[Array, "*batch"]
    next_observation: Float[Array, "*batch 4"]
    terminated: Bool[Array, "*batch"]
    # The environment starts a new episode in a step of its own, which is no transition.
    valid: Bool[Array, "*batch"]


# --- The agents: one for each seed, side by side along the first axis of all arrays ---


class Agent(NamedTuple):
    """A network with nothing normalized has no state. The target is a plain network."""

    network: PyTree
    state: eqx.nn.State | None
    target: eqx.nn.MLP
    opt_state: optax.OptState


def first_agents(
    where: Callable[[eqx.nn.MLP], Any] | None,
    optimizer: optax.GradientTransformation,
    *,
    keys: Array,
) -> Agent:
    """For each key the same network, whatever is normalized."""

    @eqx.filter_vmap
    def make(key: Array) -> Agent:
        network = eqx.nn.MLP(OBSERVATION_SIZE, NUM_ACTIONS, WIDTH, depth=2, key=key)
        state = None
        if where is not None:
            # One vector, one step for each update, as in the paper.
            estimator = spectrax.PowerIteration(block_size=1)
            network, state = spectrax.constrain(
                network, where=where, estimator=estimator
            )
        opt_state = optimizer.init(eqx.filter(network, eqx.is_inexact_array))
        return Agent(network, state, spectrax.unwrap(network, state), opt_state)

    return make(keys)


@eqx.filter_jit
@eqx.filter_vmap
def best_action(agent: Agent, observation: Float[Array, " 4"]) -> Int[Array, ""]:
    network = spectrax.unwrap(agent.network, agent.state, lazy=True)
    return jnp.argmax(network(observation))


def make_update(
    optimizer: optax.GradientTransformation,
) -> Callable[[Agent, Transition], tuple[Agent, Array]]:
    @eqx.filter_jit
    @eqx.filter_vmap
    def update(agent: Agent, batch: Transition) -> tuple[Agent, Float[Array, ""]]:
        """One step of Q-learning. Also the mean value of the actions taken."""
        network, state, target, opt_state = agent
        state = spectrax.advance(network, state)
        future = jax.vmap(target)(batch.next_observation).max(axis=-1)
        goal = batch.reward + DISCOUNT * jnp.where(batch.terminated, 0, future)

        @eqx.filter_value_and_grad(has_aux=True)
        def loss(network: PyTree) -> tuple[Array, Array]:
            plain = spectrax.unwrap(network, state, lazy=True)
            values = jax.vmap(plain)(batch.observation)
            taken = jnp.take_along_axis(values, batch.action[:, None], axis=-1)[:, 0]
            errors = jnp.where(batch.valid, optax.huber_loss(taken, goal), 0)
            return errors.mean(), taken.mean()

        (_, value), gradient = loss(network)
        updates, opt_state = optimizer.update(gradient, opt_state)
        network = eqx.apply_updates(network, updates)
        return Agent(network, state, target, opt_state), value

    return update


@eqx.filter_jit
@eqx.filter_vmap
def synchronize(agent: Agent) -> Agent:
    return agent._replace(target=spectrax.unwrap(agent.network, agent.state))


# --- Memory and training -----------------------------------------------------------


class Memory:
    """The last transitions of every agent, with time as the first axis."""

    def __init__(self, num_agents: int):
        def zeros(*shape: int, dtype: Any = np.float32) -> np.ndarray:
            return np.zeros((CAPACITY, num_agents, *shape), dtype)

        self.fields = [  # those of `Transition`
            zeros(OBSERVATION_SIZE),
            zeros(dtype=np.int32),
            zeros(),
            zeros(OBSERVATION_SIZE),
            zeros(dtype=bool),
            zeros(dtype=bool),
        ]
        self.agents = np.arange(num_agents)[:, None]
        self.count = 0

    def add(self, *transition: np.ndarray) -> None:
        for field, value in zip(self.fields, transition, strict=True):
            field[self.count % CAPACITY] = value
        self.count += 1

    def sample(self, rng: np.random.Generator) -> Transition:
        """A batch for each agent, of shape `[agents, batch, ...]`."""
        size = min(self.count, CAPACITY)
        times = rng.integers(size, size=(len(self.agents), BATCH_SIZE))
        drawn = (jnp.asarray(field[times, self.agents]) for field in self.fields)
        return Transition(*drawn)


class Run(NamedTuple):
    """One variant at one learning rate: rows are times, columns are seeds."""

    steps: np.ndarray
    returns: np.ndarray  # mean of the last ten episodes
    values: np.ndarray  # mean value of the actions in the last batch
    norms: np.ndarray  # of each layer at the end, layers as rows


def train(
    args: argparse.Namespace,
    where: Callable[[eqx.nn.MLP], Any] | None,
    learning_rate: float,
    *,
    title: str,
) -> Run:
    optimizer = optax.adam(learning_rate)
    update = make_update(optimizer)
    keys = jr.split(jr.key(args.seed), args.seeds)
    agents = first_agents(where, optimizer, keys=keys)
    environment = gymnasium.make_vec(
        ENVIRONMENT, args.seeds, vectorization_mode="vector_entry_point"
    )
    observation = environment.reset(seed=args.seed)[0] / OBSERVATION_SCALE
    rng = np.random.default_rng(args.seed)
    memory = Memory(args.seeds)
    over = np.zeros(args.seeds, bool)
    total = np.zeros(args.seeds)
    finished: list[list[float]] = [[] for _ in range(args.seeds)]
    value = np.zeros(args.seeds)
    steps, returns, values = [], [], []
    for step in tqdm(range(args.steps), desc=title, unit="step", disable=None):
        explore = rng.random(args.seeds) < epsilon(step / args.steps)
        random = rng.integers(NUM_ACTIONS, size=args.seeds)
        action = np.where(explore, random, best_action(agents, observation))
        after, reward, terminated, truncated, _ = environment.step(action)
        after = after / OBSERVATION_SCALE
        scaled = REWARD_SCALE * reward
        memory.add(observation, action, scaled, after, terminated, ~over)
        observation = after
        total += reward
        over = terminated | truncated
        for agent in np.flatnonzero(over):
            finished[agent].append(total[agent])
            total[agent] = 0
        if step >= START:
            agents, value = update(agents, memory.sample(rng))
        if step % SYNC_EVERY == 0:
            agents = synchronize(agents)
        if (step + 1) % (args.steps // args.evaluations) == 0:
            steps.append(step + 1)
            recent = zip(finished, total, strict=True)
            returns.append([np.mean(ends[-10:] or now) for ends, now in recent])
            values.append(np.asarray(value))
    environment.close()
    seen = [np.asarray(rows) for rows in (steps, returns, values)]
    return Run(seen[0], seen[1], seen[2], layer_norms(agents))


def epsilon(progress: float) -> float:
    first, last, duration = EPSILON
    return max(last, first + (last - first) * progress / duration)


def layer_norms(agents: Agent) -> np.ndarray:
    """The true norms of the weights that act, in float64: layers as rows."""
    networks = eqx.filter_vmap(spectrax.unwrap)(agents.network, agents.state)
    weights = [np.asarray(layer.weight, np.float64) for layer in networks.layers]
    return np.stack([np.linalg.norm(weight, 2, axis=(1, 2)) for weight in weights])


# --- What is shown -----------------------------------------------------------------


def last_quarter(rows: np.ndarray) -> np.ndarray:
    """The mean of each seed over the last quarter of the evaluations."""
    return rows[-max(1, len(rows) // 4) :].mean(axis=0)


def spread(values: np.ndarray, digits: int = 0) -> str:
    """Mean and standard deviation over the seeds."""
    return f"{values.mean():.{digits}f} ± {values.std(ddof=1):.{digits}f}"


def table(runs: dict[tuple[float, str], Run]) -> str:
    lines = [
        f"{'rate':<7}{'normalized':<13}{'whole run':>11}{'at the end':>12}"
        f"{'worst seed':>12}{'value':>13}  norms of the layers"
    ]
    for (rate, name), run in runs.items():
        end = last_quarter(run.returns)
        norms = ", ".join(f"{norm:.2f}" for norm in run.norms.mean(axis=1))
        lines.append(
            f"{rate:<7g}{name:<13}{spread(run.returns.mean(axis=0)):>11}"
            f"{spread(end):>12}{end.min():>12.0f}"
            f"{spread(last_quarter(run.values), 2):>13}  {norms}"
        )
    return "\n".join(lines)


def draw(runs: dict[tuple[float, str], Run], path: Path) -> None:
    """Returns and values over the steps: the mean over seeds and its standard error."""
    rates = sorted({rate for rate, _ in runs})
    figure = Figure(figsize=(4.5 * len(rates) + 1, 6), layout="constrained")
    axes = figure.subplots(2, len(rates), sharex=True, sharey="row", squeeze=False)
    for (rate, name), run in runs.items():
        column = axes[:, rates.index(rate)]
        color = f"C{list(VARIANTS).index(name)}"
        for ax, rows in zip(column, (run.returns, run.values), strict=True):
            mean = rows.mean(axis=1)
            error = rows.std(axis=1, ddof=1) / np.sqrt(rows.shape[1])
            ax.plot(run.steps, mean, color=color, label=name)
            ax.fill_between(
                run.steps, mean - error, mean + error, color=color, alpha=0.2
            )
            ax.grid(alpha=0.3)
        column[0].set_title(f"learning rate {rate:g}")
        column[1].set_xlabel("steps of the environment")
    for ax in axes[0]:
        ax.axhline(LONGEST, color="black", ls="--", lw=1)
    for ax in axes[1]:
        ax.axhline(1, color="black", ls="--", lw=1)
    axes[0, 0].set_ylabel("return, mean of ten episodes")
    axes[1, 0].set_ylabel("value of the actions taken")
    axes[0, 0].legend(title="normalized", loc="upper left")
    figure.savefig(path, dpi=100)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("examples/output"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, help="agents of each kind, two or more")
    parser.add_argument("--steps", type=int, help="steps of the environment")
    parser.add_argument("--smoke", action="store_true", help="one rate, few steps")
    args = parser.parse_args(argv)
    if args.seeds is None:
        args.seeds = 2 if args.smoke else 8
    if args.steps is None:
        args.steps = 1_000 if args.smoke else 20_000
    args.evaluations = 4 if args.smoke else 40
    args.rates = LEARNING_RATES[-1:] if args.smoke else LEARNING_RATES
    if args.seeds < 2 or args.steps < args.evaluations:
        parser.error(f"give two seeds or more and {args.evaluations} steps or more")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    runs = {
        (rate, name): train(args, where, rate, title=f"{rate:g}, {name}")
        for rate in args.rates
        for name, where in VARIANTS.items()
    }
    print(
        f"{args.seeds} seeds, {args.steps} steps each. Mean ± standard deviation over "
        "the seeds.\n'At the end' is the last quarter. No true value exceeds 1, no "
        f"return {LONGEST}.\n"
    )
    print(table(runs))
    path = args.out / "rl_critic.png"
    draw(runs, path)
    print(f"\nReturns and values are drawn in {path}")


if __name__ == "__main__":
    main()
