"""The parts of which enclosures are proven, each against its own formula."""

import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spectrax._enclosures import _cholesky
from spectrax._enclosures._cholesky import eigenvalue_bound
from spectrax._enclosures._convolution import _fine_enough
from spectrax._enclosures._gram import _square, gram_iteration, real_form
from spectrax._enclosures._products import gram, product, split
from spectrax._enclosures._rounding import (
    any_nonzero,
    down,
    flushed_below,
    frobenius,
    frobenius_lower,
    gamma,
    power_of_two,
    unit_roundoff,
    up,
)
from spectrax._enclosures._symbols import correlate, Grid, squared_symbols

from .convolutions import supremum, symbol_norms
from .helpers import examples, make_matrix


OPTIMIZED = True  # see conftest.py
DTYPES = [np.float32, np.float64]
SEEDS = st.integers(0, 2**32 - 1)
PI = 4 * np.arctan(np.longdouble(1))


@pytest.fixture
def single() -> Iterator[None]:
    """Without float64, as in JAX by default."""
    jax.config.update("jax_enable_x64", False)
    yield
    jax.config.update("jax_enable_x64", True)


def fraction(number: Any) -> Fraction:
    return Fraction(float(number))


def integers_of(matrix: np.ndarray) -> np.ndarray:
    """Times a power of two that is the same for all, as Python's own integers."""
    parts = [Fraction(float(x)) * 2**200 for x in np.asarray(matrix).ravel()]
    assert all(part.denominator == 1 for part in parts)
    return np.array([int(part) for part in parts], object).reshape(np.shape(matrix))


def exact_error(value: Any, a: np.ndarray, b: np.ndarray) -> float:
    """The Frobenius norm of `value - a b`, with no more than its last rounding."""
    difference = integers_of(a) @ integers_of(b) - integers_of(value) * 2**200
    total = sum(int(x) ** 2 for x in difference.ravel())
    return math.isqrt(total) / 2**400


# Rounding.


@pytest.mark.parametrize("dtype", DTYPES)
def test_gamma(dtype):
    u = Fraction(1, 2**24 if dtype == np.float32 else 2**53)
    assert fraction(unit_roundoff(dtype)) == u
    for count in [1, 2, 3, 7, 100, 10**4, 10**6, 8 * 10**6]:
        truth = count * u / (1 - count * u)
        assert (
            truth <= fraction(gamma(count, dtype)) <= truth * (1 + Fraction(1, 10**9))
        )
    assert gamma(math.ceil(1 / u), dtype) == math.inf
    assert gamma(2 * math.ceil(1 / u), dtype) == math.inf


@pytest.mark.parametrize("dtype", DTYPES)
@hypothesis.given(st.floats(1, 2), st.integers(-100, 100), st.sampled_from([4, 16]))
def test_up_and_down(dtype, mantissa, exponent, roundings):
    value = dtype(mantissa * 2.0**exponent)
    u = fraction(unit_roundoff(dtype))
    higher = up(jnp.asarray(value), roundings)
    lower = down(jnp.asarray(value), roundings)
    assert higher.dtype == lower.dtype == dtype
    # What the exact value can be if each rounding was to the worse side.
    assert fraction(higher) >= fraction(value) / (1 - u) ** roundings
    assert fraction(lower) <= fraction(value) / (1 + u) ** roundings
    room = 3 * roundings * u
    assert fraction(higher) <= fraction(value) * (1 + room)
    assert fraction(lower) >= fraction(value) * (1 - room)


def test_up_and_down_of_zero():
    assert up(jnp.zeros(())) == down(jnp.zeros(())) == 0


