"""What constraining every weight adds to a training step, to its compilation and to its
memory.

Ratios to the plain step (Adam, all weights trained), the plain one twice to show the
noise. Rows: MLPs of four square layers, as width/batch; a convolutional net (seven 3x3
convolutions of 64 to 256 channels on 32x32 images, batch 32); the critic of SN-GAN and
ResNet-18 (32x32 images, batch 32; a third of the rounds); self-attention (256 features,
8 heads, 64 tokens, batch 16). `shared` advances once and has two forward
passes, beside a plain step with two. `forward` is inference through `unwrap`.

    python benchmarks/overhead.py [--json FILE] [--rounds 12] [--only 256/64 conv ...]
"""

import argparse
import json
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, PRNGKeyArray, PyTree
from networks import call, resnet18, sngan_critic, with_peers
from rotation import Loop, plain_forward, rotate, train_loop, wrapped_forward

import spectrax


_MLPS = ((256, 64), (1024, 64), (1024, 512), (2048, 64))
_CONVOLUTIONS = ((3, 64, 1), (64, 64, 1), (64, 64, 1), (64, 128, 2))
_CONVOLUTIONS += ((128, 128, 1), (128, 256, 2), (256, 256, 1))
_Make = Callable[[Any], tuple[Any, Any]]
_Forward = Callable[[Any, Any, Array], tuple[Array, Any]]


class _Chain(eqx.Module):
    """Layers with ReLU in between and residual connections where shapes allow; each may
    be an `equinox.nn.SpectralNorm`.
    """

    layers: list[Any]
    convolutional: bool = eqx.field(static=True)

    def __call__(self, x: Array, state: Any = None) -> Any:
        for i, layer in enumerate(self.layers):
            if i + 1 == len(self.layers) and self.convolutional:
                x = x.mean(axis=(1, 2))
            y, state = call(layer, x, state)
            if i + 1 < len(self.layers):
                y = jax.nn.relu(y)
                y = y + x if self.convolutional and y.shape == x.shape else y
            x = y
        return x if state is None else (x, state)


class _Attention(eqx.Module):
    attention: eqx.nn.MultiheadAttention

    def __call__(self, x: Array) -> Array:
        return self.attention(x, x, x)


def _mlp(width: int, key: PRNGKeyArray) -> _Chain:
    keys = jr.split(key, 4)
    return _Chain(
        [eqx.nn.Linear(width, width, key=k) for k in keys], convolutional=False
    )


def _conv_net(key: PRNGKeyArray) -> _Chain:
    keys = jr.split(key, len(_CONVOLUTIONS) + 1)
    layers: list[Any] = [
        eqx.nn.Conv2d(i, o, 3, stride=s, padding=1, key=k)
        for (i, o, s), k in zip(_CONVOLUTIONS, keys, strict=False)
    ]
    return _Chain([*layers, eqx.nn.Linear(256, 10, key=keys[-1])], convolutional=True)


def _peer_forward(model: Any, state: Any, x: Array) -> tuple[Array, Any]:
    return jax.vmap(model, in_axes=(0, None), out_axes=(0, None))(x, state)


def _plain_twice(model: Any, state: Any, x: Array) -> tuple[Array, Any]:
    return jax.vmap(model)(x) + jax.vmap(model)(2 * x), state


def _wrapped_twice(model: Any, state: Any, x: Array) -> tuple[Array, Any]:
    state = spectrax.advance(model, state)
    plain = spectrax.unwrap(model, state, lazy=True)
    return jax.vmap(plain)(x) + jax.vmap(plain)(2 * x), state


def _wrap(**kwargs: Any) -> _Make:
    return lambda net: spectrax.constrain(net, **kwargs)


def _steps(
    net: Any, x: Array, y: Array, steps: int, contestants: dict[str, Any]
) -> dict[str, Loop]:
    loops = {}
    for name, (make, forward) in contestants.items():
        model, state = make(net)
        loops[name] = train_loop(forward, model, state, (x, y), steps)
    return loops


