"""What `where` selects, what is found without it, and the errors of both."""

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jaxtyping import Array, PRNGKeyArray

import spectrax

from .helpers import linear_norms, linear_weights, Net, true_norm, unchecked


wrap = eqx.nn.make_with_state(spectrax.wrap)


class Zoo(eqx.Module):
    """One of everything that `where` could meet."""

    head: eqx.nn.Linear
    blocks: dict
    norm: eqx.nn.LayerNorm
    table: Array
    stack: Array
    scalar: Array
    counts: Array
    ratio: float
    size: int = eqx.field(static=True)

    def __init__(self, key: PRNGKeyArray):
        keys = jr.split(key, 6)
        self.head = eqx.nn.Linear(4, 2, key=keys[0])
        self.blocks = {
            "a": [eqx.nn.Linear(4, 4, key=keys[1])],
            "b": (
                eqx.nn.Linear(4, 4, key=keys[2]),
                {"c": eqx.nn.Linear(4, 4, key=keys[3])},
            ),
        }
        self.norm = eqx.nn.LayerNorm((4, 4))
        self.table = jr.normal(keys[4], (4, 4))
        self.stack = jr.normal(keys[5], (3, 4, 4))
        self.scalar = jnp.asarray(2.0)
        self.counts = jnp.ones((4, 4), int)
        self.ratio = 0.5
        self.size = 4


@pytest.fixture
def zoo(getkey):
    return Zoo(getkey())


def parts(zoo: Zoo) -> dict[str, Array]:
    return {
        "head": zoo.head.weight,
        "a": zoo.blocks["a"][0].weight,
        "b": zoo.blocks["b"][0].weight,
        "c": zoo.blocks["b"][1]["c"].weight,
        "table": zoo.table,
        "stack": zoo.stack,
    }


def changed(before: Zoo, after: Zoo) -> dict[str, list[float]]:
    """The norms of all weights that are not the same as before, to the last bit."""

    def rest(zoo: Zoo) -> Zoo:
        where = lambda zoo: list(parts(zoo).values())  # noqa: E731
        return eqx.tree_at(where, zoo, replace_fn=lambda _: None)

    assert eqx.tree_equal(rest(before), rest(after))
    old, new = parts(before), parts(after)
    names = [name for name in old if not eqx.tree_equal(old[name], new[name])]
    norms = {}
    for name in names:
        shape = (-1, *old[name].shape[-2:])
        raw, weights = np.reshape(old[name], shape), np.reshape(new[name], shape)
        norms[name] = [true_norm(weight) for weight in weights]
        # Scaled, and otherwise still the same weight.
        scales = norms[name] / np.array([true_norm(weight) for weight in raw])
        np.testing.assert_allclose(weights, raw * scales[:, None, None], rtol=1e-9)
    return norms


@pytest.mark.parametrize(
    ("where", "names"),
    [
        (lambda zoo: zoo.head, {"head"}),
        (lambda zoo: zoo.head.weight, {"head"}),
        (lambda zoo: [zoo.head], {"head"}),
        (lambda zoo: (zoo.head, zoo.blocks["a"][0]), {"head", "a"}),
        (lambda zoo: zoo.blocks["a"], {"a"}),
        (lambda zoo: zoo.blocks["b"][1], {"c"}),
        (lambda zoo: zoo.blocks["b"][1]["c"].weight, {"c"}),
        (lambda zoo: zoo.blocks["b"], {"b", "c"}),
        (lambda zoo: zoo.blocks, {"a", "b", "c"}),
        (lambda zoo: [zoo.blocks["a"], zoo.blocks["b"][1]], {"a", "c"}),
        (lambda zoo: zoo, {"head", "a", "b", "c"}),
        (lambda zoo: zoo.table, {"table"}),
        (lambda zoo: [zoo.table, zoo.head], {"table", "head"}),
        (lambda zoo: zoo.stack, {"stack"}),
        (lambda zoo: {"any": zoo.head, "other": zoo.blocks["a"]}, {"head", "a"}),
    ],
    ids=[
        "layer",
        "its weight",
        "sequence of one",
        "sequence of layers",
        "list",
        "dict in a tuple",
        "array in a dict",
        "tuple",
        "dict",
        "sequence of containers",
        "everything",
        "unknown matrix",
        "matrix and layer",
        "unknown stack",
        "dict of nodes",
    ],
)
def test_what_where_selects(zoo, where, names):
    # Warnings are errors here: `where` silences the one about unknown matrices.
    model, state = wrap(zoo, where=where)
    after = changed(zoo, spectrax.unwrap(model, state))
    assert set(after) == names
    for norms in after.values():
        assert norms == pytest.approx([1] * len(norms), rel=1e-9)


