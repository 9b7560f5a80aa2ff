"""Training that shows the constrained weights it uses: what the tracking benchmarks
have in common.

A network has its layers in `layers` and is called on one input.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, PyTree

import spectrax


Weights = list[Array]
# From model and state to the output, the new state, and the weights that were used.
Forward = Callable[[Any, Any, Array], tuple[Array, Any, Weights]]


class _Peer(eqx.Module):
    """Each layer of a network in `equinox.nn.SpectralNorm`."""

    layers: list[eqx.nn.SpectralNorm]

    def __init__(self, net: Any, num_steps: int):
        keys = jr.split(jr.key(1), len(net.layers))
        self.layers = [
            eqx.nn.SpectralNorm(layer, "weight", num_steps, key=key)
            for layer, key in zip(net.layers, keys, strict=True)
        ]


def wrapped(net: Any, **options: Any) -> tuple[Any, Any, Forward]:
    """The network wrapped, its state, and how to call it."""
    model, state = spectrax.constrain(net, **options)

    def forward(model: Any, state: Any, x: Array) -> tuple[Array, Any, Weights]:
        state = spectrax.advance(model, state)
        plain = spectrax.unwrap(model, state, lazy=True)
        return jax.vmap(plain)(x), state, [layer.weight for layer in plain.layers]

    return model, state, forward


def peer(net: Any, num_steps: int) -> tuple[Any, Any, Forward]:
    """The same for `equinox.nn.SpectralNorm`; with ReLU between the layers."""
    model, state = eqx.nn.make_with_state(_Peer)(net, num_steps)

    def forward(model: Any, state: Any, x: Array) -> tuple[Array, Any, Weights]:
        weights = []
        for i, layer in enumerate(model.layers):
            batched = jax.vmap(layer, in_axes=(0, None), out_axes=(0, None))
            x, state = batched(x, state)
            x = jax.nn.relu(x) if i + 1 < len(model.layers) else x
            u, v = state.get(layer.uv_index)
            weight = layer.layer.weight
            flat = weight.reshape(len(weight), -1)
            weights.append(weight / jnp.einsum("i,ij,j->", u, flat, v))
        return x, state, weights

    return model, state, forward


def make_step(
    forward: Forward,
    objective: Callable[[Array, Array], Array],
    optimizer: optax.GradientTransformation,
) -> Callable[[Any, Any, Any, Array, Array], PyTree]:
    """A training step, which also returns the constrained weights that it used.

    `objective` is a function of the outputs and targets of a batch.
    """

    def loss(model: Any, state: Any, x: Array, y: Array) -> tuple[Array, PyTree]:
        output, state, weights = forward(model, state, x)
        return objective(output, y), (state, weights)

    @eqx.filter_jit
    def step(model: Any, state: Any, opt_state: Any, x: Array, y: Array) -> PyTree:
        gradient, (state, weights) = eqx.filter_grad(loss, has_aux=True)(
            model, state, x, y
        )
        updates, opt_state = optimizer.update(gradient, opt_state)
        return eqx.apply_updates(model, updates), state, opt_state, weights

    return step
