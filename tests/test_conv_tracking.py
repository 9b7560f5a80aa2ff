"""Whether the norm of a convolution is followed while its kernel changes.

The truth is a Fourier grid in float64, by numpy, and a search from its best points.
"""

import functools as ft
import logging
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
import sklearn.datasets

import spectrax

from .convolutions import supremum, supremum_of


# Each shape of a kernel is compiled anew, so most tests share this one.
SHAPE = (1, 3, 2, 3, 3)


@ft.partial(jax.jit, static_argnames="num_steps")
def step(kernel, state, num_steps=1):
    """The new state and the estimate, as in training."""
    operator = spectrax.LatticeConvolution(kernel, 1.0)
    state = spectrax.power_iterate(operator, state, num_steps=num_steps)
    return state, spectrax.singular_value(operator, state)


def start(kernel: Any, **options: Any) -> spectrax.LatticePowerState:
    operator = spectrax.LatticeConvolution(jnp.asarray(kernel), 1.0)
    return spectrax.init_power_state(operator, **options)


def estimate(kernel: Any, state: spectrax.LatticePowerState) -> float:
    operator = spectrax.LatticeConvolution(jnp.asarray(kernel), 1.0)
    return float(spectrax.singular_value(operator, state))


def drawn(seed: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def truth(kernel: Any) -> float:
    """Of a kernel `[groups, out, in, *taps]`."""
    return max(supremum(np.asarray(part)) for part in kernel)


@pytest.fixture
def compiled(caplog) -> Callable[[Callable[[], Any]], list[str]]:
    """What was compiled while something ran."""

    def during(function: Callable[[], Any]) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.WARNING), jax.log_compiles():
            function()
        messages = [record.getMessage() for record in caplog.records]
        return [text for text in messages if text.startswith("Compiling ")]

    return during


# Training in small.


class Critic(eqx.Module):
    """One convolution of each kind."""

    pointwise: eqx.nn.Conv2d
    small: eqx.nn.Conv2d
    depthwise: eqx.nn.Conv2d
    large: eqx.nn.Conv2d
    strided: eqx.nn.Conv2d
    transposed: eqx.nn.ConvTranspose2d
    grouped: eqx.nn.Conv1d

    def __init__(self, key):
        keys = iter(jr.split(key, 7))
        conv = ft.partial(eqx.nn.Conv2d, dtype=jnp.float32)
        self.pointwise = conv(1, 4, 1, key=next(keys))
        self.small = conv(4, 4, 3, padding=1, key=next(keys))
        self.depthwise = conv(4, 4, 3, padding=1, groups=4, key=next(keys))
        self.large = conv(4, 4, 7, padding=3, key=next(keys))
        self.strided = conv(4, 6, 4, stride=2, padding=1, key=next(keys))
        self.transposed = eqx.nn.ConvTranspose2d(
            6, 4, 4, stride=2, padding=1, dtype=jnp.float32, key=next(keys)
        )
        self.grouped = eqx.nn.Conv1d(
            4, 6, 41, stride=4, padding=20, groups=2, dtype=jnp.float32, key=next(keys)
        )

    def convolutions(self):
        return [getattr(self, name) for name in self.__annotations__]

    def __call__(self, x):
        *first, last = self.convolutions()
        for conv in first:
            x = jnp.maximum(conv(x), 0.2 * conv(x))
        return jnp.mean(last(x.reshape(4, -1)))


