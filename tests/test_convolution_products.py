"""Products of a convolution of one size are those of its layer, to the last bit."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
import pytest

import spectrax
from spectrax.internal import Convolution

from .test_convolution_enclosures import by_definition, LAYERS


OPTIMIZED = True  # see conftest.py


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float64, jnp.complex64])
@pytest.mark.parametrize("index", range(len(LAYERS)), ids=lambda i: str(LAYERS[i][0]))
def test_products_are_those_of_the_layer(index, dtype, getkey):
    config, size = LAYERS[index]
    layer = config.make(getkey(), dtype)
    layer = eqx.tree_at(lambda layer: layer.bias, layer, jnp.zeros_like(layer.bias))
    operator = spectrax.layer_operator(layer, input_size=size)
    assert isinstance(operator, Convolution)
    x = jr.normal(getkey(), (3, *operator.in_structure().shape), dtype)
    found, expected = operator.mv(x[0]), layer(x[0])
    assert found.dtype == operator.out_structure().dtype == dtype
    assert found.shape == operator.out_structure().shape
    np.testing.assert_array_equal(found, expected)
    stacked = jax.jit(jax.vmap(operator.mv))(x)
    np.testing.assert_array_equal(stacked, jax.jit(jax.vmap(layer))(x))


@pytest.mark.parametrize("index", range(len(LAYERS)), ids=lambda i: str(LAYERS[i][0]))
def test_transposes_are_those_of_the_matrix(index, getkey):
    config, size = LAYERS[index]
    layer = config.make(getkey())
    matrix, _ = by_definition(layer, layer.weight, size)
    operator = spectrax.layer_operator(layer, input_size=size)
    np.testing.assert_allclose(operator.as_matrix(), matrix, atol=1e-13)
    np.testing.assert_allclose(operator.T.as_matrix(), matrix.T, atol=1e-13)
    assert eqx.tree_equal(operator.T.T, operator)
    assert not lx.is_symmetric(operator)
