"""The Fourier layer: what it computes, its exact norm, and its place in `wrap`.

The truth is the layer's matrix, column by column, and numpy's discrete Fourier
transform written out as sums.
"""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
import optax
import pytest

import spectrax
from spectrax.nn import FourierLayer

from .helpers import true_norm, unchecked


def make(key, dims, modes, *, channels=(2, 3), **options):
    return FourierLayer(dims, *channels, modes, key=key, **options)


@eqx.filter_jit
def over_batch(layer, xs):
    return jax.vmap(layer)(xs)


def matrix_and_image(layer, x):
    """The linear part of the layer, as a dense matrix, and the layer at `x`."""
    inputs = np.concatenate([np.zeros((1, x.size)), np.eye(x.size), x.reshape(1, -1)])
    outputs = np.asarray(over_batch(layer, jnp.asarray(inputs.reshape(-1, *x.shape))))
    flat = outputs.reshape(len(inputs), -1)
    return (flat[1:-1] - flat[0]).T, outputs[-1]


def matrix_of(layer, grid):
    return matrix_and_image(layer, np.zeros((layer.in_channels, *grid)))[0]


def by_hand(layer, x):
    """The layer by numpy: every frequency is a sum over the grid, and the real part of
    the synthesis is taken at the end, as the inverse real transform does.
    """
    weight, x = np.asarray(layer.weight), np.asarray(x)
    grid = x.shape[1:]
    signed = [[*range(m), *range(1 - m, 0)] for m in layer.modes[:-1]]
    frequencies = list(itertools.product(*signed, range(layer.modes[-1])))
    points = np.stack(np.meshgrid(*(np.arange(n) / n for n in grid), indexing="ij"))
    y = np.zeros((layer.out_channels, *grid))
    count = len(frequencies)
    for index, k in enumerate(frequencies):
        if any(2 * abs(kj) >= n for kj, n in zip(k, grid, strict=True)):
            continue  # the grid cannot tell it from another one
        wave = np.exp(2j * np.pi * np.tensordot(k, points, 1))
        coefficient = (x * wave.conj()).sum(axis=tuple(range(1, x.ndim))) / wave.size
        image = (weight[index] + 1j * weight[count + index]) @ coefficient
        # With its opposite, unless that has a matrix of its own.
        twice = 1 if k[-1] == 0 else 2
        y += twice * np.real(image[(..., *(None,) * len(grid))] * wave)
    if layer.use_bypass:
        y += np.tensordot(weight[-1], x, 1)
    if layer.bias is not None:
        y += np.asarray(layer.bias)[(..., *(None,) * len(grid))]
    return y


@eqx.filter_jit
def symbol(layer):
    return spectrax.layer_operator(layer).matrices()


def symbol_norm(layer):
    """By numpy, of the matrices in the layer's operator."""
    return np.linalg.norm(np.asarray(symbol(layer)), 2, axis=(1, 2)).max()


# Grids that carry all modes, of odd and even sizes, and one that does not.
CASES = [
    (1, 4, (8,), True),
    (1, 4, (9,), True),
    (1, (4,), (6,), False),
    (1, 4, (7,), True),
    (2, (3, 2), (6, 5), True),
    (2, (2, 3), (5, 6), True),
    (2, 3, (4, 6), False),
    (2, 3, (6, 1), False),
    (3, 2, (4, 3, 4), True),
    (3, (2, 1, 2), (3, 2, 3), True),
    (3, 2, (3, 2, 4), False),
]


@pytest.mark.parametrize("use_bypass", [False, True], ids=["", "bypass"])
@pytest.mark.parametrize(("dims", "modes", "grid", "carried"), CASES)
def test_values_and_exact_norm(dims, modes, grid, carried, use_bypass, getkey):
    layer = make(getkey(), dims, modes, use_bypass=use_bypass, use_bias=use_bypass)
    x = np.asarray(jr.normal(getkey(), (2, *grid)))
    matrix, image = matrix_and_image(layer, x)
    np.testing.assert_allclose(image, by_hand(layer, x), atol=1e-13)
    norm = true_norm(matrix)
    if carried:
        np.testing.assert_allclose(norm, symbol_norm(layer), rtol=1e-12)
    else:
        assert norm <= symbol_norm(layer) * (1 + 1e-12)


