"""Convolutions to test, and what is true of them, in numpy."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import scipy.optimize
from jaxtyping import PRNGKeyArray

import spectrax

from .helpers import true_norm


@dataclasses.dataclass(frozen=True)
class Case:
    """A configuration, and input sizes that it accepts."""

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    sizes: tuple[tuple[int, ...], ...]
    options: dict[str, Any]
    transpose: bool = False

    def make(self, key: PRNGKeyArray, dtype: Any = None) -> Any:
        kind = eqx.nn.ConvTranspose if self.transpose else eqx.nn.Conv
        return kind(
            len(self.kernel_size),
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            **self.options,
            dtype=dtype,
            key=key,
        )

    def __str__(self) -> str:
        kind = "transpose" if self.transpose else "conv"
        shape = "x".join(map(str, self.kernel_size))
        channels = f"{self.in_channels}to{self.out_channels}"
        options = (f"{name}={value}" for name, value in self.options.items())
        return ",".join([kind, channels, shape, *options]).replace(" ", "")


def case(
    in_channels: int,
    out_channels: int,
    kernel_size: tuple[int, ...],
    sizes: Any,
    *,
    transpose: bool = False,
    **options: Any,
) -> Case:
    """Integers among the sizes stand for one-dimensional ones."""
    sizes = tuple((size,) if isinstance(size, int) else size for size in sizes)
    return Case(in_channels, out_channels, kernel_size, sizes, options, transpose)


@eqx.filter_jit
def _images(conv: Any, rows: jax.Array) -> jax.Array:
    return jax.vmap(lambda x: conv(x) - conv(jnp.zeros_like(x)))(rows)


def dense(conv: Any, size: tuple[int, ...]) -> np.ndarray:
    """The layer's matrix, column by column, by the layer itself less its bias."""
    wide = jnp.complex128 if jnp.iscomplexobj(conv.weight) else jnp.float64
    conv = jtu.tree_map(lambda x: x.astype(wide) if eqx.is_array(x) else x, conv)
    count = conv.in_channels * math.prod(size)
    basis = jnp.eye(count, dtype=wide).reshape(count, conv.in_channels, *size)
    return np.asarray(_images(conv, basis)).reshape(count, -1).T


def norm_at(conv: Any, size: tuple[int, ...]) -> float:
    return true_norm(dense(conv, size))


def symbol_norms(
    weight: Any,
    frequencies: np.ndarray,
    *,
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    transpose: bool,
) -> np.ndarray:
    """The norm on the lattice at each frequency, by aliasing: with stride `s` the
    frequencies `(w + 2 pi j) / s` meet, each with weight `1 / s`.
    """
    weight = np.asarray(weight, np.complex128)
    out, in_, *taps = weight.shape
    axes = [d * np.arange(k) for k, d in zip(taps, dilation, strict=True)]
    positions = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(taps))
    kernels = weight.reshape(groups, out // groups, in_, -1)
    parts = []
    for alias in np.ndindex(*stride):
        lifted = (frequencies + 2 * np.pi * np.array(alias)) / np.array(stride)
        waves = np.exp(1j * lifted @ positions.T) / math.sqrt(math.prod(stride))
        parts.append(np.einsum("goit,pt->gpoi", kernels, waves))
    symbols = np.concatenate(parts, axis=-2 if transpose else -1)
    return np.linalg.svd(symbols, compute_uv=False)[..., 0].max(axis=0)


def grid(points: int, dim: int) -> np.ndarray:
    axis = 2 * np.pi * np.arange(points) / points
    return np.stack(np.meshgrid(*[axis] * dim, indexing="ij"), -1).reshape(-1, dim)


_POINTS = {1: 512, 2: 48, 3: 16}


def supremum(
    weight: Any,
    *,
    stride: tuple[int, ...] | None = None,
    dilation: tuple[int, ...] | None = None,
    groups: int = 1,
    transpose: bool = False,
) -> float:
    """The norm on the lattice: a fine grid, and a search from its best points."""
    dim = np.ndim(weight) - 2
    config = {
        "stride": stride or (1,) * dim,
        "dilation": dilation or (1,) * dim,
        "groups": groups,
        "transpose": transpose,
    }
    frequencies = grid(_POINTS[dim], dim)
    values = symbol_norms(weight, frequencies, **config)
    best = values.max()
    for index in np.argsort(values)[-3:]:
        found = scipy.optimize.minimize(
            lambda w: -symbol_norms(weight, w[None], **config)[0],
            frequencies[index],
            method="Nelder-Mead",
            options={"xatol": 1e-9, "fatol": 1e-15, "initial_simplex": None},
        )
        best = max(best, -found.fun)
    return float(best)


def supremum_of(conv: Any) -> float:
    """The same for a layer, with the kernel as the lattice sees it."""
    return supremum(
        conv.weight,
        stride=conv.stride,
        dilation=conv.dilation,
        groups=conv.groups,
        transpose=isinstance(conv, eqx.nn.ConvTranspose),
    )


def check_gradient_through_wrapped(
    model: Any,
    state: eqx.nn.State,
    norm: Callable[[np.ndarray], float],
    *,
    cotangent: np.ndarray,
    step: float,
) -> None:
    """Compares the derivative of a wrapped layer's constrained weight with finite
    differences of `weight / norm(weight)`, for the true norm."""

    @eqx.filter_grad
    def gradient(model: Any) -> jax.Array:
        return jnp.sum(spectrax.unwrap(model, state).weight * cotangent)

    def true_value(weight: np.ndarray) -> float:
        return float(np.sum(weight * cotangent) / norm(weight))

    found = gradient(model).raw.weight
    weight = np.asarray(model.raw.weight)
    units = step * np.eye(weight.size).reshape(-1, *weight.shape)
    differences = [true_value(weight + h) - true_value(weight - h) for h in units]
    truth = np.array(differences).reshape(weight.shape) / (2 * step)
    np.testing.assert_allclose(found, truth, atol=1e-5 * np.abs(truth).max())
