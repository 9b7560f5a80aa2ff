"""The Fourier neural operator with a bound on its Lipschitz constant."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from .._constraints import AbstractConstraint, Normalize
from .._enclosures import enclose_norm
from .._norms import AbstractEstimator, PowerIteration
from .._rules import layer_operator
from .._wrap import unwrap, wrap, Wrapped
from ._fourier import FourierLayer

Activation = Callable[[Array], Array]

class FNO(eqx.Module):
    network: Wrapped

    def __init__(
        self,
        num_spatial_dims: int,
        in_channels: int,
        out_channels: int,
        width: int,
        modes: int | Sequence[int],
        depth: int,
        *,
        activation: Activation = jax.nn.relu,
        coordinates: bool = True,
        padding: float = 0.0,
        output_scale: float = 1.0,
        constraint: AbstractConstraint | None = Normalize(),
        estimator: AbstractEstimator = PowerIteration(),
        key: PRNGKeyArray,
    ):
        network_key, wrap_key = jr.split(key)
        network = _Network(num_spatial_dims, in_channels, out_channels, width, modes, depth, activation, coordinates, padding, output_scale, network_key)
        if constraint is None:
            self.network = Wrapped(network)
        else:
            self.network = wrap(network, constraint=constraint, estimator=estimator, where=_constrained, key=wrap_key)

    def __call__(self, x, state=None, *, key=None):
        del key
        return self.network(x) if state is None else self.network(x, state)

    def lipschitz_bound(self, state=None):
        model = self if state is None or not self.network.sites else unwrap(self, state)
        net = model.network.module
        bound = 1.0
        for layer in _constrained(net):
            bound = bound * enclose_norm(layer_operator(layer)).upper
        return bound * net.output_scale


class _Network(eqx.Module):
    lifting: eqx.nn.Linear
    position: eqx.nn.Linear | None
    blocks: tuple
    hidden: eqx.nn.Linear
    projection: eqx.nn.Linear
    activation: Activation = eqx.field(static=True)
    padding: float = eqx.field(static=True)
    output_scale: float = eqx.field(static=True)

    def __init__(self, dim, in_channels, out_channels, width, modes, depth, activation, coordinates, padding, output_scale, key):
        l, p, h, q, *b = jr.split(key, 4 + depth)
        self.lifting = eqx.nn.Linear(in_channels, width, use_bias=not coordinates, key=l)
        self.position = eqx.nn.Linear(dim, width, key=p) if coordinates else None
        self.blocks = tuple(FourierLayer(dim, width, width, modes, use_bypass=True, use_bias=True, key=k) for k in b)
        self.hidden = eqx.nn.Linear(width, width, key=h)
        self.projection = eqx.nn.Linear(width, out_channels, key=q)
        self.activation = activation
        self.padding = padding
        self.output_scale = output_scale

    def __call__(self, x):
        grid = x.shape[1:]
        y = _pointwise(self.lifting, x)
        if self.position is not None:
            c = jnp.stack(jnp.meshgrid(*[jnp.linspace(0, 1, n, dtype=x.dtype) for n in grid], indexing="ij"))
            y = y + _pointwise(self.position, c)
        if self.padding:
            y = jnp.pad(y, [(0,0)] + [(0, round(n*self.padding)) for n in grid])
        for block in self.blocks:
            y = self.activation(block(y))
        y = y[(slice(None), *[slice(n) for n in grid])]
        y = self.activation(_pointwise(self.hidden, y))
        return self.output_scale * _pointwise(self.projection, y)

def _constrained(net):
    return [net.lifting, *net.blocks, net.hidden, net.projection]

def _pointwise(layer, x):
    flat = x.reshape(x.shape[0], -1)
    return jax.vmap(layer, 1, 1)(flat).reshape(-1, *x.shape[1:])
