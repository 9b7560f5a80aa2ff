"""`summary`: its numbers against numpy, and the table that it prints."""

import math

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jaxtyping import Array, PRNGKeyArray

import spectrax

from .helpers import linear_weights, Net, perturbed, true_norm, with_norms


wrap = eqx.nn.make_with_state(spectrax.wrap)


def test_rows(getkey):
    net = with_norms(Net(getkey()), 2.0, 0.2)
    model, state = wrap(net, constraint=spectrax.Clip(0.5))
    table = spectrax.summary(model, state, enclosure=False)
    assert len(table) == 2
    for row, (path, shape, sigma, norm) in zip(
        table,
        [("first.weight", (4, 4), 2, 0.5), ("second.weight", (2, 4), 0.2, 0.2)],
        strict=True,
    ):
        assert (row.path, row.layer, row.shape) == (path, "Linear", shape)
        assert row.sigma == pytest.approx(sigma, rel=1e-9)
        assert row.norm == pytest.approx(norm, rel=1e-9)
        assert row.bound == 0.5
        assert 0 <= row.residual < 1e-9
        assert row.true_norm is None
    assert table.unconstrained == ()


def test_an_estimate_that_lags_is_shown_to_lag(getkey):
    """The estimate is what the state says, the true norm what the weights say."""
    model, state = wrap(
        Net(getkey()),
        constraint=spectrax.LearnableBound(2.0),
        estimator=spectrax.PowerIteration(block_size=1),
    )
    model = perturbed(model, getkey())
    table = spectrax.summary(model, state, true_norm=True, enclosure=False)
    plain = spectrax.unwrap(model, state)
    (u,), (v,) = (np.asarray(vectors) for vectors in _vectors(model, state))
    raw = np.asarray(model.raw.first.weight)
    sigma = u @ raw @ v
    assert table[0].sigma == pytest.approx(sigma, rel=1e-9)
    residual = np.linalg.norm(raw.T @ u - sigma * v) / sigma
    assert table[0].residual == pytest.approx(residual, rel=1e-9)
    for row, weight in zip(table, linear_weights(plain), strict=True):
        assert row.norm == pytest.approx(2, rel=1e-9)
        assert row.bound == pytest.approx(2, rel=1e-9)
        assert row.residual > 1e-3
        assert row.true_norm == pytest.approx(true_norm(weight), rel=1e-9)
        assert row.true_norm > 2.001

    state = spectrax.advance(model, state, num_steps=300)
    for row in spectrax.summary(model, state, true_norm=True, enclosure=False):
        assert row.residual < 1e-4
        assert row.true_norm == pytest.approx(2, rel=1e-6)


def _vectors(model: spectrax.Wrapped, state: eqx.nn.State) -> tuple[Array, Array]:
    power = state.get(model.weights[0].memory).vectors
    assert isinstance(power, spectrax.PowerState)
    return power.u, power.v


def test_a_sequence(getkey):
    table = spectrax.summary(*wrap(Net(getkey())))
    first, second = table
    assert isinstance(first, spectrax.SummaryRow)
    assert (table[0], table[-1]) == (first, second)
    assert table[:1] == (first,)
    assert table.rows == (first, second) == tuple(table)
    assert second in table
    with pytest.raises(IndexError, match="out of range"):
        table[2]


def test_the_printed_table(getkey):
    net = {"net": Net(getkey()), "table": jnp.ones((3, 5))}
    model, state = wrap(net, where=lambda net: net["net"].second)
    for with_truth in (False, True):
        text = str(
            spectrax.summary(model, state, true_norm=with_truth, enclosure=False)
        )
        assert text == repr(
            spectrax.summary(model, state, true_norm=with_truth, enclosure=False)
        )
        header, rule, line, rest = text.split("\n")
        columns = ["path", "layer", "shape", "sigma", "norm", "kind", "bound"]
        columns.append("residual")
        assert header.split("  ")[-1].strip() == ["residual", "true norm"][with_truth]
        assert header.replace("true norm", "").split() == columns
        assert rule == "-" * len(header)
        cells = line.split()
        sigma = np.linalg.norm(net["net"].second.weight, 2)
        assert cells[:3] == ["['net'].second.weight", "Linear", "2x4"]
        assert cells[3:7] == [f"{sigma:.6g}", "1.000000", "estimate", "1.000000"]
        assert float(cells[7]) < 1e-9
        assert cells[8:] == ["1.000000"] * with_truth
        assert rest == (
            "not constrained: ['net'].first.weight (4, 4), ['table'] (3, 5)"
        )


