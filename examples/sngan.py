"""An SN-GAN on handwritten digits, and the same GAN without spectral normalization.

Trains a generator against a convolutional critic on scikit-learn's 8x8 digits, with
the hinge loss, as in Miyato et al. (2018): once with a plain critic and once with one
in which every layer has the same norm, from the same starts and with the same learning
rates. Prints how good the samples are and which runs failed, and draws both the
training and the samples.

    python examples/sngan.py [--out DIR] [--seed N] [--seeds N] [--steps N]
        [--generator-rate RATE] [--critic-rate RATE] [--smoke]
"""

import argparse
import functools as ft
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier
from tqdm import tqdm

import spectrax


IMAGE = (1, 8, 8)
LATENT_SIZE = 16
BATCH_SIZE = 64
# The norm of each layer of a normalized critic. Where the flattened kernel of a
# convolution has norm 1, as in Miyato et al. (2018), its true norm is 1 or more.
BOUND = 2.0
# The same for both kinds of critic. The generator's rate is among those of Miyato et
# al. (2018), the critic's is 30 times the highest of them.
GENERATOR_RATE = 2e-4
CRITIC_RATE = 3e-2

# When has a run failed? Decided before it is made, at its end: if the samples are no
# closer to the digits than digits whose pixels were shuffled among the images, which
# keeps every pixel's distribution and nothing else; if they cover fewer than half of
# the ten classes; or if a number is not finite. "The end" is the median over the last
# quarter of the evaluations.
FEWEST_CLASSES = 5.0
SHUFFLED = "shuffled digits"

WITHOUT, WITH = "without", "with"  # normalization
COLORS = {WITHOUT: "tab:orange", WITH: "tab:blue"}

Images = Float[Array, "batch 1 8 8"]
Noise = Float[Array, "batch latent"]


# --- The networks ------------------------------------------------------------------


class Critic(eqx.Module):
    """Two convolutions, 8x8 to 4x4, and a linear layer; leaky ReLU between them."""

    layers: list[eqx.nn.Conv2d | eqx.nn.Linear]

    def __init__(self, *, channels: int, key: Array):
        a, b, c = jr.split(key, 3)
        wide = 2 * channels
        self.layers = [
            eqx.nn.Conv2d(1, channels, 3, padding=1, key=a),
            eqx.nn.Conv2d(channels, wide, 4, stride=2, padding=1, key=b),
            eqx.nn.Linear(16 * wide, "scalar", key=c),
        ]

    def __call__(self, x: Float[Array, "1 8 8"]) -> Float[Array, ""]:
        *convolutions, last = self.layers
        for layer in convolutions:
            x = jax.nn.leaky_relu(layer(x), 0.1)  # 1-Lipschitz
        return last(x.ravel())


class Generator(eqx.Module):
    """From noise to pixels in [-1, 1]. It is never normalized."""

    mlp: eqx.nn.MLP

    def __init__(self, *, width: int, key: Array):
        size = math.prod(IMAGE)
        mlp = eqx.nn.MLP(
            LATENT_SIZE, size, width, depth=2, final_activation=jnp.tanh, key=key
        )

        def weights(mlp: eqx.nn.MLP) -> list[Array]:
            return [layer.weight for layer in mlp.layers]

        # Variance 2 / inputs (He et al. 2015): with the default, a third of 1 / inputs,
        # all first samples look alike, and move together from then on.
        scaled = [math.sqrt(6) * weight for weight in weights(mlp)]
        self.mlp = eqx.tree_at(weights, mlp, scaled)

    def __call__(self, z: Float[Array, " latent"]) -> Float[Array, "1 8 8"]:
        return self.mlp(z).reshape(IMAGE)


def lipschitz_bound(critic: Critic) -> float:
    """An upper bound on the critic's Lipschitz constant: the product of its layers'
    norms, each of them proven from above, as the activation is 1-Lipschitz."""
    return math.prod(float(norm) for norm in layer_norms(critic))


@eqx.filter_jit
def layer_norms(critic: Critic) -> list[Array]:
    operators = [spectrax.layer_operator(layer) for layer in critic.layers]
    return [spectrax.enclose_norm(operator).upper for operator in operators]


# --- The quality of samples --------------------------------------------------------


class Data(NamedTuple):
    train: np.ndarray
    train_labels: np.ndarray
    test: np.ndarray
    test_labels: np.ndarray