def _inference(net: Any, x: Array, steps: int) -> dict[str, Loop]:
    model, state = _wrap()(net)

    def forward(carry: PyTree) -> PyTree:
        model, x, _ = carry
        return model, x, jax.vmap(model)(x)

    nets = {
        "plain": net,
        "plain again": net,
        "unwrapped": spectrax.unwrap(model, state),
    }
    start = jax.eval_shape(jax.vmap(net), x)
    zeros = jnp.zeros(start.shape, start.dtype)
    return {name: Loop(forward, (n, x, zeros), steps) for name, n in nets.items()}


def _report(title: str, loops: dict[str, Loop], rounds: int) -> list[dict[str, Any]]:
    times = rotate(loops, rounds)
    base = (times["plain"] + times["plain again"]) / 2
    reference = loops["plain again"]
    rows = []
    for name, loop in loops.items():
        row = {
            "case": title,
            "name": name,
            "milliseconds": times[name],
            "ratio": times[name] / base,
            "compilation": loop.compile_seconds / reference.compile_seconds,
            "more temporary MB": (loop.temporary_bytes - reference.temporary_bytes)
            / 1e6,
        }
        rows.append(row)
        print(
            f"{title:18}{name:30}{row['milliseconds']:10.2f}{row['ratio']:8.3f}"
            f"{row['compilation']:9.1f}{row['more temporary MB']:10.2f}",
            flush=True,
        )
    return rows


def _contestants(*, peer: bool) -> dict[str, tuple[_Make, _Forward]]:
    one = spectrax.PowerIteration(block_size=1)
    none: _Make = lambda net: (net, None)  # noqa: E731
    found: dict[str, tuple[_Make, _Forward]] = {
        "plain": (none, plain_forward),
        "plain again": (none, plain_forward),
        "spectrax": (_wrap(), wrapped_forward),
        "spectrax, one vector": (_wrap(estimator=one), wrapped_forward),
    }
    if peer:
        make: _Make = lambda net: eqx.nn.make_with_state(with_peers)(net)  # noqa: E731
        found["equinox.nn.SpectralNorm"] = (make, _peer_forward)
    return found


def main() -> None:
    """Prints a table, and writes it if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", help="also write the results to this file")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--only", nargs="+", help="titles of the rows to run")
    args = parser.parse_args()
    print(f"{'':48}{'ms':>10}{'ratio':>8}{'compile':>9}{'more MB':>10}")
    rows: list[dict[str, Any]] = []

    def wanted(title: str) -> bool:
        return args.only is None or title in args.only

    x_key, y_key, key = jr.split(jr.key(0), 3)
    for width, batch in _MLPS:
        net = _mlp(width, key)
        x, y = jr.normal(x_key, (batch, width)), jr.normal(y_key, (batch, width))
        title = f"{width}/{batch}"
        if wanted(title):
            loops = _steps(net, x, y, 10, _contestants(peer=True))
            rows += _report(title, loops, args.rounds)
        if wanted(title + " shared"):
            both = {
                "plain": (lambda net: (net, None), _plain_twice),
                "plain again": (lambda net: (net, None), _plain_twice),
                "spectrax": (_wrap(), _wrapped_twice),
            }
            loops = _steps(net, x, y, 10, both)
            rows += _report(title + " shared", loops, args.rounds)
        if wanted(title + " forward"):
            loops = _inference(net, x, 10)
            rows += _report(title + " forward", loops, args.rounds)
    if wanted("conv"):
        x, y = jr.normal(x_key, (32, 3, 32, 32)), jr.normal(y_key, (32, 10))
        loops = _steps(_conv_net(key), x, y, 2, _contestants(peer=True))
        rows += _report("conv", loops, args.rounds)
    for title, make in (("sngan critic", sngan_critic), ("resnet18", resnet18)):
        if wanted(title):
            net, x = make(key), jr.normal(x_key, (32, 3, 32, 32))
            y = jr.normal(y_key, jax.eval_shape(jax.vmap(net), x).shape)
            contestants = _contestants(peer=True)
            del contestants["spectrax, one vector"]
            loops = _steps(net, x, y, 1, contestants)
            rows += _report(title, loops, max(1, args.rounds // 3))
    if wanted("attention"):
        x = jr.normal(x_key, (16, 64, 256))
        net = _Attention(eqx.nn.MultiheadAttention(8, 256, key=key))
        loops = _steps(net, x, x, 10, _contestants(peer=False))
        rows += _report("attention", loops, args.rounds)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
