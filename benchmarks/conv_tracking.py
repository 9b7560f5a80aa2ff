"""How far the true norm of constrained convolutions exceeds the bound while training.

Trains critics of GANs with the hinge loss, real samples against uniform noise, batches
of 32 of each: of two convolutions on scikit-learn's handwritten digits (kernels of side
3 to 9, padding 'SAME', `3x3/64` with channels 1-64-64), and of four as critics of
speech have them (`speech`: 41 taps, stride 4, groups) on sums of sinusoids. Every 5
steps from the first on it takes, in float64, the norm at every input size of the
weights that the forward pass has just used (`truth.py`); every 50, the norm that
`spectrax.summary` says of them too. `equinox.nn.SpectralNorm` is trained in the same
run on the 3x3 kernels: its bound is on the norm of the flattened kernel.

    python benchmarks/conv_tracking.py [--json FILE] [--steps 300] [--seeds 3]
        [--every 5] [--only 3x3/8 speech ...] [--optimizers adam-1e-3 ...] [--sized]

`--sized` gives `wrap` the input size and takes the norms at that size from dense
matrices, of the critics with 8 channels.
"""

import argparse
import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray
from sklearn.datasets import load_digits
from training import Forward, make_step, peer, wrapped
from truth import layer_norm, sized_norm

import spectrax


_BATCH = 32
_SIDE = 8
_LENGTH = 256
_SUMMARIES_EVERY = 50
_PEER = "equinox.nn.SpectralNorm"
_OPTIMIZERS = {
    "adam-2e-4": lambda: optax.adam(2e-4),
    "adam-1e-3": lambda: optax.adam(1e-3),
    "adam-1e-2": lambda: optax.adam(1e-2),
    "sgd-5e-2": lambda: optax.sgd(5e-2, momentum=0.9),
}


class Critic(eqx.Module):
    """Convolutions with ReLU in between; the score is taken by the loss."""

    layers: list[eqx.nn.Conv]

    def __call__(self, x: Array) -> Array:
        for layer in self.layers[:-1]:
            x = jax.nn.relu(layer(x))
        return self.layers[-1](x)


def image_critic(kernel: int, channels: int, key: PRNGKeyArray) -> Critic:
    keys = jr.split(key, 2)
    sizes = itertools.pairwise((1, channels, channels))
    return Critic(
        [
            eqx.nn.Conv2d(i, o, kernel, padding="SAME", key=k)
            for (i, o), k in zip(sizes, keys, strict=True)
        ]
    )


def speech_critic(key: PRNGKeyArray) -> Critic:
    keys = jr.split(key, 4)
    long: dict[str, Any] = {"kernel_size": 41, "stride": 4, "padding": 20}
    return Critic(
        [
            eqx.nn.Conv1d(1, 16, 15, padding=7, key=keys[0]),
            eqx.nn.Conv1d(16, 64, **long, groups=4, key=keys[1]),
            eqx.nn.Conv1d(64, 64, **long, groups=16, key=keys[2]),
            eqx.nn.Conv1d(64, 1, 3, padding=1, key=keys[3]),
        ]
    )


def images() -> Float[np.ndarray, "n 1 side side"]:
    digits, _ = load_digits(return_X_y=True)
    return (digits / 16).reshape(-1, 1, _SIDE, _SIDE)


def waveforms(count: int = 1024) -> Float[np.ndarray, "n 1 length"]:
    """Sums of three sinusoids of random strengths, frequencies and phases, in [0, 1]
    as the noise is.
    """
    rng = np.random.default_rng(0)
    strength, frequency, phase = rng.uniform(size=(3, count, 3, 1))
    angle = 2 * np.pi * (frequency * np.arange(_LENGTH) / 4 + phase)
    wave = (strength * np.sin(angle)).sum(1, keepdims=True)
    return 0.5 + 0.5 * wave / np.abs(wave).max(axis=2, keepdims=True)


def hinge(output: Array, sign: Array) -> Array:
    """Of the scores, for samples that are real (1) or noise (-1)."""
    score = 3 * output.reshape(len(output), -1).mean(1)
    return 2 * jax.nn.relu(1 - sign * score).mean()


@dataclasses.dataclass(frozen=True)
class Case:
    """A critic, its data, and how it is constrained."""

    title: str
    make: Callable[[PRNGKeyArray], Critic]
    data: Float[np.ndarray, "n 1 *size"]
    size: tuple[int, ...] | None = None
    peer: bool = False

    def contestant(self, key: PRNGKeyArray) -> tuple[Any, Any, Forward]:
        net = self.make(key)
        if self.peer:
            return peer(net, 1)
        # Without a size as users call it, which older versions know too.
        return wrapped(net, **({} if self.size is None else {"input_size": self.size}))

    def norms(self, weights: Sequence[Array]) -> Float[np.ndarray, " layers"]:
        """The true ones, of the layers with these weights."""
        layers = [
            eqx.tree_at(lambda conv: conv.weight, layer, weight)
            for layer, weight in zip(self.make(jr.key(0)).layers, weights, strict=True)
        ]
        if self.size is None:
            return np.array([layer_norm(layer) for layer in layers])
        return np.array([sized_norm(layer, self.size) for layer in layers])


