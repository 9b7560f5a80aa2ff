"""`init_power_state`, `power_iterate` and `singular_value`."""

from typing import Any

import equinox as eqx
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import lineax as lx
import numpy as np
import pytest

import spectrax

from .helpers import KINDS, make_matrix, matrices, true_norm


init = eqx.filter_jit(spectrax.init_power_state)
iterate = eqx.filter_jit(spectrax.power_iterate)
sigma_of = eqx.filter_jit(spectrax.singular_value)

WIDE = jnp.asarray(make_matrix("gaussian", (5, 8), 1))
LARGE = jnp.asarray(make_matrix("gaussian", (60, 50), 2))
EPS = 2.0**-52


def numpy_iteration(
    weight: np.ndarray, u: np.ndarray, num_steps: int
) -> tuple[np.ndarray, np.ndarray, float]:
    """Algorithm 1 of Miyato et al. (2018), in float64 or complex128."""
    for _ in range(num_steps):
        v = weight.conj().T @ u
        v = v / np.linalg.norm(v)
        u = weight @ v
        u = u / np.linalg.norm(u)
    return u, v, float(np.real(u.conj() @ weight @ v))


def assert_unit_rows(state: spectrax.PowerState, eps: float = EPS):
    for rows in (state.u, state.v):
        lengths = np.linalg.norm(np.asarray(rows), axis=1)
        np.testing.assert_allclose(lengths, 1, rtol=0, atol=20 * eps)


def assert_equal(a: Any, b: Any):
    assert jtu.tree_structure(a) == jtu.tree_structure(b)
    jtu.tree_map(np.testing.assert_array_equal, a, b)


# The first state


