"""Candidates for the frequency at which a convolution's symbol is largest.

Each has a frequency `w` and a vector `v`, and climbs `|F(w) v|`: in turn the vector by
power iteration with `w` fixed, and the frequency with the vectors fixed. A move is one
product with the kernel and one with its adjoint, for all candidates side by side:

- `F(w) v`: the kernel, a matrix of shape `[out, in * taps]` as it lies in memory, times
    the vectors `v exp(i w.t)`;
- `F(w)^H u`: the kernel times `conj(u)` from the left gives one vector for each tap, of
    which `F(w')^H u` is a sum, for any `w'`, and `u^H F(w') v` a trigonometric
    polynomial with one coefficient per tap.

So no symbol is assembled, and the cost does not depend on the size of the images.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Complex, Float, Inexact

from .._custom_types import AnyArray
from .._linalg import solve
from .._namespace import complex_of, matmul, namespace


class Candidates(NamedTuple):
    """Some candidates of each group of a convolution: vectors of unit length, their
    frequencies, and `|F(w)^H u|` for the `u` that led to `v`, which `|F(w) v|` is never
    below.
    """

    v: Complex[AnyArray, "groups some in"]
    frequency: Float[AnyArray, "groups some dim"]
    value: Float[AnyArray, "groups some"]


class Cells(NamedTuple):
    """The frequencies that candidates may have: `centre` plus or minus `half`."""

    centre: Float[AnyArray, "_ some dim"]
    half: Float[AnyArray, "1 1 dim"]


def move(
    kernel: Inexact[AnyArray, "groups out in *taps"],
    cells: Cells,
    old: Candidates,
    added: Complex[AnyArray, "groups some in"],
) -> Candidates:
    """One product with the kernel, one with its adjoint, and a step in the frequency,
    from the vectors with something added. What is not finite is not kept.
    """
    xp = namespace(kernel)
    start = old.v + added
    u, _ = unit(apply(kernel, plane_waves(kernel, old.frequency), start))
    images = _adjoint_images(kernel, u)
    amplitudes = xp.sum(images * start[..., None], axis=2)
    frequency, waves = _climb(kernel, cells, amplitudes, old.frequency)
    v, value = unit(xp.conj(xp.sum(images * waves[:, :, None], axis=3)))
    kept = (xp.isfinite(value) & (value > 0))[..., None]
    v, frequency = xp.where(kept, v, old.v), xp.where(kept, frequency, old.frequency)
    # A zero kernel has the value zero; what is not finite is no value.
    return Candidates(v, frequency, xp.where(value >= 0, value, old.value))


def apply(
    kernel: Inexact[AnyArray, "groups out in *taps"],
    waves: Complex[AnyArray, "groups some taps_"],
    v: Complex[AnyArray, "groups some in"],
) -> Complex[AnyArray, "groups some out"]:
    """`F(w) v`, for the frequencies of the plane waves."""
    xp = namespace(kernel)
    groups, out = kernel.shape[:2]
    flat = kernel.reshape(groups, out, -1)
    lifted = (v[..., None] * waves[:, :, None]).reshape(groups, v.shape[1], -1)
    # The kernel is the left factor, since XLA would transpose a right one. If it is
    # real it takes both parts side by side.
    if xp.iscomplexobj(kernel):
        return xp.swapaxes(matmul(flat, xp.swapaxes(lifted, 1, 2)), 1, 2)
    both = xp.concatenate([xp.real(lifted), xp.imag(lifted)], axis=1)
    both = xp.swapaxes(matmul(flat, xp.swapaxes(both, 1, 2)), 1, 2)
    return complex_of(*xp.split(both, 2, axis=1))


def apply_adjoint(
    kernel: Inexact[AnyArray, "groups out in *taps"],
    waves: Complex[AnyArray, "groups some taps_"],
    u: Complex[AnyArray, "groups some out"],
) -> Complex[AnyArray, "groups some in"]:
    """`F(w)^H u`."""
    xp = namespace(kernel)
    images = _adjoint_images(kernel, u)
    return xp.conj(xp.sum(images * waves[:, :, None], axis=3))


def plane_waves(
    kernel: Inexact[AnyArray, "groups out in *taps"],
    frequency: Float[AnyArray, "groups *some dim"],
) -> Complex[AnyArray, "groups *some taps_"]:
    """`exp(i w.t)` at every tap `t`, counted from the kernel's centre."""
    xp = namespace(kernel)
    positions = xp.asarray(tap_positions(kernel.shape[3:]), frequency.dtype)
    angle = xp.zeros((), frequency.dtype)
    for axis in range(positions.shape[1]):
        column = positions[:, axis].reshape((1,) * (frequency.ndim - 1) + (-1,))
        angle = angle + frequency[..., axis, None] * column
    return complex_of(xp.cos(angle), xp.sin(angle))


def tap_positions(taps: tuple[int, ...]) -> Float[np.ndarray, "taps_ dim"]:
    """From the centre. Elsewhere in the house taps are counted from the corner, which
    multiplies a symbol by a number of absolute value 1.
    """
    axes = [np.arange(k) - (k - 1) / 2 for k in taps]
    return np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(taps))


