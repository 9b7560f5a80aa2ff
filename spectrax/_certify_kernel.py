"""Kernels of convolutions for deployment, scaled and proven without compiling anything.

One proof does for the raw weight and for the stored one: if `F` and `G` are the symbols
of the kernels `K` and `L`, then `G = c F + (G - c F)`, hence

    sup |G| <= c sup |F| + sup |G - c F| <= c U + sqrt(taps) |L - c K|_F,

as a symbol is a sum of its taps, of which each is multiplied by a number of absolute
value one. With `L` the stored kernel the last term is what rounding has done to it, of
which nothing need be known, as both kernels are in memory.
"""

import dataclasses
import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Inexact

from ._certify import certified_in_memory, NO_PROOF
from ._constraints import AbstractConstraint
from ._enclosures import enclose_kernel, in_float64, proves_kernel_below
from ._operators import LatticeConvolution, Operator


_MOST_ATTEMPTS = 24
_WIDTH = 1e-2
# Where rounding may do more than this, the stored kernel is proven by itself.
_ROUGH = 1e-3
_UNIT = 2.0**-53


@certified_in_memory.register
def _(
    operator: LatticeConvolution,
    build: Callable[[Array], Operator],
    depth: int,
    weight: Inexact[Array, "..."],
    constraint: AbstractConstraint,
) -> Inexact[Array, "..."]:
    del operator
    return certified_kernels(build, depth, weight, constraint)


def certified_kernels(
    build: Callable[[Array], Operator],
    depth: int,
    weight: Inexact[Array, "..."],
    constraint: AbstractConstraint,
) -> Inexact[Array, "..."]:
    """A stack of kernels, scaled such that each as it is stored has a norm of at most
    its bound. `build` makes a `LatticeConvolution` of one.
    """
    stack = weight.shape[:depth]
    uppers = np.zeros(stack)
    kernels = {}
    for index in np.ndindex(*stack):
        kernels[index], gain = _kernel(build, weight[index])
        uppers[index] = _up(enclose_kernel(kernels[index], _WIDTH)[1] * gain)
    dtype = constraint.target().dtype
    scale = np.asarray(constraint.scale(jnp.asarray(uppers, dtype)), float)
    bound = np.broadcast_to(np.asarray(constraint.target(), float), stack)
    scaled = np.empty(weight.shape, weight.dtype)
    for index in np.ndindex(*stack):
        one = _Raw(weight[index], kernels[index], float(uppers[index]))
        scaled[index] = _certified(build, one, float(scale[index]), float(bound[index]))
    return jnp.asarray(scaled)


@dataclasses.dataclass(frozen=True)
class _Raw:
    """A weight, its kernel in float64, and an upper bound on its norm."""

    weight: Inexact[Array, "..."]
    kernel: Inexact[np.ndarray, "groups out in *taps"]
    upper: float


def _certified(
    build: Callable[[Array], Operator], raw: _Raw, scale: float, bound: float
) -> Inexact[np.ndarray, "..."]:
    """`raw` times `scale`, or a little less, in its own dtype."""
    weight = np.asarray(raw.weight)
    for attempt in range(_MOST_ATTEMPTS if math.isfinite(raw.upper) else 0):
        stored = (in_float64(weight) * scale).astype(weight.dtype)
        kernel, gain = _kernel(build, jnp.asarray(stored))
        off = _up(gain * _largest_norm(kernel - scale * raw.kernel))
        off += _up(gain * scale * 4 * _UNIT * _largest_norm(raw.kernel))
        scaled = _up(scale * raw.upper)
        if _up(scaled + off) <= bound:
            return stored
        if off <= _ROUGH * bound:
            missing, less = (bound - off) / scaled, 2.0 ** (attempt - 40)
        elif proves_kernel_below(kernel, bound / gain * (1 - 4 * _UNIT)):
            return stored
        else:
            missing, less = bound / scaled, 2.0 ** (attempt - 11)
        scale *= min(1.0, missing) * (1 - min(less, 0.5))
    raise RuntimeError(NO_PROOF)


def _kernel(
    build: Callable[[Array], Operator], weight: Inexact[Array, "..."]
) -> tuple[Inexact[np.ndarray, "groups out in *taps"], float]:
    """In float64, and the gain of its padding."""
    operator = build(weight)
    assert isinstance(operator, LatticeConvolution)
    return in_float64(np.asarray(operator.kernel)), operator.gain


def _largest_norm(kernel: Inexact[np.ndarray, "groups out in *taps"]) -> float:
    """At least the largest `sigma` of its symbol: that of one group, as above."""
    largest = float(np.max(np.abs(kernel)))
    if not 0 < largest < math.inf:
        return largest
    squares = np.square(np.abs(kernel / largest)).reshape(len(kernel), -1)
    rounding = 1 + 4 * squares.shape[1] * _UNIT
    taps = math.prod(kernel.shape[3:])
    return largest * math.sqrt(taps * float(np.max(np.sum(squares, axis=1)))) * rounding


def _up(value: float) -> float:
    return math.nextafter(value, math.inf)
