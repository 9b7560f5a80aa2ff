"""The norm of a convolution at every input size, proven outside of jit."""

import logging
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
from spectrax import _certify_kernel
from spectrax._certify_kernel import certified_kernels
from spectrax._enclosures import _lattice_proof
from spectrax._enclosures._cells import Cells, cover
from spectrax._enclosures._hermitian import squared_symbols
from spectrax._enclosures._lattice_proof import enclose_kernel, proves_kernel_below

from .convolutions import case, supremum_of, symbol_norms
from .helpers import examples


# Of a search for the supremum by other means, and of SVDs.
SLACK = 1e-9
_POINTS = {1: 360, 2: 36, 3: 14}


@pytest.fixture
def single() -> Iterator[None]:
    """Without float64, as in JAX by default."""
    jax.config.update("jax_enable_x64", False)
    yield
    jax.config.update("jax_enable_x64", True)


@pytest.fixture
def compiled(caplog) -> Callable[[Callable[[], Any]], list[str]]:
    def during(function: Callable[[], Any]) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.WARNING), jax.log_compiles():
            function()
        messages = [record.getMessage() for record in caplog.records]
        return [text for text in messages if text.startswith("Compiling ")]

    return during


def draw_kernel(
    kind: str, shape: tuple[int, ...], seed: int, *, imaginary: bool = False
) -> np.ndarray:
    """`[groups, out, in, *taps]`, in float64, of norm about 1."""
    rng = np.random.default_rng(seed)
    kernel = rng.normal(size=shape)
    if imaginary:
        kernel = kernel + 1j * rng.normal(size=shape)
    if kind == "zero":
        return 0 * kernel
    if kind == "one entry":
        kernel = 0 * kernel
        kernel.reshape(-1)[rng.integers(kernel.size)] = 1
    if kind == "ones":
        return np.ones_like(kernel)
    if kind == "rank one":
        factors = [rng.normal(size=n) for n in shape]
        kernel = np.einsum(
            ",".join("abcdef"[: len(shape)]) + "->" + "abcdef"[: len(shape)], *factors
        )
    if kind == "shift":
        # `sigma` is the same at all frequencies, and all singular values are one.
        kernel = 0 * kernel
        for i in range(min(shape[1:3])):
            kernel[(slice(None), i, i, *(rng.integers(k) for k in shape[3:]))] = 1
    return kernel / np.linalg.norm(kernel)


KINDS = ["gaussian", "zero", "one entry", "ones", "rank one", "shift"]
SHAPES = [
    (1, 1, 1, 3),
    (1, 3, 2, 4),
    (3, 2, 2, 2),
    (1, 2, 5, 3, 3),
    (2, 4, 1, 2, 3),
    (1, 3, 3, 1, 1),
    (1, 2, 3, 1, 4),
    (1, 2, 2, 2, 2, 3),
]


def truth_of(kernel: np.ndarray) -> float:
    """By SVDs on a fine grid: a little below the supremum, never above."""
    points = _POINTS[kernel.ndim - 3]
    axis = 2 * np.pi * np.arange(points) / points
    dim = kernel.ndim - 3
    frequencies = np.stack(np.meshgrid(*[axis] * dim, indexing="ij"), -1)
    frequencies = frequencies.reshape(-1, dim)
    plain = {"stride": (1,) * dim, "dilation": (1,) * dim, "groups": 1}
    return max(
        symbol_norms(group, frequencies, **plain, transpose=False).max()
        for group in kernel
    )


def excess_of_grid(kernel: np.ndarray) -> float:
    """How far the supremum can be above the largest on that grid."""
    points = _POINTS[kernel.ndim - 3]
    reach = sum((k - 1) / 2 * np.pi / points for k in kernel.shape[3:])
    return 1 / math.cos(reach)


