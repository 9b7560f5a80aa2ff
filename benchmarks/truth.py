"""True norms in float64, by numpy and scipy alone: the oracle of other benchmarks.

The norm of a convolution with zero padding at every input size is the largest
`sigma(F(w))` over the frequencies `w`, where `F(w) = sum_t K_t exp(-i w.t)` after the
stride has been folded into channels. It is looked for on a grid of frequencies, and
then by a smooth search from the highest maxima of that grid, so that the grid itself is
no error. The result is `sigma` at some frequency: never above the norm.
"""

import itertools
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import scipy.fft
import scipy.linalg
import scipy.optimize
import scipy.sparse.linalg
from jaxtyping import Array, Complex, Float
from threadpoolctl import ThreadpoolController


# Channels up to which the grid's matrices are decomposed; above, ARPACK is faster.
_FEW = 16
_CHUNK_BYTES = 2**23
# Small products in several threads mostly wait for each other on shared cores.
_THREADS = ThreadpoolController()

_Kernel = Float[np.ndarray, "out in *taps"]


def matrix_norm(matrix: Any) -> float:
    """Of an array with two axes."""
    return float(np.linalg.norm(np.asarray(matrix, np.float64), 2))


def layer_norm(layer: Any, *, fewest: int = 64) -> float:
    """Of a Linear layer, or of a zero-padded convolution at every input size.

    The grid has eight points for each tap along every axis, and at least `fewest` if
    the channels are few.
    """
    if isinstance(layer, eqx.nn.Linear):
        return matrix_norm(layer.weight)
    if not isinstance(layer, eqx.nn.Conv) or layer.padding_mode != "ZEROS":
        raise TypeError(f"no true norm of {layer}.")
    kernels = np.asarray(layer.weight, np.float64)
    kernels = kernels.reshape(layer.groups, -1, *kernels.shape[1:])
    for axis, (s, d) in enumerate(zip(layer.stride, layer.dilation, strict=True)):
        # Dilation alone only permutes the frequencies; with a stride it matters.
        if s > 1:
            kernels = _folded(_dilated(kernels, axis + 3, d), axis + 3, s)
    return max(lattice_norm(kernel, fewest=fewest) for kernel in kernels)


def sized_norm(layer: eqx.nn.Conv, size: tuple[int, ...]) -> float:
    """Of a convolution at one input size, from its dense matrix."""
    matrix = np.asarray(_jacobian(layer, size))
    return matrix_norm(matrix.reshape(-1, layer.in_channels * math.prod(size)))


@eqx.filter_jit
def _jacobian(layer: eqx.nn.Conv, size: tuple[int, ...]) -> Array:
    return jax.jacfwd(layer)(jnp.zeros((layer.in_channels, *size)))


@_THREADS.wrap(limits=1)
def lattice_norm(kernel: _Kernel, *, fewest: int = 64, starts: int = 8) -> float:
    """Of a kernel of one group and stride 1, searched from `starts` maxima."""
    if not kernel.any():
        return 0.0
    taps = kernel.shape[2:]
    large = min(kernel.shape[:2]) > _FEW
    counts = [1 if k == 1 else max(0 if large else fewest, 8 * k) for k in taps]
    heights = _heights(kernel, counts)
    tops = np.argwhere(_is_top(heights))
    frequencies = 2 * np.pi * tops / np.array(counts)
    best = np.argsort(-heights[tuple(tops.T)])[:starts]
    return max(_climbed(kernel, frequencies[i]) for i in best)


def _dilated(kernels: np.ndarray, axis: int, dilation: int) -> np.ndarray:
    shape = list(kernels.shape)
    shape[axis] = dilation * (shape[axis] - 1) + 1
    spread = np.zeros(shape)
    spread[(*[slice(None)] * axis, slice(None, None, dilation))] = kernels
    return spread


def _folded(kernels: np.ndarray, axis: int, stride: int) -> np.ndarray:
    """Tap `t = stride * a + r` becomes tap `a` of input channel `(channel, r)`."""
    parts = [
        kernels[(*[slice(None)] * axis, slice(r, None, stride))] for r in range(stride)
    ]
    longest = parts[0].shape[axis]
    for r, part in enumerate(parts):
        pad = [(0, 0)] * part.ndim
        pad[axis] = (0, longest - part.shape[axis])
        parts[r] = np.pad(part, pad)
    return np.concatenate(parts, axis=2)


