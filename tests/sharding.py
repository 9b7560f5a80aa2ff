"""A program for `test_sharding.py`, as the number of devices is chosen at the start.

    python tests/sharding.py devices
    python tests/sharding.py process COORDINATOR COUNT INDEX

Prints one line of JSON: the norms and losses of a few training steps in each layout,
and the collectives of the compiled programs with the entries that they move.
"""

import functools
import json
import math
import re
import sys
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from jaxtyping import Array, PyTree

import spectrax


_WIDTH, _BATCH, _DEVICES = 64, 16, 8
# Layers' weights, by layout: how their (out, in, ...) axes are laid out.
_LAYOUTS: dict[str, tuple[P, ...]] = {
    "replicated": (P(), P(), P()),
    "fsdp": (P("devices"), P("devices"), P("devices")),
    "tensor": (P("devices"), P(None, "devices"), P("devices")),
}


class Net(eqx.Module):
    """Two dense layers and a convolution."""

    layers: tuple[eqx.nn.Linear, eqx.nn.Linear, eqx.nn.Conv1d]

    def __init__(self):
        first, second, third = jr.split(jr.key(0), 3)
        self.layers = (
            eqx.nn.Linear(_WIDTH, 2 * _WIDTH, key=first),
            eqx.nn.Linear(2 * _WIDTH, _WIDTH, key=second),
            eqx.nn.Conv1d(16, 16, 3, padding=1, key=third),
        )

    def __call__(self, x: Array) -> Array:
        dense_in, dense_out, conv = self.layers
        x = dense_out(jax.nn.relu(dense_in(x)))
        return conv(x.reshape(16, -1)).reshape(-1)


def placed(tree: PyTree, mesh: Mesh, layout: str) -> PyTree:
    """Weights, and whatever has their shapes, laid out; all else on every device."""
    shapes = [layer.weight.shape for layer in Net().layers]

    def place(x: Any) -> Any:
        if not eqx.is_array(x):
            return x
        spec = _LAYOUTS[layout][shapes.index(x.shape)] if x.shape in shapes else P()
        return put(x, NamedSharding(mesh, spec))

    return jax.tree.map(place, tree)


def put(x: Array, sharding: NamedSharding) -> Array:
    """`jax.device_put` that also works with devices of other processes."""
    value = np.asarray(x)
    return jax.make_array_from_callback(value.shape, sharding, lambda i: value[i])


def collectives(compiled: Any) -> list[tuple[str, int]]:
    """The kind of every collective of a program, and the entries of its results."""
    kinds = "all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute"
    found = []
    for line in compiled.as_text().splitlines():
        match = re.search(rf"= (.*?) ({kinds})(-start)?\(", line)
        if match:
            shapes = re.findall(r"\[([\d,]*)\]", match.group(1))
            sizes = (math.prod(map(int, s.split(","))) if s else 1 for s in shapes)
            found.append((match.group(2), max(sizes, default=1)))
    return found


def run(
    mesh: Mesh, layout: str, *, look_at: tuple[str, ...] = (), train_it: bool = True
) -> dict[str, Any]:
    """A few steps of Adam, and what the programs send."""
    model, state = eqx.nn.make_with_state(spectrax.wrap)(Net())
    optimizer = optax.adam(1e-2)
    opt_state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))
    x, y = jr.normal(jr.key(1), (2, _BATCH, _WIDTH))
    model, opt_state = (placed(tree, mesh, layout) for tree in (model, opt_state))
    # The state is left to be placed by the compiler.
    batch = NamedSharding(mesh, P("devices"))
    replicated = NamedSharding(mesh, P())
    state = jax.tree.map(lambda s: put(s, replicated) if eqx.is_array(s) else s, state)
    x, y = put(x, batch), put(y, batch)

    def update(
        model: Any, opt_state: Any, plain: Callable[[Any], Any], x: Array, y: Array
    ) -> tuple[Any, ...]:
        def loss(model: Any) -> Array:
            return jnp.mean((jax.vmap(plain(model))(x) - y) ** 2)

        value, gradient = eqx.filter_value_and_grad(loss)(model)
        updates, opt_state = optimizer.update(gradient, opt_state)
        return eqx.apply_updates(model, updates), opt_state, value

    def train(
        model: Any, state: Any, opt_state: Any, x: Array, y: Array, num_steps: int = 1
    ) -> tuple[Any, ...]:
        state = spectrax.advance(model, state, num_steps=num_steps)
        model, opt_state, value = update(
            model, opt_state, lambda model: spectrax.unwrap(model, state), x, y
        )
        return model, state, opt_state, value

    def train_plain(model: Any, opt_state: Any, x: Array, y: Array) -> tuple[Any, ...]:
        return update(model, opt_state, lambda model: model.raw, x, y)

    result: dict[str, Any] = {"losses": []}
    programs = {
        "advance": (spectrax.advance, (model, state)),
        "step": (train, (model, state, opt_state, x, y)),
        "plain step": (train_plain, (model, opt_state, x, y)),
    }
    for name in look_at:
        function, arguments = programs[name]
        compiled = eqx.filter_jit(function).lower(*arguments).compile()
        result[name] = collectives(compiled.compiled)
    if not train_it:
        return result
    # Some steps: one may start in a direction that rounding has chosen.
    step = eqx.filter_jit(functools.partial(train, num_steps=3))
    for _ in range(2):
        model, state, opt_state, value = step(model, state, opt_state, x, y)
        result["losses"].append(float(value))

    @eqx.filter_jit
    def norms(model: Any, state: Any) -> list[Array]:
        return [
            jax.lax.with_sharding_constraint(spectrax.singular_value(w, s), replicated)
            for w, s in (
                (node.weight, state.get(node.memory).vectors)
                for node in model.weights[:2]
            )
        ]

    result["norms"] = [float(n) for n in norms(model, state)]
    return result


def main() -> None:
    """Runs in the way that the arguments say."""
    if sys.argv[1] == "process":
        coordinator, count, index = sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
        jax.distributed.initialize(coordinator, count, index)
        mesh = Mesh(np.array(jax.devices()), ("devices",))
        results = {"fsdp": run(mesh, "fsdp")}
    else:
        mesh = Mesh(np.array(jax.devices()), ("devices",))
        assert len(jax.devices()) == _DEVICES
        results = {
            "replicated": run(mesh, "replicated", look_at=("advance",), train_it=False),
            "fsdp": run(mesh, "fsdp", look_at=("advance", "step", "plain step")),
            "tensor": run(mesh, "tensor", look_at=("advance",)),
        }
        one = Mesh(np.array(jax.devices()[:1]), ("devices",))
        results["one device"] = run(one, "replicated")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