@pytest.mark.parametrize("channels", [(1, 1), (3, 2), (2, 5)])
def test_channels(channels, getkey):
    layer = make(getkey(), 2, 2, channels=channels)
    norm = true_norm(matrix_of(layer, (4, 5)))
    np.testing.assert_allclose(norm, symbol_norm(layer), rtol=1e-12)


def test_one_mode_alone_and_the_bypass_alone(getkey):
    """The largest block decides, whichever it is."""
    layer = make(getkey(), 2, 3, use_bypass=True)
    count = (layer.weight.shape[0] - 1) // 2
    for row, expected in [(7, 1.0), (count + 7, 1.0), (-1, 1.0), (count, 0.0)]:
        # Row `count` is the imaginary part at the zero frequency, which does not act.
        matrix = jnp.zeros((3, 2)).at[1, 1].set(1.0)
        alone = eqx.tree_at(
            lambda layer: layer.weight,
            layer,
            jnp.zeros_like(layer.weight).at[row].set(matrix),
        )
        found = true_norm(matrix_of(alone, (8, 8)))
        np.testing.assert_allclose(found, symbol_norm(alone), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_the_bypass_acts_where_no_mode_is_kept(getkey):
    """With matrices that cancel it at the kept modes, all that is left is elsewhere."""
    layer = make(getkey(), 1, 3, use_bypass=True)
    matrix = jnp.zeros((3, 2)).at[1, 1].set(2.0)
    weight = jnp.zeros_like(layer.weight).at[:3].set(-matrix).at[-1].set(matrix)
    changed = eqx.tree_at(lambda layer: layer.weight, layer, weight)
    np.testing.assert_allclose(symbol_norm(changed), 2.0)
    np.testing.assert_allclose(true_norm(matrix_of(changed, (6,))), 2.0)
    assert true_norm(matrix_of(changed, (5,))) < 1e-14


def test_conjugate_pairs_at_zero_last_frequency(getkey):
    """Independent matrices at `k` and `-k` act by the mean of one and the conjugate of
    the other: two that cancel leave nothing."""
    layer = make(getkey(), 2, 2, channels=(1, 1))
    # Order: (0, 0), (0, 1), (1, 0), (1, 1), (-1, 0), (-1, 1); real parts, then others.
    real = jnp.zeros(12).at[2].set(1.0).at[4].set(-1.0)
    imaginary = jnp.zeros(12).at[8].set(1.0).at[10].set(-1.0)
    for values, expected in [(real, 0.0), (imaginary, 1.0)]:
        weight = values.reshape(12, 1, 1)
        changed = eqx.tree_at(lambda layer: layer.weight, layer, weight)
        found = true_norm(matrix_of(changed, (5, 5)))
        np.testing.assert_allclose(found, expected, atol=1e-14)
        np.testing.assert_allclose(symbol_norm(changed), expected, atol=1e-14)


def test_resolution(getkey):
    """A band-limited function and its image are the same functions on every grid."""
    layer = make(getkey(), 1, 4, channels=(1, 1))
    amplitudes = np.asarray(jr.normal(getkey(), (4, 2)))

    def function(n):
        t = 2 * np.pi * np.arange(n) / n
        waves = [np.stack([np.cos(k * t), np.sin(k * t)]) for k in range(4)]
        return jnp.asarray(sum(a @ w for a, w in zip(amplitudes, waves, strict=True)))

    fine = layer(function(24)[None])
    np.testing.assert_allclose(layer(function(8)[None]), fine[:, ::3], atol=1e-13)
    np.testing.assert_allclose(layer(function(12)[None]), fine[:, ::2], atol=1e-13)


def test_no_aliasing(getkey):
    """What a coarse grid cannot tell from a low frequency is left out, not folded."""
    layer = make(getkey(), 1, 5, channels=(1, 1))
    only_highest = jnp.zeros_like(layer.weight).at[4].set(1.0)
    layer = eqx.tree_at(lambda layer: layer.weight, layer, only_highest)
    wave = jnp.asarray(np.cos(2 * np.pi * 4 * np.arange(16) / 16))[None]
    np.testing.assert_allclose(layer(wave), wave, atol=1e-14)
    # At 8 points frequency 4 is that of Nyquist; at 6 it would look like 2.
    for n in (8, 6):
        assert true_norm(matrix_of(layer, (n,))) < 1e-14


@pytest.mark.parametrize(("dims", "grid"), [(1, (9,)), (3, (3, 4, 3))])
def test_wrapped(dims, grid, getkey):
    layer = make(getkey(), dims, 2)
    model, state = eqx.nn.make_with_state(spectrax.wrap)(
        layer, constraint=spectrax.Normalize(0.7)
    )
    plain = spectrax.unwrap(model, state)
    assert isinstance(plain, FourierLayer)
    np.testing.assert_allclose(true_norm(matrix_of(plain, grid)), 0.7, rtol=1e-6)


def test_wrapped_with_everything(getkey):
    layer = make(getkey(), 2, 2, use_bypass=True, use_bias=True)
    model, state = eqx.nn.make_with_state(spectrax.wrap)(
        layer, constraint=spectrax.Normalize(0.7)
    )
    plain = spectrax.unwrap(model, state)
    found = true_norm(matrix_of(plain, (5, 6)))
    (row,) = spectrax.summary(model, state, true_norm=True)
    np.testing.assert_allclose([row.norm, row.true_norm, 0.7], found, rtol=1e-6)
    assert row.lower <= found * (1 + 1e-12)
    assert found <= row.upper
    certified = spectrax.unwrap(model, state, certified=True)
    found = true_norm(matrix_of(certified, (5, 6)))
    assert 0.7 * (1 - 1e-4) <= found <= 0.7


def test_stack(getkey):
    stack = eqx.filter_vmap(lambda key: make(key, 1, 2))(jr.split(getkey(), 3))
    bounds = jnp.array([1.0, 2.0, 3.0])
    model, state = eqx.nn.make_with_state(spectrax.wrap)(
        stack, constraint=spectrax.Normalize(bounds)
    )
    state = spectrax.advance(model, state)
    plain = spectrax.unwrap(model, state)
    x = jr.normal(getkey(), (2, 4))
    assert eqx.filter_vmap(lambda layer: layer(x))(plain).shape == (3, 3, 4)
    layers = [jax.tree.map(lambda leaf, i=i: leaf[i], plain) for i in range(3)]
    norms = [true_norm(matrix_of(layer, (4,))) for layer in layers]
    np.testing.assert_allclose(norms, bounds, rtol=1e-6)
    rows = spectrax.summary(model, state, enclosure=False)
    assert [row.bound for row in rows] == [1.0, 2.0, 3.0]


def test_derivative_through_the_norm(getkey):
    """That of the loss of the constrained layer, against finite differences."""
    layer = make(getkey(), 2, 2, use_bypass=True)
    model, state = eqx.nn.make_with_state(spectrax.wrap)(
        layer, estimator=spectrax.PowerIteration(init_steps=64)
    )
    state = spectrax.advance(model, state, num_steps=100)
    x, target = jr.normal(getkey(), (2, 4, 5)), jr.normal(getkey(), (3, 4, 5))

    def loss(model):
        return jnp.sum((spectrax.unwrap(model, state)(x) - target) ** 2)

    gradient = eqx.filter_jit(eqx.filter_grad(loss))(model).raw.weight
    direction = jr.normal(getkey(), layer.weight.shape)

    def exactly(weight):
        changed = eqx.tree_at(lambda layer: layer.weight, layer, weight)
        matrix = matrix_of(changed, (4, 5))
        y = matrix @ np.asarray(x).ravel() / true_norm(matrix)
        return np.sum((y - np.asarray(target).ravel()) ** 2)

    step = 1e-5
    ends = [exactly(layer.weight + s * direction) for s in (step, -step)]
    expected = (ends[0] - ends[1]) / (2 * step)
    np.testing.assert_allclose(jnp.sum(gradient * direction), expected, rtol=1e-6)


def test_derivatives_with_respect_to_the_input(getkey):
    layer = make(getkey(), 1, 3, channels=(1, 1), use_bypass=True)
    x, direction = jr.normal(getkey(), (2, 1, 8))

    def energy(x):
        return jnp.sum(jnp.sin(layer(x)))

    hessian = jax.jit(jax.hessian(energy))(x).reshape(8, 8)
    matrix = matrix_of(layer, (8,))
    y = matrix @ np.asarray(x)[0]
    np.testing.assert_allclose(hessian, -(matrix.T * np.sin(y)) @ matrix, atol=1e-12)
    _, tangent = jax.jvp(layer, (x,), (direction,))
    np.testing.assert_allclose(tangent[0], matrix @ np.asarray(direction)[0])
    batch = jnp.stack([x, direction])
    np.testing.assert_allclose(jax.vmap(layer)(batch)[1], layer(direction), atol=1e-13)


def test_adam_descends_in_the_imaginary_part(getkey):
    """A shift by a quarter of a wave needs an imaginary matrix: real arrays make an
    ordinary optimizer find it."""
    layer = make(getkey(), 1, 2, channels=(1, 1))
    t = jnp.asarray(2 * np.pi * np.arange(8) / 8)
    x, y = jnp.cos(t)[None], jnp.sin(t)[None]
    optimizer = optax.adam(0.1)

    @eqx.filter_jit
    def step(layer, opt_state):
        value, gradient = eqx.filter_value_and_grad(
            lambda layer: jnp.sum((layer(x) - y) ** 2)
        )(layer)
        with jax.numpy_dtype_promotion("standard"):  # optax relies on it
            updates, opt_state = optimizer.update(gradient, opt_state)
        return eqx.apply_updates(layer, updates), opt_state, value

    opt_state = optimizer.init(eqx.filter(layer, eqx.is_inexact_array))
    for _ in range(200):
        layer, opt_state, value = step(layer, opt_state)
    assert value < 1e-4
    np.testing.assert_allclose(layer.weight[3, 0, 0], -1.0, atol=1e-2)


def test_norm_is_tracked_while_training(getkey):
    """Many modes with close norms: the true norm stays at the bound under Adam."""
    layer = make(getkey(), 2, 4, channels=(8, 8), use_bypass=True)
    model, state = eqx.nn.make_with_state(spectrax.wrap)(layer)
    optimizer = optax.adam(1e-2)
    opt_state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))
    x, y = jr.normal(getkey(), (2, 8, 8, 8))

    @eqx.filter_jit
    def step(model, state, opt_state):
        state = spectrax.advance(model, state)

        @eqx.filter_grad
        def gradient(model):
            return jnp.sum((spectrax.unwrap(model, state)(x) - y) ** 2)

        matrices = spectrax.layer_operator(spectrax.unwrap(model, state)).matrices()
        with jax.numpy_dtype_promotion("standard"):  # optax relies on it
            updates, opt_state = optimizer.update(gradient(model), opt_state)
        return eqx.apply_updates(model, updates), state, opt_state, matrices

    norms = []
    for _ in range(60):
        model, state, opt_state, matrices = step(model, state, opt_state)
        norms.append(np.linalg.norm(matrices, 2, axis=(1, 2)).max())
    assert min(norms) >= 1 - 1e-9
    assert max(norms) <= 1 + 1e-3


