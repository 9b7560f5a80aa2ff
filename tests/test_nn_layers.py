"""Ready layers are Equinox's layers with their norms under a constraint.

Norms are computed exactly here: how a norm is estimated is tested elsewhere, and a
decomposition compiles fast.
"""

import functools as ft
import inspect
import pickle

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import spectrax

from .convolutions import dense, norm_at
from .helpers import clone, true_norm


BOUND = 0.7
EXACT = {
    "constraint": spectrax.Normalize(BOUND),
    "estimator": spectrax.ExactSVD(),
}
KINDS = {
    spectrax.nn.SpectralLinear: eqx.nn.Linear,
    spectrax.nn.SpectralConv1d: eqx.nn.Conv1d,
    spectrax.nn.SpectralConv2d: eqx.nn.Conv2d,
    spectrax.nn.SpectralConv3d: eqx.nn.Conv3d,
    spectrax.nn.SpectralConvTranspose1d: eqx.nn.ConvTranspose1d,
    spectrax.nn.SpectralConvTranspose2d: eqx.nn.ConvTranspose2d,
    spectrax.nn.SpectralConvTranspose3d: eqx.nn.ConvTranspose3d,
    spectrax.nn.SpectralMultiheadAttention: eqx.nn.MultiheadAttention,
}


def assert_bound(matrix, bound=BOUND):
    np.testing.assert_allclose(true_norm(matrix), bound, rtol=1e-12)


def make(kind, *args, **kwargs):
    return eqx.nn.make_with_state(kind)(*args, **kwargs)


@pytest.mark.parametrize(("ready", "kind"), KINDS.items(), ids=lambda k: k.__name__)
def test_arguments_are_those_of_equinox(ready, kind):
    def arguments(function):
        parameters = list(inspect.signature(function).parameters.values())
        return [
            (p.name, p.kind, np.ravel(p.default).tolist()[:1])
            for p in parameters
            if p.name not in ("self", "per_head", "constraint", "estimator")
            and p.name != "input_size"
        ]

    # A default such as (1, 1) is that of 1 for each axis.
    assert arguments(ready) == arguments(kind.__init__)


# Classes.

_SMALL = {
    spectrax.nn.SpectralLinear: (3, 2),
    spectrax.nn.SpectralConv1d: (2, 3, 2),
    spectrax.nn.SpectralConv2d: (2, 3, 2),
    spectrax.nn.SpectralConv3d: (2, 3, 2),
    spectrax.nn.SpectralConvTranspose1d: (2, 3, 2),
    spectrax.nn.SpectralConvTranspose2d: (2, 3, 2),
    spectrax.nn.SpectralConvTranspose3d: (2, 3, 2),
    spectrax.nn.SpectralMultiheadAttention: (2, 4),
    spectrax.nn.AdaptiveSpectralNorm: (3, 2),
}
_BASES = [spectrax.nn.AbstractSpectralConv, spectrax.nn.AbstractSpectralConvTranspose]


def equinox_layer(kind, key):
    return KINDS.get(kind, eqx.nn.Linear)(*_SMALL[kind], key=key)


def small(kind, key):
    if kind is spectrax.nn.AdaptiveSpectralNorm:
        layer = equinox_layer(kind, key)
        return make(kind, layer, estimator=spectrax.ExactSVD())
    if issubclass(kind, tuple(_BASES)):
        size = (2,) * kind.kind(1, 1, 1, key=key).num_spatial_dims
        return make(kind, *_SMALL[kind], **EXACT, input_size=size, key=key)
    return make(kind, *_SMALL[kind], **EXACT, key=key)


def assert_is_one(model, kind):
    assert isinstance(model, kind)
    assert isinstance(model, spectrax.Wrapped)
    others = [other for other in _SMALL if isinstance(model, other)]
    assert others == [kind]


def by_pickle(kind, key):
    return pickle.loads(pickle.dumps(small(kind, key)))[0]


