"""Attention from distances: what it computes, and its bound from both sides."""

import decimal
import importlib
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


_module = importlib.import_module("spectrax.nn._l2_attention")


def _averages(y: Array) -> Array:
    """The nonlinear part alone, from its definition."""
    distances = jnp.sum(jnp.square(y[:, None] - y[None, :]), axis=-1)
    weights = jnp.exp(-distances)
    return weights @ y / jnp.sum(weights, axis=1, keepdims=True)


def _jacobian_norm(function, x: Array) -> Array:
    jacobian = jax.jacfwd(function)(x)
    return jnp.linalg.norm(jacobian.reshape(-1, x.size), 2)


# Compiled once for all tests with two heads and five points of four channels.
@eqx.filter_jit
def _apply(attention, x: Array, mask: Array | None = None) -> Array:
    return attention(x, mask)


@eqx.filter_jit
def _norms_and_outputs(attention, x: Array) -> tuple[Array, Array]:
    norms = jax.vmap(lambda x: _jacobian_norm(attention, x))(x)
    return norms, jax.vmap(attention)(x)


def _with_weights(attention, query, value, output):
    def weights(attention):
        projections = (
            attention.query_proj,
            attention.value_proj,
            attention.output_proj,
        )
        return [projection.weight for projection in projections]

    return eqx.tree_at(weights, attention, [query, value, output])


def _orthogonal(key, size: int) -> Array:
    return jnp.linalg.qr(jr.normal(key, (size, size)))[0]


# What it computes.


def test_definition(getkey):
    attention = snn.L2MultiheadAttention(2, 4, key=getkey())
    x = 2 * np.asarray(jr.normal(getkey(), (5, 4)))
    query = np.asarray(attention.query_proj.weight).reshape(2, 2, 4)
    value = np.asarray(attention.value_proj.weight)
    heads = []
    for w, v in zip(query, value, strict=True):
        q = x @ w.T
        distances = np.sum((q[:, None] - q[None]) ** 2, axis=-1)
        weights = np.exp(-distances / np.sqrt(2))
        weights /= weights.sum(axis=1, keepdims=True)
        # As in the source, with its matrices transposed.
        heads.append(weights @ x @ (w.T @ w / np.sqrt(2)) @ v.T)
    expected = (
        np.concatenate(heads, axis=1) @ np.asarray(attention.output_proj.weight).T
    )
    found = _apply(attention, jnp.asarray(x))
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_shapes():
    make = lambda key: snn.L2MultiheadAttention(3, 6, key=key)  # noqa: E731
    attention = eqx.filter_eval_shape(make, jr.key(0))
    assert attention.query_proj.weight.shape == (6, 6)
    assert attention.value_proj.weight.shape == (3, 2, 6)
    assert attention.output_proj.weight.shape == (6, 6)


def test_the_order_of_points_does_not_matter(getkey):
    attention = snn.L2MultiheadAttention(2, 4, key=getkey())
    x = jr.normal(getkey(), (5, 4))
    order = jnp.array([3, 0, 4, 1, 2])
    expected = _apply(attention, x)[order]
    np.testing.assert_allclose(_apply(attention, x[order]), expected, rtol=1e-10)


def test_far_from_the_origin_in_float32(getkey):
    attention = snn.L2MultiheadAttention(2, 4, key=getkey())
    single = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), attention)
    x = jr.normal(getkey(), (5, 4)) + 1000.0
    exact = np.asarray(_apply(attention, x))
    error = np.asarray(_apply(single, x.astype(jnp.float32))) - exact
    assert np.max(np.abs(error)) < 1e-5 * np.max(np.abs(exact))


def test_derivatives_of_points_that_coincide(getkey):
    attention = snn.L2MultiheadAttention(2, 4, key=getkey())

    def total(x):
        return jnp.sum(jnp.square(attention(x)))

    x = jnp.ones((3, 4))
    hessian = jax.jit(jax.hessian(total))(x).reshape(12, 12)
    assert np.all(np.isfinite(hessian))
    np.testing.assert_allclose(hessian, hessian.T, atol=1e-12)


# Masks.


def test_mask_leaves_points_out(getkey):
    attention = snn.L2MultiheadAttention(2, 4, key=getkey())
    x = jr.normal(getkey(), (5, 4))
    mask = jnp.array([True, False, True, True, False])
    alone = _apply(attention, x[mask])
    for filling in (0.0, 1e6, jnp.nan):
        filled = jnp.where(mask[:, None], x, filling)
        y = _apply(attention, filled, mask)
        np.testing.assert_allclose(y[mask], alone, rtol=1e-10)
        np.testing.assert_array_equal(y[~mask], 0)


