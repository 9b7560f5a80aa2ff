"""How compilation and a training step grow with the depth of an MLP, as ratios to the
plain one of the same depth (Adam, batch 64), the plain one twice.

    python benchmarks/growth.py [--json FILE] [--width 256] [--depths 4 16 48]
"""

import argparse
import json
from typing import Any

import equinox as eqx
import jax
import jax.random as jr
from jaxtyping import Array
from rotation import Loop, rotate, train_step

import spectrax


def _plain(model: Any, state: Any, x: Array) -> tuple[Array, Any]:
    return jax.vmap(model)(x), state


def _wrapped(model: Any, state: Any, x: Array) -> tuple[Array, Any]:
    state = spectrax.advance(model, state)
    return jax.vmap(spectrax.unwrap(model, state))(x), state


def main() -> None:
    """Prints a table, and writes it if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", help="also write the results to this file")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 16, 48])
    parser.add_argument("--rounds", type=int, default=6)
    args = parser.parse_args()
    x, y = jr.normal(jr.key(0), (2, 64, args.width))
    rows = []
    print(f"{'depth':>6}{'plain ms':>10}{'again':>8}{'spectrax':>10}{'compile':>9}")
    for depth in args.depths:
        net = eqx.nn.MLP(args.width, args.width, args.width, depth - 1, key=jr.key(1))
        loops = {}
        for name in ("plain", "again", "spectrax"):
            step, start = train_step(_wrapped if name == "spectrax" else _plain, x, y)
            model, state = net, None
            if name == "spectrax":
                model, state = eqx.nn.make_with_state(spectrax.wrap)(net)
            loops[name] = Loop(step, start(model, state), 10)
        times = rotate(loops, args.rounds)
        row = {
            "depth": depth,
            "plain milliseconds": times["plain"],
            "again": times["again"] / times["plain"],
            "spectrax": times["spectrax"] / times["plain"],
            "compilation": loops["spectrax"].compile_seconds
            / loops["again"].compile_seconds,
        }
        rows.append(row)
        print(
            f"{depth:6d}{row['plain milliseconds']:10.2f}{row['again']:8.2f}"
            f"{row['spectrax']:10.2f}{row['compilation']:9.1f}",
            flush=True,
        )
    if args.json:
        with open(args.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
