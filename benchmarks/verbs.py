"""How long a user waits for each verb, on a network as it is used.

Each verb is measured in a process of its own, so that nothing is compiled yet, and
beside the plain network in the same process: a first call (compilation and run) beside
the first gradient of the squared error of a batch of 32, a later call (median of
several) beside a later gradient, the compilation of a training step (Adam) beside that
of the plain step. With `wrap` comes how far the true norms of the freshly wrapped
network are from the bound, before its first update (float64, `truth.py`). The network
is wrapped in every process anew: a run takes six times as long as `wrap` at the least.

    python benchmarks/verbs.py [--json FILE] [--model resnet18 | critic]
        [--only wrap advance step summary true-norms certified]
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.random as jr
import numpy as np
from jaxtyping import Array
from networks import layers_of, resnet18, sngan_critic
from rotation import plain_forward, train_loop, wrapped_forward
from truth import layer_norm

import spectrax


_MODELS = {"resnet18": resnet18, "critic": sngan_critic}
_BATCH = 32
_LATER = 7
_Row = dict[str, Any]
_Measure = Callable[[Any], list[_Row]]


def seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(eqx.filter(function(), eqx.is_array))
    return time.perf_counter() - start


def later(function: Callable[[], Any]) -> float:
    """The median of several calls, after one that may compile."""
    seconds(function)
    return float(np.median([seconds(function) for _ in range(_LATER)]))


def wrap(net: Any) -> tuple[Any, Any]:
    return spectrax.constrain(net)


def batch(net: Any) -> tuple[Array, Array]:
    x_key, y_key = jr.split(jr.key(1))
    x = jr.normal(x_key, (_BATCH, 3, 32, 32))
    return x, jr.normal(y_key, jax.eval_shape(jax.vmap(net), x).shape)


def gradient(net: Any) -> Callable[[], Any]:
    """Value and gradient of the plain network, to be compiled at the first call."""
    x, y = batch(net)

    @eqx.filter_jit
    @eqx.filter_value_and_grad
    def value_and_gradient(net: Any) -> Array:
        return ((jax.vmap(net)(x) - y) ** 2).mean()

    return lambda: value_and_gradient(net)


def wrap_rows(net: Any) -> list[_Row]:
    start = time.perf_counter()
    model, state = wrap(net)
    jax.block_until_ready(eqx.filter((model, state), eqx.is_array))
    found = time.perf_counter() - start
    plain = seconds(gradient(net))
    # Eight points for each tap are enough for wide layers of few taps.
    norms = [
        layer_norm(layer, fewest=24)
        for layer in layers_of(spectrax.unwrap(model, state))
    ]
    row = _row("wrap", found, "first gradient", plain)
    return [row | {"errors of the norms": [norm - 1 for norm in norms]}]


def advance_rows(net: Any) -> list[_Row]:
    model, state = wrap(net)
    compiled = eqx.filter_jit(spectrax.advance), eqx.filter_jit(spectrax.unwrap)
    advance, unwrap = (lambda verb=verb: verb(model, state) for verb in compiled)
    plain = gradient(net)
    first, plain_first = seconds(advance), seconds(plain)
    plain_later = later(plain)
    return [
        _row("first advance", first, "first gradient", plain_first),
        _row("later advance", later(advance), "later gradient", plain_later),
        _row("later unwrap", later(unwrap), "later gradient", plain_later),
    ]


def step_rows(net: Any) -> list[_Row]:
    data = batch(net)
    loop = train_loop(wrapped_forward, *wrap(net), data, 1)
    plain = train_loop(plain_forward, net, None, data, 1)
    compilations = loop.compile_seconds, plain.compile_seconds
    return [_row("step, compilation", compilations[0], "plain step", compilations[1])]


def first_rows(title: str, verb: Callable[..., Any], **options: Any) -> _Measure:
    """Of one call of a verb on a wrapped network."""

    def measure(net: Any) -> list[_Row]:
        model, state = wrap(net)
        found = seconds(lambda: verb(model, state, **options))
        return [_row(title, found, "first gradient", seconds(gradient(net)))]

    return measure


def _row(verb: str, found: float, beside: str, plain: float) -> _Row:
    return {"verb": verb, "seconds": found, "beside": beside, "beside seconds": plain}


_MEASURES: dict[str, _Measure] = {
    "wrap": wrap_rows,
    "advance": advance_rows,
    "step": step_rows,
    "summary": first_rows("summary", spectrax.summary),
    "true-norms": first_rows(
        "summary, true norms", spectrax.summary, true_norm=True, enclosure=False
    ),
    "certified": first_rows("unwrap, certified", spectrax.unwrap, certified=True),
}


def child(verb: str, model: str) -> list[_Row]:
    """What a process of its own prints."""
    net = _MODELS[model](jr.key(0))
    jax.block_until_ready(eqx.filter(net, eqx.is_array))
    return _MEASURES[verb](net)


def in_fresh_process(verb: str, model: str) -> list[_Row]:
    command = [sys.executable, __file__, "--model", model, "--child", verb]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Prints a table, and writes it if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", help="also write the results to this file")
    parser.add_argument("--model", choices=_MODELS, default="resnet18")
    parser.add_argument("--only", nargs="+", choices=_MEASURES, default=list(_MEASURES))
    parser.add_argument("--child", choices=_MEASURES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(args.child, args.model)))
        return
    print(f"{args.model:22}{'seconds':>10}  {'beside plain':16}{'seconds':>10}", end="")
    print(f"{'ratio':>9}")
    rows: list[_Row] = []
    for verb in args.only:
        for row in in_fresh_process(verb, args.model):
            rows.append(row)
            found, plain = row["seconds"], row["beside seconds"]
            print(
                f"{row['verb']:22}{found:10.3f}  {row['beside']:16}{plain:10.3f}"
                f"{found / plain:9.3f}",
                flush=True,
            )
            if errors := row.get("errors of the norms"):
                worst = max(map(abs, errors))
                print(
                    f"  largest |norm / bound - 1| of {len(errors)}: {worst:.1e}",
                    flush=True,
                )
        if args.json:
            with open(args.json, "w") as file:
                json.dump({"model": args.model, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
