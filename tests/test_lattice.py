"""Convolutions at every input size at once."""

import functools as ft
import math

import equinox as eqx
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest

import spectrax

from .convolutions import (
    case,
    check_gradient_through_wrapped,
    grid,
    norm_at,
    supremum,
    supremum_of,
    symbol_norms,
)


# Compilation takes many seconds for each shape of a kernel. So the tests go through
# few shapes, each with many configurations, whose constant factor `gain` stays outside.
@eqx.filter_jit
def _estimates(kernel):
    operator = spectrax.LatticeConvolution(kernel, 1.0)
    state = spectrax.init_power_state(operator)
    value = spectrax.singular_value(operator, state)
    return spectrax.spectral_norm(operator), value


@ft.partial(jax.jit, static_argnums=(1, 2))
def _value(kernel, num_steps=32, block_size=8):
    operator = spectrax.LatticeConvolution(kernel, 1.0)
    state = spectrax.init_power_state(
        operator, num_steps=num_steps, block_size=block_size
    )
    return spectrax.singular_value(operator, state)


SMALL = [1, 2, 3, 4, 7, 12]
TALL = [2, 3, 4, 5, 6, 8]
IMAGES = [(1, 1), (1, 4), (2, 3), (3, 3), (4, 4), (7, 6)]
VOLUMES = [(1, 1, 1), (2, 1, 3), (3, 3, 3)]

