"""Convolutions at one input size, and what `wrap` makes of convolutional layers."""

import equinox as eqx
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
    dense,
    norm_at,
)
from .helpers import true_norm, unchecked


@eqx.filter_jit
def _norm(conv, size):
    return spectrax.spectral_norm(spectrax.layer_operator(conv, input_size=size))


@eqx.filter_jit
def _value(conv, size):
    operator = spectrax.layer_operator(conv, input_size=size)
    state = spectrax.init_power_state(operator, num_steps=0)
    state = spectrax.power_iterate(operator, state, num_steps=100)
    return spectrax.singular_value(operator, state)


@eqx.filter_jit
def _products(conv, size, x, y):
    operator = spectrax.layer_operator(conv, input_size=size)
    return operator.mv(x), operator.T.mv(y), operator.T.T.mv(x)


# Each feature once or twice, with the size at which it is used.
CASES = [
    case(2, 3, (3,), [7]),
    case(2, 3, (5,), [2], padding=4, padding_mode="circular"),
    case(3, 2, (4,), [6], padding="SAME", dilation=2),
    case(2, 2, (2,), [10], stride=3, padding="SAME_LOWER"),
    case(2, 2, (3,), [5], padding=((2, 1),), padding_mode="reflect"),
    case(2, 2, (3, 3), [(5, 4)], padding=((1, 0), (2, 1)), stride=(2, 1)),
    case(4, 4, (2, 3), [(4, 4)], padding=1, padding_mode="replicate", groups=2),
    case(3, 3, (3, 2), [(4, 3)], padding="SAME", groups=3, padding_mode="circular"),
    case(3, 2, (1, 1), [(3, 4)]),
    case(2, 2, (2, 1, 3), [(3, 2, 4)], padding="VALID"),
    case(3, 2, (3,), [5], transpose=True, stride=2, output_padding=1, padding=1),
    case(2, 2, (3, 2), [(3, 3)], transpose=True, padding="SAME", dilation=(1, 2)),
    case(
        2, 4, (4,), [3], transpose=True, padding="SAME", padding_mode="circular",
        groups=2, stride=2,
    ),
    case(1, 2, (2, 2, 2), [(2, 2, 2)], transpose=True, stride=(1, 2, 1)),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_norm_at_one_size_is_that_of_the_dense_matrix(case, getkey):
    conv = case.make(getkey())
    (size,) = case.sizes
    np.testing.assert_allclose(_norm(conv, size), norm_at(conv, size), rtol=1e-10)


@pytest.mark.parametrize("case", [CASES[i] for i in (4, 6, 12)], ids=str)
def test_power_iteration_at_one_size_converges_to_it(case, getkey):
    conv = case.make(getkey())
    (size,) = case.sizes
    truth = norm_at(conv, size)
    value = _value(conv, size)
    assert (1 - 1e-6) * truth <= value <= (1 + 1e-10) * truth


@pytest.mark.parametrize("case", CASES, ids=str)
def test_operator_is_the_layer_without_bias_and_has_its_adjoint(case, getkey):
    conv = case.make(getkey())
    (size,) = case.sizes
    matrix = dense(conv, size)
    assert np.any(np.asarray(conv.bias) != 0)
    x = jr.normal(getkey(), (conv.in_channels, *size))
    y = jr.normal(getkey(), jax.eval_shape(conv, x).shape)
    image, adjoint_image, image_again = _products(conv, size, x, y)
    np.testing.assert_allclose(image.ravel(), matrix @ np.ravel(x), atol=1e-12)
    np.testing.assert_allclose(
        adjoint_image.ravel(), matrix.T @ np.ravel(y), atol=1e-12
    )
    np.testing.assert_allclose(image_again, image, atol=1e-12)
    np.testing.assert_allclose(np.vdot(y, image), np.vdot(adjoint_image, x), rtol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "rtol"),
    [(jnp.float32, 1e-5), (jnp.complex64, 1e-5), (jnp.complex128, 1e-10)],
    ids=["float32", "complex64", "complex128"],
)
@pytest.mark.parametrize("transpose", [False, True])
def test_norm_in_other_dtypes(dtype, rtol, transpose, getkey):
    kind = eqx.nn.ConvTranspose1d if transpose else eqx.nn.Conv1d
    conv = kind(2, 3, 3, stride=2, padding=1, dtype=dtype, key=getkey())
    weight = jr.normal(getkey(), conv.weight.shape, dtype)
    conv = eqx.tree_at(lambda conv: conv.weight, conv, weight)
    norm = _norm(conv, (8,))
    assert norm.dtype == jnp.finfo(dtype).dtype
    np.testing.assert_allclose(norm, norm_at(conv, (8,)), rtol=rtol)


