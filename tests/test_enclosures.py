"""Enclosures of matrices and of composed operators, from both sides."""

import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
import pytest
import scipy.linalg

import spectrax

from .helpers import examples, is_thorough, KINDS, make_matrix, true_norm, unchecked


OPTIMIZED = True  # see conftest.py
# Matrices that go through one compiled program at once. Each is a case.
BATCH = 32
# What the singular value decomposition of the truth may be off by.
SLACK = 1e-13
# Widths `upper / lower - 1`, where nothing is near the ends of the range of a dtype.
# Many singular values close to the largest one are the widest in float32.
WIDTHS = {jnp.float64: 2e-5, jnp.float32: 2e-3}

MORE_KINDS = (
    "toeplitz",
    "hadamard",
    "orthogonal",
    "graded columns",
    "graded rows",
    "graded",
    "nearly rank one",
    "perron",
)

bounds = jax.jit(jax.vmap(spectrax.enclose_norm))


@pytest.fixture
def single() -> Iterator[None]:
    """Without float64, as in JAX by default."""
    jax.config.update("jax_enable_x64", False)
    yield
    jax.config.update("jax_enable_x64", True)


def draw(
    kind: str, shape: tuple[int, int], seed: int, *, imaginary: bool
) -> np.ndarray:
    """A matrix of norm between about 0.1 and `sqrt(size)`."""
    if kind in KINDS:
        return make_matrix(kind, shape, seed, imaginary=imaginary)
    rng = np.random.default_rng(seed)
    m, n = shape
    gaussian = make_matrix("gaussian", shape, seed, imaginary=imaginary)
    if kind == "toeplitz":
        first = make_matrix("gaussian", (1, m + n), seed, imaginary=imaginary)[0]
        return scipy.linalg.toeplitz(first[:m], first[m:])
    if kind == "hadamard":
        size = 2 ** math.ceil(math.log2(max(shape)))
        return scipy.linalg.hadamard(size)[:m, :n] / math.sqrt(size)
    if kind == "orthogonal":
        left, _, right = np.linalg.svd(gaussian, full_matrices=False)
        return left @ right
    if kind == "graded columns":
        return gaussian * 10.0 ** rng.permutation(-np.linspace(0, 30, n))
    if kind == "graded rows":
        return gaussian * 10.0 ** rng.permutation(-np.linspace(0, 30, m))[:, None]
    if kind == "graded":
        return gaussian * 10.0 ** rng.uniform(-30, 0, shape)
    if kind == "nearly rank one":
        one = make_matrix("rank one", shape, seed, imaginary=imaginary)
        return one + 10.0 ** rng.uniform(-12, -1) * gaussian
    assert kind == "perron"
    return np.abs(gaussian)


