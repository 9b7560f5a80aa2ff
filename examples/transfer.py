"""Transfer learning with pretrained weights whose norms may not grow.

Trains a multilayer perceptron on scikit-learn's handwritten digits, then goes on with a
few digits that lie on their side: without a constraint, with every norm kept in
[0, initial norm] by `spectrax.ClipToInitial`, with half of that, and with every norm 1.
Prints the accuracy on the new and on the old task, also with noise, and draws the paths
of the norms. Ends with exit code 1 if a model does not start as it was, or if a norm
leaves its interval.

    python examples/transfer.py [--out DIR] [--seed N] [--steps N] [--smoke]
"""

import argparse
import functools as ft
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import spectrax


CONSTRAINTS: dict[str, spectrax.AbstractConstraint | None] = {
    "none": None,
    "ClipToInitial": spectrax.ClipToInitial(),
    "ClipToInitial(0.5)": spectrax.ClipToInitial(0.5),
    "Normalize": spectrax.Normalize(),
}
RATES = (1e-3, 1e-2, 3e-2)
NOISES = (0.2, 0.4)  # standard deviations; pixels are in [0, 1]
PER_CLASS = 10  # images of each digit on its side
BATCH_SIZE = 64
CHUNK = 10  # updates between two looks at the norms

# A norm is estimated from below while training, so a true norm may be above its bound.
LARGEST_EXCESS = 1e-2
# Of a float32 estimate of the initial norm, with what `ClipToInitial` adds to it.
ROUNDING = 1e-5

Images = Float[Array, "batch pixels"]
Labels = Int[Array, " batch"]


class Data(NamedTuple):
    """One split for each start; the new task has few images, and the same labels."""

    old_train: tuple[Array, Array]
    old_test: tuple[Array, Array]
    new_train: tuple[Array, Array]
    new_test: tuple[Array, Array]


class Lanes(NamedTuple):
    """What tells the runs with one constraint from each other: an entry for each."""

    start: Array
    rate: Array


class Run(NamedTuple):
    """A network in training; `state` is `None` if nothing in it is constrained."""

    model: PyTree
    state: eqx.nn.State | None
    opt_state: optax.OptState


class Result(NamedTuple):
    """What came of the runs with one constraint, with an axis for the runs in front."""

    norms: Float[np.ndarray, "lanes looks layers"]  # of the weights that act
    path: Float[np.ndarray, "lanes looks"]  # accuracy on the new task
    new: Float[np.ndarray, " lanes"]
    old: Float[np.ndarray, " lanes"]
    noisy: Float[np.ndarray, "lanes noises"]  # on the new task
    runs: Run


# --- The two tasks -----------------------------------------------------------------


def on_its_side(images: np.ndarray) -> np.ndarray:
    return np.rot90(images.reshape(-1, 8, 8), axes=(1, 2)).reshape(-1, 64)


