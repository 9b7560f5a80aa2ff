"""The converged norm: values against a dense SVD, derivatives of every order."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import hypothesis
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
import pytest

import spectrax

from .helpers import KINDS, make_matrix, matrices, true_norm


norm = eqx.filter_jit(spectrax.spectral_norm)
norm_gradient = eqx.filter_jit(jax.grad(spectrax.spectral_norm))
norm_hessian = eqx.filter_jit(jax.jacfwd(jax.grad(spectrax.spectral_norm)))


def eps_of(dtype: Any) -> float:
    """Of the precision in which norms of such a matrix are computed."""
    narrow = jnp.dtype(dtype) in ("float16", "bfloat16", "float32", "complex64")
    return 2.0**-23 if narrow else 2.0**-52


def small_norm(operator: Any) -> jax.Array:
    """One cycle, complete if a side is at most 32: quicker to compile than a loop."""
    return spectrax.spectral_norm(operator, max_steps=32)


def svd_norm(matrix: jax.Array) -> jax.Array:
    """The oracle for derivatives: JAX's own SVD, differentiated."""
    return jnp.linalg.svd(matrix, compute_uv=False)[0]


def as_matrix(pair: jax.Array) -> jax.Array:
    """A complex matrix from the real array of its two parts."""
    return jax.lax.complex(pair[0], pair[1])


# Values


# Shapes are compiled one by one, so each dtype has some of them; (60, 50) is larger
# than the 32 vectors of the Krylov basis, so that it has to restart.
SHAPES = [
    ((6, 6), "float64", 20),
    ((8, 5), "float64", 20),
    ((5, 8), "float64", 20),
    ((1, 7), "float64", 20),
    ((7, 1), "float64", 20),
    ((1, 1), "float64", 20),
    ((60, 50), "float64", 20),
    ((60, 50), "float32", 20),
    ((5, 8), "float32", 20),
    ((8, 5), "complex64", 20),
    ((5, 8), "complex128", 20),
    ((50, 60), "complex128", 20),
    ((5, 8), "bfloat16", 20),
    ((8, 5), "float16", 2),
]


@pytest.mark.parametrize(("shape", "dtype", "exponent"), SHAPES)
def test_value_is_the_largest_singular_value(
    shape: tuple[int, int], dtype: str, exponent: int
):
    dtype = jnp.dtype(dtype)
    eps = eps_of(dtype)
    imaginary = jnp.issubdtype(dtype, jnp.complexfloating)
    powers = (-exponent, -exponent // 2, 0, exponent // 2, exponent)

    @hypothesis.given(matrices([shape], exponents=powers, imaginary=imaginary))
    def check(drawn: np.ndarray):
        matrix = drawn.astype(dtype)
        truth = true_norm(matrix)
        value = norm(jnp.asarray(matrix))
        assert value.shape == ()
        assert value.dtype == ("float32" if eps > 1e-10 else "float64")
        assert float(value) <= truth * (1 + 50 * eps)
        # The promise is the residual, eps ** 0.75; the value is of second order in it.
        assert float(value) >= truth * (1 - 100 * eps)

    check()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "complex128"])
def test_every_kind_at_every_scale(kind: str, dtype: str):
    eps = eps_of(dtype)
    for exponent in (-20, -10, 0, 10, 20):
        matrix = make_matrix(kind, (5, 8), 7, imaginary=dtype == "complex128")
        matrix = (matrix * 10.0**exponent).astype(dtype)
        truth = true_norm(matrix)
        value = float(norm(jnp.asarray(matrix)))
        assert abs(value - truth) <= 50 * eps * truth


def test_numpy_arrays_are_accepted():
    matrix = make_matrix("gaussian", (6, 6), 1)
    assert norm(matrix) == pytest.approx(true_norm(matrix), rel=1e-13)


def test_zero_has_norm_and_derivatives_zero():
    zero = jnp.zeros((5, 8))
    assert norm(zero) == 0
    np.testing.assert_array_equal(norm_gradient(zero), np.zeros((5, 8)))
    np.testing.assert_array_equal(norm_hessian(zero), np.zeros((5, 8, 5, 8)))