def draw_batch(
    shape: tuple[int, int], dtype: Any, seed: int, exponents: tuple[int, int]
) -> tuple[np.ndarray, list[str]]:
    """Matrices of all kinds, each times ten to a power between the two."""
    rng = np.random.default_rng(seed)
    imaginary = jnp.issubdtype(dtype, jnp.complexfloating)
    kinds = rng.choice(KINDS + MORE_KINDS, BATCH)
    matrices = []
    largest = float(jnp.finfo(dtype).max)
    for kind in kinds:
        matrix = draw(kind, shape, int(rng.integers(2**32)), imaginary=imaginary)
        exponent = int(rng.integers(exponents[0], exponents[1] + 1))
        matrix = matrix * 10.0 ** (exponent // 2) * 10.0 ** (exponent - exponent // 2)
        matrices.append(np.where(np.abs(matrix) < largest, matrix, largest / 2))
    return np.stack(matrices).astype(dtype), list(kinds)


def scaled_norm(matrix: np.ndarray) -> tuple[float, int]:
    """The true norm as a number and a power of two, with which nothing overflows."""
    wide = np.complex128 if np.iscomplexobj(matrix) else np.float64
    matrix = np.asarray(matrix).astype(wide)
    parts = np.stack([matrix.real, matrix.imag])
    exponent = int(np.frexp(np.max(np.abs(parts)))[1])
    real, imag = np.ldexp(parts, -exponent)
    return true_norm(real + 1j * imag if np.iscomplexobj(matrix) else real), exponent


def check_ends(lower: Any, upper: Any, matrix: np.ndarray, *context: Any) -> None:
    truth, exponent = scaled_norm(matrix)
    low, high = np.ldexp(np.float64(lower), -exponent), float(upper)
    if math.isfinite(high):
        high = np.ldexp(np.longdouble(high), -exponent)
    assert low <= truth * (1 + SLACK), (low, truth, exponent, *context)
    assert truth * (1 - SLACK) <= high, (truth, high, exponent, *context)


def width_of(box: spectrax.Enclosure) -> float:
    return float(box.upper) / float(box.lower) - 1


def succeeded(box: spectrax.Enclosure) -> bool:
    return bool(jnp.all(box.result == lx.RESULTS.successful))


# Each pair is compiled once.
CASES = [
    ((1, 1), jnp.float64),
    ((1, 9), jnp.float64),
    ((5, 3), jnp.float64),
    ((16, 16), jnp.float64),
    ((40, 70), jnp.float64),
    ((5, 3), jnp.float32),
    ((16, 16), jnp.complex128),
    ((5, 3), jnp.complex64),
    ((5, 3), jnp.bfloat16),
    ((5, 3), jnp.float16),
]
SINGLE_CASES = [
    ((1, 9), jnp.float32),
    ((16, 16), jnp.float32),
    ((40, 70), jnp.float32),
    ((5, 3), jnp.complex64),
    ((5, 3), jnp.bfloat16),
]
if is_thorough():
    CASES += [((n, m), jnp.float64) for n, m in [(96, 100), (512, 512)]]
    CASES += [((130, 33), jnp.complex64)]
    SINGLE_CASES += [((n, m), jnp.float32) for n, m in [(2100, 65), (512, 512)]]

# Powers of ten: with the first, everything is normal and narrow; the second goes over
# the whole range of the dtype, subnormal numbers included.
RANGES = {
    jnp.float64: ((-100, 100), (-322, 307)),
    jnp.float32: ((-20, 20), (-45, 38)),
    jnp.bfloat16: ((-20, 20), (-40, 38)),
    jnp.float16: ((-2, 2), (-8, 4)),
    jnp.complex64: ((-20, 20), (-45, 38)),
    jnp.complex128: ((-100, 100), (-322, 307)),
}


def count_for(shape: tuple[int, int]) -> hypothesis.settings:
    large = math.prod(shape) > 5000
    if large:
        return hypothesis.settings(max_examples=8)
    return examples(4)


def check_case(shape: tuple[int, int], dtype: Any, *, width: float) -> None:
    @count_for(shape)
    @hypothesis.given(st.integers(0, 2**32 - 1), st.booleans())
    def check(seed: int, extreme: bool) -> None:
        matrices, kinds = draw_batch(shape, dtype, seed, RANGES[dtype][extreme])
        box = bounds(jnp.asarray(matrices))
        assert box.lower.dtype == (jnp.zeros(()) + 1.0).dtype
        for i, kind in enumerate(kinds):
            context = kind, shape, dtype, seed, i
            check_ends(box.lower[i], box.upper[i], matrices[i], *context)
            if not np.any(matrices[i]):
                assert box.upper[i] == 0, context
            elif not extreme and box.upper[i] > 1e-29:
                # Graded matrices may be drawn close to the smallest normal number.
                assert box.upper[i] <= (1 + width) * box.lower[i], context
        if not extreme:
            assert succeeded(box)

    check()


@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_matrix(shape, dtype):
    check_case(shape, dtype, width=WIDTHS[jnp.float64])


@pytest.mark.parametrize(("shape", "dtype"), SINGLE_CASES)
@pytest.mark.usefixtures("single")
def test_matrix_without_float64(shape, dtype):
    check_case(shape, dtype, width=WIDTHS[jnp.float32])


# With the square of the norm, an integer.
def _integer_matrices() -> Iterator[tuple[np.ndarray, int]]:
    rng = np.random.default_rng(0)
    n = 16
    yield np.zeros((n, n)), 0
    yield np.eye(n), 1
    yield np.ones((n, n)), n**2
    yield np.ones((n, n)) - np.eye(n), (n - 1) ** 2
    yield scipy.linalg.hadamard(n), n
    yield np.diag(np.arange(n)), (n - 1) ** 2
    yield 3 * np.eye(n)[rng.permutation(n)], 9
    for _ in range(10):
        left, right = rng.integers(-9, 10, (2, n))
        yield np.outer(left, right), int(left @ left) * int(right @ right)
    for _ in range(10):
        row = rng.integers(0, 10, n)
        yield scipy.linalg.circulant(row), int(row.sum()) ** 2
    for size in range(1, 6):
        block = np.zeros((n, n))
        block[:size, :size] = 7
        yield block, (7 * size) ** 2


@pytest.mark.parametrize("x64", [True, False])
def test_norms_known_exactly(x64, request):
    if not x64:
        request.getfixturevalue("single")
    matrices, squares = zip(*_integer_matrices(), strict=True)
    assert len(matrices) == BATCH
    box = bounds(jnp.asarray(np.stack(matrices), float))
    for lower, upper, square in zip(box.lower, box.upper, squares, strict=True):
        # Without any rounding.
        assert Fraction(float(lower)) ** 2 <= square <= Fraction(float(upper)) ** 2
        width = WIDTHS[jnp.float64 if x64 else jnp.float32]
        assert upper <= (1 + width) * lower


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64, jnp.bfloat16])
def test_zero_and_smallest(dtype):
    zero = spectrax.enclose_norm(jnp.zeros((5, 3), dtype))
    assert zero.lower == zero.upper == 0
    assert succeeded(zero)
    smallest = np.zeros((5, 3))
    smallest[2, 1] = float(jnp.finfo(dtype).smallest_subnormal)
    box = spectrax.enclose_norm(jnp.asarray(smallest.astype(dtype)))
    assert 0 < box.upper < 20 * float(jnp.finfo(dtype).tiny)
    assert box.lower <= smallest[2, 1]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nonfinite_input(bad):
    matrices = np.ones((BATCH, 5, 3))
    matrices[::2, 1, 1] = bad
    box = bounds(jnp.asarray(matrices))
    bad_ones = np.arange(BATCH) % 2 == 0
    nonfinite = box.result == lx.RESULTS.nonfinite_input
    np.testing.assert_array_equal(nonfinite, bad_ones)
    np.testing.assert_array_equal(box.result == lx.RESULTS.successful, ~bad_ones)
    np.testing.assert_array_equal(np.isnan(box.lower), bad_ones)
    np.testing.assert_array_equal(np.isnan(box.upper), bad_ones)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nonfinite_operators(bad):
    finite, zero = matrix(np.eye(2)), matrix(np.zeros((2, 2)))
    wrong = matrix(np.array([[1, bad], [0, 1]]))
    operators = [
        lx.DiagonalLinearOperator(jnp.asarray([1.0, bad])),
        -wrong,
        finite + wrong,
        wrong @ finite,
        finite @ wrong,
        zero @ wrong,
        wrong @ zero,
        lx.MulLinearOperator(finite, jnp.asarray(bad)),
        lx.MulLinearOperator(zero, jnp.asarray(bad)),
        spectrax.fourier_multiplier(jnp.asarray([[[1.0, bad]]])),
    ]
    for operator in operators:
        box = spectrax.enclose_norm(operator)
        assert jnp.isnan(box.lower), operator
        assert jnp.isnan(box.upper), operator
        assert box.result == lx.RESULTS.nonfinite_input