@pytest.mark.parametrize("jit", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_power_of_two(dtype, jit):
    function = jax.jit(power_of_two) if jit else power_of_two
    finfo = np.finfo(dtype)
    exponents = np.arange(finfo.minexp, finfo.maxexp - 1)
    powers = np.ldexp(dtype(1), exponents).astype(dtype)
    for factor in (1, 1.5, 2 - 2 * finfo.eps):
        values = (powers * dtype(factor)).astype(dtype)
        np.testing.assert_array_equal(function(jnp.asarray(values)), powers)
    # The largest of which the inverse is normal, and the smallest.
    most = np.ldexp(dtype(1), finfo.maxexp - 2)
    special = np.array([finfo.max, np.inf, np.nan, 0, finfo.smallest_subnormal], dtype)
    found = np.asarray(function(jnp.asarray(special)))
    np.testing.assert_array_equal(found, [most, most, most, finfo.tiny, finfo.tiny])
    with np.errstate(all="raise"):
        assert 1 / most >= finfo.tiny
        assert np.isfinite(1 / finfo.tiny)


@pytest.mark.parametrize("shape", [(1, 1), (3, 4)])
@pytest.mark.parametrize(
    "dtype", [jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64, jnp.complex64]
)
def test_any_nonzero(dtype, shape):
    function = jax.jit(any_nonzero)
    real = jnp.finfo(dtype).dtype
    smallest = np.asarray(jnp.finfo(dtype).smallest_subnormal, real)
    for sign in (1, -1):
        for unit in (1, 1j) if jnp.issubdtype(dtype, jnp.complexfloating) else (1,):
            values = np.zeros(shape, dtype)
            assert not function(jnp.asarray(sign * values))
            part = values.imag if unit == 1j else values
            part[-1, -1] = sign * smallest
            assert function(jnp.asarray(values)), (sign, unit)
    assert not function(jnp.asarray(-np.zeros(shape, real)))
    assert function(jnp.full(shape, jnp.nan, real))


def test_nothing_normal_is_flushed():
    for dtype in (jnp.bfloat16, jnp.float32, jnp.float64):
        assert flushed_below(dtype) == float(jnp.finfo(dtype).tiny)
    assert flushed_below(jnp.float16) == 0
    # Its subnormal numbers are normal ones of the dtype in which they are used.
    smallest = float(jnp.finfo(jnp.float16).smallest_subnormal)
    assert smallest >= float(jnp.finfo(jnp.float32).tiny)


@pytest.mark.parametrize("shape", [(1,), (37,), (5, 8), (300, 3)])
@pytest.mark.parametrize("dtype", DTYPES)
@examples(4)
@hypothesis.given(SEEDS, st.sampled_from([0, -10, -40]))
def test_frobenius(dtype, shape, seed, spread):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=shape) * 10.0 ** rng.uniform(min(spread, -1e-3), 0, shape)
    values = values.astype(dtype)
    total = sum(fraction(x) ** 2 for x in values.ravel())
    upper = jax.jit(frobenius)(jnp.asarray(values))
    lower = jax.jit(frobenius_lower)(jnp.asarray(values))
    assert fraction(lower) ** 2 <= total <= fraction(upper) ** 2
    room = 1 + (200 + 3 * values.size) * unit_roundoff(dtype)
    lost = math.sqrt(values.size * float(np.finfo(dtype).tiny))
    assert upper <= lower * room + 2 * lost


@pytest.mark.parametrize("dtype", DTYPES)
def test_frobenius_of_squares_below_the_smallest_number(dtype):
    tiny = float(np.finfo(dtype).tiny)
    values = np.full((5, 8), 0.9 * math.sqrt(tiny), dtype)
    truth = math.sqrt(40) * 0.9 * math.sqrt(tiny)
    assert frobenius_lower(jnp.asarray(values)) <= truth * (1 + 1e-6)
    assert truth * (1 - 1e-6) <= frobenius(jnp.asarray(values)) <= 4 * truth
    assert frobenius(jnp.zeros((2, 2), dtype)) >= 0
    assert frobenius_lower(jnp.zeros((2, 2), dtype)) == 0


# Products.

FACTORS = ["gaussian", "ones", "graded", "positive", "large rows", "hilbert"]


