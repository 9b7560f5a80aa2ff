"""From a norm to a scale; and what holds for all abstract classes of the package."""

import importlib
import inspect
import math
import pkgutil
from typing import Any

import equinox as eqx
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spectrax

from .helpers import unchecked


sigmas = st.floats(1e-30, 1e30)
bounds = st.sampled_from([1e-3, 0.3, 1.0, 50.0])


def scale_of(constraint: spectrax.AbstractConstraint, sigma: float) -> float:
    """As `wrap` does it: one instance for the weight, then its scale."""
    value = jnp.asarray(sigma)
    return float(constraint.init(value).scale(value))


def slope_of(constraint: spectrax.AbstractConstraint, sigma: float) -> float:
    value = jnp.asarray(sigma)
    return float(jax.grad(constraint.init(value).scale)(value))


# Normalize and Clip


@hypothesis.given(sigmas, bounds)
def test_normalize_brings_every_norm_to_the_bound(sigma: float, bound: float):
    scale = scale_of(spectrax.Normalize(bound), sigma)
    assert scale * sigma == pytest.approx(bound, rel=1e-14)


@hypothesis.given(sigmas, bounds)
def test_clip_never_scales_up_and_brings_larger_norms_to_the_bound(
    sigma: float, bound: float
):
    scale = scale_of(spectrax.Clip(bound), sigma)
    assert scale <= 1
    assert scale * sigma == pytest.approx(min(sigma, bound), rel=1e-14)


@pytest.mark.parametrize("bound", [0.3, 1.0, 1 / 3])
def test_clip_is_exactly_one_up_to_the_bound(bound: float):
    for sigma in (0.0, 1e-300, bound / 2, math.nextafter(bound, 0), bound):
        assert scale_of(spectrax.Clip(bound), sigma) == 1
    assert scale_of(spectrax.Clip(bound), bound * (1 + 1e-9)) < 1


def test_the_sign_of_sigma_is_ignored():
    for constraint in (spectrax.Normalize(2.0), spectrax.Clip(2.0)):
        for sigma in (1.5, 5.0):
            assert scale_of(constraint, -sigma) == scale_of(constraint, sigma) > 0


def test_clip_has_no_slope_below_the_bound_and_that_of_normalize_above():
    clip, normalize = spectrax.Clip(2.0), spectrax.Normalize(2.0)
    assert slope_of(clip, 1.9) == 0
    assert slope_of(clip, 4.0) == slope_of(normalize, 4.0) == -2 / 16
    assert slope_of(normalize, 1.0) == -2


def test_clipped_weight_is_the_identity_below_the_bound_and_can_shrink_above():
    def clipped(weight: jax.Array, bound: float) -> jax.Array:
        sigma = spectrax.spectral_norm(weight, max_steps=32)
        return weight * spectrax.Clip(bound).init(sigma).scale(sigma)

    weight = jnp.diag(jnp.array([3.0, 1.0]))
    loose, tight = (
        jax.jit(lambda w, b=b: (clipped(w, b), jax.jacrev(clipped)(w, b)))(weight)
        for b in (4.0, 2.0)
    )
    np.testing.assert_array_equal(loose[0], weight)
    np.testing.assert_array_equal(loose[1].reshape(4, 4), np.eye(4))
    np.testing.assert_allclose(tight[0], weight * 2 / 3, rtol=1e-14)
    # Above, a change of the weight's length changes nothing, all others do.
    slopes = np.einsum("ijkl,kl->ij", tight[1], weight)
    np.testing.assert_allclose(slopes, 0, atol=1e-14)
    assert tight[1][1, 1, 1, 1] == pytest.approx(2 / 3)
    assert tight[1][1, 1, 0, 0] == pytest.approx(-2 / 9)