# The norms of Fourier multipliers in general.


def test_norms_of_a_multiplier(getkey):
    weight = jr.normal(getkey(), (3, 4, 5, 2), complex)
    operator = spectrax.fourier_multiplier(weight)
    blocks = np.moveaxis(np.asarray(weight).reshape(3, 4, 10), -1, 0)
    norms = np.linalg.norm(blocks, 2, axis=(1, 2))

    @jax.jit
    def found(operator):
        state = spectrax.init_power_state(operator, num_steps=8)
        state = spectrax.power_iterate(operator, state, num_steps=100)
        residual = spectrax.PowerIteration().residual(operator, state)
        values = spectrax.singular_value(operator, state)
        return state, values, residual, spectrax.ExactSVD().sigma(operator, ())

    state, value, residual, exact = found(operator)
    assert state.u.shape == (10, 2, 3)
    assert residual < 1e-6
    np.testing.assert_allclose([value, exact], norms.max(), rtol=1e-12)
    solve = eqx.filter_jit(spectrax.spectral_norm)
    solution = solve(operator, with_result=True)
    np.testing.assert_allclose(solution.value, norms.max(), rtol=1e-12)
    assert solution.result == lx.RESULTS.successful


def test_derivatives_of_the_norm_of_a_multiplier(getkey):
    weight = jr.normal(getkey(), (2, 3, 4))

    def norm(weight):
        return spectrax.spectral_norm(spectrax.fourier_multiplier(weight))

    def truth(weight):
        matrices = jnp.moveaxis(weight, -1, 0)
        return jnp.max(jnp.linalg.svd(matrices, compute_uv=False))

    direction = jr.normal(getkey(), weight.shape)

    def derivatives(function):
        slope = lambda w: jnp.vdot(jax.grad(function)(w), direction)  # noqa: E731
        return jax.jit(lambda w: (slope(w), jax.grad(slope)(w)))(weight)

    for found, expected in zip(derivatives(norm), derivatives(truth), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("modes", [3, None])
def test_state_of_another_operator_raises(modes, getkey):
    operator = spectrax.fourier_multiplier(jr.normal(getkey(), (2, 2, 4)))
    other = jr.normal(getkey(), (2, 2) if modes is None else (2, 2, modes))
    other = other if modes is None else spectrax.fourier_multiplier(other)
    state = jax.eval_shape(lambda: spectrax.init_power_state(other))
    for call in (spectrax.power_iterate, spectrax.singular_value):
        with pytest.raises(ValueError, match=r"an axis in front for the modes.*\(4,\)"):
            call(operator, state)


# Dtypes and errors.


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_narrow_dtypes(dtype, getkey):
    layer = make(getkey(), 2, 2, dtype=dtype, use_bypass=True, use_bias=True)
    assert layer.weight.dtype == layer.bias.dtype == dtype
    x = jr.normal(getkey(), (2, 4, 4), dtype)
    y = layer(x)
    assert y.dtype == dtype
    wide = jax.tree.map(lambda leaf: leaf.astype(float), layer)
    tolerance = 4 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(
        y.astype(float), by_hand(wide, x.astype(float)), atol=tolerance, rtol=tolerance
    )
    np.testing.assert_allclose(
        symbol_norm(layer), true_norm(matrix_of(wide, (4, 4))), rtol=1e-5
    )


def test_default_dtype(getkey):
    assert make(getkey(), 1, 1).weight.dtype == jnp.zeros(()).dtype


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, 1, 1, 1), "`num_spatial_dims` to be 1, 2 or 3, got 4"),
        ((1, 0, 1, 1), "at least one channel, got in_channels=0, out_channels=1"),
        ((1, 1, 0, 1), "at least one channel, got in_channels=1, out_channels=0"),
        ((1, 1, 1, 0), "`modes` to be a positive number.* got 0"),
        ((2, 1, 1, (2, 0)), r"one for each of the 2 axes.* got \(2, 0\)"),
        ((2, 1, 1, (2,)), r"one for each of the 2 axes.* got \(2,\)"),
    ],
)
def test_bad_arguments(arguments, message, getkey):
    with pytest.raises(ValueError, match=message):
        FourierLayer(*arguments, key=getkey())


@pytest.mark.parametrize("dtype", [jnp.complex64, jnp.int32])
def test_bad_dtype(dtype, getkey):
    with pytest.raises(TypeError, match="a real floating-point dtype, got"):
        make(getkey(), 1, 1, dtype=dtype)


@pytest.mark.parametrize("shape", [(2, 4), (3, 4, 4), (2, 4, 4, 4), (2, 4, 0)])
def test_bad_input(shape, getkey):
    layer = make(getkey(), 2, 2)
    with unchecked(), pytest.raises(ValueError, match=r"\(2, n, n\), got "):
        layer(jnp.zeros(shape))


def test_complex_input(getkey):
    layer = make(getkey(), 1, 2)
    with unchecked(), pytest.raises(TypeError, match="a real input, got .*complex"):
        layer(jnp.zeros((2, 4), complex))