def by_vmap(kind, key):
    return eqx.filter_vmap(ft.partial(small, kind))(jr.split(key, 2))[0]


def by_jit(kind, key):
    return eqx.filter_jit(lambda model: model)(small(kind, key)[0])


def by_inference_mode(kind, key):
    return eqx.nn.inference_mode(small(kind, key)[0])


@pytest.mark.parametrize("kind", _SMALL, ids=lambda kind: kind.__name__)
def test_ready_layers_are_classes(kind, getkey):
    key = getkey()
    assert inspect.isclass(kind)
    model, state = small(kind, key)
    assert_is_one(model, kind)
    raw = equinox_layer(kind, key)
    assert type(model.raw) is type(raw)
    assert eqx.tree_equal(model.raw, raw)
    # The class of Equinox's layer is what is left without the constraint.
    assert type(spectrax.unwrap(model, state)) is type(raw)


@pytest.mark.parametrize("through", [by_pickle, by_vmap, by_jit, by_inference_mode])
@pytest.mark.parametrize("kind", _SMALL, ids=lambda kind: kind.__name__)
def test_ready_layers_keep_their_class(kind, through, getkey):
    assert_is_one(through(kind, getkey()), kind)


def test_a_stack_has_the_weights_of_a_stack(getkey):
    key, kind = getkey(), spectrax.nn.SpectralConv1d
    raw = eqx.filter_vmap(ft.partial(equinox_layer, kind))(jr.split(key, 2))
    assert eqx.tree_equal(by_vmap(kind, key).raw, raw)


def test_ready_layers_in_the_init_of_a_module(getkey):
    class Two(eqx.Module):
        first: spectrax.nn.SpectralConv2d
        second: spectrax.nn.SpectralConvTranspose2d

        def __init__(self, key):
            size = {"input_size": (4, 4)}
            self.first = spectrax.nn.SpectralConv2d(1, 2, 2, **EXACT, **size, key=key)
            self.second = spectrax.nn.SpectralConvTranspose2d(
                2, 1, 2, **EXACT, input_size=(3, 3), key=key
            )

        def __call__(self, x, state):
            return self.second(*self.first(x, state))

    key = getkey()
    model, state = make(Two, key)
    assert_is_one(model.first, spectrax.nn.SpectralConv2d)
    assert_is_one(model.second, spectrax.nn.SpectralConvTranspose2d)
    assert eqx.tree_equal(model.first.raw, eqx.nn.Conv2d(1, 2, 2, key=key))
    state = spectrax.advance(model, state)
    x = jr.normal(key, (1, 4, 4))
    plain = spectrax.unwrap(model, state)
    expected, _ = plain(x, state)
    np.testing.assert_allclose(model(x, state)[0], expected, rtol=1e-12)


@pytest.mark.parametrize("base", _BASES, ids=lambda base: base.__name__)
def test_what_convolutions_share_is_abstract(base, getkey):
    kinds = [kind for kind in _SMALL if issubclass(kind, base)]
    assert [kind.__name__ for kind in kinds] == [
        f"{base.__name__.removeprefix('Abstract')}{dims}d" for dims in (1, 2, 3)
    ]
    with pytest.raises(TypeError, match=f"abstract class {base.__name__} "):
        base(2, 3, 2, key=getkey())


# Linear layers and convolutions.


@pytest.mark.parametrize("use_bias", [True, False])
def test_linear(use_bias, getkey):
    key = getkey()
    options = {"use_bias": use_bias, "dtype": jnp.float32}
    model, state = make(spectrax.nn.SpectralLinear, 6, 5, **options, **EXACT, key=key)
    raw = eqx.nn.Linear(6, 5, **options, key=key)
    assert eqx.tree_equal(model.raw, raw)
    layer = spectrax.unwrap(model, state)
    assert type(layer) is eqx.nn.Linear
    np.testing.assert_allclose(true_norm(layer.weight), BOUND, rtol=1e-6)
    x = jr.normal(getkey(), (6,), jnp.float32)
    expected = np.asarray(raw.weight) * (BOUND / true_norm(raw.weight)) @ x
    expected = expected + raw.bias if use_bias else expected
    y, state = model(x, state)
    np.testing.assert_allclose(y, expected, rtol=1e-5)


