"""What spectral normalization adds to a training step, library by library.

Four square linear layers with ReLU in between, Adam on all weights, one step of power
iteration per step of training (spectrax: its default). Each contestant trains in a
process of its own, so that no library's threads disturb another's; the processes stay
alive and take turns, ten steps at a time, every round starting with another one. Each
library's ratio is that to its own plain step. Libraries that are not installed are left
out: `pip install flax torch` brings both.

    python benchmarks/peers.py [--json FILE] [--rounds 12] [--only 256/64 ...]
"""

import argparse
import functools
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np


_CASES = ((256, 64), (1024, 64), (1024, 512), (2048, 64))
_DEPTH = 4
_STEPS = 10
_RATE = 1e-3


def _data(width: int, batch: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, batch, width)).astype(np.float32)
    return x, y


def _spectrax(width: int, batch: int, *, normalized: bool) -> Callable[[], None]:
    import equinox as eqx
    import jax
    import jax.numpy as jnp
    from rotation import plain_forward, train_loop, wrapped_forward

    import spectrax

    # As many linear layers as the others have, and no activation after the last.
    net = eqx.nn.MLP(width, width, width, _DEPTH - 1, key=jax.random.key(0))
    x, y = _data(width, batch)
    data = jnp.asarray(x), jnp.asarray(y)
    if not normalized:
        return train_loop(plain_forward, net, None, data, _STEPS)
    model, state = spectrax.constrain(net)
    return train_loop(wrapped_forward, model, state, data, _STEPS)


def _flax(width: int, batch: int, *, normalized: bool) -> Callable[[], None]:
    import flax.linen as nn  # pyright: ignore[reportMissingImports]
    import jax
    import optax

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            for i in range(_DEPTH):
                layer = nn.Dense(width)
                if normalized:
                    x = nn.SpectralNorm(layer)(x, update_stats=True)
                else:
                    x = layer(x)
                x = nn.relu(x) if i + 1 < _DEPTH else x
            return x

    x, y = (jax.numpy.asarray(array) for array in _data(width, batch))
    net, optimizer = Net(), optax.adam(_RATE)
    variables = net.init(jax.random.key(0), x)
    params, stats = variables["params"], variables.get("batch_stats", {})

    def loss(params: Any, stats: Any) -> Any:
        variables = {"params": params, "batch_stats": stats}
        output, new = net.apply(variables, x, mutable=["batch_stats"])
        return ((output - y) ** 2).mean(), new.get("batch_stats", {})

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def step(params: Any, stats: Any, opt_state: Any) -> Any:
        gradient, stats = jax.grad(loss, has_aux=True)(params, stats)
        updates, opt_state = optimizer.update(gradient, opt_state)
        return optax.apply_updates(params, updates), stats, opt_state

    carry = [params, stats, optimizer.init(params)]

    def run() -> None:
        for _ in range(_STEPS):
            carry[:] = step(*carry)
        jax.block_until_ready(carry)

    return run


def _torch(width: int, batch: int, *, normalized: bool) -> Callable[[], None]:
    import torch  # pyright: ignore[reportMissingImports]

    def layer() -> Any:
        linear = torch.nn.Linear(width, width)
        spectral_norm = torch.nn.utils.parametrizations.spectral_norm
        return spectral_norm(linear) if normalized else linear

    layers: list[Any] = [layer()]
    for _ in range(_DEPTH - 1):
        layers += [torch.nn.ReLU(), layer()]
    net = torch.nn.Sequential(*layers)
    optimizer = torch.optim.Adam(net.parameters(), lr=_RATE)
    x, y = (torch.from_numpy(array) for array in _data(width, batch))

    def run() -> None:
        for _ in range(_STEPS):
            optimizer.zero_grad()
            ((net(x) - y) ** 2).mean().backward()
            optimizer.step()

    return run


_LIBRARIES = {"spectrax": _spectrax, "flax": _flax, "torch": _torch}


def _work(library: str, width: int, batch: int, *, normalized: bool) -> None:
    """A contestant: runs its steps whenever a line comes in, and says how long."""
    run = _LIBRARIES[library](width, batch, normalized=normalized)
    run()
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        run()
        print(1e3 * (time.perf_counter() - start) / _STEPS, flush=True)


class _Contestant:
    def __init__(self, library: str, case: str, *, normalized: bool):
        self.library = library
        self.normalized = normalized
        self.times: list[float] = []
        command = [sys.executable, __file__, "--work", library, "--only", case]
        self.process = subprocess.Popen(
            command + ["--normalized"] * normalized,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._line() == "ready", library

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def turn(self) -> None:
        assert self.process.stdin is not None
        print(file=self.process.stdin, flush=True)
        self.times.append(float(self._line()))

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def _compare(case: str, libraries: list[str], rounds: int) -> list[dict[str, Any]]:
    field = [
        _Contestant(library, case, normalized=normalized)
        for library in libraries
        for normalized in (False, True)
    ]
    for i in range(rounds):
        first = i % len(field)
        for contestant in field[first:] + field[:first]:
            contestant.turn()
    rows = []
    for plain, other in zip(field[::2], field[1::2], strict=True):
        base, time_taken = np.median(plain.times), np.median(other.times)
        row = {
            "case": case,
            "library": plain.library,
            "plain milliseconds": float(base),
            "milliseconds": float(time_taken),
            "ratio": float(time_taken / base),
        }
        rows.append(row)
        print(
            f"{case:12}{plain.library:12}{base:12.2f}{time_taken:12.2f}"
            f"{row['ratio']:8.2f}",
            flush=True,
        )
    for contestant in field:
        contestant.stop()
    return rows


def main() -> None:
    """Prints a table, and writes it if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", help="also write the results to this file")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--only", nargs="+", help="cases to run, as width/batch")
    parser.add_argument("--work", choices=_LIBRARIES, help=argparse.SUPPRESS)
    parser.add_argument("--normalized", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    cases = args.only or [f"{width}/{batch}" for width, batch in _CASES]
    if args.work:
        width, batch = (int(number) for number in cases[0].split("/"))
        _work(args.work, width, batch, normalized=args.normalized)
        return
    libraries = [name for name in _LIBRARIES if importlib.util.find_spec(name)]
    print(f"{'case':12}{'library':12}{'plain ms':>12}{'ms':>12}{'ratio':>8}")
    rows = [row for case in cases for row in _compare(case, libraries, args.rounds)]
    if args.json:
        with open(args.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
