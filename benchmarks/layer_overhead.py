"""What each ready layer adds to a training step of that layer alone.

Ratios to the step (Adam, all weights trained) with the plain Equinox layer, which is
timed twice to show the noise; `one vector` is power iteration with a block of 1. A
layer alone is the worst case for the cost of its norm where nothing else is computed.

    python benchmarks/layer_overhead.py [--json FILE] [--rounds 15]
"""

import argparse
import json
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.random as jr
from jaxtyping import Array
from rotation import Loop, rotate, train_loop

import spectrax


KEY = jr.key(0)
ONE_VECTOR = {"estimator": spectrax.PowerIteration(block_size=1)}


def on_one(layer: Any, x: Array) -> Array:
    return layer(x)


def on_itself(attention: Any, x: Array) -> Array:
    return attention(x, x, x)


def linear() -> eqx.nn.Linear:
    return eqx.nn.Linear(512, 512, key=KEY)


def adaptive(**options: Any) -> Callable[..., Any]:
    def make(**estimator: Any) -> Any:
        return spectrax.nn.AdaptiveSpectralNorm(linear(), **options, **estimator)

    return make


def ready(kind: Callable[..., Any], *sizes: int, **options: Any) -> Callable[..., Any]:
    return lambda **estimator: kind(*sizes, **options, **estimator, key=KEY)


# Name: the plain layer, the constrained one, the shape of a batch, the call.
_ATTENTION = (16, 64, 256)
CASES: dict[str, tuple[Any, Callable[..., Any], tuple[int, ...], Any]] = {
    "SpectralLinear": (
        linear,
        ready(spectrax.nn.SpectralLinear, 512, 512),
        (256, 512),
        on_one,
    ),
    "SpectralConv2d": (
        lambda: eqx.nn.Conv2d(64, 64, 3, padding=1, key=KEY),
        ready(spectrax.nn.SpectralConv2d, 64, 64, 3, padding=1),
        (16, 64, 32, 32),
        on_one,
    ),
    "SpectralMultiheadAttention": (
        lambda: eqx.nn.MultiheadAttention(8, 256, key=KEY),
        ready(spectrax.nn.SpectralMultiheadAttention, 8, 256),
        _ATTENTION,
        on_itself,
    ),
    "the same, per_head": (
        lambda: eqx.nn.MultiheadAttention(8, 256, key=KEY),
        ready(spectrax.nn.SpectralMultiheadAttention, 8, 256, per_head=True),
        _ATTENTION,
        on_itself,
    ),
    "AdaptiveSpectralNorm, fixed": (linear, adaptive(), (256, 512), on_one),
    "AdaptiveSpectralNorm, learned": (
        linear,
        adaptive(learnable_bound=True),
        (256, 512),
        on_one,
    ),
}


def contestants(name: str, steps: int) -> dict[str, Loop]:
    plain, constrained, shape, call = CASES[name]
    x = jr.normal(KEY, shape)
    y = jax.vmap(lambda x: call(plain(), x))(x)

    def forward(model: Any, state: Any, x: Array) -> tuple[Array, Any]:
        if state is not None:
            state = spectrax.advance(model, state)
            model = spectrax.unwrap(model, state, lazy=True)
        return jax.vmap(lambda x: call(model, x))(x), state

    made = eqx.nn.make_with_state(constrained)
    models = {
        "plain": (plain(), None),
        "plain again": (plain(), None),
        "constrained": made(),
        "one vector": made(**ONE_VECTOR),
    }
    return {
        title: train_loop(forward, model, state, (x, y + 1), steps)
        for title, (model, state) in models.items()
    }


def main() -> None:
    """Prints a table, and writes it if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", help="also write the results to this file")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    columns = ("plain", "plain again", "constrained", "one vector")
    print(f"{'ratio to the plain step':<32}{'plain, ms':>10}", end="")
    print("".join(f"{column:>14}" for column in columns[1:]))
    rows = []
    for name in CASES:
        times = rotate(contestants(name, steps=5), args.rounds)
        base = (times["plain"] + times["plain again"]) / 2
        cells = "".join(f"{times[column] / base:>14.3f}" for column in columns[1:])
        print(f"{name:<32}{base:>10.2f}{cells}", flush=True)
        rows.append({"name": name, "milliseconds": times})
    if args.json:
        with open(args.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
