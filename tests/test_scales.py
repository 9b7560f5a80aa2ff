"""Derivatives of constrained weights at every scale, in units of the norm."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import spectrax


SCALES = (1e-25, 1e-20, 1e-10, 1.0, 1e10, 1e19, 1e25)
KEY = jr.key(3)
LAYERS = {
    "matrix": (eqx.nn.Linear(4, 5, use_bias=False, key=KEY), {}),
    "convolution": (eqx.nn.Conv1d(2, 3, 3, use_bias=False, key=KEY), {}),
    "convolution of one size": (
        eqx.nn.Conv1d(2, 3, 3, use_bias=False, key=KEY),
        {"input_size": (7,)},
    ),
    "Fourier": (spectrax.nn.FourierLayer(1, 2, 3, 4, key=KEY), {}),
}
CONSTRAINTS = {
    "normalize": spectrax.Normalize(2.0),
    "learned": spectrax.LearnableBound(2.0),
    "clip": spectrax.ClipToInitial(0.5),
}
# So that the state is the same at every scale.
CONVERGED = spectrax.PowerIteration(init_steps=200)


def cast(tree: Any, scale: float, dtype: Any) -> Any:
    """The layer with its arrays multiplied in float64 and rounded once."""

    def leaf(x: Any) -> Any:
        if not eqx.is_inexact_array(x):
            return x
        kind = jnp.promote_types(dtype, jnp.complex64) if jnp.iscomplexobj(x) else dtype
        return (scale * x).astype(kind)

    return jax.tree.map(leaf, tree)


@eqx.filter_jit
def derivatives(model: Any, state: Any, unit: Any, probe: Any) -> Any:
    """A functional of the constrained weights; its gradient, and the change of that, in
    units of the norm.
    """
    model, static = eqx.partition(model, eqx.is_inexact_array)
    direction = jax.tree.map(
        # A number is the bound that is trained, which has no scale.
        lambda x: unit.astype(x.dtype) * jnp.sin(x / unit) if x.ndim else 0.3 + 0 * x,
        model,
    )

    def value(model: Any) -> Any:
        plain = spectrax.unwrap(eqx.combine(model, static), state)
        leaves = jax.tree.leaves(eqx.filter(plain, eqx.is_inexact_array))
        terms = [jnp.sum(jnp.real(x) * p) for x, p in zip(leaves, probe, strict=True)]
        return sum(terms[1:], terms[0])

    first, second = jax.jvp(jax.grad(value), (model,), (direction,))
    return jax.tree.map(lambda x: x * unit.astype(x.dtype), (first, second))


@pytest.mark.parametrize(
    ("kind", "constraint", "estimator"),
    [
        *[("matrix", constraint, CONVERGED) for constraint in CONSTRAINTS],
        ("matrix", "normalize", spectrax.ExactSVD()),
        *[(kind, "normalize", CONVERGED) for kind in LAYERS if kind != "matrix"],
    ],
    ids=str,
)
def test_derivatives_do_not_depend_on_the_scale(
    kind: str, constraint: str, estimator: spectrax.AbstractEstimator
):
    layer, options = LAYERS[kind]
    rule = CONSTRAINTS[constraint]
    leaves = jax.tree.leaves(eqx.filter(layer, eqx.is_inexact_array))
    keys = jr.split(jr.key(5), len(leaves))
    probe = [jr.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]

    def at(scale: float, dtype: Any) -> list[np.ndarray]:
        model, state = spectrax.constrain(
            cast(layer, scale, dtype),
            constraint=rule,
            estimator=estimator,
            **options,
        )
        # What is clipped is as large as the weight was.
        size = 1 / scale if constraint == "clip" else 1.0
        weights = [jnp.asarray(size * p, dtype) for p in probe]
        found = derivatives(model, state, jnp.asarray(scale, dtype), weights)
        return [
            np.asarray(jnp.ravel(x), complex)
            for x in jax.tree.leaves(found)
            if x.ndim > 0
        ]

    expected = at(1.0, jnp.float64)
    for scale in SCALES:
        for right, got in zip(expected, at(scale, jnp.float32), strict=True):
            error = np.max(np.abs(got - right)) / np.max(np.abs(right))
            assert error < 1e-3, (scale, error)