def test_width_out_of_reach():
    value = make_matrix("gaussian", (5, 3), 0)
    box = spectrax.enclose_norm(jnp.asarray(value), rtol=1e-17, max_steps=2)
    assert box.result == lx.RESULTS.max_steps_reached
    check_ends(box.lower, box.upper, value)
    # A tight one that can be had, and a wide one.
    for rtol in (1e-9, 1e-2):
        box = spectrax.enclose_norm(jnp.asarray(value), rtol=rtol)
        assert succeeded(box)
        assert width_of(box) <= rtol
        check_ends(box.lower, box.upper, value)


def test_one_attempt_is_a_bound():
    value = make_matrix("clustered top", (40, 70), 0)
    box = spectrax.enclose_norm(jnp.asarray(value), rtol=1e-12, max_steps=1)
    check_ends(box.lower, box.upper, value)
    assert width_of(box) < 10


def test_every_key_encloses():
    value = jnp.asarray(make_matrix("clustered top", (16, 16), 0))
    keys = jr.split(jr.key(1), BATCH)
    box = jax.vmap(lambda key: spectrax.enclose_norm(value, key=key))(keys)
    for lower, upper in zip(box.lower, box.upper, strict=True):
        check_ends(lower, upper, np.asarray(value))
    assert len(set(np.asarray(box.lower).tolist())) > 1