def test_mask_without_any_point_has_derivatives(getkey):
    attention = snn.L2MultiheadAttention(2, 4, key=getkey())
    x = jr.normal(getkey(), (5, 4))
    none = jnp.zeros(5, bool)
    gradient = eqx.filter_grad(lambda a: jnp.sum(_apply(a, x, none)))(attention)
    for leaf in jax.tree.leaves(gradient):
        np.testing.assert_array_equal(leaf, 0)


# The growth with the number of points.


def test_lambert_is_rounded_up():
    decimal.getcontext().prec = 50
    for value in (1e-6, 1 / math.e, 1.0, 7.3, 1e3, 1e9):
        found = _module._lambert_upper(value)
        exact = decimal.Decimal(found)
        residual = exact * exact.exp() / decimal.Decimal(value) - 1
        assert 0 <= residual < 1e-13


# The page on attention prints what is found.
@pytest.mark.parametrize(
    ("num_points", "size", "found"), [(2, 1, 1.60), (8, 1, 2.3), (16, 2, 2.8)]
)
def test_growth_from_both_sides(num_points, size, found, getkey):
    growth = _module.l2_attention_growth(num_points)
    scales = jnp.linspace(0.3, 2.0, 16)
    y = scales[:, None, None] * jr.normal(getkey(), (16, num_points, size))

    def ascend(y: Array, rate: Array) -> tuple[Array, Array]:
        steep = jax.value_and_grad(lambda y: _jacobian_norm(_averages, y))
        norms, slopes = jax.vmap(steep)(y)
        lengths = jnp.linalg.norm(slopes.reshape(16, -1), axis=1)[:, None, None]
        return y + rate * slopes / jnp.maximum(lengths, 1e-6), jnp.max(norms)

    rates = jnp.linspace(0.1, 0, 200)
    largest = jnp.max(jax.lax.scan(ascend, y, rates)[1])
    assert found <= largest <= growth
    assert largest <= found * 1.15


def test_growth_of_two_points():
    # On a line, the derivative of the difference of both averages.
    z = np.linspace(0, 20, 100_001)
    exact = np.max(np.tanh(z / 2) + z / np.cosh(z / 2) ** 2)
    growth = _module.l2_attention_growth(2)
    assert exact <= growth <= 1.45 * exact
    assert _module.l2_attention_growth(1) == 1


def _weights_of_star(inner: int, outer: int, overlap: float) -> np.ndarray:
    """Weights of some points at the origin, and of others around it in all directions
    of their own, at the distance at which `K` is the overlap."""
    middle, around = np.zeros((inner, outer)), np.sqrt(-np.log(overlap)) * np.eye(outer)
    y = np.concatenate([middle, around])
    distances = np.sum(np.square(y[:, None] - y[None]), axis=-1)
    weights = np.exp(-distances)
    return weights / weights.sum(axis=1, keepdims=True)


def test_sums_of_columns_from_both_sides():
    columns = _weights_of_star(1, 99, 0.1).sum(axis=0)
    assert 0.45 * np.sqrt(100) < np.max(columns) <= np.sqrt(100)


def test_norm_of_weights_from_both_sides():
    norm = true_norm(_weights_of_star(10, 100, 0.1))
    assert 0.3 * 110**0.25 < norm <= 110**0.25


def test_growth_is_below_that_of_the_source():
    previous = 0.0
    for num_points in (1, 2, 3, 5, 17, 100, 10**4, 10**8):
        growth = _module.l2_attention_growth(num_points)
        variance = _module._lambert_upper((num_points - 1) / math.e)
        assert previous < growth <= math.sqrt(num_points) * (4 * variance + 1)
        previous = growth


def test_the_table_of_the_docstring():
    text = snn.L2MultiheadAttention.lipschitz_bound.__doc__ or ""
    lines = {
        line.split("|")[1].strip(): line for line in text.splitlines() if "|" in line
    }
    points = [int(cell) for cell in lines["points"].split("|")[2:-1]]
    printed = [float(cell) for cell in lines["`c(N)`"].split("|")[2:-1]]
    for num_points, number in zip(points, printed, strict=True):
        growth = _module.l2_attention_growth(num_points)
        assert growth <= number <= 1.01 * growth


def test_growth_of_no_points_raises(getkey):
    attention = snn.L2MultiheadAttention(2, 4, key=getkey())
    with pytest.raises(ValueError, match="at least one point, got 0"):
        attention.lipschitz_bound(0)


# The bound.


