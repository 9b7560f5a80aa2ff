"""Parts without a constrained weight: their Lipschitz constants, from both sides."""

import decimal
import functools as ft
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jaxtyping import Array

import spectrax
import spectrax.nn as snn

from .helpers import true_norm, unchecked


def _jacobian(function, x: Array) -> np.ndarray:
    """As a matrix, column by column."""

    def column(unit: Array) -> Array:
        return jax.jvp(function, (x,), (unit.reshape(x.shape),))[1].ravel()

    return np.asarray(jax.vmap(column)(jnp.eye(x.size))).T


def _matrix(function, shape: tuple[int, ...]) -> np.ndarray:
    """Of a linear function."""
    units = jnp.eye(math.prod(shape)).reshape(-1, *shape)
    return np.asarray(jax.vmap(function)(units)).reshape(len(units), -1).T


def _most_apart(function, x: Array, y: Array) -> float:
    """The largest quotient of distances over a batch of pairs."""
    image = jax.vmap(function)
    moved = np.asarray(image(x) - image(y)).reshape(len(x), -1)
    apart = np.asarray(x - y).reshape(len(x), -1)
    return float(np.max(np.linalg.norm(moved, axis=1) / np.linalg.norm(apart, axis=1)))


# The table of constants.

ENTRYWISE = {
    "identity": (jax.nn.identity, 1.0),
    "relu": (jax.nn.relu, 1.0),
    "relu6": (jax.nn.relu6, 1.0),
    "tanh": (jax.nn.tanh, 1.0),
    "hard_tanh": (jax.nn.hard_tanh, 1.0),
    "soft_sign": (jax.nn.soft_sign, 1.0),
    "softplus": (jax.nn.softplus, 1.0),
    "squareplus": (jax.nn.squareplus, 1.0),
    "squareplus(b=1)": (ft.partial(jax.nn.squareplus, b=1.0), 1.0),
    "sparse_plus": (jax.nn.sparse_plus, 1.0),
    "log_sigmoid": (jax.nn.log_sigmoid, 1.0),
    "celu": (jax.nn.celu, 1.0),
    "celu(alpha=3)": (ft.partial(jax.nn.celu, alpha=3.0), 1.0),
    "sigmoid": (jax.nn.sigmoid, 1 / 4),
    "hard_sigmoid": (jax.nn.hard_sigmoid, 1 / 6),
    "sparse_sigmoid": (jax.nn.sparse_sigmoid, 1 / 2),
    "leaky_relu": (jax.nn.leaky_relu, 1.0),
    "leaky_relu(-2)": (ft.partial(jax.nn.leaky_relu, negative_slope=-2.0), 2.0),
    "elu": (jax.nn.elu, 1.0),
    "elu(alpha=3)": (ft.partial(jax.nn.elu, alpha=3.0), 3.0),
    "selu": (jax.nn.selu, 1.7581),
    "gelu": (jax.nn.gelu, 1.12899),
    "exact gelu": (ft.partial(jax.nn.gelu, approximate=False), 1.12890),
    "silu": (jax.nn.silu, 1.09984),
    "hard_silu": (jax.nn.hard_silu, 1.5),
    "mish": (jax.nn.mish, 1.08850),
    "abs": (jnp.abs, 1.0),
    "sin": (jnp.sin, 1.0),
    "cos": (jnp.cos, 1.0),
    "arctan": (jnp.arctan, 1.0),
    "scaled_gelu": (snn.scaled_gelu, 1.0),
    "exact scaled_gelu": (ft.partial(snn.scaled_gelu, approximate=False), 1.0),
    "Identity": (eqx.nn.Identity(), 1.0),
    "Lambda": (eqx.nn.Lambda(jax.nn.silu), 1.09984),
    "PReLU": (eqx.nn.PReLU(-1.5), 1.5),
}


