"""Timing of training steps beside one another.

What a step returns is what the next one takes. Steps are timed several at a time, the
contestants in rotating order, and every round starts with another one: single steps in
alternation make two copies of one program differ by up to a quarter.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import numpy as np
import optax
from jaxtyping import Array, PyTree

import spectrax


class Loop:
    """A compiled step with its own buffers, run some steps at a time."""

    def __init__(self, step: Callable[[PyTree], PyTree], start: PyTree, steps: int):
        # Buffers are donated: each contestant needs its own.
        start = jax.tree.map(lambda x: x.copy() if eqx.is_array(x) else x, start)
        self._arrays, rest = eqx.partition(start, eqx.is_array)
        self.steps = steps

        @functools.partial(jax.jit, donate_argnums=0)
        def on_arrays(arrays: PyTree) -> PyTree:
            return eqx.filter(step(eqx.combine(arrays, rest)), eqx.is_array)

        begin = time.perf_counter()
        self._compiled = on_arrays.lower(self._arrays).compile()
        self.compile_seconds = time.perf_counter() - begin
        memory = self._compiled.memory_analysis()
        assert memory is not None
        self.temporary_bytes = memory.temp_size_in_bytes

    def __call__(self) -> None:
        arrays = self._arrays
        for _ in range(self.steps):
            arrays = self._compiled(arrays)
        self._arrays = jax.block_until_ready(arrays)


def medians(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """The median milliseconds of a call of each; every round starts with another."""
    names = list(functions)
    times: dict[str, list[float]] = {name: [] for name in names}
    for function in functions.values():
        jax.block_until_ready(function())
    for i in range(rounds):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            jax.block_until_ready(functions[name]())
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: float(np.median(values)) for name, values in times.items()}


def rotate(loops: dict[str, Loop], rounds: int) -> dict[str, float]:
    """The median milliseconds of a step of each."""
    times = medians({name: loop.__call__ for name, loop in loops.items()}, rounds)
    return {name: times[name] / loop.steps for name, loop in loops.items()}


def plain_forward(model: Any, state: Any, x: Array) -> tuple[Array, Any]:
    """A batch through a model without a state."""
    return jax.vmap(model)(x), state


def wrapped_forward(model: Any, state: Any, x: Array) -> tuple[Array, Any]:
    """A batch through a wrapped model, advanced once."""
    state = spectrax.advance(model, state)
    return jax.vmap(spectrax.unwrap(model, state, lazy=True))(x), state


def train_loop(
    forward: Callable[[Any, Any, Array], tuple[Array, Any]],
    model: Any,
    state: Any,
    batch: tuple[Array, Array],
    steps: int,
) -> Loop:
    """Steps of Adam on the squared error over one batch of inputs and targets."""
    x, y = batch
    optimizer = optax.adam(1e-3)

    def loss(model: Any, state: Any) -> tuple[Array, Any]:
        output, state = forward(model, state, x)
        return ((output - y) ** 2).mean(), state

    def step(carry: PyTree) -> PyTree:
        model, state, opt_state = carry
        gradient, state = eqx.filter_grad(loss, has_aux=True)(model, state)
        updates, opt_state = optimizer.update(gradient, opt_state)
        return eqx.apply_updates(model, updates), state, opt_state

    opt_state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))
    return Loop(step, (model, state, opt_state), steps)