def load_data(seeds: Sequence[int]) -> Data:
    """1,797 images of 8x8 pixels in [0, 1], three tenths of them for testing."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    parts = []
    for seed in seeds:
        split = train_test_split(
            images, labels, test_size=0.3, stratify=labels, random_state=seed
        )
        x, x_test, y, y_test = map(np.asarray, split)
        few = [np.flatnonzero(y == label)[:PER_CLASS] for label in range(10)]
        few = np.concatenate(few)
        new_train = on_its_side(x[few]), y[few]
        new_test = on_its_side(x_test), y_test
        parts.append(((x, y), (x_test, y_test), new_train, new_test))
    stacked = jax.tree.map(lambda *arrays: jnp.asarray(np.stack(arrays)), *parts)
    return Data(*stacked)


def entry(tree: PyTree, index: Any) -> PyTree:
    return jax.tree.map(lambda x: x[index] if eqx.is_array(x) else x, tree)


# --- Training ----------------------------------------------------------------------


def loss(network: eqx.nn.MLP, x: Images, y: Labels) -> Float[Array, ""]:
    logits = jax.vmap(network)(x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def accuracy(network: eqx.nn.MLP, x: Images, y: Labels) -> Float[Array, ""]:
    return jnp.mean(jnp.argmax(jax.vmap(network)(x), axis=-1) == y)


def start(
    network: eqx.nn.MLP,
    rate: Array,
    constraint: spectrax.AbstractConstraint | None,
) -> Run:
    model, state = network, None
    if constraint is not None:
        model, state = spectrax.constrain(network, constraint=constraint)
    weights = eqx.filter(model, eqx.is_inexact_array)
    return Run(model, state, optax.adam(rate).init(weights))


def train_step(run: Run, rate: Array, x: Images, y: Labels) -> Run:
    @eqx.filter_grad
    def gradient(model: PyTree) -> Float[Array, ""]:
        return loss(spectrax.unwrap(model, run.state, lazy=True), x, y)

    model, state, opt_state = run
    updates, opt_state = optax.adam(rate).update(gradient(model), opt_state)
    model = eqx.apply_updates(model, updates)
    state = spectrax.advance(model, state)  # once per update
    return Run(model, state, opt_state)


@eqx.filter_jit(donate="all-except-first")
@eqx.filter_vmap(in_axes=(0, eqx.if_array(0), 0, 0, None, None))
def train_steps(
    data: tuple[Images, Labels],
    run: Run,
    rate: Array,
    start: Array,
    keys: PRNGKeyArray,
    size: int,
) -> Run:
    """An update with each key: a batch of `size` images, each run with its own."""
    x, y = data
    arrays, static = eqx.partition(run, eqx.is_array)

    def step(arrays: Any, key: PRNGKeyArray) -> tuple[Any, None]:
        key = jr.fold_in(key, start)
        batch = jr.choice(key, len(x), (min(size, len(x)),), replace=False)
        run = train_step(eqx.combine(arrays, static), rate, x[batch], y[batch])
        return eqx.filter(run, eqx.is_array), None

    arrays, _ = jax.lax.scan(step, arrays, keys)
    return eqx.combine(arrays, static)


@eqx.filter_jit
@eqx.filter_vmap
def look(
    run: Run, test: tuple[Images, Labels]
) -> tuple[Float[Array, " layers"], Float[Array, ""]]:
    """The norm of each weight that acts, by a decomposition, and the accuracy."""
    network = spectrax.unwrap(run.model, run.state)
    norms = [jnp.linalg.norm(layer.weight, ord=2) for layer in network.layers]
    return jnp.stack(norms), accuracy(network, *test)


@eqx.filter_jit
@eqx.filter_vmap
def judge(
    run: Run, old: tuple[Images, Labels], new: tuple[Images, Labels], start: Array
) -> tuple[Array, Array, Array]:
    """The accuracy on the new and on the old task, and on the new one with noise."""
    network = spectrax.unwrap(run.model, run.state)
    x, y = new
    noise = jr.normal(jr.fold_in(jr.key(1), start), x.shape)
    noisy = [accuracy(network, x + std * noise, y) for std in NOISES]
    return accuracy(network, *new), accuracy(network, *old), jnp.stack(noisy)


def pretrain(data: Data, seeds: Sequence[int], *, width: int, steps: int) -> eqx.nn.MLP:
    """A network for each start, on the old task."""

    @eqx.filter_vmap
    def make(seed: Array) -> Run:
        mlp = eqx.nn.MLP(64, 10, width, depth=2, key=jr.key(seed))
        return start(mlp, jnp.asarray(1e-3), None)

    starts = jnp.array(seeds)
    runs, rates = make(starts), jnp.full(len(seeds), 1e-3)
    all_keys = jr.split(jr.key(seeds[0]), (steps // CHUNK, CHUNK))
    for keys in tqdm(all_keys, desc="pretraining", unit="chunk", disable=None):
        runs = train_steps(data.old_train, runs, rates, starts, keys, BATCH_SIZE)
    return runs.model


def finetune(
    data: Data,
    pretrained: eqx.nn.MLP,
    lanes: Lanes,
    constraint: spectrax.AbstractConstraint | None,
    *,
    steps: int,
    seed: int,
    title: str,
) -> tuple[Run, Result]:
    """All runs with one constraint on the new task, side by side: how they start and
    what comes of them."""
    # Every run has the network and the images of its start.
    network, data = entry((pretrained, data), lanes.start)
    make = eqx.filter_vmap(start, in_axes=(eqx.if_array(0), 0, None))
    first = eqx.filter_jit(make)(network, lanes.rate, constraint)
    looks = [look(first, data.new_test)]
    # The first runs are still to be looked at, so their arrays are not given away.
    runs = jax.tree.map(lambda x: x.copy() if eqx.is_array(x) else x, first)
    with tqdm(total=steps, desc=title, unit="step", disable=None) as bar:
        for keys in jr.split(jr.key(seed), (steps // CHUNK, CHUNK)):
            runs = train_steps(
                data.new_train, runs, lanes.rate, lanes.start, keys, BATCH_SIZE
            )
            looks.append(jax.block_until_ready(look(runs, data.new_test)))
            bar.update(CHUNK)
    norms, path = (np.stack(parts, axis=1) for parts in zip(*looks, strict=True))
    found = judge(runs, data.old_test, data.new_test, lanes.start)
    new, old, noisy = map(np.asarray, found)
    return first, Result(norms, path, new, old, noisy, runs)


# --- The promise -------------------------------------------------------------------


def check_start(first: Run, network: eqx.nn.MLP) -> None:
    """Exits with code 1 if the models are not the pretrained ones to the last bit."""
    before = jax.tree.leaves(eqx.filter(network, eqx.is_array))
    unwrapped = eqx.filter_vmap(spectrax.unwrap)(first.model, first.state)
    after = jax.tree.leaves(eqx.filter(unwrapped, eqx.is_array))
    if not all(itertools.starmap(jnp.array_equal, zip(before, after, strict=True))):
        sys.exit("The promise does not hold: a model does not start unchanged.")
    print("ClipToInitial: every model starts unchanged to the last bit.\n")


def true_norms(network: eqx.nn.MLP) -> list[float]:
    """By decompositions in float64."""
    weights = [np.asarray(layer.weight, np.float64) for layer in network.layers]
    return [float(np.linalg.norm(weight, ord=2)) for weight in weights]


def excesses(
    name: str, result: Result, pretrained: eqx.nn.MLP, lanes: Lanes, factor: float
) -> tuple[float, float]:
    """By how much a norm exceeds `factor` times the initial one, at most: the weights
    of training, and certified ones."""
    certify = eqx.filter_vmap(ft.partial(spectrax.unwrap, certified=True))
    proven = eqx.filter_jit(certify)(result.runs.model, result.runs.state)
    trained, certified = [], []
    for i, origin in enumerate(tqdm(lanes.start, desc=f"{name}: norms", disable=None)):
        allowed = factor * np.array(true_norms(entry(pretrained, origin)))
        model, state = entry(result.runs[:2], i)
        table = spectrax.summary(model, state, enclosure=False, true_norm=True)
        trained.append(np.array([row.true_norm for row in table]) / allowed - 1)
        certified.append(true_norms(entry(proven, i)) / allowed - 1)
    return np.max(trained), np.max(certified)


def verify(results: dict[str, Result], pretrained: eqx.nn.MLP, lanes: Lanes) -> None:
    """Exits with code 1 and a message if a norm has left its interval."""
    broken = []
    for name, result in results.items():
        constraint = CONSTRAINTS[name]
        if not isinstance(constraint, spectrax.ClipToInitial):
            continue
        trained, certified = excesses(
            name, result, pretrained, lanes, constraint.factor
        )
        print(
            f"{name}: largest norm over its bound, minus 1: {trained:.1e} as trained, "
            f"{certified:.1e} certified"
        )
        if not trained <= LARGEST_EXCESS:
            broken.append(f"{name}: a norm exceeds its bound by {trained:.1e}")
        if not certified <= ROUNDING:
            broken.append(f"{name}: a certified norm exceeds by {certified:.1e}")
    if broken:
        sys.exit("The promise does not hold.\n" + "\n".join(broken))
    print("Every norm stayed in its interval.")


# --- What is shown -----------------------------------------------------------------


def print_table(results: dict[str, Result], shape: tuple[int, int]) -> None:
    noises = "".join(f"{f'noise {std:g}':>17}" for std in NOISES)
    print(
        f"{'constraint':<20}{'rate':>6}{'at the start':>14}{'new task':>17}{noises}"
        f"{'old task':>17}{'product of norms':>18}"
    )
    print("-" * (92 + 17 * len(NOISES)))
    for i, rate in enumerate(RATES):
        for name, result in results.items():
            new, old, noisy, path, norms = (
                x.reshape(*shape, *x.shape[1:])[i]
                for x in (
                    result.new,
                    result.old,
                    result.noisy,
                    result.path,
                    result.norms,
                )
            )
            cells = "".join(f"{spread(x):>17}" for x in (new, *noisy.T, old))
            product = norms[:, -1].prod(axis=-1).mean()
            print(
                f"{name:<20}{rate:>6g}{path[:, 0].mean():>14.1%}{cells}{product:>18.3g}"
            )


def spread(values: np.ndarray) -> str:
    return f"{values.mean():.1%} ({values.min():.1%})"


def draw(results: dict[str, Result], shape: tuple[int, int], path: Path) -> None:
    """At the middle rate: norms over the initial ones and accuracy; and all rates."""
    figure = Figure(figsize=(12, 6), layout="constrained")
    axes = figure.subplots(2, 3)
    middle = len(RATES) // 2
    colors = ("tab:orange", "tab:blue", "tab:cyan", "tab:green")
    for (name, result), color in zip(results.items(), colors, strict=False):
        norms = result.norms.reshape(*shape, *result.norms.shape[1:])[middle]
        steps = CHUNK * np.arange(norms.shape[1])
        initial = results["none"].norms[: shape[1], :1]
        for layer, ax in enumerate(axes[0]):
            for ratio in (norms / initial)[:, :, layer]:
                ax.plot(steps, ratio, color=color, lw=0.9)
            ax.set_title(
                f"layer {layer}: norm / initial norm, rate {RATES[middle]:g}",
                fontsize=9,
            )
            ax.set_xlabel("step")
        accuracies = result.path.reshape(*shape, -1)[middle]
        axes[1, 0].plot(steps, accuracies.mean(axis=0), color=color, label=name)
        noisy = result.noisy[:, -1]
        for ax, values in ((axes[1, 1], result.new), (axes[1, 2], noisy)):
            values = values.reshape(shape)
            ax.plot(RATES, values.mean(axis=1), "o-", color=color, label=name)
            ends = values.min(axis=1), values.max(axis=1)
            ax.fill_between(RATES, *ends, color=color, alpha=0.15, lw=0)
    titles = (
        f"accuracy on the new task, rate {RATES[middle]:g}",
        "new task: mean and range over the starts",
        f"new task with noise {NOISES[-1]:g}",
    )
    for ax, title, label in zip(axes[1], titles, ("step", "rate", "rate"), strict=True):
        ax.set_title(title, fontsize=9)
        ax.set_xlabel("learning rate" if label == "rate" else label)
        ax.set_xscale("log" if label == "rate" else "linear")
    axes[1, 0].legend(fontsize=8)
    for ax in axes.flat:
        ax.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("examples/output"))
    parser.add_argument("--seed", type=int, default=0, help="of the first start")
    parser.add_argument("--steps", type=int, help=f"updates, a multiple of {CHUNK}")
    parser.add_argument("--smoke", action="store_true", help="narrow nets, few steps")
    args = parser.parse_args(argv)
    if args.steps is None:
        args.steps = CHUNK if args.smoke else 300
    if args.steps < CHUNK or args.steps % CHUNK:
        parser.error(f"--steps: expected a multiple of {CHUNK}, got {args.steps}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    num_starts, width, steps = (2, 16, 200) if args.smoke else (5, 128, 1000)
    seeds = range(args.seed, args.seed + num_starts)
    data = load_data(seeds)
    pretrained = pretrain(data, seeds, width=width, steps=steps)
    old = eqx.filter_vmap(accuracy)(pretrained, *data.old_test)
    new = eqx.filter_vmap(accuracy)(pretrained, *data.new_test)
    print(
        f"pretrained: {old.mean():.1%} on the old task, {new.mean():.1%} on the new\n"
    )

    shape = len(RATES), num_starts
    rates, starts = zip(*itertools.product(RATES, range(num_starts)), strict=True)
    lanes = Lanes(jnp.array(starts), jnp.array(rates))
    results = {}
    names = list(CONSTRAINTS)[:2] if args.smoke else list(CONSTRAINTS)
    for name in names:
        first, results[name] = finetune(
            data,
            pretrained,
            lanes,
            CONSTRAINTS[name],
            steps=args.steps,
            seed=args.seed,
            title=name,
        )
        if name == "ClipToInitial":
            check_start(first, entry(pretrained, lanes.start))
    print_table(results, shape)
    run = entry(results["ClipToInitial"].runs, num_starts * (len(RATES) // 2))
    assert run.state is not None
    print(f"\nClipToInitial, rate {RATES[len(RATES) // 2]:g}, the first start:")
    print(spectrax.summary(run.model, run.state, true_norm=True), end="\n\n")
    draw(results, shape, args.out / "transfer.png")
    print(f"The paths are drawn in {args.out / 'transfer.png'}\n")
    verify(results, pretrained, lanes)


if __name__ == "__main__":
    main()