def test_the_order_of_where_is_that_of_the_constraints(zoo):
    constraints = [spectrax.Normalize(bound) for bound in (0.25, 0.5, 2.0, 4.0)]
    model, state = wrap(
        zoo,
        where=lambda zoo: [zoo.stack, zoo.head, zoo.blocks["b"], zoo.table],
        constraint=constraints,
    )
    after = changed(zoo, spectrax.unwrap(model, state))
    expected = {"stack": [0.25] * 3, "head": [0.5], "b": [2], "c": [2], "table": [4]}
    assert after.keys() == expected.keys()
    for name, norms in after.items():
        assert norms == pytest.approx(expected[name], rel=1e-9)


def test_the_model_itself_is_an_array(getkey):
    weight = jr.normal(getkey(), (4, 4))
    model, state = wrap(weight, where=lambda array: array)
    assert true_norm(spectrax.unwrap(model, state)) == pytest.approx(1, rel=1e-9)


def test_without_where(zoo):
    match = r"leaves these arrays as they are.* knows no layer .*: table, stack\. To "
    with pytest.warns(UserWarning, match=match):
        model, state = wrap(zoo)
    after = changed(zoo, spectrax.unwrap(model, state))
    assert set(after) == {"head", "a", "b", "c"}


def test_matrices_of_elementwise_layers_are_no_strangers(getkey):
    net = eqx.nn.Sequential(
        [
            eqx.nn.Linear(4, 4, key=getkey()),
            eqx.nn.LayerNorm((4, 4)),
            eqx.nn.PReLU(jnp.ones((4, 4))),
            eqx.nn.RMSNorm((4, 4)),
        ]
    )
    model, state = wrap(net)
    plain = spectrax.unwrap(model, state)
    assert linear_norms(plain) == pytest.approx([1], rel=1e-9)
    assert eqx.tree_equal(plain.layers[1:], net.layers[1:])


#
# Errors
#


def test_nothing_to_constrain(getkey):
    net = {"norm": eqx.nn.LayerNorm(4), "table": jr.normal(getkey(), (4, 4))}
    match = (
        r"with a weight to constrain, found none\. It has the layers \['LayerNorm'\] "
        r"and the arrays .*'norm'\]\.bias \(4,\).*'table'\] \(4, 4\)"
        r".*known layers are .*Conv, .*Linear.*`spectrax.register_layer`.*`where`"
    )
    with pytest.raises(ValueError, match=match):
        spectrax.wrap(net)
    with pytest.raises(ValueError, match=r"found none. It has the layers \[\]"):
        spectrax.wrap(())