@hypothesis.given(
    kind=st.sampled_from(KINDS),
    shape=st.sampled_from(SHAPES),
    seed=st.integers(0, 2**16),
    exponent=st.sampled_from([0, 0, -30, 30, -200, 200]),
    rtol=st.sampled_from([1e-2, 1e-3]),
    imaginary=st.booleans(),
)
@examples(40)
def test_ends_hold_and_are_narrow(kind, shape, seed, exponent, rtol, imaginary):
    # Flat ones of three dimensions would take too many cells for a small width.
    rtol = max(rtol, 1e-2) if len(shape) == 6 else rtol
    kernel = draw_kernel(kind, shape, seed, imaginary=imaginary)
    scale = 10.0**exponent
    lower, upper = enclose_kernel(kernel * scale, rtol)
    if kind == "zero":
        assert lower == upper == 0
        return
    truth = truth_of(kernel)
    assert lower <= truth * excess_of_grid(kernel) * (1 + 1e-12) * scale
    assert truth * (1 - 1e-12) * scale <= upper
    assert upper <= lower * (1 + rtol)
    # Nothing else than what was asked for is given away.
    assert lower >= truth * (1 - 1e-4) * scale
    assert proves_kernel_below(kernel * scale, upper * (1 + rtol))
    assert not proves_kernel_below(kernel * scale, lower * (1 - 1e-9))


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        (case(2, 3, (3,), []), jnp.float32),
        (case(2, 2, (4,), [], stride=2, groups=2), jnp.bfloat16),
        (case(2, 1, (3, 3), [], dilation=2), jnp.float16),
        (case(3, 4, (3, 3), [], stride=2, dilation=(1, 2)), jnp.float32),
        (case(2, 2, (3,), [], transpose=True, stride=2), jnp.complex64),
        (case(4, 4, (2, 3), [], transpose=True, stride=(2, 1), groups=2), jnp.float64),
        (case(2, 2, (41,), [], padding=20), jnp.float32),
        (case(2, 2, (2, 2, 2), []), jnp.float32),
    ],
    ids=str,
)
def test_layers_by_svd_and_by_the_compiled_proof(config, dtype, compiled):
    layer = config.make(jr.key(0), dtype)
    operator = spectrax.layer_operator(layer)
    wide = layer.weight.astype(
        jnp.complex128 if jnp.iscomplexobj(layer.weight) else jnp.float64
    )
    truth = supremum_of(eqx.tree_at(lambda conv: conv.weight, layer, wide))
    boxes = []
    assert compiled(lambda: boxes.append(spectrax.enclose_norm(operator))) == []
    if config.kernel_size in ((4,), (41,)) or dtype == jnp.complex64:
        boxes.append(eqx.filter_jit(spectrax.enclose_norm)(operator))
    for box in boxes:
        assert box.lower.dtype == box.upper.dtype == jnp.float64
        assert box.lower <= truth * (1 + SLACK)
        assert truth * (1 - SLACK) <= box.upper <= 1.0101 * truth
        assert box.result == lx.RESULTS.successful
    # No further than a thousandth below, whatever width was asked for.
    assert boxes[0].lower >= truth * (1 - 1e-3)


@pytest.mark.usefixtures("single")
def test_under_vmap_and_in_float32(getkey):
    kernels = jr.normal(getkey(), (3, 1, 2, 2, 3), jnp.float32)

    def enclose(kernel: jax.Array) -> spectrax.Enclosure:
        return spectrax.enclose_norm(spectrax.LatticeConvolution(kernel, 1.0))

    stacked = eqx.filter_vmap(enclose)(kernels)
    for i, kernel in enumerate(kernels):
        box = enclose(kernel)
        assert box.lower.dtype == box.upper.dtype == jnp.float32
        # Rounded outward.
        lower, upper = enclose_kernel(np.asarray(kernel), 1e-2)
        assert float(box.lower) <= lower <= upper <= float(box.upper)
        truth = truth_of(np.asarray(kernel, np.float64))
        assert float(box.lower) <= truth * (1 + 1e-5)
        assert max(truth, float(stacked.lower[i])) <= float(box.upper)
        assert float(box.lower) <= float(stacked.upper[i])


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_not_finite(value):
    kernel = jnp.ones((1, 2, 2, 3)).at[0, 1, 0, 2].set(value)
    box = spectrax.enclose_norm(spectrax.LatticeConvolution(kernel, 1.0))
    assert jnp.isnan(box.lower)
    assert jnp.isnan(box.upper)
    assert box.result == lx.RESULTS.nonfinite_input


