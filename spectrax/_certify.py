"""Weights for deployment: scaled until their norm is proven to be within the bound."""

import functools as ft
from collections.abc import Callable

import equinox as eqx
import jax
import jax.core
import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Inexact, Int

from ._constraints import AbstractConstraint, apply_scale
from ._enclosures import check_provable, enclose_norm, in_memory
from ._norms import stop_gradient
from ._operators import Operator
from ._tree import over_stack


_MAX_ATTEMPTS = 24
NO_PROOF = (
    "expected weights whose norm can be proven to be within the bound, got one for "
    "which no proof was found: it has a NaN or an infinity, or its bound is zero."
)


def certified_weights(
    weight: Inexact[Array, "..."],
    view: Callable[[Array], Operator],
    depth: int,
    constraint: AbstractConstraint,
    norm: Callable[[], Float[Array, "*stack"]],
) -> Inexact[Array, "..."]:
    """A weight, or a whole stack of them, scaled such that the constraint is proven to
    be kept. `norm` finds the norm of the raw weight, if it is needed.

    While a function is traced nothing can be raised in a program that can be exported:
    a weight for which no proof is found is then NaN.
    """
    one = jax.ShapeDtypeStruct(weight.shape[depth:], weight.dtype)
    operator = eqx.filter_eval_shape(view, one)
    check_provable(operator)
    target = constraint.target()
    concrete = in_memory(weight) and in_memory(target)
    if concrete:
        found = certified_in_memory(operator, view, depth, weight, constraint)
        if found is not None:
            return found
    scale = constraint.scale(norm())
    bound = jnp.broadcast_to(target, scale.shape)
    certified, proven = _certified(view, depth, weight, scale, bound)
    if not isinstance(proven, jax.core.Tracer) and not proven:
        raise RuntimeError(NO_PROOF)
    return certified


@ft.singledispatch
def certified_in_memory(
    operator: Operator,
    build: Callable[[Array], Operator],
    depth: int,
    weight: Inexact[Array, "..."],
    constraint: AbstractConstraint,
) -> Inexact[Array, "..."] | None:
    """A stack of weights, scaled such that each as it is stored has a norm of at most
    its bound, if there is a way that needs no compilation.

    **Arguments:**

    - `operator`: of the kind that the weights are seen as; its arrays are abstract. By
        default there is no such way.
    - `build`: makes an operator of one weight.
    - `depth`: how many axes the stack has.
    - `weight`: the stack, concrete.
    - `constraint`: with the bound, concrete.

    **Returns:** the scaled stack, or `None`.

    **Raises:** `RuntimeError` if no proof is found.
    """
    del operator, build, depth, weight, constraint
    return None


@eqx.filter_jit
def _certified(
    build: Callable[[Array], Operator],
    depth: int,
    weight: Inexact[Array, "..."],
    scale: Float[Array, "*stack"],
    bound: Float[Array, "*stack"],
) -> tuple[Inexact[Array, "..."], Bool[Array, ""]]:
    one = ft.partial(certified_weight, operator=build)
    certified, proven = over_stack(one, depth)(weight, scale, bound)
    return certified, jnp.all(proven)


def certified_weight(
    weight: Inexact[Array, "..."],
    scale: Float[Array, ""],
    bound: Float[Array, ""],
    operator: Callable[[Array], Operator],
) -> tuple[Inexact[Array, "..."], Bool[Array, ""]]:
    """`weight` times `scale`, or a little less: such that its norm as it is stored, in
    its own dtype after the last rounding, is proven to be at most `bound`. NaN and a
    false flag if there is no proof.

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
    return jnp.where(proven, candidate, jnp.nan), proven