def test_complex_adjoint_conjugates(getkey):
    conv = eqx.nn.Conv1d(2, 3, 3, dtype=jnp.complex128, key=getkey())
    x = jr.normal(getkey(), (2, 6), jnp.complex128)
    y = jr.normal(getkey(), (3, 4), jnp.complex128)
    operator = spectrax.layer_operator(conv, input_size=(6,))
    np.testing.assert_allclose(
        np.vdot(y, operator.mv(x)),
        np.vdot(jnp.conj(operator.T.mv(jnp.conj(y))), x),
        rtol=1e-12,
    )


def test_bias_never_counts(getkey):
    conv = eqx.nn.Conv2d(2, 2, 3, padding=1, key=getkey())
    large = eqx.tree_at(lambda conv: conv.bias, conv, 100 + conv.bias)
    without = eqx.nn.Conv2d(2, 2, 3, padding=1, use_bias=False, key=getkey())
    without = eqx.tree_at(lambda conv: conv.weight, without, conv.weight)
    x = jr.normal(getkey(), (2, 4, 4))
    images = [
        spectrax.layer_operator(layer, input_size=(4, 4)).mv(x)
        for layer in (conv, large, without)
    ]
    np.testing.assert_array_equal(images[0], images[1])
    np.testing.assert_array_equal(images[0], images[2])
    np.testing.assert_array_equal(images[2], without(x))


def test_operator_is_linear_in_the_weight(getkey):
    conv = eqx.nn.Conv1d(2, 3, 3, padding=2, padding_mode="reflect", key=getkey())
    other = jr.normal(getkey(), conv.weight.shape)
    x = jr.normal(getkey(), (2, 5))

    def image(weight):
        layer = eqx.tree_at(lambda conv: conv.weight, conv, weight)
        return spectrax.layer_operator(layer, input_size=(5,)).mv(x)

    combined = image(2 * conv.weight - 3 * other)
    np.testing.assert_allclose(
        combined, 2 * image(conv.weight) - 3 * image(other), atol=1e-12
    )
    np.testing.assert_array_equal(image(0 * other), 0)


# What other libraries have got wrong.


def test_groups_are_a_maximum_not_a_product(getkey):
    conv = eqx.nn.Conv1d(2, 2, 1, groups=2, key=getkey())
    conv = eqx.tree_at(lambda conv: conv.weight, conv, jnp.full((2, 1, 1), 0.5))
    at_size = spectrax.layer_operator(conv, input_size=(3,))
    np.testing.assert_allclose(spectrax.spectral_norm(at_size), 0.5, rtol=1e-12)
    operator = spectrax.layer_operator(conv)
    state = spectrax.init_power_state(operator)
    value = spectrax.singular_value(operator, state)
    np.testing.assert_allclose(value, 0.5, rtol=1e-12)


def test_kernel_larger_than_the_image_wraps(getkey):
    conv = eqx.nn.Conv2d(1, 1, 5, padding=2, padding_mode="circular", key=getkey())
    conv = eqx.tree_at(lambda conv: conv.weight, conv, jnp.ones((1, 1, 5, 5)))
    np.testing.assert_allclose(norm_at(conv, (3, 3)), 25, rtol=1e-12)
    # A kernel truncated to the image would have norm 9.
    np.testing.assert_allclose(_norm(conv, (3, 3)), 25, rtol=1e-10)


def test_stride_is_not_ignored(getkey):
    conv = eqx.nn.Conv1d(1, 1, 2, stride=2, use_bias=False, key=getkey())
    conv = eqx.tree_at(lambda conv: conv.weight, conv, jnp.ones((1, 1, 2)))
    # Without overlap the norm is that of the taps; with stride 1 it would be 2.
    np.testing.assert_allclose(_norm(conv, (8,)), np.sqrt(2), rtol=1e-12)


def test_flattened_kernel_is_not_the_norm_of_the_convolution(getkey):
    conv = eqx.nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular", key=getkey())
    conv = eqx.tree_at(lambda conv: conv.weight, conv, jnp.ones((1, 1, 3, 3)))
    flat = spectrax.flattened_kernel(conv.weight)
    np.testing.assert_allclose(spectrax.spectral_norm(flat), 3, rtol=1e-12)
    np.testing.assert_allclose(_norm(conv, (4, 4)), 9, rtol=1e-10)