@pytest.mark.usefixtures("single")
def test_ends_of_the_range_of_float32():
    """Subnormal entries, and a norm that is not a number of float32 any more."""
    tiny = jnp.asarray(np.full((1, 1, 1, 2), 1e-44, np.float32))
    box = spectrax.enclose_norm(spectrax.LatticeConvolution(tiny, 1.0))
    assert box.lower == 0
    assert float(box.upper) >= 2e-44
    huge = jnp.full((1, 1, 1, 2), 3e38, jnp.float32)
    box = spectrax.enclose_norm(spectrax.LatticeConvolution(huge, 1.0))
    assert box.lower == jnp.finfo(jnp.float32).max
    assert box.upper == jnp.inf
    assert box.result == lx.RESULTS.max_steps_reached


def test_gain_is_on_the_upper_end_alone(getkey):
    kernel = jr.normal(getkey(), (1, 2, 2, 3))
    plain = spectrax.enclose_norm(spectrax.LatticeConvolution(kernel, 1.0))
    padded = spectrax.enclose_norm(spectrax.LatticeConvolution(kernel, 2.0))
    assert plain.lower == padded.lower
    assert 2 * plain.upper <= padded.upper <= 2 * plain.upper * (1 + 1e-15)
    assert padded.result == lx.RESULTS.max_steps_reached


@pytest.mark.parametrize("budget", [8, 100])
def test_a_budget_that_is_spent_widens_the_upper_end(budget, monkeypatch):
    kernel = draw_kernel("shift", (1, 3, 3, 3, 3), 0)
    monkeypatch.setattr(_lattice_proof, "_MOST_TESTS", budget)
    monkeypatch.setattr(_lattice_proof, "_MOST_SMALL_TESTS", budget)
    lower, upper = enclose_kernel(kernel, 1e-4)
    truth = truth_of(kernel)
    assert lower <= truth * (1 + 1e-12)
    assert truth <= upper <= 4 * truth
    assert upper > (1 + 1e-3) * lower
    operator = spectrax.LatticeConvolution(jnp.asarray(kernel), 1.0)
    box = spectrax.enclose_norm(operator, rtol=1e-4)
    assert box.result == lx.RESULTS.max_steps_reached


def test_a_poor_search_costs_time_and_not_the_proof(monkeypatch):
    """From estimates that are all wrong, and a peak that is none."""
    kernel = draw_kernel("gaussian", (1, 3, 3, 3, 3), 1)
    right = _lattice_proof.sample
    monkeypatch.setattr(
        _lattice_proof, "sample", lambda s: (0.1 * right(s)[0][:, ::-1], right(s)[1])
    )
    monkeypatch.setattr(_lattice_proof, "_proven", lambda *_: 0.5)
    _, upper = enclose_kernel(kernel, 1e-2)
    assert truth_of(kernel) <= upper <= 2 * truth_of(kernel)


# The parts.