def load_data(seed: int) -> Data:
    """1,797 images of 8x8 pixels in [-1, 1], a fifth of them held out."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 8 - 1).astype(np.float32).reshape(-1, *IMAGE)
    parts = train_test_split(
        images, labels, test_size=0.2, stratify=labels, random_state=seed
    )
    train, test, train_labels, test_labels = map(np.asarray, parts)
    return Data(train, train_labels, test, test_labels)


class Quality(NamedTuple):
    """How a set of images looks to a classifier of real digits.

    - `distance`: the Fréchet distance between its features of these images and those of
        the training images, `|m - n|^2 + tr(A + B - 2 (A B)^(1/2))` for means `m` and
        `n` and covariances `A` and `B`.
    - `classes`: the number of classes in use, `exp` of the entropy of the classifier's
        mean prediction: from 1 to 10.
    - `confidence`: the mean of the largest probability.
    - `nearest`: the mean distance to the nearest training image, in units of that of
        held-out digits. Far below 1, the images would be copies.
    """

    distance: float
    classes: float
    confidence: float
    nearest: float


class Judge:
    """A classifier with one hidden layer of 32 features, trained on the real digits."""

    def __init__(self, data: Data, seed: int):
        self.train = data.train.reshape(len(data.train), -1)
        # 1e-2 is its weight decay: it converges within the iterations given.
        self.classifier = MLPClassifier(
            (32,), alpha=1e-2, max_iter=1000, random_state=seed
        ).fit(self.train, data.train_labels)
        held_out = data.test.reshape(len(data.test), -1)
        self.accuracy = float(self.classifier.score(held_out, data.test_labels))
        self.unit = self.nearest(held_out)

    def features(self, images: np.ndarray) -> np.ndarray:
        weight, bias = self.classifier.coefs_[0], self.classifier.intercepts_[0]
        return np.maximum(images @ weight + bias, 0)

    def nearest(self, images: np.ndarray) -> float:
        squares = np.sum((images[:, None] - self.train[None]) ** 2, axis=-1)
        return float(np.sqrt(squares.min(axis=1)).mean())

    def __call__(self, images: np.ndarray) -> Quality:
        images = images.reshape(len(images), -1)
        if not np.all(np.isfinite(images)):
            return Quality(math.inf, math.nan, math.nan, math.nan)
        probabilities = np.asarray(self.classifier.predict_proba(images))
        shares = probabilities.mean(axis=0)
        return Quality(
            frechet_distance(self.features(self.train), self.features(images)),
            float(np.exp(-np.sum(shares * np.log(np.maximum(shares, 1e-30))))),
            float(probabilities.max(axis=1).mean()),
            self.nearest(images) / self.unit,
        )


def frechet_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Between the Gaussians with the means and covariances of the rows."""
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    values, vectors = np.linalg.eigh(a)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    values = np.linalg.eigvalsh(root @ b @ root)  # those of `a @ b`
    trace = np.trace(a) + np.trace(b) - 2 * np.sqrt(np.maximum(values, 0)).sum()
    return float(np.sum((x.mean(axis=0) - y.mean(axis=0)) ** 2) + trace)