def test_transforms():
    value = jnp.asarray(make_matrix("gaussian", (5, 3), 0))
    plain = spectrax.enclose_norm(value)
    jitted = jax.jit(spectrax.enclose_norm)(value)
    assert jitted.lower == pytest.approx(float(plain.lower), rel=1e-6)
    assert jitted.upper == pytest.approx(float(plain.upper), rel=1e-6)

    def total(value: jax.Array) -> jax.Array:
        box = spectrax.enclose_norm(value)
        return box.lower + box.upper

    np.testing.assert_array_equal(jax.grad(total)(value), 0)
    np.testing.assert_array_equal(jax.jvp(total, (value,), (value,))[1], 0)


def test_numpy_matrices_are_operators_too():
    value = make_matrix("gaussian", (5, 3), 0)
    box = spectrax.enclose_norm(value)
    check_ends(box.lower, box.upper, value)


def test_errors():
    with pytest.raises(ValueError, match="`rtol` to be positive, got 0"):
        spectrax.enclose_norm(jnp.ones((2, 2)), rtol=0.0)
    with pytest.raises(ValueError, match="`rtol` to be positive, got nan"):
        spectrax.enclose_norm(jnp.ones((2, 2)), rtol=math.nan)
    with pytest.raises(ValueError, match="`max_steps` to be positive, got 0"):
        spectrax.enclose_norm(jnp.ones((2, 2)), max_steps=0)
    with pytest.raises(TypeError, match="floating-point or complex dtype, got int"):
        spectrax.enclose_norm(jnp.ones((2, 2), int))
    with pytest.raises(ValueError, match="expected a 2-D array, got one of shape"):
        spectrax.enclose_norm(jnp.ones(2))
    with unchecked(), pytest.raises(TypeError, match="a 2-D array or a `lineax` oper"):
        spectrax.enclose_norm("matrix")


# Operators, each with a matrix of its own.

A = make_matrix("gaussian", (4, 3), 1)
B = make_matrix("gaussian", (4, 3), 2)
C = make_matrix("gaussian", (3, 5), 3)
Z = make_matrix("gaussian", (4, 3), 4, imaginary=True)
ROWS = jax.ShapeDtypeStruct((3,), jnp.float64)


def matrix(value: Any) -> lx.MatrixLinearOperator:
    return lx.MatrixLinearOperator(jnp.asarray(value))