_CONVOLUTIONS = [
    # Every option differs from its default in one of them.
    (spectrax.nn.SpectralConv1d, (4, 6, 3), {"stride": 2, "padding": 1, "groups": 2}),
    (
        spectrax.nn.SpectralConv2d,
        (2, 3, (3, 2)),
        {"dilation": 2, "padding": "SAME", "padding_mode": "REPLICATE"},
    ),
    (spectrax.nn.SpectralConv3d, (2, 3, 2), {"use_bias": False}),
    (
        spectrax.nn.SpectralConvTranspose1d,
        (4, 2, 3),
        {"stride": 2, "output_padding": 1, "padding": 1, "groups": 2},
    ),
    (
        spectrax.nn.SpectralConvTranspose2d,
        (2, 3, (3, 2)),
        {"dilation": 2, "padding": "SAME", "padding_mode": "CIRCULAR"},
    ),
    (spectrax.nn.SpectralConvTranspose3d, (2, 3, 2), {"use_bias": False}),
]
_SIZES = {1: (6,), 2: (4, 5), 3: (3, 3, 2)}


@pytest.mark.parametrize(
    ("kind", "sizes", "options"),
    _CONVOLUTIONS,
    ids=[kind.__name__ for kind, _, _ in _CONVOLUTIONS],
)
def test_convolution_at_one_input_size(kind, sizes, options, getkey):
    key = getkey()
    raw = KINDS[kind](*sizes, **options, key=key)
    input_size = _SIZES[raw.num_spatial_dims]
    model, state = make(
        kind, *sizes, **options, **EXACT, input_size=input_size, key=key
    )
    assert eqx.tree_equal(model.raw, raw)
    layer = spectrax.unwrap(model, state)
    assert_bound(dense(layer, input_size))
    # Scaled, not changed: the same map up to a factor.
    factor = BOUND / norm_at(raw, input_size)
    np.testing.assert_allclose(layer.weight, raw.weight * factor, rtol=1e-10)
    x = jr.normal(getkey(), (sizes[0], *input_size))
    y, _ = model(x, state)
    np.testing.assert_allclose(y, layer(x), rtol=1e-12)


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        (spectrax.nn.SpectralConv1d, (2, 3, 3)),
        (spectrax.nn.SpectralConvTranspose1d, (3, 2, 3)),
    ],
)
def test_convolution_at_every_input_size(kind, sizes, getkey):
    constraint = spectrax.Normalize(BOUND)
    model, state = make(kind, *sizes, constraint=constraint, key=getkey())
    layer = spectrax.unwrap(model, state)
    norms = [norm_at(layer, (size,)) for size in (1, 4, 64)]
    assert max(norms) <= BOUND * (1 + 1e-6)
    # A supremum over all sizes, which a large one comes close to.
    assert norms[-1] > 0.99 * BOUND


# Attention.

_SHAPES = {
    "key_size": 4,
    "value_size": 3,
    "output_size": 5,
    "qk_size": 2,
    "vo_size": 4,
}
_BIASES = {f"use_{name}_bias": True for name in ("query", "key", "value", "output")}


def attention(key, *, per_head=False, **options):
    kind = spectrax.nn.SpectralMultiheadAttention
    return make(kind, 2, 6, **options, **EXACT, per_head=per_head, key=key)