@pytest.mark.parametrize("dtype", ["float64", "complex128"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_nan_or_an_infinity_gives_nan(dtype: str, bad: float):
    matrix = np.ones((5, 8), dtype)
    matrix[1, 2] = bad
    assert np.isnan(norm(jnp.asarray(matrix)))


# Operators


SPACE = jax.ShapeDtypeStruct((6,), jnp.float64)
A = jnp.asarray(make_matrix("gaussian", (4, 6), 1))
B = jnp.asarray(make_matrix("gaussian", (4, 6), 2))
C = jnp.asarray(make_matrix("gaussian", (4, 6), 3, imaginary=True))
D = jnp.asarray(make_matrix("gaussian", (6, 6), 4, imaginary=True))


def pytree_matrix() -> lx.PyTreeLinearOperator:
    blocks = {
        "a": {"x": A[:1, :2], "y": A[:1, 2:]},
        "b": {"x": A[1:, :2], "y": A[1:, 2:]},
    }
    out = {"a": (1,), "b": (3,)}
    structure = {k: jax.ShapeDtypeStruct(s, jnp.float64) for k, s in out.items()}
    return lx.PyTreeLinearOperator(blocks, structure)


def pytree_function() -> lx.FunctionLinearOperator:
    def apply(pair: tuple[jax.Array, jax.Array]) -> dict[str, jax.Array]:
        y = A @ jnp.concatenate([pair[0].reshape(-1), pair[1]])
        return {"p": y[:1], "q": y[1:]}

    square = jax.ShapeDtypeStruct((2, 2), jnp.float64)
    rest = jax.ShapeDtypeStruct((2,), jnp.float64)
    return lx.FunctionLinearOperator(apply, (square, rest))


def jacobian_operator() -> lx.JacobianLinearOperator:
    return lx.JacobianLinearOperator(lambda x, _: jnp.tanh(A @ x), jnp.ones(6))


def tanh_jacobian() -> jax.Array:
    return (1 - jnp.tanh(A @ jnp.ones(6)) ** 2)[:, None] * A


def complex_function() -> lx.FunctionLinearOperator:
    space = jax.ShapeDtypeStruct((6,), jnp.complex128)
    return lx.FunctionLinearOperator(lambda x: C @ x, space)


M = lx.MatrixLinearOperator
OPERATORS = {
    "function": (lambda: lx.FunctionLinearOperator(lambda x: A @ x, SPACE), lambda: A),
    "complex function": (complex_function, lambda: C),
    "diagonal": (
        lambda: lx.DiagonalLinearOperator(jnp.array([1.0, -3.0, 2.0])),
        lambda: jnp.diag(jnp.array([1.0, -3.0, 2.0])),
    ),
    "complex diagonal": (
        lambda: lx.DiagonalLinearOperator(jnp.array([1.0, -3j, 2 + 1j])),
        lambda: jnp.diag(jnp.array([1.0, -3j, 2 + 1j])),
    ),
    "sum": (lambda: M(A) + M(B), lambda: A + B),
    "complex product": (lambda: M(C) @ M(D), lambda: C @ D),
    "transpose": (lambda: M(C).T, lambda: C.T),
    "multiple": (lambda: M(A) * jnp.array(-2.5), lambda: 2.5 * A),
    "pytree matrix": (pytree_matrix, lambda: A),
    "pytree function": (pytree_function, lambda: A),
    "jacobian": (jacobian_operator, tanh_jacobian),
    "identity": (lambda: lx.IdentityLinearOperator(SPACE), lambda: jnp.eye(6)),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_any_lineax_operator_has_the_norm_of_its_matrix(name: str):
    operator, matrix = (make() for make in OPERATORS[name])
    value = jax.jit(lambda: small_norm(operator))()
    assert value == pytest.approx(true_norm(matrix), rel=1e-13)


@pytest.mark.parametrize("kind", ["matrix", "function"])
def test_the_adjoint_conjugates(kind: str):
    # With A^T in the place of A^H, every step would end at A^T A, which is zero here.
    # The side of 50 is beyond what one Krylov basis spans, whatever is put into it.
    block = np.array([[1, 1j], [1j, -1]])
    matrix = jnp.asarray(np.kron(block, make_matrix("gaussian", (25, 25), 5)))
    assert np.max(np.abs(matrix.T @ matrix)) < 1e-14
    space = jax.ShapeDtypeStruct((50,), matrix.dtype)
    operators = {
        "matrix": lx.MatrixLinearOperator(matrix),
        "function": lx.FunctionLinearOperator(lambda x: matrix @ x, space),
    }
    assert norm(operators[kind]) == pytest.approx(true_norm(matrix), rel=1e-13)


def test_derivative_with_respect_to_a_parameter_of_an_operator():
    def through_operator(x: jax.Array) -> jax.Array:
        jacobian = lx.JacobianLinearOperator(lambda x, _: jnp.tanh(A @ x), x)
        return small_norm(jacobian)

    def through_svd(x: jax.Array) -> jax.Array:
        return svd_norm((1 - jnp.tanh(A @ x) ** 2)[:, None] * A)

    x = jnp.linspace(0.2, 1, 6)
    for derivative in (jax.grad, jax.hessian):
        got = jax.jit(derivative(through_operator))(x)
        truth = jax.jit(derivative(through_svd))(x)
        np.testing.assert_allclose(got, truth, rtol=1e-9, atol=1e-12)


# Derivatives


CASES = {
    "wide": (jnp.asarray(make_matrix("gaussian", (4, 6), 11)), lambda x: x),
    "tall": (jnp.asarray(make_matrix("gaussian", (5, 3), 12)), lambda x: x),
    "complex wide": (
        jnp.asarray(np.stack([make_matrix("gaussian", (3, 4), i) for i in (13, 14)])),
        as_matrix,
    ),
    "complex tall": (
        jnp.asarray(np.stack([make_matrix("gaussian", (4, 3), i) for i in (15, 16)])),
        as_matrix,
    ),
}


def assert_agree(
    derivative: Callable[[Callable], Callable], case: str, *, rtol: float = 1e-9
):
    x, to_matrix = CASES[case]
    got = jax.jit(derivative(lambda x: small_norm(to_matrix(x))))(x)
    truth = jax.jit(derivative(lambda x: svd_norm(to_matrix(x))))(x)
    assert np.max(np.abs(truth)) > 0.1
    np.testing.assert_allclose(got, truth, atol=rtol * np.max(np.abs(truth)), rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_gradient_agrees_with_a_differentiated_svd(case: str):
    assert_agree(jax.grad, case)


def test_complex_gradient_follows_the_convention_of_jax():
    matrix = as_matrix(CASES["complex wide"][0])
    got, truth = norm_gradient(matrix), jax.grad(svd_norm)(matrix)
    assert np.max(np.abs(np.imag(truth))) > 0.1
    np.testing.assert_allclose(got, truth, rtol=1e-9, atol=1e-12)


FORWARD, REVERSE = jax.jacfwd, jax.jacrev


@pytest.mark.parametrize(
    ("outer", "inner", "case"),
    [
        *(
            (outer, inner, case)
            for outer in (FORWARD, REVERSE)
            for inner in (FORWARD, REVERSE)
            for case in ("wide", "complex tall")
        ),
        (FORWARD, REVERSE, "tall"),
        (REVERSE, FORWARD, "complex wide"),
    ],
)
def test_second_derivatives_agree_with_a_differentiated_svd(
    outer: Callable, inner: Callable, case: str
):
    assert_agree(lambda f: outer(inner(f)), case)


@pytest.mark.parametrize("case", ["wide", "complex tall"])
def test_third_derivatives_agree_with_a_differentiated_svd(case: str):
    # One direction each for the outer two, as the whole tensor takes long.
    x, _ = CASES[case]
    p, q = jr.normal(jr.key(1), (2, *x.shape))

    def third(f: Callable) -> Callable:
        along_p = lambda y: jax.jvp(f, (y,), (p,))[1]  # noqa: E731
        along_q = lambda y: jax.jvp(along_p, (y,), (q,))[1]  # noqa: E731
        return jax.grad(along_q)

    assert_agree(third, case)


def test_derivatives_agree_with_finite_differences_where_it_restarts():
    matrix = jnp.asarray(make_matrix("gaussian", (60, 50), 17))
    direction = jr.normal(jr.key(2), matrix.shape) / 50
    h = 1e-4

    def along(t: float) -> float:
        return true_norm(matrix + t * direction)

    @jax.jit
    def derivatives(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
        rate = lambda a: jax.jvp(spectrax.spectral_norm, (a,), (direction,))[1]  # noqa: E731
        return jax.jvp(rate, (matrix,), (direction,))

    first, second = derivatives(matrix)
    assert first == pytest.approx((along(h) - along(-h)) / (2 * h), rel=1e-6)
    difference = (along(h) - 2 * along(0.0) + along(-h)) / h**2
    assert second == pytest.approx(difference, rel=1e-4)


def test_float32_second_derivatives_are_as_good_as_float32():
    matrix = CASES["wide"][0]
    got = norm_hessian(matrix.astype(jnp.float32))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, jax.hessian(svd_norm)(matrix), atol=2e-5, rtol=0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_gradient_of_half_precision_has_its_dtype(dtype: str):
    matrix = CASES["wide"][0]
    got = norm_gradient(matrix.astype(dtype))
    assert got.dtype == dtype
    truth = jax.grad(svd_norm)(matrix)
    np.testing.assert_allclose(got.astype(float), truth, atol=2e-2, rtol=0)


def test_rank_one_has_the_derivatives_of_the_svd():
    matrix = jnp.asarray(make_matrix("rank one", (5, 8), 18))
    np.testing.assert_allclose(norm_gradient(matrix), matrix, atol=1e-13, rtol=0)
    left, _, right = np.linalg.svd(matrix)
    # d2 sigma = (|P dA v|^2 + |Q dA^T u|^2) / sigma, P and Q the complements.
    u, v, direction = left[:, 0], right[0], np.asarray(jr.normal(jr.key(3), (5, 8)))
    a, b = direction @ v, direction.T @ u
    truth = a @ a - (u @ a) ** 2 + b @ b - (v @ b) ** 2
    hessian = norm_hessian(matrix)
    got = np.einsum("ij,ijkl,kl->", direction, hessian, direction)
    assert got == pytest.approx(truth, rel=1e-10)


@pytest.mark.parametrize("seed", [1, 2])
def test_repeated_top_value_gives_a_subgradient(seed: int):
    matrix = make_matrix("repeated top", (5, 8), seed)
    assert norm(jnp.asarray(matrix)) == pytest.approx(1, rel=1e-13)
    gradient = np.asarray(norm_gradient(jnp.asarray(matrix)))
    # The subdifferential: <G, A> is the norm, and the sum of singular values is one.
    assert np.sum(gradient * matrix) == pytest.approx(1, rel=1e-12)
    values = np.linalg.svd(gradient, compute_uv=False)
    np.testing.assert_allclose(values, [1, 0, 0, 0, 0], atol=1e-12)


def test_repeated_top_value_holds_the_vectors_fixed_in_second_derivatives():
    for matrix in (make_matrix("repeated top", (5, 8), 1), np.eye(5, 8)):
        hessian = norm_hessian(jnp.asarray(matrix))
        np.testing.assert_array_equal(hessian, np.zeros((5, 8, 5, 8)))


# Transforms


def test_vmap_agrees_with_a_loop():
    stack = np.stack([make_matrix(kind, (5, 8), 20) for kind in KINDS])
    values = jax.jit(jax.vmap(spectrax.spectral_norm))(jnp.asarray(stack))
    truth = [true_norm(matrix) for matrix in stack]
    np.testing.assert_allclose(values, truth, rtol=1e-13, atol=0)


def test_vmap_of_the_gradient_agrees_with_a_loop():
    stack = jnp.asarray(np.stack([make_matrix("gaussian", (5, 8), i) for i in (1, 2)]))
    stack = jnp.concatenate([stack, jnp.zeros((1, 5, 8))])
    got = jax.jit(jax.vmap(jax.grad(spectrax.spectral_norm)))(stack)
    truth = jnp.stack([norm_gradient(matrix) for matrix in stack])
    np.testing.assert_allclose(got, truth, rtol=0, atol=1e-13)


def test_a_second_call_does_not_trace_again():
    traces = []

    @eqx.filter_jit
    def counted(matrix: jax.Array) -> jax.Array:
        traces.append(matrix.shape)
        return spectrax.spectral_norm(matrix)

    first, second = counted(jnp.ones((2, 2))), counted(2 * jnp.ones((2, 2)))
    assert len(traces) == 1
    assert second == pytest.approx(2 * float(first))


# Arguments


HARD = jnp.asarray(make_matrix("clustered top", (60, 50), 21))


def test_more_steps_come_closer():
    # One cycle of 32 steps cannot tell apart the 25 values of the cluster.
    one = float(norm(HARD, max_steps=32))
    many = float(norm(HARD, max_steps=1024))
    truth = true_norm(HARD)
    assert one < truth * (1 - 1e-9)
    assert one > truth * (1 - 1e-2)
    assert many == pytest.approx(truth, rel=1e-13)


def test_a_loose_tolerance_stops_earlier():
    loose = float(norm(HARD, rtol=1e-1))
    assert loose == float(norm(HARD, max_steps=32))
    assert loose < float(norm(HARD, rtol=1e-10)) * (1 - 1e-9)


def test_tolerance_bounds_the_error():
    truth = true_norm(HARD)
    for rtol in (1e-2, 1e-4):
        value = float(norm(HARD, rtol=rtol))
        assert truth * (1 - rtol) <= value <= truth * (1 + 1e-13)


def test_key_chooses_the_starting_vector():
    values = [float(norm(HARD, max_steps=32, key=jr.key(i))) for i in range(2)]
    assert values[0] != values[1]
    assert values[0] == float(norm(HARD, max_steps=32))


# Errors


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((), r"expected a 2-D array, got one of shape \(\)"),
        ((3,), r"expected a 2-D array, got one of shape \(3,\)"),
        ((2, 3, 4), r"expected a 2-D array, got one of shape \(2, 3, 4\)"),
        ((0, 3), r"expected a matrix with entries, got one of shape \(0, 3\)"),
    ],
)
def test_arrays_that_are_no_matrices_are_rejected(shape: tuple[int, ...], message: str):
    with pytest.raises(ValueError, match=message):
        spectrax.spectral_norm(jnp.zeros(shape))


@pytest.mark.parametrize("dtype", ["int32", "bool"])
def test_integers_are_rejected(dtype: str):
    message = f"floating-point or complex dtype, got {dtype}"
    with pytest.raises(TypeError, match=message):
        spectrax.spectral_norm(jnp.zeros((2, 3), dtype))


@pytest.mark.parametrize("value", [[[1.0]], 1.0, "matrix", None])
def test_other_objects_are_rejected(value: object):
    message = (
        "`operator` to be a 2-D array or a `lineax` operator, "
        f"got {type(value).__name__}"
    )
    with pytest.raises(TypeError, match=message):
        spectrax.spectral_norm(value)


@pytest.mark.parametrize("rtol", [-1.0, float("nan")])
def test_negative_tolerance_is_rejected(rtol: float):
    with pytest.raises(ValueError, match="expected `rtol` to be non-negative"):
        spectrax.spectral_norm(A, rtol=rtol)


def test_no_steps_are_rejected():
    with pytest.raises(ValueError, match="expected `max_steps` to be positive, got 0"):
        spectrax.spectral_norm(A, max_steps=0)


def test_operators_from_real_to_complex_are_rejected():
    operator = lx.FunctionLinearOperator(lambda x: C @ x.astype(jnp.complex128), SPACE)
    with pytest.raises(ValueError, match="all real or all complex"):
        spectrax.spectral_norm(operator)


def test_hessian_in_units_of_the_norm():
    """`|s A|` has the Hessian of `|A|` over `s`, entry by entry."""
    matrix = make_matrix("gaussian", (5, 8), 3)
    expected = np.asarray(norm_hessian(jnp.asarray(matrix)))
    for exponent in (-30, -20, 5, 8, 19, 25):
        scale = 10.0**exponent
        scaled = jnp.asarray(scale * matrix, jnp.float32)
        got = np.asarray(norm_hessian(scaled), np.float64) * scale
        np.testing.assert_allclose(
            got, expected, atol=1e-4 * np.abs(expected).max(), rtol=0
        )


@pytest.mark.parametrize("compiled", [True, False])
def test_hessian_at_a_tie_under_debug_nans(compiled: bool):
    hessian = jax.hessian(spectrax.spectral_norm)
    with jax.debug_nans(new_val=True):
        for matrix in (jnp.eye(3), jnp.diag(jnp.array([2.0, 2.0, 1.0]))):
            found = (jax.jit(hessian) if compiled else hessian)(matrix)
            assert jnp.all(jnp.isfinite(found))