def shuffled(images: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Images with each pixel taken from another one of the given images."""
    rng = np.random.default_rng(seed)
    return rng.permuted(images, axis=0)[:count]


# --- Training ----------------------------------------------------------------------


class Rates(NamedTuple):
    """Learning rates. Arrays, so that another value compiles nothing anew."""

    generator: Float[Array, ""]
    critic: Float[Array, ""]


class Players(NamedTuple):
    """Both networks and what their updates need. A plain critic has no state."""

    generator: Generator
    critic: PyTree
    state: eqx.nn.State | None
    generator_opt: optax.OptState
    critic_opt: optax.OptState


ADAM = optax.scale_by_adam(b1=0.5, b2=0.9)


def update(
    network: PyTree, gradient: PyTree, opt_state: optax.OptState, rate: Array
) -> tuple[PyTree, optax.OptState]:
    updates, opt_state = ADAM.update(gradient, opt_state)
    updates = jax.tree.map(lambda direction: -rate * direction, updates)
    return eqx.apply_updates(network, updates), opt_state


def critic_loss(critic: Critic, real: Images, fake: Images) -> Float[Array, ""]:
    """The hinge loss. A critic that is 0 everywhere has 2."""
    on_real, on_fake = jax.vmap(critic)(real), jax.vmap(critic)(fake)
    return jnp.mean(jax.nn.relu(1 - on_real)) + jnp.mean(jax.nn.relu(1 + on_fake))


@eqx.filter_jit
def train_step(
    players: Players, rates: Rates, real: Images, noise: Noise
) -> tuple[Players, Float[Array, ""]]:
    """One update of the critic, then one of the generator."""
    generator, critic, state, generator_opt, critic_opt = players
    state = spectrax.advance(critic, state)  # once per step

    @eqx.filter_value_and_grad
    def critic_gradient(critic: PyTree) -> Float[Array, ""]:
        # One critic for both halves of the loss: real and fake share the `unwrap`.
        plain = spectrax.unwrap(critic, state, lazy=True)
        return critic_loss(plain, real, jax.vmap(generator)(noise))

    loss, gradient = critic_gradient(critic)
    critic, critic_opt = update(critic, gradient, critic_opt, rates.critic)

    @eqx.filter_grad
    def generator_gradient(generator: Generator) -> Float[Array, ""]:
        judge = spectrax.unwrap(critic, state, lazy=True)
        return -jnp.mean(jax.vmap(judge)(jax.vmap(generator)(noise)))

    gradient = generator_gradient(generator)
    generator, generator_opt = update(
        generator, gradient, generator_opt, rates.generator
    )
    return Players(generator, critic, state, generator_opt, critic_opt), loss


def arrays(network: PyTree) -> PyTree:
    return eqx.filter(network, eqx.is_inexact_array)


def first_players(args: argparse.Namespace, seed: int, *, constrained: bool) -> Players:
    """The same networks for the same seed, whether the critic is wrapped or not."""
    generator_key, critic_key = jr.split(jr.key(seed))
    generator = Generator(width=args.width, key=generator_key)
    critic, state = Critic(channels=args.channels, key=critic_key), None
    if constrained:
        # One vector and one step per update, as in the paper. The norm is that of the
        # convolution at every input size, and not that of the flattened kernel.
        estimator = spectrax.PowerIteration(block_size=1)
        critic, state = spectrax.constrain(
            critic, constraint=spectrax.Normalize(BOUND), estimator=estimator
        )
    generator_opt = ADAM.init(arrays(generator))
    critic_opt = ADAM.init(arrays(critic))
    return Players(generator, critic, state, generator_opt, critic_opt)


@eqx.filter_jit
def samples(generator: Generator, noise: Noise) -> Images:
    return jax.vmap(generator)(noise)


class Run(NamedTuple):
    """What was seen at each evaluation, and the samples at the end."""

    steps: np.ndarray
    losses: np.ndarray  # the critic's, the mean since the last evaluation
    bounds: np.ndarray
    qualities: list[Quality]
    images: np.ndarray


def train(
    args: argparse.Namespace,
    data: Data,
    judge: Judge,
    seed: int,
    *,
    constrained: bool,
) -> Run:
    players = first_players(args, seed, constrained=constrained)
    rates = Rates(jnp.asarray(args.generator_rate), jnp.asarray(args.critic_rate))
    rng = np.random.default_rng(seed)

    def draw_noise(count: int) -> Noise:
        return jnp.asarray(rng.normal(size=(count, LATENT_SIZE)), jnp.float32)

    # As many samples as there are digits held out: a Fréchet distance depends on it.
    shown = draw_noise(len(data.test))
    steps, losses, bounds, qualities, since = [], [], [], [], []
    images = data.test
    title = f"seed {seed}, {WITH if constrained else WITHOUT}"
    for step in tqdm(range(1, args.steps + 1), desc=title, unit="step", disable=None):
        batch = rng.choice(len(data.train), BATCH_SIZE, replace=False)
        real, noise = jnp.asarray(data.train[batch]), draw_noise(BATCH_SIZE)
        players, loss = train_step(players, rates, real, noise)
        since.append(loss)
        if step % (args.steps // args.evaluations) == 0:
            images = np.asarray(samples(players.generator, shown))
            steps.append(step)
            losses.append(np.mean(since))
            since.clear()
            bounds.append(
                lipschitz_bound(spectrax.unwrap(players.critic, players.state))
            )
            qualities.append(judge(images))
    seen = [np.asarray(values) for values in (steps, losses, bounds)]
    return Run(seen[0], seen[1], seen[2], qualities, images)


# --- What is shown -----------------------------------------------------------------


def at_the_end(run: Run) -> Quality:
    """The median of each measure over the last quarter of the evaluations."""
    last = run.qualities[-max(1, len(run.qualities) // 4) :]
    return Quality(*np.median(np.asarray(last), axis=0).tolist())


def failed(run: Run, limit: float) -> bool:
    """`limit` is the distance of shuffled digits."""
    end = at_the_end(run)
    finite = bool(np.isfinite(run.losses).all() and np.isfinite(run.bounds).all())
    return not (finite and end.distance < limit and end.classes >= FEWEST_CLASSES)


def references(data: Data, judge: Judge, seed: int) -> dict[str, Quality]:
    """As many images as are made by a generator, to compare with."""
    count = len(data.test)
    rng = np.random.default_rng(seed)
    noise = rng.uniform(-1, 1, data.test.shape)
    return {
        "held-out digits": judge(data.test),
        SHUFFLED: judge(shuffled(data.train, count, seed)),
        "uniform noise": judge(noise),
    }


def row(name: str, quality: Quality) -> str:
    return (
        f"{name:<18}{quality.distance:>9.2f}{quality.classes:>9.2f}"
        f"{quality.confidence:>12.2f}{quality.nearest:>9.2f}"
    )


def table(
    runs: dict[str, list[Run]], known: dict[str, Quality], seeds: Sequence[int]
) -> str:
    head = (
        f"{'':<18}{'distance':>9}{'classes':>9}{'confidence':>12}{'nearest':>9}"
        f"{'Lipschitz':>11}{'failed':>8}"
    )
    lines = [head, "-" * len(head)]
    lines += [row(name, quality) for name, quality in known.items()]
    for title, group in runs.items():
        lines.append("-" * len(head))
        for seed, run in zip(seeds, group, strict=True):
            word = "failed" if failed(run, known[SHUFFLED].distance) else "no"
            name = row(f"{title}, seed {seed}", at_the_end(run))
            lines.append(f"{name}{run.bounds[-1]:>11.4g}{word:>8}")
    return "\n".join(lines)


def draw_training(runs: dict[str, list[Run]], limit: float, path: Path) -> None:
    """The critic's Lipschitz bound, its loss and the samples' distance over steps."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    axes = figure.subplots(1, 3)
    for title, group in runs.items():
        for i, run in enumerate(group):
            label = title if i == 0 else None
            distances = [quality.distance for quality in run.qualities]
            for ax, values in zip(
                axes, (run.bounds, run.losses, distances), strict=True
            ):
                ax.plot(run.steps, values, color=COLORS[title], alpha=0.7, label=label)
    names = ("Lipschitz bound of the critic", "critic's loss", "Fréchet distance")
    for ax, name in zip(axes, names, strict=True):
        ax.set_title(name)
        ax.set_xlabel("step")
        ax.set_yscale("log")
        ax.grid(alpha=0.3)
    axes[1].axhline(2, color="black", ls=":", lw=1, label="critic that is 0")
    axes[2].axhline(limit, color="black", ls="--", lw=1, label=f"{SHUFFLED}: failed")
    for ax in axes:
        ax.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def draw_samples(runs: dict[str, list[Run]], data: Data, path: Path) -> None:
    """Digits, and the samples of the first seed at the end of its training."""
    columns = {"digits": data.test}
    for title, group in runs.items():
        columns[f"{title} normalization"] = group[0].images
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for ax, (title, images) in zip(
        figure.subplots(1, len(columns)), columns.items(), strict=True
    ):
        ax.imshow(grid(images), cmap="gray_r", vmin=-1, vmax=1)
        ax.set_title(title)
        ax.axis("off")
    figure.savefig(path, dpi=120)


def grid(images: np.ndarray, rows: int = 8) -> np.ndarray:
    """The first `rows * rows` images as one, with a white line between them."""
    tiles = np.pad(
        images[: rows * rows, 0], ((0, 0), (0, 1), (0, 1)), constant_values=-1
    )
    height, width = tiles.shape[1:]
    tiles = tiles.reshape(rows, rows, height, width).transpose(0, 2, 1, 3)
    return tiles.reshape(rows * height, rows * width)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("examples/output"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, help="runs of each kind")
    parser.add_argument("--steps", type=int, help="updates of both networks")
    parser.add_argument("--generator-rate", type=float, default=GENERATOR_RATE)
    parser.add_argument("--critic-rate", type=float, default=CRITIC_RATE)
    parser.add_argument("--smoke", action="store_true", help="narrow nets, few steps")
    args = parser.parse_args(argv)
    if args.seeds is None:
        args.seeds = 1 if args.smoke else 4
    if args.steps is None:
        args.steps = 20 if args.smoke else 2000
    args.channels, args.width = (4, 32) if args.smoke else (16, 128)
    args.evaluations = 2 if args.smoke else 30
    if args.seeds < 1 or args.steps < args.evaluations:
        parser.error(f"give a seed or more and {args.evaluations} steps or more")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    data = load_data(args.seed)
    judge = Judge(data, args.seed)
    known = references(data, judge, args.seed)
    seeds = range(args.seed, args.seed + args.seeds)
    fit = ft.partial(train, args, data, judge)
    runs = {
        title: [fit(seed=seed, constrained=title == WITH) for seed in seeds]
        for title in (WITHOUT, WITH)
    }
    print(
        f"Learning rates: generator {args.generator_rate:g}, critic "
        f"{args.critic_rate:g}. The classifier is right about {judge.accuracy:.1%} of "
        "the held-out digits.\n"
    )
    print(table(runs, known, seeds))
    draw_training(runs, known[SHUFFLED].distance, args.out / "sngan.png")
    draw_samples(runs, data, args.out / "sngan_samples.png")
    print(f"\nThe training and the samples are drawn in {args.out / 'sngan*.png'}")


if __name__ == "__main__":
    main()