def _pytree() -> tuple[Any, np.ndarray]:
    blocks = {"a": jnp.asarray(A), "b": (jnp.asarray(B),)}
    structure = {
        "a": jax.ShapeDtypeStruct((4,), jnp.float64),
        "b": (jax.ShapeDtypeStruct((4,), jnp.float64),),
    }
    return lx.PyTreeLinearOperator(blocks, structure), np.concatenate([A, B])


def _tridiagonal() -> tuple[Any, np.ndarray]:
    d, low, high = A[:, 0], A[:3, 1], A[:3, 2]
    truth = np.diag(d) + np.diag(low, -1) + np.diag(high, 1)
    return lx.TridiagonalLinearOperator(*map(jnp.asarray, (d, low, high))), truth


def _function() -> lx.FunctionLinearOperator:
    value = jnp.asarray(A)
    return lx.FunctionLinearOperator(lambda x: value @ x, ROWS)


def _diagonal_pytree() -> tuple[Any, np.ndarray]:
    leaves = {"a": jnp.asarray(A), "b": jnp.asarray(-7.5, jnp.float32)}
    values = np.append(A.ravel(), -7.5)
    return lx.DiagonalLinearOperator(leaves), np.diag(values)


# The operator, its matrix, and how wide the enclosure may be.
OPERATORS: dict[str, Callable[[], tuple[Any, np.ndarray, float]]] = {
    "diagonal": lambda: (
        lx.DiagonalLinearOperator(jnp.asarray(A[0])), np.diag(A[0]), 0,
    ),
    "complex diagonal": lambda: (
        lx.DiagonalLinearOperator(jnp.asarray(Z[0])), np.diag(Z[0]), 1e-13,
    ),
    "diagonal of single complex numbers": lambda: (
        lx.DiagonalLinearOperator(jnp.asarray(Z[0].astype(np.complex64))),
        np.diag(Z[0].astype(np.complex64)), 1e-13,
    ),
    "diagonal pytree": lambda: (*_diagonal_pytree(), 0),
    "identity": lambda: (lx.IdentityLinearOperator(ROWS), np.eye(3), 0),
    "tridiagonal": lambda: (*_tridiagonal(), 2e-5),
    "pytree": lambda: (*_pytree(), 2e-5),
    "tagged": lambda: (
        lx.TaggedLinearOperator(matrix(A @ A.T), lx.symmetric_tag), A @ A.T, 2e-5,
    ),
    "negative": lambda: (-matrix(A), A, 2e-5),
    "multiple": lambda: (matrix(A) * jnp.asarray(-3.7), 3.7 * A, 2e-5),
    "single multiple": lambda: (
        lx.MulLinearOperator(matrix(A), jnp.asarray(0.1, jnp.float32)),
        float(np.float32(0.1)) * A, 2e-5,
    ),
    "quotient": lambda: (matrix(A) / jnp.asarray(-3.7), A / 3.7, 2e-5),
    "sum": lambda: (matrix(A) + matrix(B), A + B, 2e-5),
    "difference": lambda: (matrix(A) - matrix(0.99 * A), 0.01 * A, 3e-5),
    "complex sum": lambda: (matrix(Z) + matrix(1j * Z), (1 + 1j) * Z, 2e-5),
    "product": lambda: (matrix(A) @ matrix(C), A @ C, 2e-5),
    "complex product": lambda: (matrix(Z) @ matrix(C + 0j), Z @ C, 2e-5),
    "sum with a negative": lambda: (
        (-matrix(B)) + matrix(A) @ matrix(np.eye(3)), A - B, 2e-5,
    ),
    "difference with a negative": lambda: (matrix(A) - matrix(-A), 2 * A, 2e-5),
    "product with a negative": lambda: (
        matrix(A) @ (-matrix(C)) + matrix(0.5 * A @ C), 0.5 * A @ C, 2e-5,
    ),
    "sum with a multiple": lambda: (
        matrix(A) + matrix(A) * jnp.asarray(-0.5), 0.5 * A, 2.1,
    ),
    "function, materialised": lambda: (_function(), A, 2e-5),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATORS)
