"""Upper bounds, from the literature, on the norm of a convolution with zero padding.

The operator is the one of a 2-D convolution with a kernel `[out, in, k, k]`, `k` odd,
stride 1 and 'same' zero padding, on images of side `n`. Every bound is written from its
paper, in float32; products ask for the highest precision, without which a GPU's TF32
would break the bounds.
"""

import functools
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, Float, Int
from rotation import medians
from scipy.sparse.linalg import eigsh, LinearOperator
from sklearn.datasets import load_digits
from threadpoolctl import threadpool_limits


_Kernel = Float[Array, "out in k k"]
_Colours = Float[np.ndarray, "batch 3 side side"]
_Trained = dict[tuple[int, int, int, int], Float[np.ndarray, "out in k k"]]


def _tall(kernel: _Kernel) -> _Kernel:
    """With no more inputs than outputs: the transpose has the same norm."""
    out_channels, in_channels = kernel.shape[:2]
    return kernel.swapaxes(0, 1) if in_channels > out_channels else kernel


def _matrix_norm(matrix: Float[Array, "rows columns"]) -> Float[Array, ""]:
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    gram = jnp.matmul(wide, wide.T, precision="highest")
    return jnp.sqrt(jnp.linalg.eigvalsh(gram)[-1])


@jax.jit
def flattened(kernel: _Kernel) -> Float[Array, ""]:
    """The norm of the kernel as an `[out, in * k * k]` matrix, which bounds nothing."""
    return _matrix_norm(kernel.reshape(kernel.shape[0], -1))


@functools.partial(jax.jit, static_argnames=("n", "iterations"))
def gram_fourier(kernel: _Kernel, n: int, iterations: int) -> Float[Array, ""]:
    """Delattre et al. 2023 (arXiv 2305.16173), algorithm 3.

    On a grid of side `n + k - 1` the circular convolution contains the zero-padded one.
    """
    side = n + kernel.shape[-1] - 1
    spectrum = jnp.fft.rfft2(_tall(kernel), (side, side))
    gram = spectrum.reshape(*spectrum.shape[:2], -1).transpose(2, 0, 1)
    log_scale = jnp.zeros(len(gram))
    for _ in range(iterations):
        gram, log_scale = _rescale(gram, log_scale)
        gram = jnp.matmul(gram.conj().swapaxes(1, 2), gram, precision="highest")
    norms = jnp.linalg.norm(gram, axis=(1, 2))
    return jnp.exp((jnp.log(norms) + log_scale) / 2**iterations).max()


def _rescale(iterate: Array, log_scale: Array) -> tuple[Array, Array]:
    """To Frobenius norm 1, ahead of a squaring; the leading axes of the scale stay."""
    axes = tuple(range(log_scale.ndim, iterate.ndim))
    squares = jnp.sum(jnp.abs(iterate) ** 2, axis=axes, keepdims=True)
    norm = jnp.maximum(jnp.sqrt(squares), jnp.finfo(jnp.float32).tiny)
    return iterate / norm, 2 * (log_scale + jnp.log(norm).reshape(log_scale.shape))


@functools.partial(jax.jit, static_argnames="iterations")
def gram_spatial(kernel: _Kernel, iterations: int) -> Float[Array, ""]:
    """Delattre et al. 2024 (arXiv 2402.00240): Gram iteration for zero padding.

    Correlating a kernel with itself, fully padded, gives the kernel of the Gram
    operator on the infinite grid. It is symmetric, so that the largest sum of absolute
    values over an output channel bounds its norm.
    """
    if iterations < 1:
        raise ValueError("Without an iteration the kernel is not symmetric.")
    gram, log_scale = _tall(kernel).swapaxes(0, 1), jnp.zeros(())
    for _ in range(iterations):
        gram, log_scale = _rescale(gram, log_scale)
        pad = gram.shape[-1] - 1
        gram = jax.lax.conv_general_dilated(
            gram, gram, (1, 1), ((pad, pad), (pad, pad)), precision="highest"
        )
    log_norm = jnp.log(jnp.abs(gram).sum(axis=(1, 2, 3)).max())
    return jnp.exp((log_norm + log_scale) / 2**iterations)


@jax.jit
def singla_feizi(kernel: _Kernel) -> Float[Array, ""]:
    """Singla and Feizi 2021 (arXiv 1911.10258), theorem 1."""
    out_channels, in_channels, height, width = kernel.shape
    reshaped = (
        kernel.reshape(out_channels, -1),
        kernel.transpose(0, 2, 3, 1).reshape(-1, in_channels),
        kernel.transpose(0, 2, 1, 3).reshape(out_channels * height, -1),
        kernel.transpose(0, 3, 1, 2).reshape(out_channels * width, -1),
    )
    norms = jnp.stack([_matrix_norm(matrix) for matrix in reshaped])
    return math.sqrt(height * width) * norms.min()