@pytest.mark.parametrize(
    ("num_points", "factor"), [(1, 4.0), (5, 0.3), (5, 1.0), (5, 4.0)]
)
def test_bound_holds(num_points, factor, getkey):
    attention = snn.L2MultiheadAttention(2, 4, key=getkey())
    attention = eqx.tree_at(
        lambda a: a.query_proj.weight, attention, replace_fn=lambda w: factor * w
    )
    bound = float(attention.lipschitz_bound(num_points))
    scales = jnp.geomspace(0.1, 20.0, 32)[:, None, None]
    x = scales * jr.normal(getkey(), (32, num_points, 4))
    norms, outputs = map(np.asarray, _norms_and_outputs(attention, x))
    assert np.max(norms) <= bound
    # Pairs that are far apart as well.
    moved = np.linalg.norm(outputs - outputs[::-1], axis=(1, 2))
    apart = np.linalg.norm(np.asarray(x - x[::-1]), axis=(1, 2))
    assert np.all(moved <= bound * apart)


def test_bound_of_one_point_is_exact_for_orthogonal_weights(getkey):
    attention = snn.L2MultiheadAttention(2, 4, key=getkey())
    query, output = _orthogonal(getkey(), 4), _orthogonal(getkey(), 4)
    attention = _with_weights(attention, 4 * query, query.reshape(2, 2, 4), output)
    # Linear, with the queries in it twice: 4 * 4 / sqrt(2).
    norms, _ = _norms_and_outputs(attention, jnp.ones((32, 1, 4)))
    np.testing.assert_allclose(norms, 8 * math.sqrt(2), rtol=1e-12)
    bound = attention.lipschitz_bound(1)
    assert norms[0] <= bound <= norms[0] * (1 + 1e-3)


def test_bound_is_the_product_that_it_is_said_to_be(getkey):
    attention = snn.L2MultiheadAttention(2, 4, key=getkey())
    query = np.asarray(attention.query_proj.weight)
    values = np.asarray(attention.value_proj.weight)
    output = true_norm(attention.output_proj.weight)
    heads = list(zip(values, query.reshape(2, 2, 4), strict=True))
    weights = true_norm(query) * max(true_norm(v @ w.T) for v, w in heads) * output
    found = float(attention.weights_bound())
    assert weights <= found <= weights * (1 + 1e-3)
    bound = float(attention.lipschitz_bound(7))
    growth = _module.l2_attention_growth(7) / math.sqrt(2)
    np.testing.assert_allclose(bound, growth * found, rtol=1e-12)


def test_wrapped_weights_have_norm_one(getkey):
    attention = snn.L2MultiheadAttention(2, 4, key=getkey())
    wrap = eqx.nn.make_with_state(spectrax.wrap)
    model, state = wrap(attention, estimator=spectrax.ExactSVD())
    x = jr.normal(getkey(), (5, 4))
    plain = spectrax.unwrap(model, state)
    weights = [
        plain.query_proj.weight,
        *plain.value_proj.weight,
        plain.output_proj.weight,
    ]
    for weight in weights:
        np.testing.assert_allclose(true_norm(weight), 1, rtol=1e-10)
    assert plain.weights_bound() <= 1 + 1e-3

    def loss(model):
        return jnp.sum(jnp.square(spectrax.unwrap(model, state)(x)))

    gradient = eqx.filter_jit(eqx.filter_grad(loss))(model)
    for leaf in jax.tree.leaves(eqx.filter(gradient.module, eqx.is_array)):
        assert np.all(np.isfinite(leaf))
        assert np.any(leaf != 0)


# Errors.


@pytest.mark.parametrize(("num_heads", "size"), [(0, 4), (3, 4), (2, 0)])
def test_heads_that_do_not_divide_raise(num_heads, size, getkey):
    message = (
        f"divides the number of channels, got num_heads={num_heads} and size={size}"
    )
    with pytest.raises(ValueError, match=message):
        snn.L2MultiheadAttention(num_heads, size, key=getkey())


@pytest.mark.parametrize("shape", [(4,), (5, 3), (2, 5, 4)])
def test_points_of_another_shape_raise(shape, getkey):
    attention = snn.L2MultiheadAttention(2, 4, key=getkey())
    with unchecked(), pytest.raises(ValueError, match=r"shape \[points, 4\], got"):
        attention(jnp.ones(shape))


def test_mask_of_pairs_raises(getkey):
    attention = snn.L2MultiheadAttention(2, 4, key=getkey())
    causal = jnp.tril(jnp.ones((5, 5), bool))
    with (
        unchecked(),
        pytest.raises(ValueError, match="constant is proven"),
    ):
        attention(jnp.ones((5, 4)), causal)