@pytest.mark.parametrize("name", ENTRYWISE)
def test_constants_of_entrywise_functions(name: str):
    function, rounded = ENTRYWISE[name]
    constant = float(snn.lipschitz_constant(function))
    np.testing.assert_allclose(constant, rounded, atol=6e-6)
    # Zero is where derivatives of functions with a corner are one-sided.
    x = jnp.asarray(np.linspace(-40, 40, 400_001))
    steepness = np.abs(np.diff(np.asarray(function(x)))) / np.diff(np.asarray(x))
    assert np.max(steepness) <= constant * (1 + 1e-10)
    assert np.max(steepness) >= constant * (1 - 1e-3)


# The same to 50 digits: the places of the largest derivatives, to float precision, at
# which an error only counts squared.
PLACES = {
    "exact gelu": math.sqrt(2),
    "gelu": 1.418504008790828,
    "silu": 2.3993572805154668,
    "mish": 1.4905711794854284,
}
PI = decimal.Decimal("3.14159265358979323846264338327950288419716939937511")


def _exact_slope(name: str, x: decimal.Decimal) -> decimal.Decimal:
    one, two = decimal.Decimal(1), decimal.Decimal(2)

    def tanh(z: decimal.Decimal) -> decimal.Decimal:
        return 1 - 2 / ((2 * z).exp() + 1)

    sigmoid = 1 / (1 + (-x).exp())
    if name == "silu":
        return sigmoid + x * sigmoid * (1 - sigmoid)
    if name == "mish":
        t = tanh((1 + x.exp()).ln())
        return t + x * (1 - t * t) * sigmoid
    if name == "gelu":
        scale, cubic = (two / PI).sqrt(), decimal.Decimal("0.044715")
        t = tanh(scale * (x + cubic * x**3))
        return (1 + t) / 2 + x / 2 * (1 - t * t) * scale * (1 + 3 * cubic * x * x)
    assert name == "exact gelu"
    series = [(-one) ** n / (math.factorial(n) * (2 * n + 1)) for n in range(45)]
    half_erf = sum(series) / PI.sqrt()
    return one / 2 + half_erf + (-one).exp() / PI.sqrt()


@pytest.mark.parametrize("name", PLACES)
def test_constants_are_rounded_up(name: str):
    function, _ = ENTRYWISE[name]
    constant = snn.lipschitz_constant(function)
    assert isinstance(constant, float)
    with decimal.localcontext() as context:
        context.prec = 50
        exact = _exact_slope(name, decimal.Decimal(PLACES[name]))
        assert 0 <= decimal.Decimal(constant) - exact < math.ulp(constant)
    # The largest derivative is there.
    slope = jax.grad(function)
    np.testing.assert_allclose(slope(PLACES[name]), constant, rtol=1e-15)
    np.testing.assert_allclose(jax.grad(slope)(PLACES[name]), 0, atol=1e-15)


def test_rounded_constants_are_not_below():
    alpha, scale = 16732632423543772848, 10507009873554804934
    selu = snn.lipschitz_constant(jax.nn.selu)
    assert isinstance(selu, float)
    numerator, denominator = selu.as_integer_ratio()
    assert numerator * 10**38 >= alpha * scale * denominator
    numerator, denominator = float(
        snn.lipschitz_constant(jax.nn.hard_sigmoid)
    ).as_integer_ratio()
    assert 6 * numerator >= denominator


def test_constant_of_softmax(getkey):
    for function in (jax.nn.softmax, ft.partial(jax.nn.softmax, axis=0)):
        constant = snn.lipschitz_constant(function)
        norms = [
            true_norm(_jacobian(function, scale * jr.normal(getkey(), (5,))))
            for scale in (0.1, 1.0, 10.0)
        ]
        assert max(norms) <= constant
        # Two equal entries, far above the others.
        worst = jnp.array([50.0, 50.0, 0.0])
        np.testing.assert_allclose(true_norm(_jacobian(function, worst)), constant)