@functools.partial(jax.jit, static_argnames=("samples", "per_output"))
def araujo(
    kernel: _Kernel, samples: int = 50, *, per_output: bool = False
) -> Float[Array, ""]:
    """Araujo et al. 2021 (arXiv 2006.08391): LipBound on a grid of samples.

    Up to a phase, the frequency response has degree `d = (k - 1) / 2` in each of the
    two frequencies, and so exceeds its maximum over `samples ** 2` points by a factor
    of no more than `1 / (1 - 2 d / samples)` (Pfister and Bresler 2018). The paper adds
    up the maxima of the output channels (`per_output`); the authors' later code takes
    the maximum of the sum, which is never larger.
    """
    degree = (kernel.shape[-1] - 1) / 2
    if samples <= 2 * degree:
        raise ValueError(f"{samples} samples are too few for this kernel.")
    response = jnp.fft.rfft2(_tall(kernel).swapaxes(0, 1), (samples, samples))
    squares = (jnp.abs(response) ** 2).sum(axis=1)
    largest = squares.max(axis=(1, 2)).sum() if per_output else squares.sum(0).max()
    return jnp.sqrt(largest) / (1 - 2 * degree / samples)


def lanczos_truth(kernel: Float[Any, "out in k k"], n: int) -> float:
    """The norm to float64 accuracy, by Lanczos on the smaller Gram operator."""
    kernel = np.asarray(kernel, np.float64)
    if kernel.shape[1] > kernel.shape[0]:
        kernel = kernel.swapaxes(0, 1)[:, :, ::-1, ::-1]
    adjoint = np.ascontiguousarray(kernel.swapaxes(0, 1)[:, :, ::-1, ::-1])
    in_channels = kernel.shape[1]

    def gram(x: Float[np.ndarray, " size"]) -> Float[np.ndarray, " size"]:
        y = _convolve(kernel, x.reshape(in_channels, n, n))
        return _convolve(adjoint, y).reshape(-1)

    size = in_channels * n * n
    make: Any = LinearOperator  # pyright takes its constructor for a subclass's
    operator = make((size, size), matvec=gram, dtype=np.float64)
    start = np.random.default_rng(0).standard_normal(size)
    options: Any = {"tol": 1e-10, "return_eigenvectors": False}
    with threadpool_limits(1):  # on shared cores, more threads mostly wait
        largest = eigsh(operator, 1, v0=start, ncv=min(size, 48), **options)
    return math.sqrt(float(largest[0]))


