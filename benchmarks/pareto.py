"""How closely the norm is followed, against what a training step costs.

For blocks of 1 to 16 vectors and 1 to 10 steps of power iteration per update: the worst
and the median excess of the true norm over the bound in the runs of `tracking.py` (Adam
1e-3), and the time of a training step of its MLP beside the plain one.

    python benchmarks/pareto.py [--json FILE] [--figure FILE] [--seeds 2] [--rounds 12]
"""

import argparse
import json
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from rotation import Loop, plain_forward, rotate, train_loop
from sklearn.datasets import load_digits
from tracking import excesses, SIZES
from training import Forward, peer, wrapped

import spectrax


_STEPS = 300
_RATE = 1e-3
_SPECTRAX = ((1, 1), (1, 2), (1, 5), (1, 10), (2, 1), (4, 1), (4, 2), (8, 1), (16, 1))
_PEER = (1, 2, 5, 10)


def _name(block: int, steps: int) -> str:
    vectors = "1 vector" if block == 1 else f"{block} vectors"
    return f"{vectors}, {steps} step" + "s" * (steps > 1)


def _contestants() -> dict[str, Callable[[eqx.nn.MLP], tuple[Any, Any, Forward]]]:
    made: dict[str, Callable[[eqx.nn.MLP], tuple[Any, Any, Forward]]] = {}
    for block, steps in _SPECTRAX:
        estimator = spectrax.PowerIteration(steps, block)
        made[_name(block, steps)] = lambda mlp, e=estimator: wrapped(mlp, estimator=e)
    for steps in _PEER:
        made["equinox, " + _name(1, steps)] = lambda mlp, n=steps: peer(mlp, n)
    return made


def _costs(rounds: int) -> dict[str, float]:
    x_key, y_key, key = jr.split(jr.key(0), 3)
    batch = jr.normal(x_key, (64, SIZES[0])), jr.normal(y_key, (64, SIZES[-1]))
    mlp = eqx.nn.MLP(SIZES[0], SIZES[-1], SIZES[1], len(SIZES) - 2, key=key)
    loops: dict[str, Loop] = {}
    for name in ("plain", "plain again"):
        loops[name] = train_loop(plain_forward, mlp, None, batch, 10)
    for name, make in _contestants().items():
        model, state, forward = make(mlp)

        def without_weights(*args: Any, forward: Forward = forward) -> Any:
            return forward(*args)[:2]

        loops[name] = train_loop(without_weights, model, state, batch, 10)
    times = rotate(loops, rounds)
    base = (times.pop("plain") + times["plain again"]) / 2
    return {name: time / base for name, time in times.items()}


def _excesses(seeds: int) -> dict[str, np.ndarray]:
    images, labels = load_digits(return_X_y=True)
    data = jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels)
    return {
        name: np.concatenate(
            [excesses(make, _RATE, seed, _STEPS, data) for seed in range(seeds)]
        )
        for name, make in _contestants().items()
    }


def _draw(rows: list[dict[str, Any]], file: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for library, marker in (("spectrax", "o"), ("equinox", "s")):
        chosen = [row for row in rows if row["library"] == library]
        axes.plot(
            [row["ratio"] for row in chosen],
            [row["worst"] for row in chosen],
            marker,
            label=library,
        )
        for row in chosen:
            axes.annotate(
                row["name"].removeprefix("equinox, "),
                (row["ratio"], row["worst"]),
                xytext=(4, 3),
                textcoords="offset points",
                fontsize=7,
            )
    axes.set_yscale("log")
    axes.set_xlabel("time of a training step / plain step")
    axes.set_ylabel("worst excess of the norm over its bound")
    axes.legend()
    figure.savefig(file, dpi=120)


def main() -> None:
    """Prints a table, writes and draws it if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", help="also write the results to this file")
    parser.add_argument("--figure", help="also draw them to this file")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=12)
    args = parser.parse_args()
    costs = _costs(args.rounds)
    print(f"{'plain again':34}{costs.pop('plain again'):8.2f}")
    found = _excesses(args.seeds)
    rows = []
    for name, ratio in costs.items():
        row = {
            "library": "equinox" if name.startswith("equinox") else "spectrax",
            "name": name,
            "ratio": ratio,
            "worst": float(found[name].max()),
            "median": float(np.median(found[name])),
        }
        rows.append(row)
        print(f"{name:34}{ratio:8.2f}{row['worst']:10.1e}{row['median']:10.1e}")
    if args.json:
        with open(args.json, "w") as file:
            json.dump(rows, file, indent=1)
    if args.figure:
        _draw(rows, args.figure)


if __name__ == "__main__":
    main()