def test_weights_of_a_critic_keep_their_bound_while_it_is_trained(getkey):
    images = sklearn.datasets.load_digits().images.astype(np.float32)[:, None] / 16
    critic, state = eqx.nn.make_with_state(spectrax.wrap)(Critic(getkey()))
    optimizer = optax.adam(1e-3)
    optimizer_state = optimizer.init(eqx.filter(critic, eqx.is_inexact_array))

    @eqx.filter_jit
    def update(critic, state, optimizer_state, real, fake):
        def loss(critic, state):
            state = spectrax.advance(critic, state)
            plain = spectrax.unwrap(critic, state)
            # The weights are small: without a factor the loss would be linear.
            values = 30 * jax.vmap(plain)(real), 30 * jax.vmap(plain)(fake)
            on_real, on_fake = jax.nn.relu(1 - values[0]), jax.nn.relu(1 + values[1])
            return jnp.mean(on_real) + jnp.mean(on_fake), state

        (value, state), gradient = eqx.filter_value_and_grad(loss, has_aux=True)(
            critic, state
        )
        used = [conv.weight for conv in spectrax.unwrap(critic, state).convolutions()]
        updates, optimizer_state = apply(gradient, optimizer_state)
        return eqx.apply_updates(critic, updates), state, optimizer_state, value, used

    # Optax relies on promotion.
    @jax.numpy_dtype_promotion("standard")
    def apply(gradient, optimizer_state):
        return optimizer.update(gradient, optimizer_state)

    rng = np.random.default_rng(0)
    first = np.asarray(critic.raw.small.weight)
    for count in range(1, 41):
        real = images[rng.integers(len(images), size=8)]
        fake = rng.uniform(size=real.shape).astype(np.float32)
        critic, state, optimizer_state, value, used = update(
            critic, state, optimizer_state, real, fake
        )
        assert jnp.isfinite(value)
        if count % 5:
            continue
        for conv, weight in zip(critic.raw.convolutions(), used, strict=True):
            assert weight.dtype == jnp.float32
            conv = eqx.tree_at(lambda conv: conv.weight, conv, weight)
            norm = supremum_of(conv)
            assert 1 - 1e-5 <= norm <= 1 + 1e-2, f"{conv} after {count}: {norm}"
    assert np.abs(critic.raw.small.weight - first).max() > 1e-2


# Maxima that move.


def at_zero_and_at_the_corner(noise: float, *, turned: bool) -> list[np.ndarray]:
    """Two kernels, the largest symbol of one of which is at the frequency 0, of the
    other at `(pi, pi)`, as far away as can be; with other vectors if `turned`.
    """
    rng = np.random.default_rng(1)
    (left, _), (right, _) = (np.linalg.qr(rng.normal(size=(n, n))) for n in (3, 2))
    signs = (-1.0) ** np.add.outer(np.arange(3), np.arange(3))
    kernels = []
    for i, taps in enumerate([np.ones((3, 3)), signs]):
        column = i if turned else 0
        kernel = np.multiply.outer(np.outer(left[:, column], right[:, column]), taps)
        kernel += noise * rng.normal(size=kernel.shape)
        kernels.append(kernel.astype(np.float32)[None])
    return kernels


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("noise", [0.01, 0.1])
@pytest.mark.parametrize("back", [False, True])
def test_maximum_that_jumps_is_found_in_one_step(noise, turned, back):
    kernels = at_zero_and_at_the_corner(noise, turned=turned)
    before, after = kernels[::-1] if back else kernels
    state = start(before)
    for _ in range(20):
        state, sigma = step(before, state)
    np.testing.assert_allclose(sigma, truth(before), rtol=1e-5)
    state, sigma = step(after, state)
    sup = truth(after)
    assert (1 - 1e-2) * sup <= sigma <= (1 + 1e-5) * sup


def check_takeover(first, second, *, noise=0.0, block_size=8, within=1e-2):
    """Adds more of the second kernel at every step, until it is twice the first."""
    rng = np.random.default_rng(5)
    share, state = 0.3, None
    while share < 2:
        kernel = first + share * second
        kernel = (kernel + noise * rng.normal(size=kernel.shape)).astype(np.float32)
        if state is None:
            state = start(kernel, block_size=block_size)
        state, sigma = step(kernel, state)
        sup = truth(kernel)
        assert (1 - within) * sup <= sigma <= (1 + 1e-5) * sup, share
        share *= 1.1


def at_frequency(frequency, column):
    """Of norm 1 there. Different columns have orthogonal vectors."""
    rng = np.random.default_rng(1)
    (left, _), (right, _) = (np.linalg.qr(rng.normal(size=(n, n))) for n in (3, 2))
    places = np.indices((3, 3)) - 1
    taps = np.cos(np.tensordot(np.asarray(frequency), places, 1))
    kernel = np.multiply.outer(np.outer(left[:, column], right[:, column]), taps)
    return (kernel / supremum(kernel))[None]


@pytest.mark.parametrize("block_size", [1, 8])
@pytest.mark.parametrize(
    ("here", "there"), [((0.2, 0.4), (2.5, 3.0)), ((3.0, 0.1), (0.3, 1.6))]
)
def test_direction_that_grows_at_another_frequency_takes_over(here, there, block_size):
    first, second = at_frequency(here, 0), at_frequency(there, 1)
    check_takeover(first, second, block_size=block_size)


# A candidate has one vector, in which power iteration leaves nothing of an orthogonal
# one that is smaller. What a step adds to it lets that one be seen when it grows.
@pytest.mark.parametrize("noise", [0.0, 0.001])
def test_direction_that_grows_at_the_same_frequency_takes_over(noise):
    first, second = at_frequency((0.2, 0.4), 0), at_frequency((0.2, 0.4), 1)
    check_takeover(first, second, noise=noise, within=1e-1)