def _convolve(
    kernel: Float[np.ndarray, "out in k k"], image: Float[np.ndarray, "in n n"]
) -> Float[np.ndarray, "out n n"]:
    size = kernel.shape[-1]
    padded = np.pad(image, ((0, 0), (size // 2, size // 2), (size // 2, size // 2)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), (1, 2))
    return np.tensordot(kernel, windows, ((1, 2, 3), (0, 3, 4)))


def gaussian_kernel(shape: tuple[int, int, int, int], seed: int) -> _Kernel:
    return jr.normal(jr.key(seed), shape)


def trained_like_kernel(shape: tuple[int, int, int, int], seed: int) -> _Kernel:
    """He-scaled noise, plus smooth filters between channels of decaying strength."""
    out_channels, in_channels, size, _ = shape
    keys = jr.split(jr.key(seed), 5)
    rank = min(out_channels, in_channels)
    left = jr.normal(keys[0], (out_channels, rank)) / math.sqrt(out_channels)
    right = jr.normal(keys[1], (in_channels, rank)) / math.sqrt(in_channels)
    centre = size // 2 + jr.normal(keys[2], (rank, 2, 1)) * size / 4
    width = size * jr.uniform(keys[3], (rank, 1, 1), minval=0.3, maxval=1.0)
    profile = jnp.exp(-(((jnp.arange(size) - centre) / width) ** 2) / 2)
    filters = jnp.einsum("rh,rw->rhw", profile[:, 0], profile[:, 1])
    filters /= jnp.linalg.norm(filters, axis=(1, 2), keepdims=True)
    strengths = 2 / jnp.arange(1, rank + 1) ** 0.75
    smooth = jnp.einsum("r,or,ir,rhw->oihw", strengths, left, right, filters)
    noise = jr.normal(keys[4], shape) * math.sqrt(2 / (in_channels * size**2))
    return 0.5 * noise + smooth


# Output channels, input channels, kernel size, stride and whether there is a skip.
_LAYERS = (
    (64, 3, 7, 2, False),
    (64, 64, 3, 1, True),
    (128, 64, 3, 2, False),
    (256, 128, 3, 2, False),
    (256, 256, 3, 1, True),
)


def _logits(
    parameters: dict[str, list[Array]], x: Float[Array, "batch 3 side side"]
) -> Float[Array, "batch 10"]:
    layers = zip(_LAYERS, parameters["kernels"], parameters["scales"], strict=True)
    for i, ((*_, size, stride, skips), kernel, scale) in enumerate(layers):
        pad = (size // 2, size // 2)
        y = jax.lax.conv_general_dilated(x, kernel, (stride, stride), (pad, pad))
        y = (y - y.mean((0, 2, 3), keepdims=True)) * jax.lax.rsqrt(
            y.var((0, 2, 3), keepdims=True) + 1e-5
        )
        y = jax.nn.relu(y * scale[:, None, None])
        x = x + y if skips else y
        if i == 0:  # as in a ResNet, the stem pools
            window = (1, 1, 2, 2)
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, window, "VALID")
    return x.mean((2, 3)) @ parameters["head"][0]


def _loss(
    parameters: dict[str, list[Array]],
    x: Float[Array, "batch 3 side side"],
    y: Int[Array, " batch"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    logits = _logits(parameters, x)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
    return loss, (logits.argmax(1) == y).mean()


def _coloured(
    images: Float[np.ndarray, "batch side side"], rng: np.random.Generator
) -> _Colours:
    """In random colours and shifted at random: else the three inputs are one."""
    paper, contrast = rng.uniform(0, 1, (2, len(images), 3, 1, 1))
    shifts = rng.integers(-3, 4, (len(images), 2))
    moved = [
        np.roll(image, tuple(shift), (0, 1))
        for image, shift in zip(images, shifts, strict=True)
    ]
    coloured = paper - 1 + (0.5 + contrast) * np.stack(moved)[:, None]
    return (coloured + 0.1 * rng.standard_normal(coloured.shape)).astype(np.float32)


def trained_kernels(steps: int = 240, seed: int = 0) -> _Trained:
    """Kernels of a small ResNet-like network, trained on upsampled, coloured digits.

    Batches of 32 images of side 32; SGD with Nesterov momentum 0.9, a cosine schedule
    from 0.1 and weight decay 1e-2; kernels start at He's scale.
    """
    start = time.perf_counter()
    rng = np.random.default_rng(seed)
    digits, labels = load_digits(return_X_y=True)
    images = np.kron(digits.reshape(-1, 8, 8) / 16, np.ones((4, 4)))
    *keys, head_key = jr.split(jr.key(seed), len(_LAYERS) + 1)
    kernels = [
        jr.normal(key, (out_channels, in_channels, size, size))
        * math.sqrt(2 / (in_channels * size**2))
        for key, (out_channels, in_channels, size, *_) in zip(
            keys, _LAYERS, strict=True
        )
    ]
    parameters = {
        "kernels": kernels,
        "scales": [jnp.ones(layer[0]) for layer in _LAYERS],
        "head": [jr.normal(head_key, (_LAYERS[-1][0], 10)) / 16],
    }
    optimizer = optax.chain(
        optax.add_decayed_weights(1e-2),
        optax.sgd(optax.cosine_decay_schedule(0.1, steps), 0.9, nesterov=True),
    )
    opt_state = optimizer.init(parameters)

    @jax.jit
    def step(parameters: Any, opt_state: Any, x: Array, y: Array) -> Any:
        gradient, accuracy = jax.grad(_loss, has_aux=True)(parameters, x, y)
        updates, opt_state = optimizer.update(gradient, opt_state, parameters)
        return optax.apply_updates(parameters, updates), opt_state, accuracy

    accuracies = []
    for _ in range(steps):
        batch = rng.integers(0, len(images), 32)
        x, y = _coloured(images[batch], rng), jnp.asarray(labels[batch])
        parameters, opt_state, accuracy = step(parameters, opt_state, x, y)
        accuracies.append(float(accuracy))
    print(
        f"trained {len(_LAYERS)} convolutions on coloured digits of side 32: {steps} "
        f"steps, {time.perf_counter() - start:.0f} s, "
        f"{np.mean(accuracies[-20:]):.1%} of the last 20 batches right",
        flush=True,
    )
    named = {kernel.shape: np.asarray(kernel) for kernel in parameters["kernels"]}
    shapes = ((64, 64, 3, 3), (128, 64, 3, 3), (256, 256, 3, 3), (64, 3, 7, 7))
    return {shape: named[shape] for shape in shapes}


def time_together(
    functions: dict[str, Callable[[], Any]],
    rounds: int,
    lapack_threads: int | None = 1,
) -> dict[str, float]:
    """Median milliseconds; every round starts with another function.

    LAPACK, and so every `eigvalsh` on the CPU, is held to one thread by default: on a
    busy machine its threads wait for each other: `singla_feizi` was 150 times slower.
    """
    with threadpool_limits(lapack_threads):
        return medians(functions, rounds)