def unit(
    x: Complex[AnyArray, "*batch n"],
) -> tuple[Complex[AnyArray, "*batch n"], Float[AnyArray, "*batch"]]:
    """Vectors of unit length, and the lengths they had. Zero stays zero."""
    xp = namespace(x)
    scale = _inverse_size(x, axis=-1)
    squares = xp.sum(_squares(_times(x, scale[..., None])), axis=-1)
    # At least 1 for a nonzero vector, so that no division can overflow.
    length = xp.sqrt(xp.where(squares > 0, squares, 1))
    return _times(x, (scale / length)[..., None]), xp.sqrt(squares) / scale


def _inverse_size(
    x: Complex[AnyArray, "*batch"], axis: int | tuple[int, ...]
) -> Float[AnyArray, "*rest"]:
    """What to multiply with for a largest entry of about 1; 1 for zero."""
    xp = namespace(x)
    largest = xp.max(xp.maximum(xp.abs(xp.real(x)), xp.abs(xp.imag(x))), axis=axis)
    tiny = float(np.finfo(largest.dtype).tiny)
    return xp.where(largest > 4 * tiny, 1 / xp.maximum(largest, 4 * tiny), 1)


def _squares(x: Inexact[AnyArray, "*shape"]) -> Float[AnyArray, "*shape"]:
    xp = namespace(x)
    return xp.square(xp.real(x)) + xp.square(xp.imag(x))


def _times(
    x: Complex[AnyArray, "*shape"], factor: Float[AnyArray, "*factor"]
) -> Complex[AnyArray, "*shape"]:
    xp = namespace(x)
    return complex_of(xp.real(x) * factor, xp.imag(x) * factor)


def _adjoint_images(
    kernel: Inexact[AnyArray, "groups out in *taps"],
    u: Complex[AnyArray, "groups some out"],
) -> Complex[AnyArray, "groups some in taps_"]:
    """`u^H K_t` for every tap."""
    xp = namespace(kernel)
    groups, out, in_ = kernel.shape[:3]
    flat = kernel.reshape(groups, out, -1)
    if xp.iscomplexobj(kernel):
        images = matmul(xp.conj(u), flat)
    else:
        both = xp.concatenate([xp.real(u), -xp.imag(u)], axis=1)
        images = complex_of(*xp.split(matmul(both, flat), 2, axis=1))
    return images.reshape(groups, u.shape[1], in_, -1)


def _climb(
    kernel: Inexact[AnyArray, "groups out in *taps"],
    cells: Cells,
    amplitudes: Complex[AnyArray, "groups some taps_"],
    current: Float[AnyArray, "groups some dim"],
) -> tuple[Float[AnyArray, "groups some dim"], Complex[AnyArray, "groups some taps_"]]:
    """The best of four frequencies for `|sum_t amplitudes_t exp(i w.t)|`, and its plane
    waves: where it is, a step of Newton's method, one up the slope that cannot
    overshoot, and one a little aside.

    That is for the frequencies at which the symbol of a real kernel is real, where
    vectors become real too, and see no slope even where there is no maximum.
    """
    xp = namespace(amplitudes)
    positions = tap_positions(kernel.shape[3:])
    dim = positions.shape[1]
    # Squared below, which must not overflow.
    amplitudes = _times(amplitudes, _inverse_size(amplitudes, axis=-1)[..., None])
    here = amplitudes * plane_waves(kernel, current)
    # The sum and what its derivatives bring down, `i` times the positions.
    products = (positions[:, :, None] * positions[:, None]).reshape(-1, dim * dim)
    table = np.concatenate([np.ones((len(positions), 1)), positions, products], axis=1)
    table = xp.asarray(table, current.dtype)[None]
    real, imag = matmul(xp.real(here), table), matmul(xp.imag(here), table)
    # Of `f = |sum|^2 / 2`.
    a, b = real[..., 0, None], imag[..., 0, None]
    moment_a, moment_b = real[..., 1 : dim + 1], imag[..., 1 : dim + 1]
    gradient = b * moment_a - a * moment_b
    hessian = (
        moment_a[..., :, None] * moment_a[..., None, :]
        + moment_b[..., :, None] * moment_b[..., None, :]
        - (a * real[..., dim + 1 :] + b * imag[..., dim + 1 :]).reshape(
            *gradient.shape, dim
        )
    )
    squares = xp.asarray(np.sum(positions**2, axis=1), current.dtype)[None, None]
    most = xp.sum(xp.abs(amplitudes) * squares, axis=-1, keepdims=True)
    most = most * xp.sqrt(a**2 + b**2)
    aside = xp.asarray([0.1, 0.07, 0.05][:dim], current.dtype)[None, None]
    trials = [
        current,
        current - solve(hessian, gradient)[0],
        current + gradient / xp.where(most > 0, most, 1),
        current + aside * cells.half,
    ]
    low, high = cells.centre - cells.half, cells.centre + cells.half
    trials = xp.stack([xp.clip(trial, low, high) for trial in trials], axis=2)
    waves = plane_waves(kernel, trials)
    height = xp.sum(amplitudes[:, :, None] * waves, axis=-1)
    height = _squares(height)
    # What is not a number is not higher.
    height = xp.where(height >= 0, height, -1)
    highest = xp.argmax(height, axis=2)[..., None, None]
    best = highest == xp.arange(4, dtype=highest.dtype)[None, None, :, None]
    frequency = xp.sum(xp.where(best, trials, 0), axis=2)
    return frequency, xp.sum(xp.where(best, waves, 0), axis=2)