def test_flattened_kernel_is_the_reshaped_kernel(getkey):
    weight = jr.normal(getkey(), (4, 2, 3, 2))
    operator = spectrax.flattened_kernel(weight)
    np.testing.assert_array_equal(
        operator.as_matrix(), np.asarray(weight).reshape(4, 12)
    )


@pytest.mark.parametrize("size", [(4,), (4, 4, 4), (0, 4), (4, -1), ()])
def test_input_size_of_another_dimension_raises(size, getkey):
    conv = eqx.nn.Conv2d(1, 1, 3, key=getkey())
    with unchecked(), pytest.raises(ValueError, match="`input_size` to be 2 positive"):
        spectrax.layer_operator(conv, input_size=size)


def test_input_size_without_output_raises(getkey):
    conv = eqx.nn.Conv1d(1, 1, 5, key=getkey())
    with unchecked(), pytest.raises(ValueError, match="input_size"):
        spectrax.layer_operator(conv, input_size=(4,))


# Derivatives.


def _kernel_basis(conv, size):
    """The dense matrix of each single entry of the kernel."""
    count = conv.weight.size
    units = np.eye(count).reshape(count, *conv.weight.shape)
    make = lambda unit: eqx.tree_at(lambda c: c.weight, conv, jnp.asarray(unit))  # noqa: E731
    return np.stack([dense(make(unit), size) for unit in units])


@pytest.mark.parametrize(
    ("case", "size"),
    [
        (case(2, 2, (3,), [], padding=1), (6,)),
        (case(2, 1, (3,), [], transpose=True, stride=2), (4,)),
    ],
    ids=["conv", "transpose"],
)
def test_derivatives_at_one_size(case, size, getkey):
    conv = case.make(getkey())
    basis = _kernel_basis(conv, size)
    weight, direction = np.asarray(jr.normal(getkey(), (2, *conv.weight.shape)))

    def true_value(weight):
        return true_norm(np.tensordot(weight.ravel(), basis, 1))

    def true_gradient(weight):
        u, _, vh = np.linalg.svd(np.tensordot(weight.ravel(), basis, 1))
        return np.einsum("o,toi,i->t", u[:, 0], basis, vh[0]).reshape(weight.shape)

    def norm(weight):
        layer = eqx.tree_at(lambda conv: conv.weight, conv, weight)
        return spectrax.spectral_norm(spectrax.layer_operator(layer, input_size=size))

    @jax.jit
    def derivatives(weight, direction):
        return jax.jvp(jax.value_and_grad(norm), (weight,), (direction,))

    found = derivatives(weight, direction)
    (value, gradient), (value_rate, gradient_rate) = found
    h = 1e-5
    ahead, behind = weight + h * direction, weight - h * direction
    slope = (true_value(ahead) - true_value(behind)) / (2 * h)
    turn = (true_gradient(ahead) - true_gradient(behind)) / (2 * h)
    np.testing.assert_allclose(value, true_value(weight), rtol=1e-10)
    np.testing.assert_allclose(gradient, true_gradient(weight), atol=1e-8)
    np.testing.assert_allclose(value_rate, slope, rtol=1e-7)
    np.testing.assert_allclose(gradient_rate, turn, atol=1e-6 * np.abs(turn).max())
    # At zero, all of them are zero and none is a NaN.
    for leaf in jtu.tree_leaves(derivatives(np.zeros_like(weight), direction)):
        np.testing.assert_array_equal(leaf, 0)


def test_derivative_through_the_wrapped_layer(getkey):
    conv = eqx.nn.Conv1d(2, 2, 3, padding=1, use_bias=False, key=getkey())
    size = (6,)
    basis = _kernel_basis(conv, size)
    wrap = lambda conv: spectrax.wrap(conv, input_size=size)  # noqa: E731
    model, state = eqx.nn.make_with_state(wrap)(conv)
    state = spectrax.advance(model, state, num_steps=100)
    cotangent = np.asarray(jr.normal(getkey(), conv.weight.shape))

    check_gradient_through_wrapped(
        model,
        state,
        lambda weight: true_norm(np.tensordot(weight.ravel(), basis, 1)),
        cotangent=cotangent,
        step=1e-5,
    )