def as_equinox(model, state):
    """An `equinox.nn.MultiheadAttention` with the constrained weights of all heads
    written into its own linear layers, by numpy.
    """
    layer = spectrax.unwrap(model, state)
    names = ("query_proj", "key_proj", "value_proj", "output_proj")
    weights = [np.asarray(getattr(layer, name).weight) for name in names]
    if weights[0].ndim == 3:
        inner = [np.concatenate(list(weight)) for weight in weights[:3]]
        weights = [*inner, np.concatenate(list(weights[3]), axis=1)]
    plain = eqx.nn.MultiheadAttention(
        layer.num_heads,
        layer.query_size,
        layer.key_size,
        layer.value_size,
        layer.output_size,
        layer.qk_size,
        layer.vo_size,
        layer.use_query_bias,
        layer.use_key_bias,
        layer.use_value_bias,
        layer.use_output_bias,
        dropout_p=layer.dropout.p,
        key=jr.key(0),
    )
    biases = [getattr(layer, name).bias for name in names]
    put = lambda attention: [  # noqa: E731
        getattr(getattr(attention, name), part)
        for part in ("weight", "bias")
        for name in names
    ]
    values = [*map(jnp.asarray, weights), *biases]
    return eqx.tree_at(put, plain, values, is_leaf=lambda x: x is None)


def test_attention_bounds_all_four_projections(getkey):
    key = getkey()
    model, state = attention(key, **_SHAPES)
    raw = eqx.nn.MultiheadAttention(2, 6, **_SHAPES, key=key)
    assert eqx.tree_equal(model.raw, raw)
    layer = spectrax.unwrap(model, state)
    assert type(layer) is eqx.nn.MultiheadAttention
    shapes = {"query": (4, 6), "key": (4, 4), "value": (8, 3), "output": (5, 8)}
    for name, shape in shapes.items():
        weight = getattr(layer, f"{name}_proj").weight
        assert weight.shape == shape
        assert_bound(weight)


def test_attention_bounds_each_head(getkey):
    key = getkey()
    model, state = attention(key, per_head=True, **_SHAPES, **_BIASES)
    raw = eqx.nn.MultiheadAttention(2, 6, **_SHAPES, **_BIASES, key=key)
    plain = as_equinox(model, state)
    for name, axis in [("query", 0), ("key", 0), ("value", 0), ("output", 1)]:
        constrained, before = (
            np.split(np.asarray(getattr(layer, f"{name}_proj").weight), 2, axis)
            for layer in (plain, raw)
        )
        for block, raw_block in zip(constrained, before, strict=True):
            assert_bound(block)
            factor = BOUND / true_norm(raw_block)
            np.testing.assert_allclose(block, raw_block * factor, rtol=1e-10)
        whole = true_norm(np.concatenate(constrained, axis))
        assert BOUND < whole <= np.sqrt(2) * BOUND * (1 + 1e-12)
        bias = getattr(plain, f"{name}_proj").bias
        np.testing.assert_array_equal(bias, getattr(raw, f"{name}_proj").bias)


def test_each_head_has_a_bound_to_train(getkey):
    model, state = make(
        spectrax.nn.SpectralMultiheadAttention,
        2,
        6,
        per_head=True,
        constraint=spectrax.LearnableBound(0.5),
        estimator=spectrax.ExactSVD(),
        key=getkey(),
    )
    x = jr.normal(getkey(), (5, 6))

    @eqx.filter_grad
    def gradient(model):
        return jnp.sum(spectrax.unwrap(model, state)(x, x, x) ** 2)

    bounds = gradient(model).constraints
    assert [bound.raw.shape for bound in bounds] == [(2,)] * 4
    assert all(np.all(np.abs(bound.raw) > 1e-8) for bound in bounds)


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("cross", [False, True])
def test_attention_computes_what_equinox_does(per_head, cross, getkey):
    shapes = {**_SHAPES, **_BIASES} if cross else {}
    model, state = attention(getkey(), per_head=per_head, **shapes, dropout_p=0.5)
    plain = as_equinox(model, state)
    query = jr.normal(getkey(), (5, 6))
    key_, value = query, query
    if cross:
        key_, value = jr.normal(getkey(), (7, 4)), jr.normal(getkey(), (7, 3))
    shape = (5, len(key_))
    masks = [None, *(jr.bernoulli(getkey(), 0.6, s) for s in (shape, (2, *shape)))]
    dropout = getkey()
    for mask in masks:
        args = query, key_, value, mask
        for options in [{"key": dropout}, {"inference": True}]:
            y, state = model(*args, state=state, **options)
            np.testing.assert_allclose(y, plain(*args, **options), rtol=1e-9)
    with_dropout, _ = model(*args, clone(state), key=dropout)
    assert not np.allclose(y, with_dropout)
    silent = eqx.nn.inference_mode(model)
    np.testing.assert_allclose(silent(*args, state)[0], y, rtol=1e-12)


