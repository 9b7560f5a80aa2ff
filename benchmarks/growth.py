"""How compilation and a training step grow with the depth of an MLP, as ratios to the
plain one of the same depth (Adam, batch 64), the plain one twice.

    python benchmarks/growth.py [--json FILE] [--width 256] [--depths 4 16 48]
"""

import argparse
import json

import equinox as eqx
import jax.random as jr
from rotation import plain_forward, rotate, train_loop, wrapped_forward

import spectrax


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
        model, state = spectrax.constrain(net)
        loops = {
            "plain": train_loop(plain_forward, net, None, (x, y), 10),
            "again": train_loop(plain_forward, net, None, (x, y), 10),
            "spectrax": train_loop(wrapped_forward, model, state, (x, y), 10),
        }
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