# Wrapped layers.


@eqx.filter_jit
def _update(model, state, change):
    model = eqx.tree_at(
        lambda model: model.module.weight.weight, model, model.raw.weight + change
    )
    return model, spectrax.advance(model, state)


def _trained(conv, key, **options):
    """The constrained layer after ten updates, of a tenth of the weight each."""
    wrap = lambda conv: spectrax.wrap(conv, **options)  # noqa: E731
    model, state = eqx.nn.make_with_state(wrap)(conv)
    size = 0.1 * np.asarray(conv.weight).std()
    for change in jr.normal(key, (10, *conv.weight.shape)):
        model, state = _update(model, state, size * change)
    return eqx.filter_jit(spectrax.unwrap)(model, state)


WRAPPED = [
    case(2, 3, (3,), [1, 2, 5, 40], padding=1),
    case(2, 2, (3,), [1, 2, 3, 6, 7], padding=2, padding_mode="reflect"),
    case(2, 2, (3,), [1, 2, 3, 6, 7], padding=2, padding_mode="replicate"),
    case(2, 2, (3,), [1, 2, 5, 8], padding=1, padding_mode="circular", stride=2),
    case(4, 2, (3, 3), [(1, 1), (3, 4), (9, 9)], padding=1, groups=2),
    case(2, 2, (2, 3), [(2, 3), (6, 7)], stride=(2, 1), dilation=(1, 2)),
    case(1, 2, (2, 2, 2), [(2, 2, 2), (3, 5, 4)]),
    case(3, 2, (3,), [1, 4, 20], transpose=True, stride=2),
    case(2, 2, (2, 3), [(1, 1), (4, 6)], transpose=True, padding="SAME"),
    case(2, 1, (2, 2, 2), [(1, 1, 1), (3, 4, 3)], transpose=True),
]  # fmt: skip


@pytest.mark.parametrize("case", WRAPPED, ids=str)
def test_wrapped_layer_keeps_its_bound_at_every_size(case, getkey):
    constraint = spectrax.Normalize(1.5)
    layer = _trained(case.make(getkey()), getkey(), constraint=constraint)
    for size in case.sizes:
        assert norm_at(layer, size) <= 1.5 * (1 + 1e-3), size


@pytest.mark.parametrize(
    "case",
    [
        case(2, 3, (3,), [40], padding=1),
        case(2, 2, (3, 3), [(14, 14)], padding=1),
        case(2, 2, (3,), [40], transpose=True, padding=1),
    ],
    ids=str,
)
def test_wrapped_layer_uses_its_bound_up_at_a_large_size(case, getkey):
    constraint = spectrax.Normalize(1.5)
    layer = _trained(case.make(getkey()), getkey(), constraint=constraint)
    norm = norm_at(layer, case.sizes[0])
    assert 0.9 * 1.5 <= norm <= 1.5 * (1 + 1e-3)


@pytest.mark.parametrize(
    ("case", "size"),
    [
        (case(2, 3, (3, 3), [], padding=1), (5, 5)),
        (case(2, 2, (3,), [], padding=2, padding_mode="reflect", stride=2), (7,)),
        (case(2, 2, (3,), [], transpose=True, stride=2), (6,)),
    ],
    ids=["2-D", "reflect", "transpose"],
)
def test_with_an_input_size_the_norm_there_is_the_bound(case, size, getkey):
    layer = _trained(case.make(getkey()), getkey(), input_size=size)
    np.testing.assert_allclose(norm_at(layer, size), 1, rtol=1e-3)


def test_with_an_input_size_smaller_zero_padded_inputs_are_bounded_too(getkey):
    conv = eqx.nn.Conv2d(2, 3, 3, padding=1, key=getkey())
    layer = _trained(conv, getkey(), input_size=(5, 5))
    for size in [(1, 1), (2, 5), (4, 4)]:
        assert norm_at(layer, size) <= 1 + 1e-3, size


def test_with_the_flattened_view_the_norm_of_that_is_the_bound(getkey):
    conv = eqx.nn.Conv2d(2, 3, 3, padding=1, key=getkey())
    layer = _trained(conv, getkey(), view=spectrax.flattened_kernel)
    flat = np.asarray(layer.weight).reshape(3, -1)
    np.testing.assert_allclose(true_norm(flat), 1, rtol=1e-3)
    assert norm_at(layer, (6, 6)) > 1.05