def test_a_mask_hides_what_comes_later(getkey):
    model, state = attention(getkey(), per_head=True)
    layer = spectrax.unwrap(model, state)
    causal = jnp.tril(jnp.ones((5, 5), bool))
    x = jr.normal(getkey(), (5, 6))
    other = x.at[3].add(1.0)
    y, z = layer(x, x, x, causal), layer(other, other, other, causal)
    np.testing.assert_array_equal(y[:3], z[:3])
    assert np.all(np.linalg.norm(y[3:] - z[3:], axis=1) > 1e-3)


def test_heads_under_transformations(getkey):
    model, state = attention(getkey(), per_head=True, use_output_bias=True)
    layer, plain = spectrax.unwrap(model, state), as_equinox(model, state)
    x = jr.normal(getkey(), (3, 4, 6))

    def total(attention, x):
        return jnp.sum(jnp.sin(attention(x, x, x)))

    expected = jax.vmap(lambda x: plain(x, x, x))(x)
    found = eqx.filter_jit(eqx.filter_vmap(lambda x: layer(x, x, x)))(x)
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    hessians = [jax.hessian(lambda x, f=f: total(f, x))(x[0]) for f in (layer, plain)]
    np.testing.assert_allclose(*hessians, atol=1e-12)
    assert np.max(np.abs(hessians[0])) > 1e-3


def test_heads_by_power_iteration(getkey):
    kind = spectrax.nn.SpectralMultiheadAttention
    # All blocks of one shape, which is compiled once.
    model, state = make(kind, 2, 4, qk_size=4, vo_size=4, per_head=True, key=getkey())
    for row in spectrax.summary(model, state, true_norm=True):
        np.testing.assert_allclose(row.true_norm, 1.0, rtol=1e-8)


# Adaptive bounds.


def adaptive(layer, **options):
    estimator = spectrax.ExactSVD()
    kind = spectrax.nn.AdaptiveSpectralNorm
    return make(kind, layer, estimator=estimator, **options)


def mlp(key):
    return eqx.nn.MLP(3, 2, width_size=4, depth=2, key=key)


@pytest.mark.parametrize("learnable", [False, True])
def test_adaptive_bound_of_every_layer(learnable, getkey):
    model, state = adaptive(
        mlp(getkey()), initial_bound=BOUND, learnable_bound=learnable
    )
    assert type(model.module) is eqx.nn.MLP
    for layer in spectrax.unwrap(model, state).layers:
        assert_bound(layer.weight)
    trained = [constraint is not None for constraint in model.constraints]
    assert trained == [learnable] * 3


def test_bounds_of_a_stack(getkey):
    stack = eqx.filter_vmap(lambda key: eqx.nn.Linear(3, 4, key=key))(
        jr.split(getkey(), 2)
    )
    model, state = adaptive(stack, initial_bound=jnp.array([0.5, 2.0]))
    for weight, bound in zip(spectrax.unwrap(model, state).weight, (0.5, 2.0)):  # noqa: B905
        assert_bound(weight, bound)