DTYPES = {
    "float16": "float32",
    "bfloat16": "float32",
    "float32": "float32",
    "float64": "float64",
    "complex64": "complex64",
    "complex128": "complex128",
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_steps", [0, 4])
def test_state_is_of_the_dtype_of_the_operator_or_float32(dtype: str, num_steps: int):
    operator = jax.ShapeDtypeStruct((5, 8), jnp.dtype(dtype))
    first = eqx.filter_eval_shape(
        lambda weight: spectrax.init_power_state(weight, num_steps=num_steps), operator
    )
    later = eqx.filter_eval_shape(spectrax.power_iterate, operator, first)
    for state in (first, later):
        assert state.u.shape == (5, 5)
        assert state.v.shape == state.momentum.shape == (5, 8)
        assert state.u.dtype == state.v.dtype == state.momentum.dtype == DTYPES[dtype]
    value = eqx.filter_eval_shape(spectrax.singular_value, operator, later)
    assert value.shape == ()
    assert value.dtype == np.zeros((), DTYPES[dtype]).real.dtype


@pytest.mark.parametrize(
    ("shape", "block_size", "block"),
    [
        ((5, 8), 3, 3),
        ((5, 8), 8, 5),
        ((8, 5), 100, 5),
        ((60, 50), 8, 8),
        ((1, 7), 8, 1),
    ],
)
@pytest.mark.parametrize("num_steps", [0, 4])
def test_block_is_cut_to_the_smaller_side(
    shape: tuple[int, int], block_size: int, block: int, num_steps: int
):
    state = eqx.filter_eval_shape(
        lambda weight: spectrax.init_power_state(
            weight, block_size=block_size, num_steps=num_steps
        ),
        jax.ShapeDtypeStruct(shape, jnp.float64),
    )
    assert state.u.shape == (block, shape[0])
    assert state.v.shape == (block, shape[1])


def test_only_a_block_of_several_vectors_has_momentum():
    assert init(WIDE, block_size=1, num_steps=0).momentum is None
    np.testing.assert_array_equal(init(WIDE, num_steps=0).momentum, np.zeros((5, 8)))


def test_without_steps_the_start_is_random_and_depends_on_the_key_alone():
    state = init(WIDE, num_steps=0)
    assert_unit_rows(state)
    assert_equal(state, init(2 * WIDE + 1, num_steps=0))
    assert_equal(state, init(WIDE, num_steps=0, key=jr.key(0)))
    other = init(WIDE, num_steps=0, key=jr.key(1))
    assert np.all(np.abs(other.u - state.u) > 0)
    assert sigma_of(WIDE, state) < 0.9 * true_norm(WIDE)


def test_more_steps_start_closer():
    truth = true_norm(LARGE)
    errors = [
        1 - float(sigma_of(LARGE, init(LARGE, num_steps=n))) / truth for n in (0, 8)
    ]
    errors.append(1 - float(sigma_of(LARGE, init(LARGE))) / truth)
    assert errors[0] > 0.5 > 0.1 > errors[1] > 10 * errors[2]
    # The documented accuracy of the default on square Gaussian matrices is 1e-4.
    assert -EPS * 100 < errors[2] < 1e-3


def test_first_state_holds_the_leading_pairs_in_order():
    state = init(WIDE, block_size=3)
    left, values, right = np.linalg.svd(WIDE)
    for i in range(3):
        assert abs(state.u[i] @ left[:, i]) == pytest.approx(1, rel=1e-12)
        assert abs(state.v[i] @ right[i]) == pytest.approx(1, rel=1e-12)
        paired = state.u[i] @ WIDE @ state.v[i]
        assert paired == pytest.approx(values[i], rel=1e-12)


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
@pytest.mark.parametrize("block_size", [1, 8])
def test_first_state_of_a_degenerate_matrix_is_random_and_usable(
    bad: float, block_size: int
):
    state = init(jnp.full((5, 8), bad), block_size=block_size)
    assert_unit_rows(state)
    state = iterate(WIDE, state, num_steps=30)
    assert sigma_of(WIDE, state) == pytest.approx(true_norm(WIDE), rel=1e-6)


def test_first_state_carries_no_derivative():
    def value(weight: jax.Array) -> jax.Array:
        state = spectrax.init_power_state(weight, block_size=2, num_steps=2)
        return jnp.sum(state.u**3) + jnp.sum(state.v**3)

    np.testing.assert_array_equal(jax.jit(jax.grad(value))(WIDE), np.zeros((5, 8)))


# The estimate


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((5, 8), "float64"),
        ((8, 5), "float32"),
        ((60, 50), "float64"),
        ((8, 5), "complex128"),
        ((1, 1), "float64"),
        ((1, 7), "float64"),
    ],
)
@pytest.mark.parametrize("block_size", [1, 8])
def test_estimate_is_never_above_the_norm_and_rises_to_it(
    shape: tuple[int, int], dtype: str, block_size: int
):
    eps = 2.0**-23 if dtype == "float32" else EPS
    imaginary = dtype == "complex128"
    # A cluster takes many steps; the block is never farther from the top than it.
    kinds = [kind for kind in KINDS if kind != "clustered top"]
    # One vector gains a factor of 0.9 or so at each step on the large Gaussian.
    tolerance = 0.05 if block_size == 1 else 1e-4

    @hypothesis.given(
        matrices([shape], kinds=kinds, imaginary=imaginary), st.integers(0, 100)
    )
    @hypothesis.settings(max_examples=15)
    def check(drawn: np.ndarray, seed: int):
        weight = jnp.asarray(drawn.astype(dtype))
        truth = true_norm(weight)
        state = init(weight, key=jr.key(seed), block_size=block_size, num_steps=0)
        previous = 0.0
        for num_steps in (1, 3, 40):
            state = iterate(weight, state, num_steps=num_steps)
            assert_unit_rows(state, eps)
            value = float(sigma_of(weight, state))
            # Each step can only raise it.
            assert previous * (1 - 50 * eps) <= value <= truth * (1 + 50 * eps)
            previous = value
        assert previous >= truth * (1 - tolerance)

    check()


@pytest.mark.parametrize("shape", [(5, 8), (60, 50)])
def test_estimate_converges_to_rounding(shape: tuple[int, int]):
    weight = jnp.asarray(make_matrix("gaussian", shape, 3))
    state = iterate(weight, init(weight, num_steps=0), num_steps=200)
    assert sigma_of(weight, state) == pytest.approx(true_norm(weight), rel=1e-13)


def test_estimate_on_a_cluster_is_within_the_cluster():
    weight = jnp.asarray(make_matrix("clustered top", (60, 50), 3))
    state = iterate(weight, init(weight, num_steps=0), num_steps=40)
    assert 1 - 25e-4 < sigma_of(weight, state) <= 1 + 50 * EPS