@pytest.mark.parametrize(
    ("where", "error", "match"),
    [
        (
            lambda zoo: zoo.head.bias,
            ValueError,
            r"weight `head.bias` to have at least two axes, got shape \(2,\)",
        ),
        (
            lambda zoo: zoo.scalar,
            ValueError,
            r"weight `scalar` to have at least two axes, got shape \(\)",
        ),
        (
            lambda zoo: zoo.counts,
            TypeError,
            r"weight `counts` to be of floating-point or complex dtype, got int64",
        ),
        (
            lambda zoo: zoo.ratio,
            TypeError,
            r"weight `ratio` to be a JAX array, got float.*`jax.numpy.asarray`",
        ),
        (
            lambda zoo: zoo.size,
            TypeError,
            r"`where` to select layers or arrays of the model, got 4 of type int",
        ),
        (
            lambda zoo: zoo.head.use_bias,
            TypeError,
            r"`where` to select layers or arrays .* got True of type bool",
        ),
        (lambda _: None, TypeError, r"`where` to select .* of type NoneType"),
        (lambda _: "head", TypeError, r"`where` to select .* got 'head' of type str"),
        (
            lambda zoo: zoo.norm,
            ValueError,
            r"`where` to select something with a weight to constrain, got a LayerNorm "
            r"with the arrays \['norm.weight \(4, 4\)', 'norm.bias \(4, 4\)'\]",
        ),
        (
            lambda zoo: [zoo.head, zoo.norm],
            ValueError,
            r"something with a weight to constrain, got a LayerNorm",
        ),
        (
            lambda zoo: [zoo.head, zoo.head],
            ValueError,
            r"each weight once, got `head.weight` twice",
        ),
        (
            lambda zoo: [zoo.blocks, zoo.blocks["b"][1]["c"].weight],
            ValueError,
            r"got `blocks\['b'\]\[1\]\['c'\]\.weight` twice.* do not overlap",
        ),
    ],
    ids=[
        "bias",
        "scalar",
        "integers",
        "number",
        "static field",
        "static flag",
        "None",
        "string",
        "no weight",
        "one without weight",
        "twice",
        "overlap",
    ],
)
def test_what_where_must_not_select(zoo, where, error, match):
    with pytest.raises(error, match=match):
        spectrax.wrap(zoo, where=where)


def test_functions_are_no_weights(getkey):
    layers = [eqx.nn.Linear(4, 4, key=getkey()), eqx.nn.Lambda(jnp.tanh)]
    net = eqx.nn.Sequential(layers)
    with pytest.raises(TypeError, match=r"`layers\[1\].fn` to be a JAX array, got "):
        spectrax.wrap(net, where=lambda net: net.layers[1].fn)
    with pytest.raises(ValueError, match="a weight to constrain, got a Lambda"):
        spectrax.wrap(net, where=lambda net: net.layers)


@pytest.mark.parametrize("name", ["constraint", "estimator"])
def test_one_value_for_each_node(getkey, name):
    net = Net(getkey())
    one = {"constraint": spectrax.Clip(), "estimator": spectrax.ExactSVD()}[name]
    match = f"one `{name}`, or as many as `where` returns nodes "
    pair = lambda net: [net.first, net.second]  # noqa: E731
    with pytest.raises(ValueError, match=match + r"\(2\), got 3"):
        spectrax.wrap(net, where=pair, **{name: [one] * 3})
    with pytest.raises(ValueError, match=match + r"\(2\), got 1"):
        spectrax.wrap(net, where=pair, **{name: (one,)})
    match += r"\(it returns no sequence\), got 2"
    with pytest.raises(ValueError, match=match):
        spectrax.wrap(net, where=lambda net: net, **{name: [one, one]})
    with pytest.raises(ValueError, match=match):
        spectrax.wrap(net, **{name: [one, one]})


def test_where_that_selects_nothing(zoo):
    with pytest.raises(
        ValueError, match="to select at least one layer or array, got an"
    ):
        spectrax.wrap(zoo, where=lambda _: [])


@pytest.mark.parametrize("size", [5, (5.5,), "8"])
def test_what_is_no_input_size(size, getkey):
    conv = eqx.nn.Conv1d(2, 2, 3, key=getkey())
    with (
        unchecked(),
        pytest.raises(TypeError, match="`input_size` to be a sequence of i"),
    ):
        spectrax.wrap(conv, input_size=size)


def test_where_leaves_the_raw_weights_alone(zoo):
    model, _ = wrap(zoo, where=lambda zoo: zoo.blocks)
    assert eqx.tree_equal(linear_weights(model), linear_weights(zoo))
    assert eqx.tree_equal(model.raw, zoo)