def test_constant_of_logsumexp():
    gradient = jax.grad(jax.nn.logsumexp)(jnp.array([60.0, 0.0, 0.0]))
    np.testing.assert_allclose(np.linalg.norm(gradient), 1, rtol=1e-12)
    assert snn.lipschitz_constant(jax.nn.logsumexp) == 1


@pytest.mark.parametrize(
    "unknown",
    [
        jnp.exp,
        lambda x: x,
        eqx.nn.LayerNorm(3),
        eqx.nn.Lambda(jnp.square),
        ft.partial(jnp.exp),
        ft.partial(jax.nn.relu, jnp.ones(2)),
        eqx.nn.AdaptiveAvgPool1d(3),
    ],
)
def test_unknown_constants_raise(unknown):
    with pytest.raises(
        ValueError,
        match=r"(?s)known Lipschitz constant, got .*register_lipschitz_constant",
    ):
        snn.lipschitz_constant(unknown)


def test_constants_can_be_stated():
    class Double(eqx.Module):
        factor: Array

        def __call__(self, x):
            return 2 * self.factor * x

    class Child(Double):
        pass

    def wave(x, frequency=1.0):
        return jnp.sin(frequency * x)

    snn.register_lipschitz_constant(Double, lambda layer: 2 * jnp.abs(layer.factor))
    assert snn.lipschitz_constant(Child(jnp.array(-3.0))) == 6
    snn.register_lipschitz_constant(wave, 5.0)
    assert snn.lipschitz_constant(wave) == 5
    snn.register_lipschitz_constant(wave, lambda frequency=1.0: frequency)
    assert snn.lipschitz_constant(wave) == 1
    assert snn.lipschitz_constant(ft.partial(wave, frequency=30.0)) == 30


@pytest.mark.parametrize("constant", [-1.0, math.inf, math.nan])
def test_stating_an_impossible_constant_raises(constant):
    with pytest.raises(ValueError, match=f"not negative and finite, got {constant}"):
        snn.register_lipschitz_constant(jnp.exp, constant)


@pytest.mark.parametrize("instance", [eqx.nn.Identity(), ft.partial(jnp.exp), 3.0])
def test_stating_a_constant_of_an_instance_raises(instance):
    with (
        unchecked(),
        pytest.raises(TypeError, match="a function or a class, got an instance of"),
    ):
        snn.register_lipschitz_constant(instance, 1.0)


# Sorting.


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("group_size", [1, 2, 3, 6])
def test_group_sort(group_size, axis, getkey):
    x = jr.normal(getkey(), (6, 6, 6))
    y = np.moveaxis(np.asarray(snn.group_sort(x, group_size, axis=axis)), axis, 0)
    groups = np.moveaxis(np.asarray(x), axis, 0).reshape(-1, group_size, 6, 6)
    np.testing.assert_array_equal(y, -np.sort(-groups, axis=1).reshape(6, 6, 6))
    if group_size == 2:
        np.testing.assert_array_equal(
            snn.max_min(x, axis=axis), snn.group_sort(x, 2, axis=axis)
        )


PERMUTING = {
    "max_min": snn.max_min,
    "group_sort(3)": ft.partial(snn.group_sort, group_size=3),
    "group_sort(all)": ft.partial(snn.group_sort, group_size=6),
    "Householder": eqx.tree_at(
        lambda layer: layer.angles,
        snn.HouseholderActivation(6),
        jnp.array([0.3, -2.0, 9.0]),
    ),
}


@pytest.mark.parametrize("name", PERMUTING)
def test_jacobians_are_orthogonal(name: str, getkey):
    function = PERMUTING[name]
    assert snn.lipschitz_constant(function) == 1
    kinds = set()
    for _ in range(8):
        jacobian = _jacobian(function, jr.normal(getkey(), (6,)))
        np.testing.assert_allclose(jacobian.T @ jacobian, np.eye(6), atol=1e-12)
        kinds.add(jacobian.round(9).tobytes())
    assert len(kinds) > 1