@pytest.mark.parametrize("value", [0.0, math.nan])
@pytest.mark.parametrize(
    ("constraint", "at_zero"),
    [
        (spectrax.Normalize(2.0), 0.0),
        (spectrax.Clip(2.0), 1.0),
        (spectrax.LearnableBound(2.0), 0.0),
        (spectrax.LearnableBound(2.0, maximum=3.0), 0.0),
    ],
)
def test_zero_has_a_finite_scale_without_slope_and_nan_stays_nan(
    constraint: spectrax.AbstractConstraint, at_zero: float, value: float
):
    expected = value + at_zero
    np.testing.assert_equal(scale_of(constraint, value), expected)
    slopes = (
        slope_of(constraint, 0.0),
        jax.hessian(constraint.init(jnp.array(0.0)).scale)(jnp.array(0.0)),
    )
    assert slopes == (0, 0)


def test_scale_at_zero_is_exactly_one_with_clip_to_initial():
    constraint = spectrax.ClipToInitial().init(jnp.array(0.0))
    assert constraint.scale(jnp.array(0.0)) == 1
    assert constraint.scale(jnp.array(2.0)) == 0
    assert jax.grad(constraint.scale)(jnp.array(0.0)) == 0


@pytest.mark.parametrize("kind", [spectrax.Normalize, spectrax.Clip])
@pytest.mark.parametrize("bound", [2.0, np.array([1.0, 2.0, 4.0]), jnp.array([3.0])])
def test_stacks_have_one_bound_for_each_weight(kind: type, bound: Any):
    sigma = jnp.array([8.0, 16.0, 0.5], jnp.float32)
    constraint = kind(bound).init(sigma)
    full = np.broadcast_to(np.asarray(bound), 3)
    assert constraint.target().shape == (3,)
    assert constraint.target().dtype == constraint.scale(sigma).dtype == jnp.float32
    np.testing.assert_array_equal(constraint.target(), full)
    ratio = full / np.asarray(sigma)
    expected = np.minimum(ratio, 1) if kind is spectrax.Clip else ratio
    np.testing.assert_allclose(constraint.scale(sigma), expected, rtol=1e-6)


@pytest.mark.parametrize("value", ["2", True, 1j, None])
def test_what_is_no_bound(value):
    match = "to be a real number or an array of them, got"
    for make in (
        spectrax.Normalize,
        spectrax.Clip,
        spectrax.ClipToInitial,
        spectrax.LearnableBound,
    ):
        with unchecked(), pytest.raises(TypeError, match=match):
            make(value)


@pytest.mark.parametrize("value", [1.5, True, "1"])
@pytest.mark.parametrize("name", ["num_steps", "block_size", "init_steps"])
def test_what_is_no_count(name, value):
    match = f"expected `{name}` to be an integer, got"
    with unchecked(), pytest.raises(TypeError, match=match):
        spectrax.PowerIteration(**{name: value})


@pytest.mark.parametrize(
    "constraint",
    [
        spectrax.Normalize(np.ones(2)),
        spectrax.Clip(np.ones(2)),
        spectrax.LearnableBound(np.ones(2)),
    ],
    ids=str,
)
def test_bounds_that_fit_no_stack_are_rejected(
    constraint: spectrax.AbstractConstraint,
):
    message = r"expected `bound` to be .* broadcasts to \(3,\).* got shape \(2,\)"
    with pytest.raises(ValueError, match=message):
        constraint.init(jnp.ones(3))


@pytest.mark.parametrize("kind", [spectrax.Normalize, spectrax.Clip])
@pytest.mark.parametrize(
    "bound", [0.0, -1.0, math.nan, math.inf, np.array([1.0, 0.0])], ids=str
)
def test_bounds_that_are_not_positive_and_finite_are_rejected(kind: type, bound: Any):
    with pytest.raises(ValueError, match="expected `bound` to be positive and finite"):
        kind(bound)


# ClipToInitial


@hypothesis.given(sigmas, st.sampled_from(["float32", "float64"]))
def test_clip_to_initial_starts_at_exactly_one(sigma: float, dtype: str):
    value = jnp.asarray(sigma, dtype)
    constraint = spectrax.ClipToInitial().init(value)
    assert constraint.scale(value) == 1
    eps = float(jnp.finfo(dtype).eps)
    # Neither a rounding error of the estimate scales the weight, nor more than that
    # gets through.
    assert constraint.scale(value * (1 + 8 * eps)) == 1
    assert float(constraint.target()) == pytest.approx(float(value), rel=20 * eps)
    assert constraint.scale(value * (1 + 40 * eps)) < 1
    assert float(constraint.scale(3 * value)) == pytest.approx(1 / 3, rel=40 * eps)
    assert constraint.scale(value / 3) == 1


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_clip_to_initial_allows_the_factor(factor: float):
    constraint = spectrax.ClipToInitial(factor).init(jnp.array([3.0, 5.0]))
    np.testing.assert_allclose(constraint.target(), [3 * factor, 5 * factor])
    np.testing.assert_allclose(
        constraint.scale(jnp.array([30.0, 0.5])), [factor / 10, 1]
    )


