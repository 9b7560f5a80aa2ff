"""Weights for deployment: scaled until their norm is proven to be within the bound."""

import functools as ft
from collections.abc import Callable

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Inexact, Int

from ._certify_kernel import certified_kernels, NO_PROOF
from ._constraints import AbstractConstraint, apply_scale
from ._enclosures import check_provable, enclose_norm, in_memory
from ._norms import stop_gradient
from ._operators import LatticeConvolution, Operator
from ._tree import over_stack


_MAX_ATTEMPTS = 24


def certified_weights(
    weight: Inexact[Array, "..."],
    view: Callable[[Array], Operator],
    depth: int,
    constraint: AbstractConstraint,
    norm: Callable[[], Float[Array, "*stack"]],
) -> Inexact[Array, "..."]:
    """A weight, or a whole stack of them, scaled such that the constraint is proven to
    be kept. `norm` finds the norm of the raw weight, if it is needed.
    """
    one = jax.ShapeDtypeStruct(weight.shape[depth:], weight.dtype)
    operator = eqx.filter_eval_shape(view, one)
    check_provable(operator)
    target = constraint.target()
    concrete = in_memory(weight) and in_memory(target)
    if concrete and isinstance(operator, LatticeConvolution):
        return certified_kernels(view, depth, weight, constraint)
    scale = constraint.scale(norm())
    bound = jnp.broadcast_to(target, scale.shape)
    return _certified(view, depth, weight, scale, bound)


@eqx.filter_jit
def _certified(
    build: Callable[[Array], Operator],
    depth: int,
    weight: Inexact[Array, "..."],
    scale: Float[Array, "*stack"],
    bound: Float[Array, "*stack"],
) -> Inexact[Array, "..."]:
    one = ft.partial(certified_weight, operator=build)
    return over_stack(one, depth)(weight, scale, bound)


def certified_weight(
    weight: Inexact[Array, "..."],
    scale: Float[Array, ""],
    bound: Float[Array, ""],
    operator: Callable[[Array], Operator],
) -> Inexact[Array, "..."]:
    """`weight` times `scale`, or a little less: such that its norm as it is stored, in
    its own dtype after the last rounding, is proven to be at most `bound`.

    Each attempt scales down by what was missing and a little more, twice as much every
    time. One or two suffice, unless rounding to a narrow dtype works against it.
    """
    weight, scale, bound = stop_gradient((weight, scale, bound))

    def unfinished(
        carry: tuple[Array, Array, Bool[Array, ""], Int[Array, ""]],
    ) -> Bool[Array, ""]:
        _, _, proven, count = carry
        return ~proven & (count < _MAX_ATTEMPTS)

    def attempt(
        carry: tuple[Array, Array, Bool[Array, ""], Int[Array, ""]],
    ) -> tuple[Array, Array, Bool[Array, ""], Int[Array, ""]]:
        _, scale, _, count = carry
        candidate = apply_scale(weight, scale)
        upper = enclose_norm(operator(candidate)).upper
        limit = bound.astype(upper.dtype)
        missing = jnp.minimum(1, limit / jnp.where(upper > 0, upper, 1))
        eps = float(jnp.finfo(scale.dtype).eps)
        less = 1 - 32 * eps * 2.0 ** count.astype(scale.dtype)
        smaller = scale * missing.astype(scale.dtype) * less
        return candidate, smaller, upper <= limit, count + 1

    start = weight, scale, jnp.zeros((), bool), jnp.asarray(0)
    candidate, _, proven, _ = lax.while_loop(unfinished, attempt, start)
    return eqx.error_if(candidate, ~proven, NO_PROOF)
