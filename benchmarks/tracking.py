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
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree
from sklearn.datasets import load_digits

import spectrax


SIZES = (64, 512, 512, 512, 10)
_Weights = list[Array]
# From model and state to the output, the new state, and the weights that were used.
Forward = Callable[[Any, Any, Array], tuple[Array, Any, _Weights]]


class _PeerMLP(eqx.Module):
    """The MLP with each layer in `equinox.nn.SpectralNorm`."""

    layers: list[eqx.nn.SpectralNorm]

    def __init__(self, mlp: eqx.nn.MLP, num_steps: int):
        keys = jr.split(jr.key(1), len(mlp.layers))
        self.layers = [
            eqx.nn.SpectralNorm(layer, "weight", num_steps, key=key)
            for layer, key in zip(mlp.layers, keys, strict=True)
        ]


def wrapped(mlp: eqx.nn.MLP, estimator: Any) -> tuple[Any, Any, Forward]:
    """The MLP wrapped, its state, and how to call it."""
    model, state = eqx.nn.make_with_state(spectrax.wrap)(mlp, estimator=estimator)

    def forward(model: Any, state: Any, x: Array) -> tuple[Array, Any, _Weights]:
        state = spectrax.advance(model, state)
        plain = spectrax.unwrap(model, state)
        return jax.vmap(plain)(x), state, [layer.weight for layer in plain.layers]

    return model, state, forward


def peer(mlp: eqx.nn.MLP, num_steps: int) -> tuple[Any, Any, Forward]:
    """The same for `equinox.nn.SpectralNorm`."""
    model, state = eqx.nn.make_with_state(_PeerMLP)(mlp, num_steps)

    def forward(model: Any, state: Any, x: Array) -> tuple[Array, Any, _Weights]:
        weights = []
        for i, layer in enumerate(model.layers):
            batched = jax.vmap(layer, in_axes=(0, None), out_axes=(0, None))
            x, state = batched(x, state)
            x = jax.nn.relu(x) if i + 1 < len(model.layers) else x
            u, v = state.get(layer.uv_index)
            weight = layer.layer.weight
            weights.append(weight / jnp.einsum("i,ij,j->", u, weight, v))
        return x, state, weights

    return model, state, forward


def _contestants() -> dict[str, Callable[[eqx.nn.MLP], tuple[Any, Any, Forward]]]:
    blocks: dict[str, spectrax.PowerIteration] = {
        "spectrax, default": spectrax.PowerIteration(),
        "spectrax, block of 4": spectrax.PowerIteration(block_size=4),
        "spectrax, block of 2": spectrax.PowerIteration(block_size=2),
        "spectrax, one vector": spectrax.PowerIteration(block_size=1),
        "spectrax, one vector, 10 steps": spectrax.PowerIteration(10, 1),
    }
    made: dict[str, Callable[[eqx.nn.MLP], tuple[Any, Any, Forward]]] = {
        name: lambda mlp, estimator=estimator: wrapped(mlp, estimator)
        for name, estimator in blocks.items()
    }
    for num_steps in (1, 10):
        name = f"equinox.nn.SpectralNorm, {num_steps} step" + "s" * (num_steps > 1)
        made[name] = lambda mlp, num_steps=num_steps: peer(mlp, num_steps)
    return made


def excesses(
    make: Callable[[eqx.nn.MLP], tuple[Any, Any, Forward]],
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

    def loss(model: Any, state: Any, x: Array, y: Array) -> tuple[Array, PyTree]:
        logits, state, weights = forward(model, state, x)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return losses.mean(), (state, weights)

    @eqx.filter_jit
    def step(model: Any, state: Any, opt_state: Any, x: Array, y: Array) -> PyTree:
        gradient, (state, weights) = eqx.filter_grad(loss, has_aux=True)(
            model, state, x, y
        )
        updates, opt_state = optimizer.update(gradient, opt_state)
        return eqx.apply_updates(model, updates), state, opt_state, weights

    rng = np.random.default_rng(seed)
    excesses = []
    for count in range(steps + 1):
        batch = rng.integers(0, len(data[0]), 64)
        x, y = (array[batch] for array in data)
        model, state, opt_state, weights = step(model, state, opt_state, x, y)
        if count >= 20 and count % 20 == 0:
            norms = [np.linalg.norm(np.asarray(w, np.float64), 2) for w in weights]
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