def test_operators(name):
    operator, truth, width = OPERATORS[name]()
    box = spectrax.enclose_norm(operator, materialise="materialised" in name)
    check_ends(box.lower, box.upper, truth)
    assert box.upper <= (1 + width) * box.lower
    # The operator is the one with this matrix.
    with jax.numpy_dtype_promotion("standard"):
        norm = true_norm(operator.as_matrix())
    assert norm == pytest.approx(true_norm(truth), rel=1e-12)


def test_sum_without_dense_form():
    # Of functions nothing is known; what a sum can cancel is.
    box = spectrax.enclose_norm(matrix(A) + _function())
    assert box.upper == math.inf
    assert box.lower <= 2 * true_norm(A)
    assert box.result == lx.RESULTS.max_steps_reached
    both = spectrax.enclose_norm(matrix(100 * A) + _function(), materialise=True)
    check_ends(both.lower, both.upper, 101 * A)
    assert width_of(both) < 0.05


def test_function_without_materialising():
    box = spectrax.enclose_norm(_function())
    assert box.upper == math.inf
    assert box.result == lx.RESULTS.max_steps_reached
    assert 0.999 * true_norm(A) <= box.lower <= true_norm(A)


def test_function_rounded_coarsely():
    value = jnp.asarray(A, jnp.bfloat16)
    structure = jax.ShapeDtypeStruct((3,), jnp.bfloat16)
    operator = lx.FunctionLinearOperator(lambda x: value @ x, structure)
    box = spectrax.enclose_norm(operator)
    assert 0.8 * true_norm(value) < box.lower <= true_norm(value)


@pytest.mark.parametrize("dtype", [jnp.complex64, jnp.complex128])
@pytest.mark.parametrize("kind", [lx.MulLinearOperator, lx.DivLinearOperator])
def test_complex_multiples(kind, dtype):
    rng = np.random.default_rng(0)
    identity = lx.IdentityLinearOperator(ROWS)
    numbers = (rng.normal(size=(BATCH, 2)) @ [1, 1j]).astype(dtype)

    @jax.jit
    @jax.vmap
    def enclose(number: jax.Array) -> spectrax.Enclosure:
        return spectrax.enclose_norm(kind(identity, number))

    box = enclose(jnp.asarray(numbers))
    truth = np.abs(numbers.astype(np.complex128))
    truth = truth if kind is lx.MulLinearOperator else 1 / truth
    assert np.all(box.lower <= truth * (1 + SLACK))
    assert np.all(truth * (1 - SLACK) <= box.upper)
    # Rounded in the dtype of the number.
    assert np.all(box.upper <= (1 + 1e-5) * box.lower)


def test_integer_multiples():
    identity = lx.IdentityLinearOperator(ROWS)
    for operator, truth in [(2 * identity, 2), (identity / 2, 0.5)]:
        box = spectrax.enclose_norm(operator)
        assert truth * (1 - 1e-12) <= box.lower <= truth <= box.upper


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("kind", [lx.MulLinearOperator, lx.DivLinearOperator])
def test_multiples_of_all_scales(kind, dtype):
    finfo = jnp.finfo(dtype)
    ends = math.log2(float(finfo.smallest_subnormal)), math.log2(float(finfo.max))
    exponents = np.linspace(ends[0], ends[1] - 1, 16)
    numbers = (2.0**exponents).astype(dtype)
    first, second = map(np.ravel, np.meshgrid(numbers, numbers))

    @jax.jit
    @jax.vmap
    def enclose(entry: jax.Array, number: jax.Array) -> spectrax.Enclosure:
        operator = lx.DiagonalLinearOperator(entry[None])
        return spectrax.enclose_norm(kind(operator, number))

    box = enclose(jnp.asarray(first), jnp.asarray(second))
    for i, (a, b) in enumerate(zip(first, second, strict=True)):
        a, b = Fraction(float(a)), Fraction(float(b))
        truth = a * b if kind is lx.MulLinearOperator else a / b
        lower, upper = float(box.lower[i]), float(box.upper[i])
        assert math.isfinite(lower), (float(a), float(b))
        assert Fraction(lower) <= truth, (float(a), float(b), lower)
        assert upper == math.inf or truth <= Fraction(upper), (
            float(a),
            float(b),
            upper,
        )
        inside = all(1e-30 < x < 1e30 for x in (a, b, truth))
        assert not inside or upper <= lower * (1 + 1e-6)