def test_direction_that_grows_in_a_pointwise_kernel_takes_over():
    first, second = np.zeros((2, 1, 3, 2, 1, 1))
    first[0, 0, 0] = second[0, 1, 1] = 1
    check_takeover(first, second, within=1e-1)


# Kernels on random paths, all at once.


def grid_norms(kernels: np.ndarray, points: int) -> np.ndarray:
    """The largest singular value on a grid, for each kernel `[1, out, in, *taps]`."""
    kernels = np.asarray(kernels, np.float64)[:, 0]
    axes = tuple(range(3, kernels.ndim))
    symbols = np.fft.rfftn(kernels, s=(points,) * len(axes), axes=axes)
    symbols = np.moveaxis(symbols, (1, 2), (-2, -1))
    # With two channels in, the Gram matrix is 2 by 2.
    gram = np.swapaxes(symbols.conj(), -2, -1) @ symbols
    a, d = gram[..., 0, 0].real, gram[..., 1, 1].real
    largest = (a + d) / 2 + np.hypot((a - d) / 2, np.abs(gram[..., 0, 1]))
    return np.sqrt(largest.reshape(len(kernels), -1).max(axis=1))


@pytest.mark.parametrize("shape", [SHAPE, (1, 2, 2, 7)])
@pytest.mark.parametrize(
    ("size", "drift"), [(0.01, False), (0.03, False), (0.03, True)]
)
def test_random_paths_are_followed(shape, size, drift):
    """Steps of this relative size, in random directions or in one."""
    rng = np.random.default_rng(2)
    count = 64
    kernels = rng.normal(size=(count, *shape)).astype(np.float32)
    state = _starts(kernels)
    directions = rng.normal(size=kernels.shape)
    for _ in range(16):
        if not drift:
            directions = rng.normal(size=kernels.shape)
        kernels = (kernels + size * directions).astype(np.float32)
        state, sigma = _steps(kernels, state)
        norms = grid_norms(kernels, points=24 if len(shape) > 4 else 64)
        assert np.max(norms / np.asarray(sigma)) <= 1 + 2e-2
    for kernel, value in zip(kernels[:10], sigma, strict=False):
        sup = truth(kernel)
        assert (1 - 2e-2) * sup <= value <= (1 + 1e-5) * sup


_starts = jax.jit(jax.vmap(start))
_steps = jax.jit(jax.vmap(step.__wrapped__))


def test_grid_norms_are_below_the_supremum():
    kernels = np.stack([drawn(seed) for seed in range(8)])
    norms = np.array([truth(kernel) for kernel in kernels])
    for points, close in [(4, 0.5), (24, 2e-2), (96, 1e-3)]:
        found = grid_norms(kernels, points)
        assert np.all(found <= norms * (1 + 1e-9))
        assert np.all(found >= norms * (1 - close))


# Outside of `jit`, and inside.


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((2, 3, 2, 5), "complex128"),
        (SHAPE, "float32"),
        (SHAPE, "bfloat16"),
        (SHAPE, "float64"),
        ((1, 2, 2, 2, 3, 2), "float32"),
    ],
)
def test_numpy_and_jax_start_alike(shape, dtype, compiled):
    rng = np.random.default_rng(3)
    kernel = rng.normal(size=shape)
    if dtype.startswith("complex"):
        kernel = kernel + 1j * rng.normal(size=shape)
    kernel = jnp.asarray(kernel).astype(dtype)
    state = None

    def init():
        nonlocal state
        state = start(kernel)

    init()  # What makes the default key.
    assert compiled(init) == []
    outside = estimate(kernel, state)

    @jax.jit
    def inside(kernel):
        operator = spectrax.LatticeConvolution(kernel, 1.0)
        state = spectrax.init_power_state(operator)
        return state, spectrax.singular_value(operator, state)

    traced, value = inside(kernel)
    assert jax.tree.map(jnp.shape, traced) == jax.tree.map(jnp.shape, state)
    assert jax.tree.map(jnp.result_type, traced) == jax.tree.map(jnp.result_type, state)
    np.testing.assert_allclose(outside, value, rtol=1e-4)
    # Each array library can read the state of the other.
    np.testing.assert_allclose(estimate(kernel, traced), value, rtol=1e-5)
    sup = truth(np.asarray(kernel, np.complex128))
    np.testing.assert_allclose(value, sup, rtol=1e-3)