@pytest.mark.parametrize("degrees", [(0.5,), (1.0, 1.0), (1.5, 0.5), (1.0, 0.5, 2.0)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_every_frequency_is_in_a_cell(degrees, symmetric):
    cells = cover(degrees, 0.9, symmetric=symmetric)
    assert np.all(cells.radius() <= 0.9 * (1 + 1e-12))
    some = np.arange(len(cells)) % 3 == 0
    mixed = [cells[some].split(), cells[~some]]
    refined = mixed[0].split()
    parts = [cells, refined, mixed[1]]
    frequencies = np.random.default_rng(0).uniform(0, 2 * np.pi, (300, len(degrees)))
    for covering in ([parts[0]], parts[1:]):
        for frequency in frequencies:
            opposite = [frequency, -frequency] if symmetric else [frequency]
            assert any(contains(part, w) for part in covering for w in opposite)


def contains(cells: Cells, frequency: np.ndarray) -> bool:
    """By the weighted distance to the centres on the torus."""
    centres = 2 * np.pi * cells.numerator / cells.denominator
    apart = np.abs((frequency - centres + np.pi) % (2 * np.pi) - np.pi)
    return bool(np.any(apart @ np.array(cells.degrees) <= cells.radius() + 1e-12))


def test_what_a_cell_excludes_is_sharp_in_two_dimensions():
    """Along the diagonal `cos(w_1 + w_2)` falls off faster than any product."""
    kernel = np.zeros((1, 1, 1, 3, 3))
    kernel[0, 0, 0, 0, 0] = kernel[0, 0, 0, 2, 2] = 0.5
    lower, upper = enclose_kernel(kernel, 1e-4)
    assert lower <= 1 <= upper
    # The peak at a corner of the cell, as far from its centre as may be.
    zero = np.zeros(1, int)
    for den in (16, 64, 256):
        cells = Cells(zero, np.array([[1, 0]]), np.full((1, 2), den), (1.0, 1.0))
        centre = abs(math.cos(2 * math.pi / den))
        assert cells.cosine()[0] <= centre <= cells.cosine()[0] + 1e-14


@pytest.mark.parametrize("shape", [(2, 6, 5, 2), (1, 4, 7, 2, 3), (1, 60, 50, 1)])
@pytest.mark.parametrize("imaginary", [False, True])
def test_matrices_and_proofs_at_one_frequency(shape, imaginary):
    kernel = draw_kernel("gaussian", shape, 3, imaginary=imaginary) * 1e3
    symbols = squared_symbols(kernel)
    numerator = np.array([[1, 5], [0, 3], [7, 2]])[:, : len(symbols.taps)]
    denominator = np.full_like(numerator, 11)
    positions = np.indices(kernel.shape[3:]).reshape(kernel.ndim - 3, -1)
    moving = np.array(kernel.shape[3:]) > 1
    for group in range(len(kernel)):
        matrices = symbols.at(group, numerator, denominator)
        waves = np.exp(2j * np.pi * (numerator / 11) @ positions[moving])
        flat = kernel[group].reshape(*kernel.shape[1:3], -1)
        for i, wave in enumerate(waves):
            symbol = flat @ wave / symbols.scale
            squared = [symbol.conj().T @ symbol, symbol @ symbol.conj().T]
            truth = min(squared, key=len)
            # Of the transposed kernel, if that is the smaller side.
            truth = truth if shape[1] >= shape[2] else truth.conj()
            off = np.linalg.norm(matrices[i] - truth)
            assert off <= symbols.error[group] <= 1e-10 * np.linalg.norm(truth)
            norm = np.linalg.norm(symbol, 2)
            for factor, proven in ((1 - 1e-9, False), (1 + 1e-9, True)):
                found = symbols.below(
                    np.array([group]),
                    numerator[i : i + 1],
                    denominator[i : i + 1],
                    np.array([norm * factor]),
                )
                assert found[0] == proven


# Weights for deployment.


def certified(
    weight: jax.Array, constraint: Any, depth: int = 0, **options: Any
) -> jax.Array:
    """What `unwrap` puts in, without the estimators that `wrap` would compile."""
    out, inputs, *taps = weight.shape[depth:]
    inputs *= options.get("groups", 1)
    config = case(inputs, out, tuple(taps), [], **options)
    layer = config.make(jr.key(0), weight.dtype)

    def build(weight: jax.Array) -> Any:
        one = eqx.tree_at(lambda conv: conv.weight, layer, weight)
        return spectrax.layer_operator(one)

    bounds = constraint.init(jnp.ones(weight.shape[:depth]))
    return _certify_kernel.certified_kernels(build, depth, weight, bounds)


def norm_of(weight: jax.Array, **options: Any) -> float:
    dim = weight.ndim - 2
    wide = complex if jnp.iscomplexobj(weight) else float
    options = {"stride": (1,) * dim, "dilation": (1,) * dim, "groups": 1, **options}
    points = _POINTS[dim]
    axis = 2 * np.pi * np.arange(points) / points
    frequencies = np.stack(np.meshgrid(*[axis] * dim, indexing="ij"), -1)
    values = symbol_norms(
        np.asarray(weight).astype(wide),
        frequencies.reshape(-1, dim),
        **options,
        transpose=False,
    )
    return float(values.max())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.complex64])
