"""Power iteration beside the memory it has to read.

A step reads a weight twice: once for its adjoint, once for itself. The floor is twice
the time of reading it once, as the largest entry of a weight takes, measured in the
same run on as many weights as do not fit the cache together.

    python benchmarks/power_step.py [--json FILE] [--most 8192]
"""

import argparse
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
from rotation import medians

import spectrax


_BYTES = 100e6


def _measure(size: int) -> dict[str, Any]:
    count = max(2, min(32, round(_BYTES / (4 * size**2))))
    weights = [jr.normal(jr.key(i), (size, size)) for i in range(count)]
    functions: dict[str, Callable[[], Any]] = {}
    read = jax.jit(lambda weights: [jnp.max(w) for w in weights])
    functions["read"] = lambda: read(weights)

    @jax.jit
    def step(weights: list[jax.Array], states: list[spectrax.PowerState]) -> Any:
        return [
            spectrax.power_iterate(w, s) for w, s in zip(weights, states, strict=True)
        ]

    for block in (1, 4, 8):
        init = jax.jit(
            lambda w, block=block: spectrax.init_power_state(w, block_size=block)
        )
        states = [init(w) for w in weights]
        functions[f"block of {block}"] = lambda states=states: step(weights, states)
    times = medians(functions, 2 * len(functions))
    floor = 2 * times["read"] / count
    row: dict[str, Any] = {"size": size, "floor": 1e3 * floor}
    row |= {n: times[n] / count / floor for n in functions if n != "read"}
    return row


def main() -> None:
    """Prints a table, and writes it if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", help="also write the results to this file")
    parser.add_argument("--most", type=int, default=8192)
    args = parser.parse_args()
    print("a step's time over that of reading the weight twice")
    rows = []
    for size in (256, 512, 1024, 2048, 4096, 8192):
        if size > args.most:
            break
        row = _measure(size)
        rows.append(row)
        ratios = "".join(f"   {n}: {row[n]:5.2f}" for n in row if n.startswith("block"))
        print(f"{size:6d}   floor {row['floor']:8.1f} us{ratios}", flush=True)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
