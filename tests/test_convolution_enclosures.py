"""Enclosures of convolutions, against matrices that numpy writes out."""

import functools as ft
import math
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
import pytest

import spectrax
from spectrax._enclosures import _one_size
from spectrax._enclosures._convolution import enclose_correlation
from spectrax._enclosures._correlation import stretch, written_out
from spectrax._enclosures._geometry import grid_of
from spectrax._operators import Axis, Convolution
from spectrax._operators._views import convolution_axes, convolution_transpose_axes

from .convolutions import Case, case, dense, norm_at, supremum_of, symbol_norms
from .helpers import examples, true_norm


OPTIMIZED = True  # see conftest.py
# What the singular value decomposition of the truth may be off by.
SLACK = 1e-12
MODES = {"REFLECT": "reflect", "REPLICATE": "edge", "CIRCULAR": "wrap"}


@pytest.fixture
def single() -> Iterator[None]:
    """Without float64, as in JAX by default."""
    jax.config.update("jax_enable_x64", False)
    yield
    jax.config.update("jax_enable_x64", True)


@pytest.fixture
def grid_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is written out as a matrix."""
    jax.clear_caches()
    monkeypatch.setattr(_one_size, "_MOST_ENTRIES_WITH_ZEROS", 0)
    monkeypatch.setattr(_one_size, "_MOST_ENTRIES_OTHERWISE", 0)
    yield
    jax.clear_caches()


# The matrix of a layer by definition, from the layer's attributes alone.


def _readings(layer: Any, size: int, axis: int) -> np.ndarray:
    """Of the shape `[taps, outputs, size]`: one where a tap reads an entry."""
    k, s, d = layer.kernel_size[axis], layer.stride[axis], layer.dilation[axis]
    span = d * (k - 1)
    places = np.arange(size)
    if isinstance(layer, eqx.nn.ConvTranspose):
        more = layer.output_padding[axis]
        if layer.padding == "VALID":
            before = after = 0
        elif isinstance(layer.padding, str):
            total = span - s + more + 1
            total, more = max(total, 0), max(-total, 0)
            before = (total + (layer.padding == "SAME_LOWER")) // 2
            after = total - before
        else:
            before, after = layer.padding[axis]
        before, after = span - before, span - after + more
        if layer.padding_mode == "CIRCULAR":
            places = np.pad(places, (before // s, after // s), "wrap")
            before, after = before % s, after % s
        spread = np.full(s * (len(places) - 1) + 1, -1)
        spread[::s] = places
        end = max(0, len(spread) - max(-after, 0))  # none, if more is cut off
        spread = spread[max(-before, 0) : end]
        ends = max(before, 0), max(after, 0)
        places = np.pad(spread, ends, constant_values=-1)
        s = 1
    else:
        ends = (0, 0)
        if layer.padding in ("SAME", "SAME_LOWER"):
            total = max(0, (-(-size // s) - 1) * s + span + 1 - size)
            ends = total // 2, total - total // 2
            ends = ends[::-1] if layer.padding == "SAME_LOWER" else ends
        elif layer.padding != "VALID":
            ends = layer.padding[axis]
        if layer.padding_mode == "ZEROS":
            places = np.pad(places, ends, constant_values=-1)
        else:
            places = np.pad(places, ends, MODES[layer.padding_mode])
    outputs = max(0, (len(places) - span - 1) // s + 1)
    readings = np.zeros((k, outputs, size))
    for t in range(k):
        for i in range(outputs):
            if places[s * i + d * t] >= 0:
                readings[t, i, places[s * i + d * t]] = 1
    return readings


def by_definition(
    layer: Any, weight: Any, size: tuple[int, ...]
) -> tuple[np.ndarray, tuple[int, ...]]:
    """The matrix of a layer with this weight, and its output size."""
    weight = np.asarray(weight)
    wide = np.complex128 if np.iscomplexobj(weight) else np.float64
    groups = layer.groups
    out, channels, *taps = weight.shape
    full = np.zeros((out, channels * groups, *taps), wide)
    for group in range(groups):
        rows = slice(group * out // groups, (group + 1) * out // groups)
        columns = slice(group * channels, (group + 1) * channels)
        full[rows, columns] = weight[rows].astype(wide)
    axes = [_readings(layer, n, axis) for axis, n in enumerate(size)]
    if len(size) == 1:
        matrix = np.einsum("oct,tij->oicj", full, axes[0])
    else:
        matrix = np.einsum("octu,tij,ukl->oikcjl", full, *axes, optimize=True)
    out_size = tuple(axis.shape[1] for axis in axes)
    columns = channels * groups * math.prod(size)
    return matrix.reshape(out * math.prod(out_size), columns), out_size


def axes_of(layer: Any, size: tuple[int, ...]) -> tuple[Axis, ...]:
    if isinstance(layer, eqx.nn.ConvTranspose):
        return convolution_transpose_axes(layer, size)
    return convolution_axes(layer, size)


def at_size(layer: Any, size: tuple[int, ...]) -> Convolution:
    operator = spectrax.layer_operator(layer, input_size=size)
    assert isinstance(operator, Convolution)
    return operator


def draw_weight(shape: tuple[int, ...], kind: str, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    signs = (-1.0) ** np.indices(shape)[2:].sum(axis=0)
    if kind == "ones":
        return np.ones(shape)
    if kind == "alternating":
        return np.broadcast_to(signs, shape).copy()
    gaussian = rng.normal(size=shape)
    if kind == "positive":
        return np.abs(gaussian)
    assert kind == "gaussian"
    return gaussian


@st.composite
def configurations(draw: Any) -> tuple[Case, tuple[int, ...]]:
    """Any layer, and one input size that may be too small for it."""
    dim = draw(st.sampled_from([1, 1, 2]))

    def one_for_each(values: st.SearchStrategy[Any]) -> tuple[Any, ...]:
        return tuple(draw(values) for _ in range(dim))

    transpose = draw(st.sampled_from([False, False, True]))
    groups = draw(st.sampled_from([1, 1, 2]))
    ends = st.tuples(st.integers(0, 5), st.integers(0, 5))
    padding = draw(st.sampled_from(["SAME", "SAME_LOWER", "VALID", None, None]))
    options: dict[str, Any] = {
        "padding": one_for_each(ends) if padding is None else padding,
        "stride": one_for_each(st.integers(1, 3)),
        "dilation": one_for_each(st.integers(1, 2)),
        "groups": groups,
    }
    if not transpose:
        modes = ["ZEROS", "ZEROS", "CIRCULAR", "REFLECT", "REPLICATE"]
        options["padding_mode"] = draw(st.sampled_from(modes))
    elif padding in ("SAME", "SAME_LOWER") and draw(st.booleans()):
        options["padding_mode"] = "CIRCULAR"
    else:
        options["output_padding"] = tuple(
            draw(st.integers(0, s - 1)) for s in options["stride"]
        )
    channels = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
    taps = one_for_each(st.integers(1, 5 if dim == 1 else 4))
    size = one_for_each(st.integers(1, 10 if dim == 1 else 5))
    return case(*channels, taps, [size], transpose=transpose, **options), size


def abstract(config: Case) -> Any:
    """The layer without numbers, which costs no compilation."""
    return eqx.filter_eval_shape(config.make, jr.key(0))


def grid_bounds(layer: Any, weight: np.ndarray, size: Any) -> list:
    """The largest symbol on each of the grids, times the factor."""
    grid, factor = grid_of(axes_of(layer, size))
    found = []
    for grid_ in [grid.even(), *grid.all_shifts()]:
        points = grid_.halves(symmetric=False) * np.pi / np.array(grid_.count)
        norms = symbol_norms(
            weight,
            points,
            stride=layer.stride,
            dilation=layer.dilation,
            groups=layer.groups,
            transpose=isinstance(layer, eqx.nn.ConvTranspose),
        )
        found.append(norms.max() * factor)
    return found


KERNELS = st.sampled_from(["gaussian", "gaussian", "ones", "alternating", "positive"])


@examples(300)
@hypothesis.given(configurations(), KERNELS, st.integers(0, 2**32 - 1))
def test_grid_bounds_the_matrix(drawn, kind, seed):
    config, size = drawn
    layer = abstract(config)
    weight = draw_weight(layer.weight.shape, kind, seed)
    matrix, out_size = by_definition(layer, weight, size)
    hypothesis.assume(0 not in out_size)
    axes = axes_of(layer, size)
    outputs = [axis.size if config.transpose else axis.outputs for axis in axes]
    assert tuple(outputs) == out_size
    truth = true_norm(matrix)
    bound = min(grid_bounds(layer, weight, size))
    assert truth <= bound * (1 + SLACK), (str(config), size, truth, bound)


@examples(50)
@hypothesis.given(
    st.integers(1, 5), st.integers(1, 3), st.integers(1, 4), st.integers(1, 2),
    st.booleans(), KERNELS, st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_grid_is_exact_for_circular_padding(
    taps, stride, multiple, dilation, transpose, kind, seed
):
    options = {"stride": stride, "dilation": dilation, "padding": "SAME"}
    config = case(
        2, 2, (taps,), [], transpose=transpose, padding_mode="CIRCULAR", **options
    )
    size = (multiple,) if transpose else (multiple * stride,)
    # Less than the stride is not covered, and read at most once otherwise.
    hypothesis.assume(dilation * (taps - 1) + 1 >= stride or not transpose)
    layer = abstract(config)
    weight = draw_weight(layer.weight.shape, kind, seed)
    matrix, _ = by_definition(layer, weight, size)
    bound = min(grid_bounds(layer, weight, size))
    np.testing.assert_allclose(true_norm(matrix), bound, rtol=1e-10, atol=1e-12)


def test_frequencies_of_the_input_do_not_bound_zero_padding():
    weight = np.array([[[-1.0, 2, -1]]])
    layer = abstract(case(1, 1, (3,), [], padding=1))
    matrix, _ = by_definition(layer, weight, (3,))
    truth = true_norm(matrix)
    assert truth == pytest.approx(2 + math.sqrt(2), rel=1e-12)
    plain = {"stride": (1,), "dilation": (1,), "groups": 1, "transpose": False}
    circular = 2 * np.pi * np.arange(3)[:, None] / 3
    assert symbol_norms(weight, circular, **plain).max() == pytest.approx(3)
    bounds = grid_bounds(layer, weight, (3,))
    assert truth <= min(bounds) <= 1.1 * truth


# What is written out, and what is compiled. Each is a case of its own.
LAYERS = [
    (case(2, 3, (3,), [], padding=1), (7,)),
    (case(2, 1, (4,), [], padding="SAME", stride=2), (5,)),
    (case(1, 2, (5,), [], padding=((4, 1),), dilation=2), (4,)),
    (case(2, 2, (3,), [], padding=2, padding_mode="circular", stride=2), (5,)),
    (case(4, 2, (3,), [], padding=2, padding_mode="reflect", groups=2), (4,)),
    (case(1, 2, (2,), [], padding=((3, 1),), padding_mode="replicate"), (2,)),
    (case(1, 2, (2,), [], padding=1, stride=3), (8,)),
    (case(2, 4, (3,), [], transpose=True, stride=2, output_padding=1), (3,)),
    (
        case(
            2, 2, (4,), [], transpose=True, stride=2, padding="SAME",
            padding_mode="circular",
        ),
        (4,),
    ),
    (case(2, 2, (4,), [], transpose=True, stride=3, padding="SAME_LOWER"), (3,)),
    (case(2, 2, (3, 2), [], padding=((1, 0), (2, 1)), groups=2), (3, 2)),
    (case(1, 2, (2, 3), [], padding="SAME", padding_mode="reflect"), (3, 3)),
]  # fmt: skip


@pytest.mark.parametrize("index", range(0, len(LAYERS), 2))
def test_definition_is_that_of_the_layer(index, getkey):
    config, size = LAYERS[index]
    layer = config.make(getkey())
    matrix, _ = by_definition(layer, layer.weight, size)
    np.testing.assert_allclose(dense(layer, size), matrix, atol=1e-13)


@pytest.mark.parametrize(("config", "size"), LAYERS, ids=str)
def test_written_out(config, size, getkey):
    layer = config.make(getkey())
    transposed = config.transpose
    truth, out_size = by_definition(layer, layer.weight, size)
    operator = at_size(layer, size)
    axes, kernel = operator.axes, operator.kernel()
    matrix, error = eqx.filter_jit(written_out)(kernel, axes)
    difference = np.linalg.norm((matrix.T if transposed else matrix) - truth)
    assert difference <= error
    assert error <= 1e-12
    # The leading vector is made the longest, and no other one longer.
    u, values, v = np.linalg.svd(truth)
    vectors = u.T if transposed else v
    channels = config.out_channels if transposed else config.in_channels
    shape = channels, *(out_size if transposed else size)
    jitted = eqx.filter_jit(stretch)
    found = [
        jitted(kernel, axes, jnp.asarray(vector).reshape(shape))
        for vector in vectors[:2]
    ]
    values = np.append(values, 0)
    for length, value in zip(found, values, strict=False):
        assert length <= value * (1 + SLACK)
        assert length >= value * (1 - 1e-6) - 1e-7 * values[0]


def test_written_out_complex(getkey):
    config = case(2, 1, (3,), [], padding=2, padding_mode="circular")
    layer = config.make(getkey(), jnp.complex128)
    real, imag = jr.normal(getkey(), (2, *layer.weight.shape))
    weight = jax.lax.complex(real, imag)
    layer = eqx.tree_at(lambda layer: layer.weight, layer, weight)
    truth, _ = by_definition(layer, weight, (3,))
    operator = at_size(layer, (3,))
    axes, kernel = operator.axes, operator.kernel()
    matrix, error = eqx.filter_jit(written_out)(kernel, axes)
    assert np.linalg.norm(matrix - truth) <= error <= 1e-12
    vector = jnp.asarray(np.linalg.svd(truth)[2][0].conj()).reshape(2, 3)
    length = eqx.filter_jit(stretch)(kernel, axes, vector)
    assert true_norm(truth) * (1 - 1e-6) <= length <= true_norm(truth) * (1 + SLACK)


# The whole. Kernels that go through one compiled program at once:
KINDS = (
    ("gaussian", 1.0),
    ("ones", 1.0),
    ("alternating", 1.0),
    ("positive", 0.01),
    ("gaussian", 1e-30),
    ("gaussian", 1e30),
    ("gaussian", 1e-40),
    ("gaussian", 0.0),
    ("gaussian", math.nan),
)
# Here numbers of float32 are subnormal, and there is nothing to be said of the width.
SUBNORMAL = 1e-40


def draw_weights(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    weights = [draw_weight(shape, kind, 1) * scale for kind, scale in KINDS]
    weights = np.stack(weights).astype(dtype)
    if np.iscomplexobj(weights):
        phases = np.exp(1j * np.arange(math.prod(shape)) ** 2).reshape(shape)
        weights = weights * phases.astype(dtype)
    return weights


def given(layer: Any, weight: Any) -> Any:
    return eqx.tree_at(lambda layer: layer.weight, layer, weight)


def enclose_all(
    layer: Any, weights: np.ndarray, size: tuple[int, ...] | None
) -> spectrax.Enclosure:
    """One after another, which takes less compilation than all at once."""

    def enclose(weight: jax.Array) -> spectrax.Enclosure:
        operator = spectrax.layer_operator(given(layer, weight), input_size=size)
        return spectrax.enclose_norm(operator)

    return jax.jit(ft.partial(jax.lax.map, enclose))(jnp.asarray(weights))


def bound_all(layer: Any, weights: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """The upper bounds by the grid alone."""

    def bound(weight: jax.Array) -> jax.Array:
        operator = at_size(given(layer, weight), size)
        return enclose_correlation(operator.on_lattice(), operator.axes)

    found = jax.jit(ft.partial(jax.lax.map, bound))(jnp.asarray(weights))
    return np.asarray(found)


def check(
    layer: Any,
    weights: np.ndarray,
    lower: Any,
    upper: Any,
    truth_of: Callable[[np.ndarray], float],
    *,
    width: float,
) -> None:
    """Both ends, for all the kernels drawn above."""
    working = np.float64 if jax.config.read("jax_enable_x64") else np.float32
    assert lower.dtype == upper.dtype == working
    narrow = jnp.finfo(weights.dtype).bits < 64
    widths = []
    for i, (kind, scale) in enumerate(KINDS):
        low, high = float(lower[i]), float(upper[i])
        if math.isnan(scale):
            assert math.isnan(low)
            assert math.isnan(high)
            continue
        if scale == 0:
            assert low == high == 0
            continue
        truth = truth_of(weights[i])
        context = str(layer), kind, scale
        assert low <= truth * (1 + SLACK), (low, truth, *context)
        assert truth * (1 - SLACK) <= high, (truth, high, *context)
        if scale == SUBNORMAL and narrow:
            continue
        assert high <= (1 + width) * truth, (high / truth - 1, *context)
        assert low >= (1 - 1e-2) * truth, (low / truth - 1, *context)
        if kind == "gaussian":
            widths.append(high / truth)
    # All of one kernel, but for its scale.
    assert max(widths) <= min(widths) * (1 + 1e-5)


def check_at_size(
    config: Case, size: tuple[int, ...], dtype: Any, *, width: float
) -> None:
    layer = config.make(jr.key(0), dtype)
    weights = draw_weights(layer.weight.shape, dtype)
    box = enclose_all(layer, weights, size)
    nonfinite = np.asarray(box.result == lx.RESULTS.nonfinite_input)
    np.testing.assert_array_equal(nonfinite, [math.isnan(scale) for _, scale in KINDS])

    def truth_of(weight: np.ndarray) -> float:
        return true_norm(by_definition(layer, weight, size)[0])

    check(layer, weights, box.lower, box.upper, truth_of, width=width)


@pytest.mark.parametrize(
    ("config", "size", "dtype"),
    [
        (case(2, 2, (3, 3), [], padding="SAME", stride=2), (5, 4), np.float32),
        (
            case(4, 2, (3,), [], padding=2, padding_mode="reflect", groups=2),
            (4,),
            jnp.bfloat16,
        ),
        (
            case(2, 2, (4,), [], transpose=True, stride=3, output_padding=1),
            (3,),
            np.complex128,
        ),
    ],
    ids=str,
)
def test_small_ones(config, size, dtype):
    check_at_size(config, size, dtype, width=1e-3)


@pytest.mark.usefixtures("single")
def test_without_float64():
    config = case(2, 2, (3, 3), [], padding=1, padding_mode="circular")
    check_at_size(config, (4, 4), np.float32, width=1e-3)


@pytest.mark.usefixtures("grid_only")
def test_one_that_is_not_written_out():
    check_at_size(case(2, 2, (3, 3), [], padding=1), (8, 8), np.float64, width=0.05)


# How much the bound by the grid may exceed the norm.
ON_A_GRID = [
    (case(2, 2, (3, 3), [], padding=1), (8, 8), np.float32, 0.05),
    (case(2, 2, (3, 3), [], padding=1, padding_mode="circular"), (5, 4), float, 1e-2),
    (case(1, 2, (3,), [], padding=2, padding_mode="replicate"), (12,), float, 1.0),
    (
        case(4, 2, (3,), [], padding=1, stride=2, dilation=2, groups=2),
        (24,),
        np.complex64,
        0.2,
    ),
    (
        case(2, 3, (4,), [], transpose=True, stride=2, padding="SAME", dilation=2),
        (12,),
        np.complex128,
        0.2,
    ),
]


def check_grid(
    config: Case, size: tuple[int, ...], dtype: Any, *, width: float
) -> None:
    layer = config.make(jr.key(0), dtype)
    weights = draw_weights(layer.weight.shape, dtype)
    upper = bound_all(layer, weights, size)

    def truth_of(weight: np.ndarray) -> float:
        return true_norm(by_definition(layer, weight, size)[0])

    truths = [truth_of(np.nan_to_num(weight)) for weight in weights]
    lower = np.where(np.isnan(upper), upper, np.array(truths) * (1 - 1e-6))
    lower = lower.astype(upper.dtype)
    check(layer, weights, lower, upper, truth_of, width=width)


@pytest.mark.parametrize(("config", "size", "dtype", "width"), ON_A_GRID, ids=str)
def test_grid(config, size, dtype, width):
    check_grid(config, size, dtype, width=width)


@pytest.mark.usefixtures("single")
@pytest.mark.parametrize("dtype", [np.float32, np.complex64])
def test_grid_without_float64(dtype):
    config = case(2, 2, (3,), [], padding=1, padding_mode="circular")
    check_grid(config, (6,), dtype, width=1e-2)


LATTICES = [
    (case(2, 3, (3,), []), np.float64),
    (case(2, 2, (4,), [], stride=2, groups=2), np.float32),
    (case(2, 1, (3, 3), [], dilation=2), np.float64),
    (case(2, 2, (3,), [], transpose=True, stride=2), np.complex128),
]


def check_all_sizes(config: Case, dtype: Any) -> None:
    layer = config.make(jr.key(0), dtype)
    weights = draw_weights(layer.weight.shape, dtype)
    box = enclose_all(layer, weights, None)

    def truth_of(weight: np.ndarray) -> float:
        scale = float(np.abs(weight).max())
        return scale * supremum_of(given(layer, weight.astype(complex) / scale))

    # The search for the supremum may end a little below it.
    lower = box.lower * (1 - 1e-9)
    check(layer, weights, lower, box.upper, truth_of, width=1e-2)


@pytest.mark.parametrize(("config", "dtype"), LATTICES, ids=str)
def test_all_sizes(config, dtype):
    check_all_sizes(config, dtype)


@pytest.mark.usefixtures("single")
def test_all_sizes_without_float64():
    check_all_sizes(case(2, 2, (3,), []), np.float32)


def test_no_frequency_of_the_lattice_is_missed():
    """Whatever lies between the points of the grid: `2 |cos((w + phase) / 2)|`."""
    phases = np.linspace(0, 2 * np.pi / 5, 400)
    weights = np.stack([np.ones(400), np.exp(1j * phases)], axis=1)
    layer = case(1, 1, (2,), []).make(jr.key(0), np.complex128)
    box = enclose_all(layer, weights[:, None, None], None)
    assert np.all(box.lower <= 2 * (1 + SLACK))
    assert np.all(box.upper >= 2 * (1 - SLACK))
    assert np.all(box.upper <= 1.01 * box.lower)


# Facts.


@pytest.mark.parametrize(
    ("config", "size", "weight", "truth"),
    [
        (
            case(1, 1, (3, 3), [], padding=1, padding_mode="circular"),
            (4, 4), np.ones((1, 1, 3, 3)), 9.0,
        ),
        (
            case(1, 1, (5, 5), [], padding=2, padding_mode="circular"),
            (3, 3), np.ones((1, 1, 5, 5)), 25.0,
        ),
        (case(2, 2, (1,), [], groups=2), (3,), np.full((2, 1, 1), 0.5), 0.5),
        (case(2, 2, (1,), [], groups=2), (3,), np.array([[[0.5]], [[2]]]), 2.0),
        (case(2, 2, (1,), [], groups=2), (3,), np.array([[[2]], [[0.5]]]), 2.0),
    ],
    ids=["ones", "kernel above the image", "two groups", "second", "first"],
)  # fmt: skip
def test_norms_known_exactly(config, size, weight, truth):
    upper = bound_all(config.make(jr.key(0)), weight[None], size)[0]
    assert truth <= upper <= truth * (1 + 1e-9)


def test_reflection_of_nine_ones_exceeds_the_circle():
    config = case(1, 1, (3, 3), [], padding=1, padding_mode="reflect")
    layer = config.make(jr.key(0))
    weight = np.ones((1, 1, 3, 3))
    truth = true_norm(by_definition(layer, weight, (4, 4))[0])
    assert truth > 1.1 * 9
    assert truth <= bound_all(layer, weight[None], (4, 4))[0] <= 2 * truth
    box = enclose_all(layer, weight[None], (4, 4))
    assert box.lower[0] <= truth * (1 + SLACK)
    assert truth * (1 - SLACK) <= box.upper[0] <= 1.001 * truth


@pytest.mark.usefixtures("single")
def test_channel_that_is_nearly_dead():
    """At pi the other one cancels, and squares of what is left are no numbers."""
    layer = case(2, 2, (2,), []).make(jr.key(0), np.float32)
    weight = np.zeros((2, 2, 2), np.float32)
    weight[0, 0], weight[1, 1, 0] = 1, 1e-10
    box = enclose_all(layer, weight[None], None)
    assert box.lower[0] <= 2 <= box.upper[0] <= 1.01 * box.lower[0]


def test_three_dimensions_and_inputs_beyond_the_grid(getkey):
    conv = eqx.nn.Conv3d(2, 2, (3, 2, 3), stride=2, padding=1, key=getkey())
    size = (4, 3, 5)
    box = spectrax.enclose_norm(spectrax.layer_operator(conv, input_size=size))
    truth = norm_at(conv, size)
    assert box.lower <= truth * (1 + 1e-13)
    assert truth <= box.upper <= (1 + 1e-3) * truth
    # So many entries that the bound is that of all sizes.
    conv = eqx.nn.Conv1d(2, 3, 3, padding=1, key=getkey())
    large = spectrax.layer_operator(conv, input_size=(20_000,))
    box = spectrax.enclose_norm(large)
    supremum = supremum_of(conv)
    assert 0.999 * supremum <= box.lower <= supremum
    assert supremum <= box.upper <= 1.01 * supremum