# For each shape of the folded kernel: configurations that have it.
FAMILIES = {
    "1-D": [
        case(2, 3, (3,), [3, 4, 5, 8, 12]),
        case(2, 3, (3,), [3, 5, 12], padding="VALID", padding_mode="reflect"),
        case(2, 3, (3,), SMALL, padding=1),
        case(2, 3, (3,), SMALL, padding=5),
        case(2, 3, (3,), SMALL, padding=((2, 0),)),
        case(2, 3, (3,), SMALL, padding="SAME", dilation=2),
        case(2, 3, (3,), SMALL, padding=1, padding_mode="circular"),
        case(2, 3, (3,), SMALL, padding=4, padding_mode="circular"),
        case(2, 3, (3,), SMALL, padding=1, padding_mode="reflect"),
        case(2, 3, (3,), SMALL, padding=3, padding_mode="reflect", dilation=2),
        case(2, 3, (3,), SMALL, padding=((2, 1),), padding_mode="replicate"),
        case(2, 3, (3,), SMALL, padding=4, padding_mode="replicate"),
        case(2, 3, (3,), SMALL, padding="SAME", padding_mode="replicate", dilation=2),
        case(3, 2, (3,), SMALL, transpose=True),
        case(3, 2, (3,), SMALL, transpose=True, padding=1, dilation=2),
    ],
    "1-D, stride 2": [
        case(2, 3, (3,), [3, 4, 5, 6, 7, 12], stride=2),
        case(2, 3, (4,), SMALL, stride=2, padding=((1, 2),)),
        case(2, 3, (2,), SMALL, stride=2, dilation=2, padding="SAME"),
        case(2, 3, (4,), SMALL, stride=2, padding=3, padding_mode="circular"),
        case(2, 3, (3,), SMALL, stride=2, padding=1, padding_mode="circular"),
        case(2, 3, (3,), SMALL, stride=2, padding="SAME", padding_mode="circular"),
        case(2, 3, (4,), SMALL, stride=2, padding="SAME_LOWER", padding_mode="reflect"),
        case(2, 3, (4,), SMALL, stride=2, padding=3, padding_mode="replicate"),
        case(3, 2, (3,), SMALL, transpose=True, stride=2, output_padding=1),
        case(3, 2, (4,), SMALL, transpose=True, stride=2, padding=((2, 1),)),
        case(
            3, 2, (4,), SMALL, transpose=True, stride=2, padding="SAME",
            padding_mode="circular",
        ),
    ],
    "1-D, stride above the kernel": [
        case(1, 2, (2,), [2, 3, 4, 5, 9, 12], stride=3),
        case(1, 2, (1,), SMALL, stride=3, padding=2),
        case(1, 2, (2,), SMALL, stride=3, padding=1, padding_mode="circular"),
        case(1, 2, (2,), SMALL, stride=3, padding=1, padding_mode="replicate"),
        case(2, 1, (2,), SMALL, transpose=True, stride=3, padding="SAME"),
    ],
    "1-D, large kernel": [
        case(1, 2, (5,), SMALL, padding=2),
        case(1, 2, (5,), SMALL, padding=4),
        case(1, 2, (5,), SMALL, padding=2, padding_mode="circular"),
        case(1, 2, (5,), SMALL, padding=2, padding_mode="reflect"),
        case(1, 2, (5,), SMALL, padding="SAME", padding_mode="replicate"),
        case(
            2, 1, (5,), SMALL, transpose=True, padding="SAME", padding_mode="circular"
        ),
    ],
    "groups": [
        case(4, 4, (3,), SMALL, groups=2, padding="SAME"),
        case(4, 4, (3,), SMALL, groups=2, padding=1, padding_mode="circular"),
        case(4, 4, (3,), SMALL, groups=2, padding=2, padding_mode="reflect"),
        case(4, 4, (3,), SMALL, transpose=True, groups=2),
    ],
    "2-D": [
        case(2, 2, (3, 3), IMAGES, padding=1),
        case(2, 2, (3, 3), IMAGES, padding=((1, 3), (2, 1))),
        case(2, 2, (3, 3), IMAGES, padding=1, padding_mode="circular"),
        case(2, 2, (3, 3), IMAGES, padding=1, padding_mode="reflect"),
        case(2, 2, (3, 3), IMAGES, padding=(2, 1), padding_mode="replicate"),
        case(2, 2, (3, 3), IMAGES, transpose=True, padding="SAME", dilation=(1, 2)),
    ],
    "2-D, depthwise, not square, stride in one axis": [
        case(2, 2, (2, 3), [(2, 3), (3, 4), (6, 5)], stride=(2, 1), groups=2),
        case(
            2, 2, (2, 3), IMAGES, stride=(2, 1), groups=2, padding=((1, 0), (2, 1)),
            padding_mode="circular",
        ),
        case(
            2, 2, (2, 3), IMAGES, stride=(2, 1), groups=2, padding="SAME",
            padding_mode="reflect",
        ),
        case(2, 2, (2, 3), IMAGES, transpose=True, stride=(2, 1), groups=2),
    ],
    "2-D, one tap": [
        case(3, 2, (1, 1), IMAGES),
        case(3, 2, (1, 1), IMAGES, padding=1),
        case(3, 2, (1, 1), IMAGES, padding=1, padding_mode="replicate"),
        case(2, 3, (1, 1), IMAGES, transpose=True),
    ],
    "3-D": [
        case(1, 2, (2, 2, 2), VOLUMES, padding=1),
        case(1, 2, (2, 2, 2), VOLUMES, padding="SAME", padding_mode="reflect"),
        case(2, 1, (2, 2, 2), VOLUMES, transpose=True, padding="SAME"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_norm_bounds_that_of_every_input_size(family, getkey):
    for config in FAMILIES[family]:
        conv = config.make(getkey())
        operator = spectrax.layer_operator(conv)
        norm, value = _estimates(operator.kernel)
        # It is the supremum, and the estimate is never above it.
        sup = supremum_of(conv)
        np.testing.assert_allclose(norm, sup, rtol=1e-8, err_msg=str(config))
        assert sup * (1 - 2e-3) <= value <= sup * (1 + 1e-9), config
        for size in config.sizes:
            truth = norm_at(conv, size)
            message = f"{config} at {size}"
            assert truth <= operator.gain * norm * (1 + 1e-9), message
            assert truth <= operator.gain * value * (1 + 2e-3), message


ALL = [config for family in FAMILIES.values() for config in family]


@pytest.mark.parametrize(
    "case", [config for config in ALL if "padding_mode" not in config.options], ids=str
)
def test_gain_of_zero_padding_is_one(case, getkey):
    assert spectrax.layer_operator(case.make(getkey())).gain == 1


def _gain(key, kernel_size=3, **options):
    conv = eqx.nn.Conv(1, 1, 1, kernel_size, **options, key=key)
    return spectrax.layer_operator(conv).gain


def test_gain_of_circular_padding_without_stride_is_one(getkey):
    assert _gain(getkey(), padding=1, padding_mode="circular") == 1
    assert _gain(getkey(), padding="SAME", padding_mode="circular") == 1
    assert _gain(getkey(), 5, padding=((4, 0),), padding_mode="circular") == 1
    assert _gain(getkey(), padding=2, dilation=2, padding_mode="circular") == 1


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_gain_without_any_padding_is_one(mode, getkey):
    assert _gain(getkey(), padding_mode=mode) == 1
    assert _gain(getkey(), padding="VALID", padding_mode=mode, stride=2) == 1
    assert _gain(getkey(), 1, padding="SAME", padding_mode=mode) == 1


# All-ones kernels at a size where the padded convolution exceeds the lattice.
EXCEEDING = [
    (case(1, 1, (2,), [], padding=1, padding_mode="circular", stride=2), (1,)),
    (case(1, 1, (3,), [], padding="SAME", padding_mode="circular", stride=3), (2,)),
    (case(1, 1, (2,), [], padding=3, padding_mode="circular"), (1,)),
    (case(1, 1, (2, 2), [], padding=3, padding_mode="circular"), (1, 1)),
    (case(1, 1, (3,), [], padding=1, padding_mode="reflect"), (4,)),
    (case(1, 1, (3,), [], padding="SAME", padding_mode="reflect"), (4,)),
    (case(1, 1, (2,), [], padding=4, padding_mode="reflect"), (2,)),
    (case(1, 1, (2,), [], padding=3, padding_mode="replicate"), (6,)),
    (case(1, 1, (2,), [], padding=((3, 0),), padding_mode="replicate"), (6,)),
    (case(1, 1, (5,), [], padding="SAME", padding_mode="replicate"), (7,)),
    (case(1, 1, (2,), [], padding=1, padding_mode="replicate", stride=2), (1,)),
    (
        case(1, 1, (2,), [], padding="SAME", dilation=3, padding_mode="replicate"),
        (4,),
    ),
]


@pytest.mark.parametrize(("case", "size"), EXCEEDING, ids=str)
def test_gain_covers_what_exceeds_the_lattice(case, size, getkey):
    conv = case.make(getkey())
    ones = jnp.ones_like(conv.weight)
    conv = eqx.tree_at(lambda conv: conv.weight, conv, ones)
    sup = supremum_of(conv)
    truth = norm_at(conv, size)
    assert sup * 1.001 < truth
    assert truth <= spectrax.layer_operator(conv).gain * sup * (1 + 1e-12)


def test_gain_covers_a_reflection_of_nine_ones(getkey):
    conv = eqx.nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect", key=getkey())
    conv = eqx.tree_at(lambda conv: conv.weight, conv, jnp.ones((1, 1, 3, 3)))
    circular = eqx.nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular", key=getkey())
    circular = eqx.tree_at(lambda conv: conv.weight, circular, conv.weight)
    np.testing.assert_allclose(norm_at(circular, (4, 4)), 9, rtol=1e-12)
    truth = norm_at(conv, (4, 4))
    assert truth > 1.1 * 9
    # Here the gain takes part: it multiplies both.
    operator = spectrax.layer_operator(conv)
    state = spectrax.init_power_state(operator)
    value = spectrax.singular_value(operator, state)
    norm = eqx.filter_jit(spectrax.spectral_norm)(operator)
    np.testing.assert_allclose([norm, value], operator.gain * 9, rtol=1e-6)
    assert norm >= truth


@pytest.mark.parametrize(
    ("case", "size"),
    [
        (case(2, 2, (3,), [], padding=1), 60),
        (case(2, 2, (4,), [], stride=2), 60),
        (case(2, 2, (3,), [], transpose=True), 60),
        (case(2, 2, (3,), [], transpose=True, stride=2), 60),
    ],
    ids=str,
)
def test_large_inputs_come_close(case, size, getkey):
    conv = case.make(getkey())
    sup = supremum_of(conv)
    norms = [norm_at(conv, (n,)) for n in (6, 15, size)]
    assert norms == sorted(norms)
    assert 0.99 * sup <= norms[-1] <= sup * (1 + 1e-12)


# The symbol.


@pytest.mark.parametrize(
    ("case", "size"),
    [
        (case(2, 3, (3,), [], padding=1, padding_mode="circular"), (7,)),
        (case(2, 3, (5,), [], padding=2, padding_mode="circular"), (3,)),
        (case(2, 2, (4,), [], padding=((1, 2),), padding_mode="circular"), (6,)),
        (case(2, 2, (3, 2), [], padding="SAME", padding_mode="circular"), (4, 5)),
        (
            case(
                4, 2, (3,), [], padding="SAME", padding_mode="circular", groups=2,
                stride=2,
            ),
            (8,),
        ),
        (
            case(
                2, 1, (3,), [], padding=((4, 0),), padding_mode="circular", stride=2,
                dilation=2,
            ),
            (8,),
        ),
        (
            case(
                1, 2, (2, 3), [], padding=((1, 0), (1, 1)), padding_mode="circular",
                stride=(2, 1),
            ),
            (6, 4),
        ),
        (
            case(
                2, 1, (4,), [], padding="SAME", padding_mode="circular", stride=2,
                transpose=True,
            ),
            (5,),
        ),
    ],
    ids=lambda value: str(value),
)  # fmt: skip
def test_circular_convolution_has_the_symbols_singular_values(case, size, getkey):
    conv = case.make(getkey())
    operator = spectrax.layer_operator(conv)
    # Folding the stride leaves the frequencies of the shorter side.
    stride = np.ones_like(conv.stride) if case.transpose else np.array(conv.stride)
    points = np.array(size) // stride
    axes = [2 * np.pi * np.arange(n) / n for n in points]
    frequencies = np.stack(np.meshgrid(*axes, indexing="ij"), -1)
    symbols = np.asarray(
        operator.symbol(jnp.asarray(frequencies.reshape(-1, len(size))))
    )
    found = np.linalg.svd(symbols, compute_uv=False).max()
    np.testing.assert_allclose(found, norm_at(conv, size), rtol=1e-12)


def test_symbol_is_the_sum_of_the_taps_times_plane_waves(getkey):
    conv = eqx.nn.Conv2d(2, 3, (2, 3), dtype=jnp.complex128, key=getkey())
    weight = jr.normal(getkey(), conv.weight.shape, jnp.complex128)
    conv = eqx.tree_at(lambda conv: conv.weight, conv, weight)
    frequency = np.array([[0.3, -1.2], [2.0, 0.1]])
    rows, columns = np.indices((2, 3))
    truth = [
        np.sum(np.asarray(weight) * np.exp(1j * (a * rows + b * columns)), (2, 3))
        for a, b in frequency
    ]
    symbol = spectrax.layer_operator(conv).symbol(jnp.asarray(frequency))
    np.testing.assert_allclose(symbol, np.array(truth)[None], atol=1e-12)


def test_lattice_operator_is_linear_in_the_weight(getkey):
    conv = eqx.nn.Conv1d(4, 2, 3, stride=2, groups=2, key=getkey())
    other = jr.normal(getkey(), conv.weight.shape)

    def kernel(weight):
        layer = eqx.tree_at(lambda conv: conv.weight, conv, weight)
        return spectrax.layer_operator(layer).kernel

    np.testing.assert_allclose(
        kernel(2 * conv.weight - 3 * other),
        2 * kernel(conv.weight) - 3 * kernel(other),
        atol=1e-12,
    )


def test_complex_kernel_needs_every_frequency():
    # Its best frequency is 4.5, which no conjugate symmetry brings to the first half.
    phases = np.exp(-4.5j * np.arange(4))
    kernel = jnp.asarray(phases.reshape(1, 1, 1, 4))
    np.testing.assert_allclose(_estimates(kernel), 4, rtol=1e-9)


# Drawn kernels.


def _draw(kind, seed, exponent):
    rng = np.random.default_rng(seed)
    shape = (2, 3, 4)
    kernel = rng.normal(size=shape)
    if kind == "zero":
        kernel = np.zeros(shape)
    elif kind == "one tap":
        kernel[..., np.arange(4) != rng.integers(4)] = 0
    elif kind == "ones":
        kernel = np.ones(shape)
    elif kind == "rank one":
        factors = [rng.normal(size=n) for n in shape]
        kernel = np.einsum("o,i,t->oit", *factors)
    elif kind == "alternating":
        kernel = np.abs(kernel) * (-1) ** np.arange(4)
    return (kernel * 10.0**exponent).astype(np.float32)


KERNELS = st.builds(
    _draw,
    st.sampled_from(["gaussian", "zero", "one tap", "ones", "rank one", "alternating"]),
    st.integers(0, 2**32 - 1),
    st.sampled_from([-20, 0, 20]),
)


@hypothesis.given(kernel=KERNELS)
def test_estimate_of_drawn_kernels_is_close_and_never_above(kernel):
    value = _value(jnp.asarray(kernel)[None])
    assert value.dtype == jnp.float32
    scale = np.abs(kernel).max() or 1.0
    sup = scale * supremum(kernel / scale)
    assert (1 - 2e-3) * sup <= value <= (1 + 1e-5) * sup


@hypothesis.given(kernel=KERNELS)
@hypothesis.settings(max_examples=15)
def test_norm_of_drawn_kernels(kernel):
    norm, _ = _estimates(jnp.asarray(kernel)[None])
    scale = np.abs(kernel).max() or 1.0
    np.testing.assert_allclose(norm, scale * supremum(kernel / scale), rtol=1e-5)


def test_no_saddle_at_a_symmetric_frequency_is_taken_for_the_maximum(getkey):
    # At the frequencies 0 and pi the symbol of a real kernel is real, and the slope of
    # its norm zero, even where it is no maximum. Here it is higher beside pi.
    kernel = [[[-3, 1, -3], [-3, 1, 0]], [[-3, -3, 2], [3, 3, 3]]]
    weight = jnp.asarray(kernel, float)
    norm, value = _estimates(weight[None])
    options = {"padding": 1, "padding_mode": "circular", "use_bias": False}
    conv = eqx.nn.Conv1d(2, 2, 3, **options, key=getkey())
    conv = eqx.tree_at(lambda conv: conv.weight, conv, weight)
    assert norm_at(conv, (23,)) <= norm * (1 + 1e-9)
    np.testing.assert_allclose(norm, supremum(weight), rtol=1e-8)
    np.testing.assert_allclose(value, supremum(weight), rtol=5e-4)


def test_more_steps_converge(getkey):
    kernel = jr.normal(getkey(), (1, 3, 4, 3))
    sup = supremum(kernel[0])
    errors = [1 - float(_value(kernel, steps, 1)) / sup for steps in (1, 4, 100)]
    assert errors[0] > 1e-6
    assert errors == sorted(errors, reverse=True)
    np.testing.assert_allclose(errors[-1], 0, atol=1e-10)


# Derivatives.


def test_derivatives(getkey):
    conv = eqx.nn.Conv1d(2, 2, 3, key=getkey())
    weight, direction = np.asarray(jr.normal(getkey(), (2, *conv.weight.shape)))

    def norm(weight):
        layer = eqx.tree_at(lambda conv: conv.weight, conv, weight)
        return spectrax.spectral_norm(spectrax.layer_operator(layer))

    @jax.jit
    def derivatives(weight, direction):
        return jax.jvp(jax.value_and_grad(norm), (weight,), (direction,))

    found = derivatives(weight, direction)
    (value, gradient), (value_rate, gradient_rate) = found
    np.testing.assert_allclose(value, supremum(weight), rtol=1e-10)
    h = 1e-3
    units = np.eye(weight.size).reshape(-1, *weight.shape)
    for unit in [direction, *units]:
        slope = supremum(weight + h * unit) - supremum(weight - h * unit)
        np.testing.assert_allclose(np.sum(unit * gradient), slope / (2 * h), atol=1e-5)
        # `unit^T H direction` from four points.
        turn = sum(
            a * b * supremum(weight + h * (a * unit + b * direction))
            for a in (1, -1)
            for b in (1, -1)
        )
        np.testing.assert_allclose(
            np.sum(unit * gradient_rate), turn / (4 * h**2), atol=1e-4
        )
    np.testing.assert_allclose(value_rate, np.sum(gradient * direction), rtol=1e-9)
    # At zero, all of them are zero and none is a NaN.
    for leaf in jtu.tree_leaves(derivatives(np.zeros_like(weight), direction)):
        np.testing.assert_array_equal(leaf, 0)


def test_derivative_through_the_wrapped_layer(getkey):
    conv = eqx.nn.Conv1d(4, 2, 3, stride=2, groups=2, use_bias=False, key=getkey())
    model, state = eqx.nn.make_with_state(spectrax.wrap)(conv)
    state = spectrax.advance(model, state, num_steps=100)
    cotangent = np.asarray(jr.normal(getkey(), conv.weight.shape))

    check_gradient_through_wrapped(
        model,
        state,
        lambda weight: supremum(weight, stride=(2,), groups=2),
        cotangent=cotangent,
        step=1e-4,
    )


def test_derivative_at_a_zero_kernel_is_zero(getkey):
    conv = eqx.nn.Conv1d(2, 2, 3, key=getkey())
    conv = eqx.tree_at(lambda conv: conv.weight, conv, jnp.zeros_like(conv.weight))
    model, state = eqx.nn.make_with_state(spectrax.wrap)(conv)

    @eqx.filter_grad
    def gradient(model):
        return jnp.sum(spectrax.unwrap(model, state).weight)

    np.testing.assert_array_equal(spectrax.unwrap(model, state).weight, 0)
    np.testing.assert_array_equal(gradient(model).raw.weight, 0)


# The oracle itself.


def test_aliased_symbols_agree_with_a_fine_circle(getkey):
    conv = eqx.nn.Conv1d(
        2, 2, 3, stride=2, padding="SAME", padding_mode="circular", key=getkey()
    )
    values = symbol_norms(
        conv.weight, grid(6, 1), stride=(2,), dilation=(1,), groups=1, transpose=False
    )
    np.testing.assert_allclose(values.max(), norm_at(conv, (12,)), rtol=1e-12)


# The steps.


@jax.jit
def _step(kernel, state):
    operator = spectrax.LatticeConvolution(kernel, 1.0)
    state = spectrax.power_iterate(operator, state)
    return state, spectrax.singular_value(operator, state)


def _started(kernel, num_steps=32):
    operator = spectrax.LatticeConvolution(kernel, 1.0)
    return spectrax.init_power_state(operator, num_steps=num_steps)


def test_every_candidate_is_moved_at_every_step(getkey):
    kernel = jr.normal(getkey(), (1, 3, 2, 3, 3))
    state = _started(kernel, num_steps=0)
    cells = state.value.size
    assert cells > 30
    np.testing.assert_array_equal(state.value, 0)
    first, _ = _step(kernel, state)
    assert jnp.all(first.value > 0)
    assert jnp.all(jnp.any(first.v != state.v, axis=-1))
    # Even those that converged long ago see another kernel at once, each in its cell.
    old = first
    for _ in range(20):
        old, _ = _step(kernel, old)
    other = jr.normal(getkey(), kernel.shape)
    new, sigma = _step(other, old)
    assert jnp.all(jnp.any(new.v != old.v, axis=-1))
    assert jnp.all(new.value != old.value)
    np.testing.assert_allclose(jnp.linalg.norm(new.v, axis=-1), 1, rtol=1e-12)
    apart = jnp.abs(new.frequency - state.frequency)
    assert jnp.all(apart <= 2 * math.pi / 8)
    assert len(np.unique(np.round(new.frequency, 3), axis=1)[0]) > 10
    # None of the values is above the norm, and the estimate is not below any of them.
    assert jnp.max(new.value) <= sigma * (1 + 1e-12)
    assert sigma <= supremum(other[0]) * (1 + 1e-9)


@pytest.mark.parametrize("broken", [jnp.nan, jnp.inf, -jnp.inf])
def test_nothing_is_kept_of_a_broken_kernel(broken, getkey):
    kernel = jr.normal(getkey(), (1, 3, 2, 3, 3))
    state = _started(kernel)
    for _ in range(5):
        state, sigma = _step(kernel, state)
    np.testing.assert_allclose(sigma, supremum(kernel[0]), rtol=1e-6)
    kept = state
    for place in [(0, 0, 0, 0, 0), (0, 2, 1, 1, 1), ...]:
        kept, value = _step(kernel.at[place].set(broken), kept)
        assert jnp.isnan(value)
        assert eqx.tree_equal(kept, state)
    _, restored = _step(kernel, kept)
    np.testing.assert_allclose(restored, sigma, rtol=1e-9)


def test_a_start_at_a_broken_kernel_recovers(getkey):
    kernel = jr.normal(getkey(), (1, 3, 2, 3, 3))
    state = _started(kernel.at[0, 0, 0, 0, 0].set(jnp.nan))
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jtu.tree_leaves(state))
    for _ in range(3):
        state, sigma = _step(kernel, state)
    np.testing.assert_allclose(sigma, supremum(kernel[0]), rtol=1e-3)


@pytest.mark.parametrize("shape", [(1, 2, 2, 0, 3), (1, 0, 2, 3), (0, 1, 1, 3)])
def test_empty_kernel_is_refused(shape):
    with pytest.raises(ValueError, match=r"at least one group, one channel and one ta"):
        spectrax.LatticeConvolution(jnp.zeros(shape), 1.0)
