"""Networks as they are used, in Equinox, for the benchmarks of whole models.

A network is called on one input, or, once its layers are in `equinox.nn.SpectralNorm`
(`with_peers`), on an input and a state, and then returns the new state too.
"""

from typing import Any

import equinox as eqx
import jax
import jax.random as jr
import jax.tree_util as jtu
from jaxtyping import Array, PRNGKeyArray


_LAYERS = (eqx.nn.Linear, eqx.nn.Conv)
_STAGES = (64, 128, 256, 512)
# Output channels, side of the kernel, stride.
_CRITIC = ((64, 3, 1), (64, 4, 2), (128, 3, 1), (128, 4, 2), (256, 3, 1), (256, 4, 2))
_CRITIC += ((512, 3, 1),)


def call(layer: Any, x: Array, state: Any) -> tuple[Array, Any]:
    """A layer, which has a state only as the peer."""
    if isinstance(layer, eqx.nn.SpectralNorm):
        return layer(x, state)
    return layer(x), state


def with_peers(net: Any) -> Any:
    """Each layer of a network in `equinox.nn.SpectralNorm`, one step of one vector."""
    layers, structure = jtu.tree_flatten(net, is_leaf=_is_layer)
    count = sum(map(_is_layer, layers))
    keys = iter(jr.split(jr.key(1), count))
    wrapped = [
        eqx.nn.SpectralNorm(layer, "weight", 1, key=next(keys))
        if _is_layer(layer)
        else layer
        for layer in layers
    ]
    return jtu.tree_unflatten(structure, wrapped)


def layers_of(net: Any) -> list[Any]:
    """The layers with a weight."""
    return [x for x in jtu.tree_leaves(net, is_leaf=_is_layer) if _is_layer(x)]


def _is_layer(node: Any) -> bool:
    return isinstance(node, _LAYERS)


class _Block(eqx.Module):
    """A basic block; half of the residual sum, whose Lipschitz constant is that of its
    parts.
    """

    first: Any
    second: Any
    shortcut: Any

    def __init__(self, channels: int, out: int, stride: int, key: PRNGKeyArray):
        keys = jr.split(key, 3)
        self.first = eqx.nn.Conv2d(
            channels, out, 3, stride=stride, padding=1, key=keys[0]
        )
        self.second = eqx.nn.Conv2d(out, out, 3, padding=1, key=keys[1])
        self.shortcut = None
        if stride > 1 or channels != out:
            self.shortcut = eqx.nn.Conv2d(channels, out, 1, stride=stride, key=keys[2])

    def __call__(self, x: Array, state: Any) -> tuple[Array, Any]:
        y, state = call(self.first, x, state)
        y, state = call(self.second, jax.nn.relu(y), state)
        if self.shortcut is not None:
            x, state = call(self.shortcut, x, state)
        return jax.nn.relu((x + y) / 2), state


class _ResNet(eqx.Module):
    stem: Any
    blocks: list[_Block]
    head: Any

    def __call__(self, x: Array, state: Any = None) -> Any:
        x, new = call(self.stem, x, state)
        x = jax.nn.relu(x)
        for block in self.blocks:
            x, new = block(x, new)
        x, new = call(self.head, x.mean(axis=(1, 2)), new)
        return x if state is None else (x, new)


def resnet18(key: PRNGKeyArray, classes: int = 10) -> Any:
    """ResNet-18 for `[3, 32, 32]`, without normalization layers: 20 convolutions and a
    head.
    """
    stem_key, head_key, *keys = jr.split(key, 2 + 2 * len(_STAGES))
    blocks, channels = [], _STAGES[0]
    for i, block_key in enumerate(keys):
        out = _STAGES[i // 2]
        stride = 2 if i in (2, 4, 6) else 1
        blocks.append(_Block(channels, out, stride, block_key))
        channels = out
    stem = eqx.nn.Conv2d(3, _STAGES[0], 3, padding=1, key=stem_key)
    return _ResNet(stem, blocks, eqx.nn.Linear(channels, classes, key=head_key))


class _Critic(eqx.Module):
    convolutions: list[Any]
    head: Any

    def __call__(self, x: Array, state: Any = None) -> Any:
        new = state
        for layer in self.convolutions:
            x, new = call(layer, x, new)
            x = jax.nn.leaky_relu(x, 0.1)
        x, new = call(self.head, x.reshape(-1), new)
        return x if state is None else (x, new)


def sngan_critic(key: PRNGKeyArray) -> Any:
    """The critic of SN-GAN for `[3, 32, 32]` (Miyato et al. 2018): 7 convolutions and a
    head.
    """
    *keys, head_key = jr.split(key, len(_CRITIC) + 1)
    layers, channels = [], 3
    for (out, side, stride), layer_key in zip(_CRITIC, keys, strict=True):
        layers.append(
            eqx.nn.Conv2d(channels, out, side, stride, padding=1, key=layer_key)
        )
        channels = out
    return _Critic(layers, eqx.nn.Linear(channels * 4 * 4, 1, key=head_key))