@pytest.mark.parametrize(
    "constraint", [spectrax.Normalize(0.7), spectrax.Clip(jnp.array([0.5, 1.0, 90.0]))]
)
def test_certified_stacks_are_within_their_bounds(dtype, constraint, compiled):
    # 16 channels: where bfloat16 is too coarse for a bound on its rounding.
    weight = jr.normal(jr.key(2), (3, 16, 8, 3)).astype(dtype)
    weight = weight * jnp.array([0.1, 0.2, 0.3]).astype(dtype)[:, None, None, None]
    found = []
    names = compiled(
        lambda: found.append(certified(weight, constraint, 1, stride=(2,), groups=2))
    )
    # What is left to the compiler are scalars, and the folding of the stride.
    assert not any("_certified" in name or "_enclosure" in name for name in names)
    (stack,) = found
    assert stack.dtype == dtype
    bounds = np.broadcast_to(np.asarray(constraint.bound, float), 3)
    for one, raw, bound in zip(stack, weight, bounds, strict=True):
        norm = norm_of(one, stride=(2,), groups=2)
        assert norm <= bound
        # Below its bound it stays as it is, to the last bit.
        below = norm_of(raw, stride=(2,), groups=2) <= 0.98 * bound
        kept = isinstance(constraint, spectrax.Clip) and below
        assert jnp.array_equal(one, raw) if kept else norm >= 0.98 * bound


def test_a_coarse_dtype_is_proven_as_it_is_stored(monkeypatch):
    calls = []
    right = _certify_kernel.proves_kernel_below

    def counted(*args: Any) -> bool:
        calls.append(args)
        return right(*args)

    monkeypatch.setattr(_certify_kernel, "proves_kernel_below", counted)
    for dtype in (jnp.bfloat16, jnp.float32):
        weight = jr.normal(jr.key(0), (16, 16, 3)).astype(dtype)
        assert norm_of(certified(weight, spectrax.Normalize(2.0))) <= 2
        assert len(calls) == 1


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_scale_that_is_too_large_is_taken_back(dtype):
    """As that of a constraint of one's own, or of rounding that goes the wrong way."""
    weight = jr.normal(jr.key(0), (16, 16, 3)).astype(dtype)

    def build(weight: jax.Array) -> spectrax.LatticeConvolution:
        return spectrax.LatticeConvolution(weight[None], 1.0)

    kernel = np.asarray(weight).astype(float)[None]
    upper = enclose_kernel(kernel, 1e-2)[1]
    raw = _certify_kernel._Raw(weight, kernel, upper)
    for factor in (1.0, 1.02, 5.0):
        stored = _certify_kernel._certified(build, raw, factor / upper, 1.0)
        assert stored.dtype == dtype
        assert 0.97 <= norm_of(jnp.asarray(stored)) <= 1


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_certified_kernels_that_are_not_finite_raise(value):
    weight = jnp.ones((2, 2, 3)).at[0, 0, 0].set(value)
    with pytest.raises(RuntimeError, match="no proof was found: it has a NaN"):
        certified(weight, spectrax.Normalize())


def test_certified_zero_kernels_trained_bounds_and_gains():
    assert jnp.all(certified(jnp.zeros((2, 2, 3, 3)), spectrax.Normalize()) == 0)
    weight = jr.normal(jr.key(0), (2, 2, 3))
    learned = spectrax.LearnableBound(2.5)
    bound = float(learned.target())
    assert 0.98 * bound <= norm_of(certified(weight, learned)) <= bound
    options = {"padding": 1, "padding_mode": "reflect"}
    norm = norm_of(certified(weight, spectrax.Normalize(), **options))
    assert 0.98 <= math.sqrt(2) * norm <= 1


def test_unwrap_takes_this_path_for_concrete_weights(monkeypatch):
    conv = eqx.nn.Conv1d(2, 2, 3, key=jr.key(0))
    model, state = eqx.nn.make_with_state(spectrax.wrap)(conv)
    calls = []
    monkeypatch.setattr(
        _certify_kernel,
        "certified_kernels",
        lambda *args: calls.append(args) or certified_kernels(*args),
    )
    plain = spectrax.unwrap(model, state, certified=True)
    assert len(calls) == 1
    assert 0.98 <= norm_of(plain.weight) <= 1
    weight = conv.weight.at[0, 0, 0].set(jnp.nan)
    model = eqx.tree_at(lambda m: m.module.weight.weight, model, weight)
    with pytest.raises(RuntimeError, match="no proof was found: it has a NaN"):
        spectrax.unwrap(model, state, certified=True)