@pytest.mark.parametrize("name", PERMUTING)
def test_no_pair_is_torn_apart(name: str, getkey):
    # Also of pairs on two sides of a corner, where a jump would show.
    x = jr.normal(getkey(), (4000, 6))
    for distance in (3.0, 1e-3):
        y = x + distance * jr.normal(getkey(), (4000, 6))
        most = _most_apart(PERMUTING[name], x, y)
        assert most <= 1 + 1e-9
        assert most > 0.99


def test_max_min_at_a_tie_has_a_bounded_derivative():
    assert true_norm(_jacobian(snn.max_min, jnp.ones(4))) <= 1


@pytest.mark.parametrize("shape", [(5,), (0,), ()])
def test_max_min_of_an_odd_number_raises(shape):
    with pytest.raises(ValueError, match=r"a multiple of 2 channels along axis 0"):
        snn.max_min(jnp.ones(shape))


@pytest.mark.parametrize("group_size", [0, 4])
def test_group_sort_with_a_wrong_size_raises(group_size):
    with pytest.raises(ValueError, match=f"a multiple of {group_size} channels"):
        snn.group_sort(jnp.ones(6), group_size)


# Householder.


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_householder_starts_as_max_min(axis, getkey):
    x = jr.normal(getkey(), (4, 4, 4))
    activation = snn.HouseholderActivation(4, axis=axis)
    np.testing.assert_allclose(
        activation(x), snn.max_min(x, axis=axis), rtol=0, atol=1e-15
    )


def test_householder_reflects_at_its_line(getkey):
    angles = np.array([0.4, -1.0, 2.5])
    activation = eqx.tree_at(
        lambda layer: layer.angles,
        snn.HouseholderActivation(6, angle=0.1),
        jnp.asarray(angles),
    )
    np.testing.assert_array_equal(snn.HouseholderActivation(6, angle=0.1).angles, 0.1)
    for _ in range(5):
        x = np.asarray(jr.normal(getkey(), (6,)))
        expected = []
        for pair, angle in zip(x.reshape(3, 2), angles, strict=True):
            normal = np.array([np.sin(angle / 2), -np.cos(angle / 2)])
            reflected = (np.eye(2) - 2 * np.outer(normal, normal)) @ pair
            expected.append(pair if normal @ pair > 0 else reflected)
        np.testing.assert_allclose(
            activation(jnp.asarray(x)), np.concatenate(expected), rtol=1e-12
        )


def test_householder_is_trained_and_not_wrapped(getkey):
    x = jr.normal(getkey(), (8, 4))

    def loss(layer):
        return jnp.sum(jnp.square(jax.vmap(layer)(x)[:, 0]))

    gradient = eqx.filter_jit(eqx.filter_grad(loss))(snn.HouseholderActivation(4))
    assert gradient.angles[0] != 0
    assert gradient.angles[1] == 0
    # Warnings are errors: a stack of angles is no unknown matrix.
    stack = eqx.filter_vmap(lambda angle: snn.HouseholderActivation(4, angle=angle))
    model = (eqx.nn.Linear(4, 4, key=getkey()), stack(jnp.arange(3.0)))
    eqx.nn.make_with_state(spectrax.wrap)(model, estimator=spectrax.ExactSVD())


@pytest.mark.parametrize("size", [0, 3])
def test_householder_of_an_odd_size_raises(size):
    with pytest.raises(
        ValueError, match=f"`size` to be even and at least 2, got {size}"
    ):
        snn.HouseholderActivation(size)


@pytest.mark.parametrize("shape", [(6, 4), ()])
def test_householder_with_other_channels_raises(shape):
    activation = snn.HouseholderActivation(4)
    with pytest.raises(ValueError, match="expected 4 channels along axis 0, got shape"):
        activation(jnp.ones(shape))


