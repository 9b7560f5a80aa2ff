"""How far the true norm of a constrained weight exceeds its bound while training.

Trains an MLP 64-512-512-512-10 on scikit-learn's handwritten digits with Adam, batches
of 64, for 300 steps, and every 20 steps from step 20 on takes the float64 SVD of the
weights that the forward pass has just used. The peers are trained in the same run, from
the same weights, on the same batches: `equinox.nn.SpectralNorm` and one-vector power
iteration.

    python benchmarks/tracking.py [--json FILE] [--steps 300] [--seeds 2]
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, Float, Int
from sklearn.datasets import load_digits
from training import Forward, make_step, peer, wrapped
from truth import matrix_norm

import spectrax


SIZES = (64, 512, 512, 512, 10)
_Make = Callable[[eqx.nn.MLP], tuple[Any, Any, Forward]]


def _contestants() -> dict[str, _Make]:
    blocks: dict[str, spectrax.PowerIteration] = {
        "spectrax, default": spectrax.PowerIteration(),
        "spectrax, block of 4": spectrax.PowerIteration(block_size=4),
        "spectrax, block of 2": spectrax.PowerIteration(block_size=2),
        "spectrax, one vector": spectrax.PowerIteration(block_size=1),
        "spectrax, one vector, 10 steps": spectrax.PowerIteration(10, 1),
    }
    made: dict[str, _Make] = {
        name: lambda mlp, estimator=estimator: wrapped(mlp, estimator=estimator)
        for name, estimator in blocks.items()
    }
    for num_steps in (1, 10):
        name = f"equinox.nn.SpectralNorm, {num_steps} step" + "s" * (num_steps > 1)
        made[name] = lambda mlp, num_steps=num_steps: peer(mlp, num_steps)
    return made


def _objective(logits: Array, labels: Array) -> Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def excesses(
    make: _Make,
    learning_rate: float,
    seed: int,
    steps: int,
    data: tuple[Float[Array, "n 64"], Int[Array, " n"]],
) -> Float[np.ndarray, "times layers"]:
    """Of the true norms over the bound, while one network trains."""
    mlp = eqx.nn.MLP(64, 10, SIZES[1], len(SIZES) - 2, key=jr.key(seed))
    model, state, forward = make(mlp)
    optimizer = optax.adam(learning_rate)
    opt_state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))
    step = make_step(forward, _objective, optimizer)

    rng = np.random.default_rng(seed)
    excesses = []
    for count in range(steps + 1):
        batch = rng.integers(0, len(data[0]), 64)
        x, y = (array[batch] for array in data)
        model, state, opt_state, weights = step(model, state, opt_state, x, y)
        if count >= 20 and count % 20 == 0:
            norms = [matrix_norm(w) for w in weights]
            excesses.append(np.array(norms) - 1)
    return np.array(excesses)


def main() -> None:
    """Prints a table, and writes it if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", help="also write the results to this file")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    images, labels = load_digits(return_X_y=True)
    data = jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels)

    print("relative excess of the true norm over the bound, over layers, times, seeds")
    print(f"{'':32}{'Adam':>8}{'worst':>10}{'median':>10}{'seconds':>9}")
    results = []
    for name, make in _contestants().items():
        for learning_rate in (1e-3, 1e-2):
            start = time.perf_counter()
            excess = np.concatenate(
                [
                    excesses(make, learning_rate, seed, args.steps, data)
                    for seed in range(args.seeds)
                ]
            )
            seconds = time.perf_counter() - start
            result = {
                "name": name,
                "learning rate": learning_rate,
                "worst": float(excess.max()),
                "median": float(np.median(excess)),
                "worst per layer": excess.max(axis=0).tolist(),
            }
            results.append(result)
            print(
                f"{name:32}{learning_rate:8.0e}{result['worst']:10.1e}"
                f"{result['median']:10.1e}{seconds:9.1f}",
                flush=True,
            )
    if args.json:
        with open(args.json, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