def test_columns_are_aligned(getkey):
    net = with_norms(Net(getkey()), 1234.5, 0.25)
    model, state = wrap({"long name": net, "b": net.second})
    lines = str(spectrax.summary(model, state, true_norm=True, enclosure=False)).split(
        "\n"
    )
    assert len(lines) == 2 + 3
    del lines[1]
    # Text starts, and numbers end, where the name of their column does.
    for name in ("layer", "shape"):
        start = lines[0].index(name)
        assert all(line[start - 2 : start] == "  " for line in lines)
        assert all(line[start] != " " for line in lines)
    for name in ("sigma", "norm", "bound", "residual", "true norm"):
        end = lines[0].index(name) + len(name)
        assert all(line[end - 1] != " " for line in lines)
        assert all(line[end : end + 1] in ("", " ") for line in lines)
    assert len({len(line) for line in lines}) == 1


def test_stacks(getkey):
    layer = eqx.filter_vmap(lambda key: eqx.nn.Linear(4, 4, key=key))
    model, state = wrap(
        {"layers": layer(jr.split(getkey(), 3))},
        constraint=spectrax.Normalize(jnp.array([0.5, 1.0, 2.0])),
    )
    table = spectrax.summary(model, state, true_norm=True, enclosure=False)
    paths = [f"['layers'].weight[{i}]" for i in range(3)]
    assert [row.path for row in table] == paths
    assert [line.split()[0] for line in str(table).split("\n")[2:5]] == paths
    weights = model.raw["layers"].weight
    for row, weight, bound in zip(table, weights, [0.5, 1, 2], strict=True):
        assert row.shape == (4, 4)
        assert row.sigma == pytest.approx(true_norm(weight), rel=1e-9)
        assert row.bound == bound
        assert row.true_norm == pytest.approx(bound, rel=1e-9)
        assert row.norm == pytest.approx(bound, rel=1e-9)


def test_stacks_of_stacks(getkey):
    model, state = wrap(
        jr.normal(getkey(), (2, 3, 4, 4)),
        where=lambda array: array,
        estimator=spectrax.ExactSVD(),
    )
    table = spectrax.summary(model, state, enclosure=False)
    names = [f"[{i}][{j}]" for i in range(2) for j in range(3)]
    assert [row.path[-6:] for row in table] == names
    norms = [true_norm(matrix) for matrix in model.raw.reshape(6, 4, 4)]
    assert [row.sigma for row in table] == pytest.approx(norms, rel=1e-9)
    assert all(row.residual == 0 for row in table)


class Outer(eqx.Module):
    layer: eqx.nn.Linear
    inner: spectrax.Wrapped

    def __init__(self, key: PRNGKeyArray):
        layer_key, inner_key = jr.split(key)
        self.layer = eqx.nn.Linear(4, 4, key=layer_key)
        self.inner = spectrax.wrap(Net(inner_key))


def test_paths_in_nested_models(getkey):
    key = getkey()

    def make() -> dict:
        layer = eqx.nn.Linear(4, 2, key=key)
        return {"a": {"b": [spectrax.wrap(layer)]}, "c": Outer(key)}

    models, state = eqx.nn.make_with_state(make)()
    table = spectrax.summary(models, state, enclosure=False)
    assert [row.path for row in table] == [
        "['a']['b'][0].weight",
        "['c'].inner.first.weight",
        "['c'].inner.second.weight",
    ]
    assert table.unconstrained == (("['c'].layer.weight", (4, 4)),)


class Namesake(eqx.Module):
    """Has attributes of the same names as `Wrapped`."""

    module: eqx.nn.Linear
    sites: Array


def test_names_that_are_those_of_wrapped(getkey):
    net = Namesake(eqx.nn.Linear(4, 4, key=getkey()), jr.normal(getkey(), (4, 4)))
    model, state = wrap(net, where=lambda net: net.module)
    table = spectrax.summary(model, state, enclosure=False)
    assert [row.path for row in table] == ["module.weight"]
    assert table.unconstrained == (("sites", (4, 4)),)
    model, state = wrap(net, where=lambda net: net.sites)
    table = spectrax.summary(model, state, enclosure=False)
    assert [row.path for row in table] == ["sites"]
    assert table.unconstrained == (("module.weight", (4, 4)),)