# Kernels on which things go wrong.


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("kind", ["gaussian", "rank one", "one tap"])
def test_scales(scale, kind):
    kernel = drawn(4)
    if kind == "rank one":
        factors = [drawn(i, (n,)) for i, n in enumerate(SHAPE)]
        kernel = np.einsum("g,o,i,t,s->goits", *factors)
    elif kind == "one tap":
        kernel[..., 1:, :] = kernel[..., :, 1:] = 0
    sup = truth(kernel)
    scaled = kernel * np.float32(scale)
    state = start(scaled)
    for value in (estimate(scaled, state), step(scaled, state)[1]):
        np.testing.assert_allclose(value / scale, sup, rtol=1e-3)
    # From one scale to the other.
    state, value = step(scaled, start(drawn(5)), num_steps=4)
    np.testing.assert_allclose(value / scale, sup, rtol=1e-2)


def test_zero_and_back():
    kernel = drawn(6)
    zero = np.zeros_like(kernel)
    state = start(zero)
    assert estimate(zero, state) == 0
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state))
    for started in (state, start(kernel)):
        at_zero, value = step(zero, started)
        assert value == 0
        _, value = step(kernel, at_zero)
        np.testing.assert_allclose(value, truth(kernel), rtol=1e-2)


@pytest.mark.parametrize(
    "shape",
    [
        (1, 3, 1, 3, 3),
        (1, 1, 2, 3, 3),
        (1, 1, 1, 3, 3),
        (3, 1, 1, 3, 3),
        (1, 3, 2, 1, 4),
        (1, 3, 2, 4, 1),
        (1, 3, 2, 1, 1),
        (1, 3, 2, 1),
        (2, 1, 3, 2),
    ],
)
def test_few_channels_and_few_taps(shape):
    kernel = drawn(7, shape)
    sup = truth(kernel)
    for block_size in (1, 8, 10_000):
        value = estimate(kernel, start(kernel, block_size=block_size))
        assert (1 - 1e-3) * sup <= value <= (1 + 1e-5) * sup


@pytest.mark.parametrize("shape", [(1, 3, 2, 1, 3), (1, 3, 2, 1, 1)])
def test_more_leaders_than_cells_in_jit(shape):
    first, other = drawn(8, shape), drawn(9, shape)
    state = start(first, block_size=1000)
    assert state.value.size < 1000
    for _ in range(4):
        state, value = step(other, state)
    np.testing.assert_allclose(value, truth(other), rtol=1e-4)


# Stacks.


def test_stack_advances_as_each_alone():
    kernels = drawn(10, (3, *SHAPE))
    moved = kernels + 0.3 * drawn(11, kernels.shape)
    states = [start(kernel) for kernel in kernels]
    stacked, values = jax.jit(jax.vmap(step.__wrapped__))(
        moved, jax.tree.map(lambda *x: jnp.stack(x), *states)
    )
    for i, (kernel, state) in enumerate(zip(moved, states, strict=True)):
        alone, value = step(kernel, state)
        np.testing.assert_allclose(values[i], value, rtol=1e-5)
        np.testing.assert_allclose(stacked.value[i], alone.value, rtol=1e-3)
        np.testing.assert_allclose(value, truth(kernel), rtol=1e-2)


def test_stack_of_wrapped_convolutions(getkey):
    @eqx.filter_vmap
    def make(key):
        return eqx.nn.Conv1d(2, 3, 3, dtype=jnp.float32, key=key)

    convs = make(jr.split(getkey(), 2))
    noise = 0.1 * jr.normal(getkey(), convs.weight.shape, jnp.float32)
    model, state = eqx.nn.make_with_state(spectrax.wrap)(convs)
    model = eqx.tree_at(
        lambda model: model.module.weight.weight, model, convs.weight + noise
    )
    state = spectrax.advance(model, state)
    together = spectrax.unwrap(model, state).weight
    for i in range(2):
        conv = jax.tree.map(lambda x: x[i], convs)  # noqa: B023
        conv = eqx.tree_at(lambda conv: conv.weight, conv, (convs.weight + noise)[i])
        alone, alone_state = eqx.nn.make_with_state(spectrax.wrap)(conv)
        alone_state = spectrax.advance(alone, alone_state)
        weight = spectrax.unwrap(alone, alone_state).weight
        np.testing.assert_allclose(together[i], weight, rtol=1e-3)
        np.testing.assert_allclose(supremum(together[i]), 1, rtol=1e-3)