@pytest.mark.parametrize("block_size", [1, 8])
@pytest.mark.parametrize("exponent", [-66, 66])
def test_vectors_do_not_depend_on_the_scale(block_size: int, exponent: int):
    # 2^66 is 7e19: squares of it overflow in float32, and those of 2^-66 vanish.
    weight, scale = WIDE.astype(jnp.float32), np.float32(2.0**exponent)
    state = init(weight, block_size=block_size, num_steps=0)
    expected = iterate(weight, state, num_steps=3)
    got = iterate(scale * weight, state, num_steps=3)
    for a, b in zip(jtu.tree_leaves(got), jtu.tree_leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
    ratio = sigma_of(scale * weight, got) / scale
    assert ratio == pytest.approx(float(sigma_of(weight, expected)), rel=1e-6)
    started = init(scale * weight, block_size=block_size)
    assert sigma_of(scale * weight, started) / scale == pytest.approx(
        true_norm(weight), rel=1e-6
    )


def test_vectors_of_any_length_are_used_as_unit_vectors():
    for block_size in (1, 8):
        state = init(WIDE, block_size=block_size, num_steps=0)
        state = iterate(WIDE, state)
        longer = jtu.tree_map(lambda x: 3 * x, state)
        assert sigma_of(WIDE, longer) == pytest.approx(float(sigma_of(WIDE, state)))
        values = [
            float(sigma_of(WIDE, iterate(WIDE, s, num_steps=3)))
            for s in (state, longer)
        ]
        assert values[0] == pytest.approx(values[1], rel=1e-12)


def test_zero_steps_return_the_same_state():
    state = init(WIDE, num_steps=0)
    assert_equal(state, iterate(WIDE, state, num_steps=0))


@pytest.mark.parametrize("block_size", [1, 8])
def test_steps_add_up(block_size: int):
    state = init(LARGE, block_size=block_size, num_steps=0)
    once = state
    for _ in range(3):
        once = iterate(LARGE, once)
    together = iterate(LARGE, state, num_steps=3)
    for a, b in zip(jtu.tree_leaves(once), jtu.tree_leaves(together), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-9)


# One vector: the algorithm of Miyato et al.


@pytest.mark.parametrize("kind", ["gaussian", "hilbert", "repeated top", "rank one"])
@pytest.mark.parametrize("imaginary", [False, True])
def test_one_vector_is_the_published_algorithm(kind: str, imaginary: bool):
    weight = make_matrix(kind, (8, 5), 4, imaginary=imaginary)
    state = init(jnp.asarray(weight), block_size=1, num_steps=0)
    for num_steps in (1, 2, 3):
        u, v, sigma = numpy_iteration(weight, np.asarray(state.u[0]), num_steps)
        state = iterate(jnp.asarray(weight), state, num_steps=num_steps)
        np.testing.assert_allclose(state.u[0], u, rtol=0, atol=1e-13)
        np.testing.assert_allclose(state.v[0], v, rtol=0, atol=1e-13)
        got = sigma_of(jnp.asarray(weight), state)
        assert got == pytest.approx(sigma, rel=1e-13)


@pytest.mark.parametrize("num_steps", [1, 4])
def test_one_vector_is_the_algorithm_of_equinox_on_the_transpose(num_steps: int):
    # Equinox updates u before v. That is ours with the roles exchanged.
    layer = eqx.nn.Linear(8, 5, use_bias=False, key=jr.key(0))
    layer = eqx.tree_at(lambda layer: layer.weight, layer, LARGE[:5, :8])
    theirs, state = eqx.nn.make_with_state(eqx.nn.SpectralNorm)(
        layer, "weight", num_power_iterations=num_steps, key=jr.key(1)
    )
    # Far from where its 15 first steps have led.
    start = (jr.normal(jr.key(2), (5,)), jr.normal(jr.key(3), (8,)))
    state = state.set(theirs.uv_index, start)
    ours = spectrax.PowerState(start[1][None], start[0][None], None)
    x = jr.normal(jr.key(4), (8,))
    out, state = theirs(x, state)
    ours = iterate(layer.weight.T, ours, num_steps=num_steps)
    u, v = state.get(theirs.uv_index)
    np.testing.assert_allclose(ours.v[0], u, rtol=0, atol=1e-13)
    np.testing.assert_allclose(ours.u[0], v, rtol=0, atol=1e-13)
    sigma = sigma_of(layer.weight.T, ours)
    np.testing.assert_allclose(out, layer.weight @ x / sigma, rtol=1e-12, atol=0)


# A changing operator


def test_default_block_tracks_a_changing_matrix_closer_than_one_vector():
    keys = jr.split(jr.key(5), 40)

    @eqx.filter_jit
    def run(state: spectrax.PowerState) -> tuple[jax.Array, jax.Array]:
        def step(carry: tuple, key: jax.Array) -> tuple:
            weight, state = carry
            noise = jr.normal(key, weight.shape) / np.sqrt(110)
            weight = np.sqrt(1 - 0.1**2) * weight + 0.1 * noise
            state = spectrax.power_iterate(weight, state)
            return (weight, state), (weight, spectrax.singular_value(weight, state))

        return jax.lax.scan(step, (LARGE, state), keys)[1]

    def errors(block_size: int) -> np.ndarray:
        weights, values = run(init(LARGE, block_size=block_size))
        truths = np.array([true_norm(weight) for weight in weights])
        assert np.all(values <= truths * (1 + 50 * EPS))
        return 1 - np.asarray(values) / truths

    one, default = errors(1), errors(8)
    assert np.mean(default) < np.mean(one) / 4
    assert np.max(default) < np.max(one) / 4


def test_momentum_makes_a_step_converge_faster():
    state = init(LARGE, block_size=4, num_steps=0)
    with_momentum = without = state
    for _ in range(12):
        with_momentum = iterate(LARGE, with_momentum)
        without = iterate(LARGE, without)
        without = eqx.tree_at(lambda s: s.momentum, without, 0 * without.momentum)
    truth = true_norm(LARGE)
    errors = [1 - float(sigma_of(LARGE, s)) / truth for s in (with_momentum, without)]
    assert 0 <= errors[0] < errors[1] / 2


@pytest.mark.parametrize("block_size", [1, 3, 8])
def test_zero_matrix_keeps_the_vectors_and_it_recovers(block_size: int):
    state = iterate(WIDE, init(WIDE, block_size=block_size, num_steps=0), num_steps=2)
    zero = jnp.zeros((5, 8))
    after = iterate(zero, state, num_steps=2)
    assert_unit_rows(after)
    np.testing.assert_allclose(after.u, state.u, rtol=0, atol=1e-14)
    assert sigma_of(zero, after) == 0
    after = iterate(WIDE, after, num_steps=200)
    assert_unit_rows(after)
    assert sigma_of(WIDE, after) == pytest.approx(true_norm(WIDE), rel=1e-12)


@pytest.mark.parametrize("block_size", [1, 3])
def test_vectors_that_the_operator_maps_to_zero_are_kept(block_size: int):
    state = iterate(WIDE, init(WIDE, block_size=block_size, num_steps=0))
    after = iterate(jnp.zeros((5, 8)), state)
    np.testing.assert_allclose(after.v, state.v, rtol=0, atol=1e-14)
    np.testing.assert_allclose(after.u, state.u, rtol=0, atol=1e-14)


@pytest.mark.parametrize("block_size", [1, 8])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_nan_or_an_infinity_leaves_the_state_as_it_was(bad: float, block_size: int):
    state = iterate(WIDE, init(WIDE, block_size=block_size, num_steps=0))
    broken = WIDE.at[2, 3].set(bad)
    after = iterate(broken, state, num_steps=2)
    assert_equal(after, state)
    assert np.isnan(sigma_of(broken, after))


@pytest.mark.parametrize("block_size", [1, 8])
def test_state_converges_again_after_a_nan(block_size: int):
    state = init(WIDE, block_size=block_size, num_steps=0)
    state = iterate(WIDE.at[2, 3].set(np.nan), state)
    state = iterate(WIDE, state, num_steps=200)
    assert sigma_of(WIDE, state) == pytest.approx(true_norm(WIDE), rel=1e-12)


# Derivatives


@pytest.mark.parametrize("block_size", [1, 8])
def test_gradient_is_the_outer_product_of_the_vectors(block_size: int):
    # Not yet converged, so that it is not the gradient of the norm.
    state = iterate(WIDE, init(WIDE, block_size=block_size, num_steps=0))
    gradient = jax.jit(jax.grad(spectrax.singular_value))(WIDE, state)
    outer = np.outer(state.u[0], state.v[0])
    np.testing.assert_allclose(gradient, outer, rtol=0, atol=1e-14)


def test_complex_gradient_is_the_outer_product_in_the_convention_of_jax():
    weight = jnp.asarray(make_matrix("gaussian", (5, 8), 6, imaginary=True))
    state = iterate(weight, init(weight, block_size=1, num_steps=0))
    gradient = jax.jit(jax.grad(spectrax.singular_value))(weight, state)
    outer = np.outer(np.conj(state.u[0]), state.v[0])
    assert np.max(np.abs(np.imag(outer))) > 0.05
    np.testing.assert_allclose(gradient, outer, rtol=0, atol=1e-14)


def test_second_derivative_is_zero():
    state = init(WIDE, num_steps=0)
    hessian = jax.jit(jax.hessian(spectrax.singular_value))(WIDE, state)
    np.testing.assert_array_equal(hessian, np.zeros((5, 8, 5, 8)))


def test_state_gets_no_gradient():
    state = init(WIDE, num_steps=0)
    gradient = jax.jit(jax.grad(lambda s: spectrax.singular_value(WIDE, s)))(state)
    assert_equal(gradient, jtu.tree_map(jnp.zeros_like, state))


@pytest.mark.parametrize("block_size", [1, 8])
def test_iteration_carries_no_derivative(block_size: int):
    state = init(WIDE, block_size=block_size, num_steps=0)

    def value(weight: jax.Array) -> tuple[jax.Array, spectrax.PowerState]:
        new = spectrax.power_iterate(weight, state)
        return spectrax.singular_value(weight, new), new

    gradient, new = jax.jit(jax.grad(value, has_aux=True))(WIDE)
    outer = np.outer(new.u[0], new.v[0])
    np.testing.assert_allclose(gradient, outer, rtol=0, atol=1e-14)

    def vectors(weight: jax.Array, state: spectrax.PowerState) -> jax.Array:
        new = spectrax.power_iterate(weight, state)
        return sum(jnp.sum(x**3) for x in jtu.tree_leaves(new))

    gradients = jax.jit(jax.grad(vectors, argnums=(0, 1)))(WIDE, state)
    assert_equal(gradients, jtu.tree_map(jnp.zeros_like, (WIDE, state)))


# Transforms and operators


def test_vmap_agrees_with_a_loop():
    stack = np.stack([make_matrix(kind, (5, 8), 7) for kind in KINDS])
    weights = jnp.asarray(stack)

    @eqx.filter_jit
    @eqx.filter_vmap
    def values(weight: jax.Array) -> tuple[jax.Array, jax.Array]:
        start = spectrax.init_power_state(weight, num_steps=0)
        state = spectrax.power_iterate(weight, start, num_steps=40)
        return (
            spectrax.singular_value(weight, state),
            spectrax.singular_value(weight, spectrax.init_power_state(weight)),
        )

    iterated, started = values(weights)
    for i, weight in enumerate(weights):
        state = iterate(weight, init(weight, num_steps=0), num_steps=40)
        truth = true_norm(weight)
        assert iterated[i] == pytest.approx(float(sigma_of(weight, state)), rel=1e-9)
        assert iterated[i] == pytest.approx(truth, rel=1e-4)
        assert started[i] == pytest.approx(truth, rel=1e-12)


def test_a_second_call_does_not_trace_again():
    traces = []

    @eqx.filter_jit
    def step(weight: jax.Array, state: spectrax.PowerState) -> spectrax.PowerState:
        traces.append(weight.shape)
        return spectrax.power_iterate(weight, state)

    state = init(WIDE)
    step(2 * WIDE, step(WIDE, state))
    assert len(traces) == 1


def test_operator_between_pytrees_has_vectors_of_its_structure():
    def apply(pair: tuple[jax.Array, jax.Array]) -> dict[str, jax.Array]:
        y = WIDE @ jnp.concatenate([pair[0].reshape(-1), pair[1]])
        return {"p": y[:2], "q": y[2:].reshape(3, 1)}

    square = jax.ShapeDtypeStruct((2, 2), jnp.float64)
    rest = jax.ShapeDtypeStruct((4,), jnp.float64)
    operator = lx.FunctionLinearOperator(apply, (square, rest))

    def shapes(tree: Any) -> Any:
        return jtu.tree_map(lambda x: x.shape, tree)

    @jax.jit
    def run() -> tuple[spectrax.PowerState, jax.Array]:
        state = spectrax.init_power_state(operator, block_size=3, num_steps=0)
        state = spectrax.power_iterate(operator, state, num_steps=100)
        return state, spectrax.singular_value(operator, state)

    state, value = run()
    assert shapes(state.u) == {"p": (3, 2), "q": (3, 3, 1)}
    assert shapes(state.v) == shapes(state.momentum) == ((3, 2, 2), (3, 4))
    assert value == pytest.approx(true_norm(WIDE), rel=1e-12)


# Errors


FUNCTIONS = {
    "init_power_state": lambda operator: spectrax.init_power_state(operator),
    "power_iterate": lambda operator: spectrax.power_iterate(operator, init(WIDE)),
    "singular_value": lambda operator: spectrax.singular_value(operator, init(WIDE)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.zeros(()), r"expected a 2-D array, got one of shape \(\)"),
        (np.zeros(3), r"expected a 2-D array, got one of shape \(3,\)"),
        (np.zeros((2, 3, 4)), r"expected a 2-D array, got one of shape \(2, 3, 4\)"),
        (
            np.zeros((0, 3)),
            r"expected a matrix with entries, got one of shape \(0, 3\)",
        ),
    ],
)
def test_arrays_that_are_no_matrices_are_rejected(
    name: str, value: np.ndarray, message: str
):
    with pytest.raises(ValueError, match=message):
        FUNCTIONS[name](value)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.zeros((2, 3), int), "of floating-point or complex dtype, got int64"),
        ("weight", "`operator` to be a 2-D array or a `lineax` operator, got str"),
        ([[1.0]], "`operator` to be a 2-D array or a `lineax` operator, got list"),
    ],
)
def test_other_objects_are_rejected(name: str, value: object, message: str):
    with pytest.raises(TypeError, match=message):
        FUNCTIONS[name](value)