def test_scaled_gelu_is_gelu_up_to_a_factor(getkey):
    x = jr.normal(getkey(), (100,))
    for approximate in (False, True):
        gelu = ft.partial(jax.nn.gelu, approximate=approximate)
        y = snn.scaled_gelu(x, approximate=approximate)
        np.testing.assert_allclose(y * snn.lipschitz_constant(gelu), gelu(x))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dtypes_are_kept(dtype):
    x = jnp.linspace(-1, 1, 8).astype(dtype)
    activation = snn.HouseholderActivation(8)
    for function in (snn.max_min, snn.scaled_gelu, activation):
        assert function(x).dtype == dtype
    average = snn.ResidualAverage(jax.nn.relu, learnable=True)
    assert average(x).dtype == dtype


# Pooling.

WINDOWS = [
    {"kernel_size": 2, "stride": 2},
    {"kernel_size": 3, "stride": 3, "padding": 1},
    {"kernel_size": 3, "stride": 1, "padding": 1},
    {"kernel_size": 3, "stride": 2, "padding": (1, 0), "use_ceil": True},
    {"kernel_size": 5, "stride": 2},
    {"kernel_size": 2, "stride": 3},
]


def _one_axis(options):
    """`Pool` has its paddings for each axis."""
    padding = options.get("padding", 0)
    return options | {"padding": (padding,) if isinstance(padding, tuple) else padding}


@pytest.mark.parametrize("options", WINDOWS, ids=str)
def test_average_pooling(options, getkey):
    pool = eqx.nn.AvgPool1d(**_one_axis(options))
    constant = float(snn.lipschitz_constant(pool))
    norms = [true_norm(_matrix(pool, (1, size))) for size in (12, 300)]
    assert max(norms) <= constant * (1 + 1e-12)
    assert max(norms) >= constant * (1 - 1e-3)
    scaled = snn.ScaledPool(pool)
    x = jr.normal(getkey(), (2, 12))
    np.testing.assert_allclose(scaled(x) * constant, pool(x), rtol=1e-12)
    assert snn.lipschitz_constant(scaled) == 1


@pytest.mark.parametrize("options", WINDOWS, ids=str)
def test_maximum_pooling(options, getkey):
    pool = eqx.nn.MaxPool1d(**_one_axis(options))
    constant = snn.lipschitz_constant(pool)
    x = jr.normal(getkey(), (2000, 1, 12))
    for distance in (1e-3, 10.0):
        y = x + distance * jr.normal(getkey(), x.shape)
        assert _most_apart(pool, x, y) <= constant * (1 + 1e-9)
    # One entry above all others, at every place in turn.
    spikes = jnp.eye(12)[:, None]
    most = _most_apart(pool, 2 * spikes, spikes)
    np.testing.assert_allclose(most, constant, rtol=1e-12)
    assert _most_apart(snn.ScaledPool(pool), 2 * spikes, spikes) <= 1 + 1e-12


def test_pools_of_several_axes(getkey):
    average = eqx.nn.AvgPool2d((3, 2), stride=(2, 2), padding=1)
    constant = float(snn.lipschitz_constant(average))
    norm = true_norm(_matrix(average, (1, 31, 30)))
    np.testing.assert_allclose(constant, math.sqrt(5) / 3 / math.sqrt(2), rtol=1e-15)
    assert constant * (1 - 1e-2) <= norm <= constant * (1 + 1e-12)
    maximum = eqx.nn.MaxPool3d(3, stride=2)
    assert snn.lipschitz_constant(maximum) ** 2 >= 8
    spike = jnp.zeros((1, 5, 5, 5)).at[0, 2, 2, 2].set(1)
    torn = np.linalg.norm(np.asarray(maximum(2 * spike) - maximum(spike)))
    np.testing.assert_allclose(torn, snn.lipschitz_constant(maximum), rtol=1e-12)
    y = eqx.filter_jit(snn.ScaledPool(maximum))(jr.normal(getkey(), (2, 7, 7, 7)))
    assert y.shape == (2, 3, 3, 3)