def _heights(kernel: _Kernel, counts: list[int]) -> Float[np.ndarray, "*half_grid"]:
    """Norms on half of the grid, as the kernel is real; of large matrices to 1e-3."""
    few = min(kernel.shape[:2]) <= _FEW
    *leading, last = counts
    rest = tuple(range(2, 2 + len(leading)))
    spectrum: Any = scipy.fft.rfft(kernel, last, axis=-1)
    # A few frequencies of the last axis at a time, to fit into memory and cache.
    chunk = max(1, _CHUNK_BYTES // (spectrum[..., 0].nbytes * math.prod(leading)))
    parts = []
    for i in range(0, spectrum.shape[-1], chunk):
        part: Any = scipy.fft.fftn(spectrum[..., i : i + chunk], leading, axes=rest)
        symbols = part.reshape(*part.shape[:2], -1).transpose(2, 0, 1)
        if few:
            norms = np.sqrt(np.maximum(np.linalg.eigvalsh(_gram(symbols))[:, -1], 0))
        else:
            norms = np.array([_krylov_norm(symbol) for symbol in symbols])
        parts.append(norms.reshape(part.shape[2:]))
    return np.concatenate(parts, axis=-1)


def _krylov_norm(symbol: Complex[np.ndarray, "out in"]) -> float:
    symbol = np.ascontiguousarray(symbol, np.complex64)
    adjoint = np.ascontiguousarray(symbol.conj().T)
    shape = symbol.shape[1:] * 2
    # The stubs know neither of these arguments nor that a tolerance is a number.
    operator: Any = scipy.sparse.linalg.LinearOperator
    square = operator(
        shape, matvec=lambda v: adjoint @ (symbol @ v), dtype=symbol.dtype
    )
    eigsh: Any = scipy.sparse.linalg.eigsh
    values = eigsh(square, k=1, tol=1e-3, return_eigenvectors=False)
    return math.sqrt(max(float(values[0]), 0.0))


def _gram(symbols: Complex[np.ndarray, "*points out in"]) -> np.ndarray:
    """The smaller of the two."""
    adjoint = np.ascontiguousarray(symbols.conj().swapaxes(-1, -2))
    tall = symbols.shape[-2] > symbols.shape[-1]
    return adjoint @ symbols if tall else symbols @ adjoint


def _is_top(heights: Float[np.ndarray, "*half_grid"]) -> np.ndarray:
    """Where it is not 0 and no neighbour is higher; its last axis is half a period."""
    pad = [(0, 0)] * (heights.ndim - 1) + [(1, 1)]
    padded = np.pad(heights, pad, constant_values=-np.inf)
    top = padded > 0
    for shift in itertools.product((-1, 0, 1), repeat=heights.ndim):
        top &= padded >= np.roll(padded, shift, tuple(range(heights.ndim)))
    return top[..., 1:-1]


def _largest(
    kernel: _Kernel, frequency: Float[np.ndarray, " dim"]
) -> tuple[float, Float[np.ndarray, " dim"]]:
    """The norm at a frequency, and its derivative where that is unique."""
    positions = np.stack(np.meshgrid(*map(np.arange, kernel.shape[2:]), indexing="ij"))
    phases: Any = np.exp(-1j * np.tensordot(frequency, positions, 1)).reshape(-1)
    flat = kernel.reshape(*kernel.shape[:2], -1)
    symbol = flat @ phases.real + 1j * (flat @ phases.imag)
    tall = symbol.shape[0] > symbol.shape[1]
    gram = _gram(symbol)
    last = [len(gram) - 1] * 2
    _, vectors = scipy.linalg.eigh(gram, subset_by_index=last)
    first = vectors[:, 0]
    other = symbol @ first if tall else symbol.conj().T @ first
    sigma = float(np.linalg.norm(other))
    other = other / max(sigma, np.finfo(np.float64).tiny)
    u, v = (other, first) if tall else (first, other)
    wide = flat.reshape(len(u), -1)
    rows = (u.real @ wide - 1j * (u.imag @ wide)).reshape(len(v), -1)
    amplitudes = (v @ rows) * phases
    slope = (-1j * positions.reshape(len(frequency), -1) * amplitudes).sum(1).real
    return sigma, slope


def _climbed(kernel: _Kernel, frequency: Float[np.ndarray, " dim"]) -> float:
    """The norm at the top of the hill that a frequency is on."""
    start, _ = _largest(kernel, frequency)

    def descent(w: np.ndarray) -> tuple[float, np.ndarray]:
        sigma, slope = _largest(kernel, w)
        return -sigma / start, -slope / start

    found = scipy.optimize.minimize(
        descent, frequency, jac=True, method="BFGS", options={"gtol": 1e-6}
    )
    return max(start, -float(found.fun) * start)