def test_layers_of_unknown_arrays(getkey):
    net = {"net": Net(getkey()), "table": jr.normal(getkey(), (4, 4))}
    model, state = wrap(net, where=lambda net: [net["table"], net["net"].first])
    table = spectrax.summary(model, state, enclosure=False)
    assert [row.layer for row in table] == ["Linear", "dict"]
    assert [row.path for row in table] == ["['net'].first.weight", "['table']"]
    assert table.unconstrained == (("['net'].second.weight", (2, 4)),)


def test_convolutions(getkey):
    """At one size against a matrix made by hand; at every size against its symbol."""
    conv = eqx.nn.Conv1d(2, 2, 3, padding=1, key=getkey())
    kernel = np.asarray(conv.weight)
    dense = np.zeros((2, 6, 2, 6))
    for i in range(6):
        for j in range(max(0, i - 1), min(6, i + 2)):
            dense[:, i, :, j] = kernel[:, :, j - i + 1]
    at_six = true_norm(dense.reshape(12, 12))
    waves = np.exp(1j * np.linspace(0, 2 * np.pi, 4001)[:, None] * np.arange(3))
    at_all = np.linalg.norm(np.einsum("oit,wt->woi", kernel, waves), 2, (1, 2)).max()
    assert at_six < at_all

    model, state = wrap(conv, input_size=(6,))
    (row,) = spectrax.summary(model, state, true_norm=True, enclosure=False)
    assert (row.layer, row.shape) == ("Conv1d", (2, 2, 3))
    assert row.sigma == pytest.approx(at_six, rel=1e-6)
    assert row.true_norm == pytest.approx(1, rel=1e-6)

    model, state = wrap(conv)
    (row,) = spectrax.summary(model, state, true_norm=True, enclosure=False)
    assert row.sigma == pytest.approx(at_all, rel=1e-5)
    assert row.true_norm == pytest.approx(row.norm, rel=1e-5)
    assert row.norm == pytest.approx(1, rel=1e-9)


def test_zero_weights(getkey):
    net = eqx.tree_at(linear_weights, Net(getkey()), replace_fn=jnp.zeros_like)
    for constraint in (spectrax.Normalize(), spectrax.Clip()):
        table = spectrax.summary(
            *wrap(net, constraint=constraint), true_norm=True, enclosure=False
        )
        for row in table:
            assert (row.sigma, row.norm, row.true_norm, row.residual) == (0, 0, 0, 0)
            assert row.bound == 1


def test_narrow_weights_as_they_are_stored(getkey):
    """The true norm is that of the rounded weights."""
    layer = eqx.nn.Linear(4, 4, dtype=jnp.bfloat16, key=getkey())
    model, state = wrap(layer)
    (row,) = spectrax.summary(model, state, true_norm=True, enclosure=False)
    plain = spectrax.unwrap(model, state)
    assert row.true_norm == pytest.approx(true_norm(plain.weight), rel=1e-12)
    assert math.isclose(row.norm, 1, rel_tol=1e-6)
    assert row.true_norm != row.norm


def test_the_enclosure_is_of_the_constrained_weight_and_printed_outward(getkey):
    model, state = wrap(Net(getkey()), constraint=spectrax.Normalize(0.7))
    model = perturbed(model, getkey())
    table = spectrax.summary(model, state)
    plain = spectrax.unwrap(model, state)
    for row, weight in zip(table, linear_weights(plain), strict=True):
        truth = true_norm(weight)
        assert truth > 1.001 * row.bound  # the estimate is out of date
        assert row.lower <= truth <= row.upper
        assert row.upper - row.lower <= 1e-4 * truth
    header, _, *lines = str(table).split("\n")
    assert header.endswith("proven from        to")
    for row, line in zip(table, lines, strict=True):
        lower, upper = map(float, line.split()[-2:])
        assert row.lower - 1e-6 < lower <= row.lower
        assert row.upper <= upper < row.upper + 1e-6


def test_the_estimator_says_its_kind(getkey):
    layer = eqx.nn.Linear(4, 3, key=getkey())
    for estimator, kind in (
        (spectrax.PowerIteration(), "estimate"),
        (spectrax.ExactSVD(), "exact"),
        (spectrax.GramIteration(), "upper bound"),
    ):
        model, state = wrap(layer, estimator=estimator)
        (row,) = spectrax.summary(model, state, enclosure=False)
        assert row.kind == estimator.kind == kind