def test_clip_to_initial_takes_the_bound_of_the_last_init():
    constraint = spectrax.ClipToInitial().init(jnp.array(3.0)).init(jnp.array(5.0))
    assert float(constraint.target()) == pytest.approx(5)


def test_clip_to_initial_needs_to_see_the_weight():
    message = "expected a `ClipToInitial` that has seen a weight"
    with pytest.raises(ValueError, match=message):
        spectrax.ClipToInitial().target()
    with pytest.raises(ValueError, match=message):
        spectrax.ClipToInitial().scale(jnp.array(1.0))


@pytest.mark.parametrize("factor", [0.0, -1.0, math.nan, math.inf])
def test_factors_that_are_not_positive_and_finite_are_rejected(factor: float):
    message = f"expected `factor` to be positive and finite, got {factor}"
    with pytest.raises(ValueError, match=message):
        spectrax.ClipToInitial(factor)


# LearnableBound


def with_raw(
    constraint: spectrax.LearnableBound, raw: float
) -> spectrax.LearnableBound:
    return eqx.tree_at(lambda c: c.raw, constraint, jnp.asarray(raw, float))


@pytest.mark.parametrize("maximum", [None, 60.0])
@pytest.mark.parametrize("init", [1e-3, 1.0, 50.0])
def test_learnable_bound_starts_at_init(init: float, maximum: float | None):
    constraint = spectrax.LearnableBound(init, maximum=maximum)
    assert float(constraint.target()) == pytest.approx(init, rel=1e-13)
    assert scale_of(constraint, 4.0) * 4 == pytest.approx(init, rel=1e-13)


@hypothesis.given(st.floats(-700, 700))
def test_learnable_bound_is_positive_whatever_is_trained(raw: float):
    free = with_raw(spectrax.LearnableBound(), raw)
    capped = with_raw(spectrax.LearnableBound(maximum=3.0), raw)
    assert float(free.target()) == pytest.approx(math.exp(raw), rel=1e-12)
    assert 0 < capped.target() <= 3
    assert float(capped.target()) == pytest.approx(3 / (1 + math.exp(-raw)), rel=1e-12)


@pytest.mark.parametrize("maximum", [None, 3.0])
def test_learnable_bound_has_a_gradient_in_what_is_trained(maximum: float | None):
    constraint = spectrax.LearnableBound(2.0, maximum=maximum)
    sigma = jnp.array(5.0)
    gradient = jax.grad(lambda c: c.scale(sigma))(constraint)
    # bound' is bound for the exponential, bound (1 - bound / maximum) for the sigmoid.
    slope = 2 if maximum is None else 2 * (1 - 2 / 3)
    assert float(gradient.raw) == pytest.approx(slope / 5, rel=1e-12)
    assert slope_of(constraint, 5.0) == pytest.approx(-2 / 25)


def test_learnable_bound_of_a_stack_has_one_for_each_weight():
    sigma = jnp.array([8.0, 16.0, 0.5], jnp.float32)
    for init in (2.0, np.array([1.0, 2.0, 4.0])):
        for maximum in (None, 9.0):
            constraint = spectrax.LearnableBound(init, maximum=maximum).init(sigma)
            assert constraint.raw.shape == (3,)
            assert constraint.raw.dtype == jnp.float32
            expected = np.broadcast_to(init, 3)
            np.testing.assert_allclose(constraint.target(), expected, rtol=1e-6)