def draw_factor(kind: str, shape: tuple[int, int], seed: int) -> np.ndarray:
    """Entries of at most 1, and some of exactly 1."""
    rng = np.random.default_rng(seed)
    value = make_matrix("gaussian", shape, seed)
    if kind in ("ones", "hilbert"):
        value = make_matrix(kind, shape, seed)
    elif kind == "graded":
        value = value * 10.0 ** rng.uniform(-25, 0, shape)
    elif kind == "positive":
        value = np.abs(value)
    elif kind == "large rows":
        value = value * 10.0 ** rng.uniform(-12, 0, (shape[0], 1))
    return value / np.abs(value).max()


@pytest.mark.parametrize("axis", [0, 1])
@examples(10)
@hypothesis.given(st.sampled_from(FACTORS), st.sampled_from([4, 300, 1024]), SEEDS)
def test_split(axis, kind, length, seed):
    shape = (length, 5) if axis == 0 else (5, length)
    value = draw_factor(kind, shape, seed).astype(np.float32)
    high, low = map(np.asarray, split(jnp.asarray(value), axis))
    together = integers_of(high) + integers_of(low)
    assert np.all(together == integers_of(value))
    slices = integers_of(high) if axis == 1 else integers_of(high).T
    for part in slices:
        size = max(abs(x) for x in part)
        quantum = math.gcd(*part)
        quantum = quantum & -quantum
        assert size == 0 or length * (size // quantum) ** 2 <= 2**24
    largest = np.abs(value).max(axis=axis, keepdims=True)
    bits = (24 - math.ceil(math.log2(length))) // 2
    bound = np.maximum(largest * 2.0**-bits, 2.0**-61)
    assert np.all(np.abs(low) <= bound)


@examples(10)
@hypothesis.given(st.sampled_from(FACTORS), st.sampled_from([4, 1024]), SEEDS)
def test_products_of_high_parts_are_exact(kind, length, seed):
    a = draw_factor(kind, (5, length), seed).astype(np.float32)
    b = draw_factor("gaussian", (length, 6), seed + 1).astype(np.float32)
    high, _ = split(jnp.asarray(a), 1)
    other, _ = split(jnp.asarray(b), 0)
    found = jnp.matmul(high, other, precision="highest")
    # Each entry is a sum of fewer bits than float64 has.
    truth = np.asarray(high, np.float64) @ np.asarray(other, np.float64)
    np.testing.assert_array_equal(np.asarray(found, np.float64), truth)


@pytest.mark.parametrize("dtype", DTYPES)
@examples(6)
@hypothesis.given(st.sampled_from(FACTORS), st.sampled_from(FACTORS), SEEDS)
def test_product_exactly(dtype, first, second, seed):
    a = draw_factor(first, (4, 30), seed).astype(dtype)
    b = draw_factor(second, (30, 3), seed + 1).astype(dtype)
    value, error = jax.jit(product)(jnp.asarray(a), jnp.asarray(b))
    assert exact_error(value, a, b) <= float(error)
    square, error = jax.jit(gram)(jnp.asarray(b))
    assert exact_error(square, b.T, b) <= float(error)
    np.testing.assert_array_equal(square, square.T)


@pytest.mark.parametrize("rows", [100, 1024, 1500, 2100])
@examples(4)
@hypothesis.given(st.sampled_from(FACTORS), SEEDS)
def test_product_in_single_precision(rows, kind, seed):
    a = draw_factor(kind, (7, rows), seed).astype(np.float32)
    b = draw_factor("gaussian", (rows, 9), seed + 1).astype(np.float32)
    a[:, 1:] *= np.float32(0.99)
    value, error = jax.jit(product)(jnp.asarray(a), jnp.asarray(b))
    truth = a.astype(float) @ b.astype(float)
    # Rounding in float64 is below a millionth of the error in float32.
    assert np.linalg.norm(np.asarray(value, float) - truth) <= float(error) * (1 + 1e-6)
    square, square_error = jax.jit(gram)(jnp.asarray(a.T))
    truth = a.astype(float) @ a.T.astype(float)
    assert np.linalg.norm(np.asarray(square, float) - truth) <= float(square_error) * (
        1 + 1e-6
    )
    np.testing.assert_array_equal(square, square.T)
    if kind == "gaussian":
        unit = rows * 2.0**-24
        lengths = np.linalg.norm(a) * np.linalg.norm(b)
        assert float(error) <= unit * lengths / 20
        assert float(square_error) <= unit * np.linalg.norm(a) ** 2 / 20


@pytest.mark.parametrize("rows", [300, 3000])
def test_error_of_products_that_cancel(rows):
    """What the error is relative to is then the factors alone."""
    rng = np.random.default_rng(0)
    order = rng.permutation(2 * rows)
    a = draw_factor("gaussian", (7, rows), 0).astype(np.float32)
    b = draw_factor("gaussian", (rows, 9), 1).astype(np.float32)
    a = np.concatenate([a, -a], axis=1)[:, order]
    b = np.concatenate([b, b])[order]
    value, error = jax.jit(product)(jnp.asarray(a), jnp.asarray(b))
    assert 0 < np.linalg.norm(np.asarray(value, float)) <= float(error)


def test_error_of_the_sum_of_chunks():
    """Factors of few bits, which have no low parts."""
    rng = np.random.default_rng(0)
    a, b = rng.integers(100, 128, (2, 4, 4096)) / 128
    a = a * np.repeat([1, 1, -1, -1], 1024)
    single = jnp.asarray(a, jnp.float32), jnp.asarray(b.T, jnp.float32)
    assert not np.any(split(single[0], 1)[1])
    value, error = jax.jit(product)(*single)
    truth = a @ b.T
    assert 0 < np.linalg.norm(np.asarray(value, float) - truth) <= float(error)


# The proof by a Cholesky factor.


def _proof() -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Compiled anew, with what has been replaced."""
    return jax.jit(lambda gram, theta: eigenvalue_bound(gram, theta))


def draw_gram(size: int, dtype: Any, seed: int) -> tuple[np.ndarray, float]:
    value = make_matrix("gaussian", (size, size), seed)
    square = (value @ value.T).astype(dtype)
    square = np.tril(square) + np.tril(square, -1).T
    return square, float(np.linalg.eigvalsh(square.astype(float))[-1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 33, 100, 150])
def test_eigenvalue_bound(size, dtype):
    prove = jax.jit(eigenvalue_bound)
    for seed in range(5):
        square, truth = draw_gram(size, dtype, seed)
        room = 1e-4 if dtype == np.float32 else 1e-10
        bound, proven = prove(
            jnp.asarray(square), jnp.asarray(truth * (1 + room), dtype)
        )
        assert proven
        assert truth * (1 - 1e-14) <= float(bound) <= truth * (1 + 2 * room)
        for below in (0.0, 0.5, 0.99, 1 - room):
            bound, proven = prove(
                jnp.asarray(square), jnp.asarray(truth * below, dtype)
            )
            assert not proven
            assert bound == math.inf


@examples(20)
@hypothesis.given(SEEDS, st.floats(-30, 30))
def test_eigenvalue_bound_within_rounding(seed, units):
    square, truth = draw_gram(33, np.float32, seed)
    theta = jnp.asarray(truth * (1 + units * 2.0**-24), jnp.float32)
    bound, proven = jax.jit(eigenvalue_bound)(jnp.asarray(square), theta)
    assert float(bound) >= truth
    assert proven == jnp.isfinite(bound)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("below", [0.1, 0.9])
def test_wrong_factor_gives_no_wrong_bound(dtype, below, monkeypatch):
    square, truth = draw_gram(100, dtype, 0)
    rng = np.random.default_rng(0)

    def wrong(block: jax.Array) -> jax.Array:
        noise = np.tril(rng.normal(size=block.shape)) / 10
        return jnp.asarray(np.eye(len(block)) + noise, block.dtype)

    monkeypatch.setattr(_cholesky, "cholesky", wrong)
    theta = jnp.asarray(truth * below, dtype)
    bound, proven = _proof()(jnp.asarray(square), theta)
    assert proven
    assert float(bound) >= truth


def test_slightly_wrong_factor_is_paid_for(monkeypatch):
    square, truth = draw_gram(100, np.float32, 0)
    true_factor = _cholesky.cholesky

    def wrong(block: jax.Array) -> jax.Array:
        return true_factor(block).at[0, 0].mul(1.001)

    theta = jnp.asarray(truth * 1.001, jnp.float32)
    before, _ = _proof()(jnp.asarray(square), theta)
    monkeypatch.setattr(_cholesky, "cholesky", wrong)
    after, _ = _proof()(jnp.asarray(square), theta)
    assert float(after) - float(before) > 1e-3 * truth


def test_residual_off_the_corners_is_seen(monkeypatch):
    """The rows below the first corner come from its inverse, which may be wrong."""
    square, truth = draw_gram(100, np.float64, 0)
    true_inverse = _cholesky._triangular_inverse

    def wrong(lower: jax.Array) -> jax.Array:
        return 0 * true_inverse(lower)

    monkeypatch.setattr(_cholesky, "_triangular_inverse", wrong)
    # Both blocks alone have no eigenvalue as large.
    blocks = square[:64, :64], square[64:, 64:]
    theta = max(np.linalg.eigvalsh(block)[-1] for block in blocks) * 1.01
    assert theta < truth
    bound, proven = _proof()(jnp.asarray(square), jnp.asarray(theta))
    assert proven
    assert bound >= truth


# Gram iteration.


def hermitian(count: int, size: int, seed: int) -> np.ndarray:
    value = [make_matrix("gaussian", (size, size), seed + i, imaginary=True)
             for i in range(count)]  # fmt: skip
    value = np.stack(value)
    return value + np.swapaxes(value, 1, 2).conj()


def encoded(matrices: np.ndarray) -> np.ndarray:
    return matrices.real + matrices.imag


def test_square_of_encoded_matrices():
    matrices = hermitian(4, 5, 0)
    found = _square(jnp.asarray(encoded(matrices)))
    np.testing.assert_allclose(found, encoded(matrices @ matrices), atol=1e-13)


def test_real_form():
    for matrix in hermitian(4, 5, 0):
        form = np.asarray(real_form(jnp.asarray(encoded(matrix))))
        np.testing.assert_array_equal(form, form.T)
        values = np.repeat(np.linalg.eigvalsh(matrix), 2)
        np.testing.assert_allclose(np.linalg.eigvalsh(form), values, atol=1e-13)


@pytest.mark.parametrize("steps", [0, 1, 3, 6])
@pytest.mark.parametrize("dtype", DTYPES)
@examples(4)
@hypothesis.given(SEEDS, st.sampled_from([-8, 0, 8]), st.booleans())
def test_gram_iteration(dtype, steps, seed, exponent, positive):
    size = 6
    matrices = hermitian(8, size, seed % 2**31)
    if positive:
        matrices = matrices @ matrices
    matrices[3] = np.outer(matrices[3, 0], matrices[3, 0].conj())
    matrices[4] = np.eye(size)
    stack = (encoded(matrices) * 10.0**exponent).astype(dtype)
    wide = stack.astype(float)
    x = (wide + np.swapaxes(wide, 1, 2)) / 2
    y = (wide - np.swapaxes(wide, 1, 2)) / 2
    truth = np.abs(np.linalg.eigvalsh(x + 1j * y)).max(axis=1)
    found, _ = jax.jit(gram_iteration, static_argnums=1)(jnp.asarray(stack), steps)
    bounds = np.asarray(found, float)
    room = 1 + 2e3 * unit_roundoff(dtype)
    assert np.all(truth * (1 - 1e-14) <= bounds)
    assert np.all(bounds <= truth * size ** (0.5 / 2**steps) * room)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gram_iteration_pays_for_its_rounding(dtype):
    """Of rank one there is no other slack, so that what is left is that of rounding."""
    rng = np.random.default_rng(0)
    vectors = rng.integers(-7, 8, (200, 4)).astype(float)
    stack = np.einsum("pi,pj->pij", vectors, vectors)
    # Integers: both are exact.
    truth = np.sum(vectors**2, axis=1)
    bounds, _ = gram_iteration(jnp.asarray(stack, dtype), 3)
    assert np.all(np.asarray(bounds, float) >= truth)


def test_gram_iteration_of_zero():
    bounds, _ = gram_iteration(jnp.zeros((2, 3, 3)), 6)
    assert np.all((bounds >= 0) & (bounds <= 1e-150))


# Symbols.


def true_symbols(kernel: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
    """`F^H F` in extended precision, in the smaller of the two dimensions."""
    kernel = kernel.astype(np.clongdouble)
    if kernel.shape[0] < kernel.shape[1]:
        kernel = np.swapaxes(kernel, 0, 1)
    total = np.zeros((len(frequencies), *kernel.shape[:2]), np.clongdouble)
    for t in np.ndindex(*kernel.shape[2:]):
        waves = np.exp(1j * np.sum(frequencies * np.array(t), axis=1))
        total = total + waves[:, None, None] * kernel[(..., *t)]
    return np.einsum("poi,poj->pij", total.conj(), total)


@pytest.mark.parametrize("x64", [True, False])
@pytest.mark.parametrize("imaginary", [True, False])
@pytest.mark.parametrize("shape", [(3, 2, 4), (2, 3, 3), (2, 2, 2, 3), (1, 1, 5)])
def test_squared_symbols(shape, imaginary, x64, request):
    if not x64:
        request.getfixturevalue("single")
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=shape) * 1e5
    if imaginary:
        kernel = kernel + 1e5j * rng.normal(size=shape)
    precision = np.complex64 if imaginary else np.float32
    kernel = kernel.astype(precision)
    dim = len(shape) - 2
    grids = Grid((5, 4)[:dim], (True, True)[:dim], (2, 1)[:dim]).all_shifts()
    assert len(grids) == 2**dim

    def square(kernel: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        correlations = correlate(kernel)
        symbols = squared_symbols(correlations, grids, symmetric=not imaginary)
        found = jax.vmap(symbols.at)(symbols.weights)
        return found, symbols.error, correlations.scale

    found, error, scale = map(np.asarray, jax.jit(square)(jnp.asarray(kernel)))
    scale = scale.astype(np.longdouble) ** 2
    for grid, matrices in zip(grids, found, strict=True):
        points = grid.halves(symmetric=not imaginary)
        frequencies = points * np.array(grid.step) * PI / np.array(grid.count)
        truth = true_symbols(kernel, frequencies) / scale
        encodings = truth.real + truth.imag
        # All points are there, in order, and the first ones again.
        repeated = np.resize(np.arange(len(points)), len(matrices))
        differences = matrices.astype(np.longdouble) - encodings[repeated]
        assert np.sqrt(np.sum(differences**2, axis=(1, 2))).max() <= error
        size = np.sqrt(np.sum(encodings**2, axis=(1, 2))).max()
        assert error <= size * (1e-12 if x64 else 1e-3)


@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize("count", range(1, 6))
def test_phases(count, shifted):
    grid = Grid((count, 3), (shifted, False), (2, 1))
    points = grid.halves(symmetric=False)
    assert len(points) == 3 * count
    first = (2 * np.arange(count) + shifted) * np.pi / count
    found = points * np.pi / np.array(grid.count)
    np.testing.assert_allclose(np.unique(found[:, 0]), first, atol=1e-14)
    offsets = np.array([(0, 0), (1, 0), (-3, 2), (100, -7), (10**6 + 1, 1)])
    frequencies = points.astype(np.longdouble) * PI / np.array(grid.count)
    angles = frequencies @ (offsets * np.array(grid.step)).T.astype(np.longdouble)
    truth = np.exp(1j * np.mod(angles, 2 * PI))
    np.testing.assert_allclose(grid.phases(points, offsets), truth, atol=3e-15 + 1e-11)


@pytest.mark.parametrize("shifted", [(True, True), (True, False), (False, False)])
def test_one_of_each_pair_of_opposite_frequencies(shifted):
    for count in np.ndindex(6, 6):
        grid = Grid((count[0] + 1, count[1] + 1), shifted, (1, 1))
        period = 2 * np.array(grid.count)
        every = {tuple(p) for p in grid.halves(symmetric=False)}
        some = [tuple(p) for p in grid.halves(symmetric=True)]
        assert len(set(some)) == len(some)
        opposite = {p: tuple(-np.array(p) % period) for p in every}
        assert set(opposite.values()) == every
        for point in every:
            chosen = {point, opposite[point]} & set(some)
            assert len(chosen) == 1


# Between the points of a grid.

PLAIN = {"groups": 1, "transpose": False}


def on_grid(kernel: np.ndarray, counts: tuple[int, ...]) -> float:
    axes = [2 * np.pi * np.arange(n) / n for n in counts]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(axes))
    ones = (1,) * len(counts)
    return symbol_norms(kernel, points, stride=ones, dilation=ones, **PLAIN).max()


@examples(10)
@hypothesis.given(
    st.sampled_from([(2,), (3,), (4,), (5,), (2, 3), (3, 3), (4, 2)]),
    st.integers(0, 6),
    st.booleans(),
    SEEDS,
)
def test_how_far_a_symbol_rises_between_points(taps, more, imaginary, seed):
    rng = np.random.default_rng(seed)
    kernel = rng.normal(size=(2, 2, *taps))
    if imaginary:
        kernel = kernel + 1j * rng.normal(size=kernel.shape)
    counts = tuple(k + more for k in taps)
    rise = math.prod(
        math.cos(math.pi * (k - 1) / (2 * n)) for k, n in zip(taps, counts, strict=True)
    )
    assert supremum(kernel) <= on_grid(kernel, counts) / rise * (1 + 1e-9)


@pytest.mark.parametrize("taps", [2, 3, 4])
def test_it_may_rise_as_far(taps):
    for multiple in (3, 5, 8):
        count = multiple * (taps - 1)
        kernel = np.zeros((1, 1, taps), complex)
        kernel[0, 0, 0], kernel[0, 0, -1] = 1, np.exp(1j * np.pi / multiple)
        # The largest is 2, halfway between two points.
        rise = math.cos(math.pi * (taps - 1) / (2 * count))
        assert supremum(kernel) == pytest.approx(2, rel=1e-9)
        assert on_grid(kernel, (count,)) == pytest.approx(2 * rise, rel=1e-9)


@pytest.mark.parametrize("taps", [(1,), (2,), (3,), (7,), (3, 3), (1, 5), (2, 3, 3)])
def test_grids_are_fine_enough(taps):
    excess = 5e-3
    counts = _fine_enough(taps, excess)
    rise = math.prod(
        1 / math.cos(math.pi * (k - 1) / (2 * n))
        for k, n in zip(taps, counts, strict=True)
    )
    assert rise <= (1 + excess) * (1 + 1e-12) or len(taps) == 3
    assert math.prod(counts) <= 2**14
    # For a single channel, where all tap numbers are 1, nothing has to be sampled.
    assert all(n == 1 for k, n in zip(taps, counts, strict=True) if k == 1)