def test_a_learnable_bound_is_trained(getkey):
    """Along `raw`, by finite differences; and a step along it moves the norms."""
    model, state = adaptive(mlp(getkey()), learnable_bound=True, maximum=3.0)
    x = jr.normal(getkey(), (8, 3))

    def loss(model):
        return jnp.mean(jax.vmap(spectrax.unwrap(model, state))(x) ** 2)

    raws = lambda model: [c.raw for c in model.constraints]  # noqa: E731
    gradient = raws(eqx.filter_grad(loss)(model))
    for i in range(3):
        shifted = [
            eqx.tree_at(lambda m, i=i: raws(m)[i], model, raws(model)[i] + h)
            for h in (1e-5, -1e-5)
        ]
        difference = (loss(shifted[0]) - loss(shifted[1])) / 2e-5
        np.testing.assert_allclose(gradient[i], difference, rtol=1e-6)
        assert abs(difference) > 1e-6
    far = eqx.tree_at(raws, model, [raw + 40.0 for raw in raws(model)])
    for layer in spectrax.unwrap(far, state).layers:
        assert_bound(layer.weight, 3.0)


def test_adaptive_key_starts_the_vectors(getkey):
    linear = eqx.nn.Linear(5, 5, key=getkey())
    random = spectrax.PowerIteration(init_steps=0)

    def sigma(**options):
        model, state = make(
            spectrax.nn.AdaptiveSpectralNorm, linear, estimator=random, **options
        )
        return true_norm(spectrax.unwrap(model, state).weight)

    assert sigma(key=jr.key(1)) == sigma(key=jr.key(1)) != sigma(key=jr.key(2))
    assert sigma() == sigma()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"initial_bound": 0.0}, "`bound` to be positive and finite, got 0.0"),
        (
            {"initial_bound": -1.0, "learnable_bound": True},
            "`bound` to be positive and finite, got -1.0",
        ),
        ({"maximum": 2.0}, "no `maximum` for a fixed bound, got 2.0"),
        (
            {"maximum": 1.0, "learnable_bound": True},
            "`bound` to be below `maximum=1.0`, got 1.0",
        ),
    ],
)
def test_impossible_bounds_raise(options, message, getkey):
    with pytest.raises(ValueError, match=message):
        adaptive(eqx.nn.Linear(3, 3, key=getkey()), **options)


def test_nothing_to_constrain_raises():
    with pytest.raises(ValueError, match="a model with a weight to constrain"):
        adaptive(eqx.nn.LayerNorm(3))


def test_an_input_size_of_another_dimension_raises(getkey):
    with pytest.raises(ValueError, match=r"`input_size` to be 2 positive.*got \(8,\)"):
        make(spectrax.nn.SpectralConv2d, 2, 3, 3, input_size=(8,), key=getkey())


# Transformations.


def test_linear_under_transformations(getkey):
    """Forward and reverse mode, second order in the input, and all of it compiled."""
    model, state = make(spectrax.nn.SpectralLinear, 4, 3, **EXACT, key=getkey())
    weight = np.asarray(spectrax.unwrap(model, state).weight)
    xs = jr.normal(getkey(), (5, 4))

    def total(x):
        y = spectrax.unwrap(model, state)(x)
        return jnp.sum(y**3)

    ys = jax.vmap(spectrax.unwrap(model, state))(xs)
    found = jax.jit(jax.vmap(jax.hessian(total)))(xs)
    expected = np.einsum("oi,bo,oj->bij", weight, 6 * np.asarray(ys), weight)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_a_stack_of_ready_layers(getkey):
    """Made under `filter_vmap`, each with a norm and a state of its own."""

    @eqx.filter_vmap
    def make_all(key):
        return make(spectrax.nn.SpectralLinear, 4, 4, **EXACT, key=key)

    models, states = make_all(jr.split(getkey(), 3))
    x = jr.normal(getkey(), (4,))
    weights = eqx.filter_vmap(lambda m, s: spectrax.unwrap(m, s).weight)(models, states)
    biases = models.module.bias
    for weight in weights:
        assert_bound(weight)
    call = eqx.filter_jit(eqx.filter_vmap(lambda m, s: m(x, s)))
    ys, states = call(models, states)
    expected = [w @ x + b for w, b in zip(weights, biases, strict=True)]
    np.testing.assert_allclose(ys, expected, rtol=1e-10)