def cases(*, sized: bool) -> list[Case]:
    size = (_SIDE, _SIDE) if sized else None
    found = []
    for kernel, channels in itertools.product((3, 5, 7, 9), (8, 64)):
        if sized and channels > 8:
            continue

        def make(
            key: PRNGKeyArray, kernel: int = kernel, channels: int = channels
        ) -> Critic:
            return image_critic(kernel, channels, key)

        case = Case(f"{kernel}x{kernel}/{channels}", make, images(), size)
        found.append(case)
        if kernel == 3:
            found.append(dataclasses.replace(case, peer=True))
    if not sized:
        found.append(Case("speech", speech_critic, waveforms()))
    return found


def readings(
    case: Case, optimizer: optax.GradientTransformation, args: argparse.Namespace
) -> tuple[Float[np.ndarray, "seeds times layers"], Float[np.ndarray, " checks"]]:
    """Excess of the true norms, and by how much summaries are below them."""
    step, excesses, below = None, [], []
    for seed in range(args.seeds):
        model, state, forward = case.contestant(jr.key(seed))
        # One step for all seeds, that it be compiled once.
        step = make_step(forward, hinge, optimizer) if step is None else step
        opt_state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))
        rng = np.random.default_rng(seed)
        sign = jnp.repeat(jnp.array([1.0, -1.0]), _BATCH)
        for count in range(args.steps + 1):
            real = case.data[rng.integers(0, len(case.data), _BATCH)]
            both = np.concatenate([real, rng.uniform(size=real.shape)])
            x = jnp.asarray(both, jnp.float32)
            before = model
            model, state, opt_state, weights = step(model, state, opt_state, x, sign)
            checked = count % _SUMMARIES_EVERY == 0 and not case.peer
            if not checked and count % args.every:
                continue
            norms = case.norms(weights)
            if count % args.every == 0:
                excesses.append(norms - 1)
            if checked:
                rows = spectrax.summary(before, state, enclosure=False)
                below.append(norms - [row.norm for row in rows])
    shape = (args.seeds, -1, len(excesses[0]))
    return np.reshape(excesses, shape), np.ravel(below)


def result(case: Case, optimizer: str, args: argparse.Namespace) -> dict[str, Any]:
    start = time.perf_counter()
    excess, below = readings(case, _OPTIMIZERS[optimizer](), args)
    return {
        "case": case.title,
        "name": _PEER if case.peer else "spectrax",
        "sized": case.size is not None,
        "optimizer": optimizer,
        "worst": float(excess.max()),
        "median": float(np.median(excess)),
        "readings": excess.size,
        "readings above 1e-2": int((excess > 1e-2).sum()),
        "summaries": below.size,
        "summaries low by 1e-3": int((below > 1e-3).sum()),
        "lowest summary": float(below.max()) if below.size else None,
        "worst per layer": excess.max(axis=(0, 1)).tolist(),
        "worst at each time": excess.max(axis=(0, 2)).tolist(),
        "seconds": time.perf_counter() - start,
    }


def print_summary(results: list[dict[str, Any]]) -> None:
    """The worst of spectrax's rows, by how fast the weights move."""
    own = [row for row in results if row["name"] == "spectrax"]
    groups = {
        "worst, Adam up to 1e-3 and SGD": (
            "worst",
            [row for row in own if row["optimizer"] != "adam-1e-2"],
        ),
        "worst of 3x3, Adam 1e-3": (
            "worst",
            [
                row
                for row in own
                if row["optimizer"] == "adam-1e-3" and row["case"].startswith("3x3")
            ],
        ),
        "worst, Adam 1e-2": (
            "worst",
            [row for row in own if row["optimizer"] == "adam-1e-2"],
        ),
        "worst median": ("median", own),
    }
    cells = [
        f"{title}: {max(row[column] for row in rows):.1e}"
        for title, (column, rows) in groups.items()
        if rows
    ]
    print("; ".join(cells), flush=True)


def main() -> None:
    """Prints a table, and writes it if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", help="also write the results to this file")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--every", type=int, default=5, help="steps to a reading")
    parser.add_argument("--only", nargs="+", help="titles of the critics to train")
    parser.add_argument(
        "--optimizers", nargs="+", choices=_OPTIMIZERS, default=list(_OPTIMIZERS)
    )
    parser.add_argument("--sized", action="store_true", help="bound at the input size")
    args = parser.parse_args()

    print("relative excess of the true norm over the bound, over layers, times, seeds")
    print(
        f"{'':9}{'':26}{'':10}{'worst':>10}{'median':>10}{'above 1e-2':>14}"
        f"{'summary low':>13}{'seconds':>9}"
    )
    results = []
    for case in cases(sized=args.sized):
        if args.only is not None and case.title not in args.only:
            continue
        for optimizer in args.optimizers:
            row = result(case, optimizer, args)
            results.append(row)
            above = f"{row['readings above 1e-2']}/{row['readings']}"
            low = f"{row['summaries low by 1e-3']}/{row['summaries']}"
            print(
                f"{row['case']:9}{row['name']:26}{optimizer:10}{row['worst']:10.1e}"
                f"{row['median']:10.1e}{above:>14}{'-' if case.peer else low:>13}"
                f"{row['seconds']:9.1f}",
                flush=True,
            )
            if args.json:
                with open(args.json, "w") as file:
                    json.dump(results, file, indent=1)
    print_summary(results)


if __name__ == "__main__":
    main()