def test_average_pooling_of_a_constant_keeps_its_length():
    pool = snn.ScaledPool(eqx.nn.AvgPool2d(2, stride=2))
    x = jnp.ones((3, 8, 8))
    np.testing.assert_allclose(np.linalg.norm(pool(x)), np.linalg.norm(x))


def test_scaled_pool_of_another_layer_raises():
    with pytest.raises(TypeError, match="windows of one size, got AdaptiveAvgPool1d"):
        with unchecked():
            snn.ScaledPool(eqx.nn.AdaptiveAvgPool1d(2))  # pyright: ignore


def test_pool_with_an_impossible_stride_raises():
    with pytest.raises(ValueError, match=r"at least 1, got .* stride=\(0,\)"):
        snn.ScaledPool(eqx.nn.MaxPool1d(2, stride=0))


# Residual averages.


@pytest.mark.parametrize("learnable", [False, True])
def test_residual_average(learnable, getkey):
    orthogonal, _ = np.linalg.qr(np.asarray(jr.normal(getkey(), (4, 4))))
    weight = jnp.asarray(orthogonal)
    block = snn.ResidualAverage(lambda x: weight @ x, 0.3, learnable=learnable)
    x = jr.normal(getkey(), (4,))
    np.testing.assert_allclose(block.weight(), 0.3, rtol=1e-12)
    np.testing.assert_allclose(block(x), 0.7 * x + 0.3 * orthogonal @ x, rtol=1e-12)
    assert true_norm(_jacobian(block, x)) <= 1 + 1e-12
    gradient = eqx.filter_grad(lambda block: jnp.sum(block(x)))(block)
    assert (gradient.raw is None) != learnable
    if learnable:
        slope = jnp.sum(orthogonal @ x - x) * 0.3 * 0.7
        np.testing.assert_allclose(gradient.raw, slope, rtol=1e-12)


def test_constant_of_residual_average():
    doubled = ft.partial(jax.nn.leaky_relu, negative_slope=2.0)
    block = snn.ResidualAverage(doubled, 0.25)
    constant = snn.lipschitz_constant(block)
    np.testing.assert_allclose(constant, 1.25, rtol=1e-12)
    steepest = true_norm(_jacobian(block, -jnp.ones(3)))
    np.testing.assert_allclose(steepest, constant, rtol=1e-12)
    assert snn.lipschitz_constant(snn.ResidualAverage(jax.nn.relu, 1)) == 1
    inner = snn.ResidualAverage(jax.nn.sigmoid, learnable=True)
    outer = eqx.filter_jit(snn.lipschitz_constant)(snn.ResidualAverage(inner, 1.0))
    np.testing.assert_allclose(outer, 0.5 + 0.5 / 4, rtol=1e-12)


def test_residual_average_hands_on_arguments():
    block = snn.ResidualAverage(lambda x, y, *, z: x + y + z)
    np.testing.assert_allclose(block(jnp.array(1.0), 2.0, z=5.0), 4.5)


@pytest.mark.parametrize("weight", [-0.1, 1.1, math.nan])
def test_residual_average_outside_raises(weight):
    with pytest.raises(ValueError, match=rf"in \[0, 1\], got {weight}"):
        snn.ResidualAverage(jax.nn.relu, weight)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_learnable_weight_at_an_end_raises(weight):
    with pytest.raises(ValueError, match=f"between 0 and 1, got {weight}"):
        snn.ResidualAverage(jax.nn.relu, weight, learnable=True)


def test_residual_average_of_another_shape_raises(getkey):
    block = snn.ResidualAverage(eqx.nn.Linear(3, 2, key=getkey()))
    with pytest.raises(ValueError, match=r"averaged with it, got \(3,\) to \(2,\)"):
        block(jnp.ones(3))


# Centering.


def _centering(**options):
    return eqx.nn.make_with_state(snn.BatchCentering)(3, "batch", **options)


def _batched(layer):
    return jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None))