@pytest.mark.parametrize(("init", "got"), [(3.0, "3.0"), (4.0, "4.0")])
def test_learnable_bound_must_start_below_the_maximum(init: float, got: str):
    message = f"expected `bound` to be below `maximum=3.0`, got {got}"
    with pytest.raises(ValueError, match=message):
        spectrax.LearnableBound(init, maximum=3.0)
    with pytest.raises(ValueError, match="expected `bound` to be below `maximum=3.0`"):
        spectrax.LearnableBound(np.array([1.0, init]), maximum=3.0)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_learnable_bounds_that_are_not_positive_and_finite_are_rejected(value: float):
    with pytest.raises(ValueError, match="expected `bound` to be positive and finite"):
        spectrax.LearnableBound(value)
    message = "expected `maximum` to be positive and finite"
    with pytest.raises(ValueError, match=message):
        spectrax.LearnableBound(1.0, maximum=value)


# The interface


def test_only_learnable_bounds_are_trained():
    for kind in (spectrax.Normalize, spectrax.Clip, spectrax.ClipToInitial):
        assert not kind.trainable
    assert spectrax.LearnableBound.trainable


def test_constraints_run_under_jit_and_vmap():
    @jax.jit
    @jax.vmap
    def scales(sigma: jax.Array) -> tuple[jax.Array, ...]:
        constraints = (
            spectrax.Normalize(2.0),
            spectrax.Clip(2.0),
            spectrax.ClipToInitial(),
            spectrax.LearnableBound(2.0),
        )
        return tuple(c.init(sigma).scale(sigma) for c in constraints)

    got = scales(jnp.array([0.0, 1.0, 4.0]))
    expected = ([0, 2, 0.5], [1, 1, 0.5], [1, 1, 1], [0, 2, 0.5])
    for values, truth in zip(got, expected, strict=True):
        np.testing.assert_allclose(values, truth, rtol=1e-14)


def test_bounds_can_be_traced():
    scale = jax.jit(
        lambda b: spectrax.Clip(b).init(jnp.array(4.0)).scale(jnp.array(4.0))
    )
    assert scale(2.0) == 0.5
    assert jax.grad(scale)(2.0) == 0.25


def test_interfaces_cannot_be_instantiated():
    for kind in (spectrax.AbstractConstraint, spectrax.AbstractEstimator):
        with pytest.raises(TypeError, match="abstract"):
            kind()


def all_modules() -> list[str]:
    found = pkgutil.walk_packages(spectrax.__path__, "spectrax.")
    return [info.name for info in found]


def module_classes() -> set[type]:
    """All `equinox.Module`s that the package defines, private ones included."""
    classes = set()
    for name in all_modules():
        members = inspect.getmembers(importlib.import_module(name), inspect.isclass)
        classes |= {
            member
            for _, member in members
            if issubclass(member, eqx.Module)
            and member.__module__.startswith("spectrax")
        }
    return classes


def is_abstract(kind: type) -> bool:
    return kind.__name__.startswith("Abstract")


def test_every_class_is_abstract_or_final():
    classes = module_classes()
    assert {spectrax.Clip, spectrax.PowerState, spectrax.PowerIteration} <= classes
    offenders = {
        (kind, base)
        for kind in classes
        for base in kind.__mro__[1:]
        if base in classes and not is_abstract(base)
    }
    # A ready layer is a `Wrapped` that makes the module in it by itself.
    assert {base for _, base in offenders} == {spectrax.Wrapped}
    assert all(kind.__module__.startswith("spectrax.nn.") for kind, _ in offenders)


def test_abstract_classes_are_named_so_and_no_others_are():
    for kind in module_classes():
        # Of Equinox's abstract class variables `isabstract` does not know.
        missing = inspect.isabstract(kind) or bool(kind.__abstractclassvars__)
        assert missing == is_abstract(kind), kind


def test_no_concrete_method_is_overridden():
    offenders = []
    for kind in module_classes():
        for base in kind.__mro__[1:]:
            if base in module_classes():
                offenders += [
                    (kind, name)
                    for name, value in vars(base).items()
                    if name in vars(kind)
                    and inspect.isfunction(value)
                    and not name.startswith("__")
                    and not getattr(value, "__isabstractmethod__", False)
                ]
    assert offenders == []