def test_complex_diagonal_beyond_the_largest_number():
    most = float(np.finfo(np.float64).max)
    entries = jnp.asarray(np.array([0.9 * most * (1 + 1j)]))
    box = spectrax.enclose_norm(lx.DiagonalLinearOperator(entries))
    assert box.upper == math.inf
    assert box.lower <= most


def test_products_of_all_scales():
    """Factors whose scales cancel, and some whose product has none."""
    most = make_matrix("gaussian", (1, 1), 0)
    for a, b in [(300, -300), (-300, 300), (-307, 100), (200, 200), (-200, -200)]:
        operator = matrix(10.0**a * most) @ matrix(10.0**b * C[:1])
        box = spectrax.enclose_norm(operator)
        truth = most * C[:1]
        low = np.longdouble(float(box.lower)) / np.longdouble(10) ** (a + b)
        high = np.longdouble(float(box.upper)) / np.longdouble(10) ** (a + b)
        assert low <= true_norm(truth) * (1 + 1e-12)
        assert high >= true_norm(truth) * (1 - 1e-12)
        if a + b == 0:
            assert high < 2 * true_norm(truth)


def test_product_of_which_parts_underflow_on_the_way():
    tiny = float(np.finfo(np.float64).tiny)
    row = np.full((1, 10000), 0.499 * 2.0**100)
    row[0, 0] = 2.0**100
    a = np.array([[1.99 * tiny]])
    box = spectrax.enclose_norm(matrix(a) @ matrix(row))
    assert box.lower <= 1.99 * tiny * true_norm(row) <= box.upper


@pytest.mark.parametrize("dtype", [jnp.complex128, jnp.float32])
def test_fourier_multiplier(dtype):
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(4, 3, 2, 5)) @ np.eye(5)
    if dtype == jnp.complex128:
        weight = weight + 1j * rng.normal(size=weight.shape)
    weight = weight.astype(dtype)
    x = rng.normal(size=(3, 2, 5)).astype(dtype)
    operator = spectrax.fourier_multiplier(jnp.asarray(weight))
    truth = np.einsum("oikl,ikl->okl", weight, x)
    np.testing.assert_allclose(operator.mv(jnp.asarray(x)), truth, rtol=1e-5)
    box = jax.jit(lambda w: spectrax.enclose_norm(spectrax.fourier_multiplier(w)))(
        jnp.asarray(weight)
    )
    modes = weight.reshape(4, 3, 10)
    norms = [true_norm(modes[:, :, k]) for k in range(10)]
    assert box.lower <= max(norms) * (1 + SLACK)
    assert max(norms) * (1 - SLACK) <= box.upper <= (1 + 2e-5) * box.lower
    assert succeeded(box)
    # Of the operator's own matrix, which is one block for each mode.
    dense = np.asarray(operator.as_matrix())
    assert true_norm(dense) == pytest.approx(max(norms), rel=1e-5)


def test_fourier_multiplier_errors():
    with pytest.raises(ValueError, match=r"a weight of shape \[out, in, \*modes\]"):
        spectrax.fourier_multiplier(jnp.ones((2, 2)))
    with pytest.raises(ValueError, match="with entries, got shape"):
        spectrax.fourier_multiplier(jnp.ones((2, 2, 0)))