@pytest.mark.parametrize("shape", [(6, 3), (5, 3, 2)])
def test_centering_projects_the_whole_batch(shape, getkey):
    layer, state = _centering()
    x = 3 + jr.normal(getkey(), shape)
    y, _ = _batched(layer)(x, state)
    others = (0, *range(2, len(shape)))
    mean = np.mean(np.asarray(x), axis=others, keepdims=True)
    np.testing.assert_allclose(y, np.asarray(x) - mean, atol=1e-12)
    matrix = _matrix(lambda x: _batched(layer)(x, state)[0], shape)
    values = np.linalg.svd(matrix, compute_uv=False)
    np.testing.assert_allclose(values[:-3], 1, rtol=1e-12)
    np.testing.assert_allclose(values[-3:], 0, atol=1e-12)
    assert snn.lipschitz_constant(layer) == 1


def test_centering_has_a_running_mean(getkey):
    layer, state = _centering(momentum=0.9)
    expected, weights = np.zeros(3), 0.0
    for _ in range(4):
        x = 2 + jr.normal(getkey(), (6, 3))
        _, state = _batched(layer)(x, state)
        expected = 0.9 * expected + 0.1 * np.mean(np.asarray(x), axis=0)
        weights = 0.9 * weights + 0.1
    still = eqx.nn.inference_mode(layer)
    x = jr.normal(getkey(), (3,))
    # Without any batch axis.
    y, state = still(x, state)
    np.testing.assert_allclose(y, x - expected / weights, rtol=1e-12)
    np.testing.assert_allclose(still(2 * x, state)[0] - y, x, rtol=1e-12)


def test_centering_before_any_batch_does_nothing():
    layer, state = _centering(inference=True)
    y, _ = layer(jnp.arange(3.0), state)
    np.testing.assert_array_equal(y, jnp.arange(3.0))


def test_centering_adds_a_trained_bias(getkey):
    layer, state = _centering()
    assert _centering(use_bias=False)[0].bias is None
    layer = eqx.tree_at(lambda layer: layer.bias, layer, jnp.array([1.0, 2.0, 3.0]))
    y, _ = _batched(layer)(jr.normal(getkey(), (6, 3, 2)), state)
    np.testing.assert_allclose(np.mean(np.asarray(y), axis=(0, 2)), [1, 2, 3])


def test_centering_without_bias_over_two_axes(getkey):
    make = eqx.nn.make_with_state(snn.BatchCentering)
    layer, state = make(3, ["outer", "inner"], use_bias=False)
    inner = jax.vmap(layer, axis_name="inner", in_axes=(0, None), out_axes=(0, None))
    outer = jax.vmap(inner, axis_name="outer", in_axes=(0, None), out_axes=(0, None))
    x = jr.normal(getkey(), (4, 5, 3)).astype(jnp.float32)
    y, _ = outer(x, state)
    assert y.dtype == jnp.float32
    x = np.asarray(x)
    np.testing.assert_allclose(y, x - np.mean(x, axis=(0, 1)), atol=1e-6)


@pytest.mark.parametrize("momentum", [-0.1, 1.0])
def test_centering_with_an_impossible_momentum_raises(momentum):
    with pytest.raises(ValueError, match=rf"in \[0, 1\), got {momentum}"):
        _centering(momentum=momentum)


def test_centering_of_other_channels_raises():
    layer, state = _centering()
    with pytest.raises(ValueError, match=r"3 channels on the first axis.*\(2, 3\)"):
        with unchecked():
            _batched(layer)(jnp.ones((4, 2, 3)), state)


def test_centering_without_a_batch_raises():
    layer, state = _centering()
    with pytest.raises(NameError, match="batch"):
        layer(jnp.ones(3), state)


def test_parts_stand_in_sequential(getkey):
    model = eqx.nn.Sequential(
        [
            eqx.nn.Lambda(snn.max_min),
            snn.HouseholderActivation(4),
            snn.ScaledPool(eqx.nn.MaxPool1d(2, stride=2)),
        ]
    )
    assert model(jr.normal(getkey(), (4, 8))).shape == (4, 4)