@pytest.mark.parametrize("block_size", [0, -1])
def test_empty_blocks_are_rejected(block_size: int):
    message = f"expected `block_size` to be at least 1, got {block_size}"
    with pytest.raises(ValueError, match=message):
        spectrax.init_power_state(WIDE, block_size=block_size)


def test_negative_numbers_of_steps_are_rejected():
    message = "expected `num_steps` to be at least 0, got -1"
    with pytest.raises(ValueError, match=message):
        spectrax.init_power_state(WIDE, num_steps=-1)
    with pytest.raises(ValueError, match=message):
        spectrax.power_iterate(WIDE, init(WIDE), num_steps=-1)


@pytest.mark.parametrize("function", [spectrax.power_iterate, spectrax.singular_value])
def test_state_of_another_operator_is_rejected(function: Any):
    for other, name, expected, got in (
        (jnp.ones((4, 8)), "u", 4, 5),
        (jnp.ones((5, 9)), "v", 9, 8),
        (jnp.ones((8, 5)), "u", 8, 5),
    ):
        message = (
            rf"expected `state.{name}` to hold vectors of shape \({expected},\), those "
            rf"of the operator, got \({got},\)"
        )
        with pytest.raises(ValueError, match=message):
            function(other, init(WIDE))


@pytest.mark.parametrize("function", [spectrax.power_iterate, spectrax.singular_value])
def test_state_of_another_class_is_rejected(function: Any):
    state = init(WIDE)
    message = "expected `state` to be a `PowerState` from .*, got tuple"
    with pytest.raises(TypeError, match=message):
        function(WIDE, (state.u, state.v))


@pytest.mark.parametrize("function", [spectrax.power_iterate, spectrax.singular_value])
def test_state_of_a_matrix_is_rejected_for_a_convolution(function: Any):
    conv = eqx.nn.Conv1d(2, 2, 3, key=jr.key(0))
    message = "expected `state` to be a `LatticePowerState`.* got PowerState"
    with pytest.raises(TypeError, match=message):
        function(spectrax.layer_operator(conv), init(WIDE))


def test_operators_from_real_to_complex_are_rejected():
    space = jax.ShapeDtypeStruct((3,), jnp.float64)
    operator = lx.FunctionLinearOperator(lambda x: x.astype(jnp.complex128), space)
    with pytest.raises(ValueError, match="all real or all complex"):
        spectrax.init_power_state(operator)


def test_operators_without_dimensions_are_rejected():
    structure = jax.ShapeDtypeStruct((0,), jnp.float64)
    operator = lx.FunctionLinearOperator(lambda x: x, structure)
    with pytest.raises(ValueError, match="spaces with dimensions, got one from 0 to 0"):
        spectrax.init_power_state(operator)
