"""The enclosure of the norm of any operator: each kind by its own argument."""

import dataclasses
import functools as ft
import math
from typing import Any

import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jaxtyping import Array, Float, PRNGKeyArray

from .._custom_types import LinearOperator
from .._dtypes import widest
from .._norms._golub_kahan import leading_triplets, Triplets
from .._operators import apply_rows, Operator
from ._dense import enclose_matrix
from ._dense_form import dense_form
from ._ends import Ends, intersection
from ._rounding import (
    any_nonzero,
    down,
    flushed_below,
    frobenius,
    frobenius_lower,
    gamma,
    power_of_two,
    real_parts,
    up,
    working_dtype,
)


_BASIS_SIZE = 32


@dataclasses.dataclass(frozen=True)
class Effort:
    """How narrow an enclosure is wanted, and what may be done for it.

    - `key`: randomness of the starting vectors.
    - `rtol`: the width asked for, `(upper - lower) / upper`.
    - `max_steps`: the most attempts at a proof.
    - `materialise`: whether to write out operators of which only products are known.
    """

    key: PRNGKeyArray
    rtol: float
    max_steps: int
    materialise: bool


def check_provable(operator: Operator) -> None:
    """Raises if no upper bound on the operator's norm can be proven."""
    if not is_provable(operator):
        raise ValueError(
            "expected an operator whose norm can be bounded from above: a matrix, a "
            "convolution, a Fourier multiplier, or a sum or product of such; got "
            f"{type(operator).__name__}, of which only products are known. Return a "
            "matrix from the `view`, for example with `.as_matrix()`."
        )


@ft.singledispatch
def is_provable(operator: Operator) -> bool:
    """Whether an upper bound on the norm can be proven.

    **Arguments:**

    - `operator`: of any kind; its arrays may be abstract. By default: if its class has
        an `enclose` of its own.

    **Returns:** `False` where [`spectrax.enclose_norm`][] has an infinite `upper`.

    **Raises:** nothing.
    """
    return enclose.dispatch(type(operator)) is not enclose.dispatch(object)


@is_provable.register(lx.AddLinearOperator)
@is_provable.register(lx.ComposedLinearOperator)
def _(operator: lx.AddLinearOperator | lx.ComposedLinearOperator) -> bool:
    return is_provable(operator.operator1) and is_provable(operator.operator2)


@is_provable.register(lx.TaggedLinearOperator)
@is_provable.register(lx.NegLinearOperator)
@is_provable.register(lx.MulLinearOperator)
@is_provable.register(lx.DivLinearOperator)
def _(operator: Any) -> bool:
    return is_provable(operator.operator)


@ft.singledispatch
def default_width(operator: Operator) -> float:
    """The width `(upper - lower) / upper` that [`spectrax.enclose_norm`][] asks for if
    it is not told.

    **Arguments:**

    - `operator`: of any kind. By default 1e-3, or 2e-5 if float64 is enabled.

    **Returns:** a positive number.

    **Raises:** nothing.
    """
    del operator
    return 2e-5 if working_dtype() == jnp.float64 else 1e-3


@ft.singledispatch
def enclose(operator: LinearOperator, effort: Effort) -> Ends:
    """Both ends of the norm, as [`spectrax.enclose_norm`][] returns them.

    **Kind:** a lower and an upper bound, rounding included.

    **Arguments:**

    - `operator`: of any kind. By default a lower bound only, `upper` being infinite,
        unless the operator is to be materialised.
    - `effort`: how narrow the enclosure is wanted, and what may be done for it.

    **Returns:** [`spectrax.internal.Ends`][] in float64 if that is enabled, in float32
    otherwise.

    **Raises:** nothing; the operator has been looked at.
    """
    return _enclose_unknown(operator, effort)


@enclose.register
def _(operator: lx.MatrixLinearOperator, effort: Effort) -> Ends:
    return enclose_dense(operator.matrix, 0.0, effort)


@enclose.register(lx.PyTreeLinearOperator)
@enclose.register(lx.TridiagonalLinearOperator)
def _(operator: LinearOperator, effort: Effort) -> Ends:
    return enclose_dense(operator.as_matrix(), 0.0, effort)


@enclose.register
def _(operator: lx.DiagonalLinearOperator, effort: Effort) -> Ends:
    del effort
    return _largest_entry(jtu.tree_leaves(operator.diagonal))


@enclose.register
def _(operator: lx.IdentityLinearOperator, effort: Effort) -> Ends:
    del operator, effort
    one = jnp.ones((), working_dtype())
    return Ends(one, one)


@enclose.register(lx.TaggedLinearOperator)
@enclose.register(lx.NegLinearOperator)
def _(operator: lx.TaggedLinearOperator | lx.NegLinearOperator, effort: Effort) -> Ends:
    return enclose(operator.operator, effort)


@enclose.register
def _(operator: lx.MulLinearOperator, effort: Effort) -> Ends:
    ends, size = enclose(operator.operator, effort), _scalar(operator.scalar)
    return Ends(ends.times(size.lower).lower, ends.times(size.upper).upper)


@enclose.register
def _(operator: lx.DivLinearOperator, effort: Effort) -> Ends:
    ends, size = enclose(operator.operator, effort), _scalar(operator.scalar)
    finfo = jnp.finfo(size.upper.dtype)
    # Dividing by zero is not finite.
    positive = jnp.where(size.upper == 0, jnp.nan, size.upper)
    lower = down(ends.lower / positive)
    lower = jnp.where(lower < 2 * finfo.tiny, 0, jnp.minimum(lower, finfo.max))
    upper = jnp.maximum(up(ends.upper / size.lower), finfo.tiny)
    upper = jnp.where((ends.upper == 0) & (size.upper > 0), 0, upper)
    return Ends(lower, jnp.where(jnp.isnan(positive), jnp.nan, upper))


def _scalar(scalar: Any) -> Ends:
    """Its absolute value."""
    value = jnp.asarray(scalar)
    if not jnp.issubdtype(value.dtype, jnp.inexact):
        size = jnp.abs(value.astype(working_dtype()))
        return Ends(down(size), up(size))
    return _largest_entry([value])


@enclose.register
def _(operator: lx.AddLinearOperator, effort: Effort) -> Ends:
    a, b = enclose(operator.operator1, effort), enclose(operator.operator2, effort)
    apart = jnp.maximum(a.lower - b.upper, b.lower - a.upper)
    sum_of_both = Ends(jnp.maximum(_finite(down(apart)), 0), up(a.upper + b.upper))
    return with_dense_form(operator, sum_of_both, effort)


@enclose.register
def _(operator: lx.ComposedLinearOperator, effort: Effort) -> Ends:
    a, b = enclose(operator.operator1, effort), enclose(operator.operator2, effort)
    both = Ends(jnp.zeros_like(a.lower), a.times(b.upper).upper)
    return with_dense_form(operator, both, effort)


def _enclose_unknown(operator: LinearOperator, effort: Effort) -> Ends:
    if effort.materialise:
        return enclose_dense(operator.as_matrix(), 0.0, effort)
    return _stretch_only(operator, effort)


def _largest_entry(leaves: list[Array]) -> Ends:
    """Of real numbers it is exact; the absolute value of a complex one is rounded."""
    sizes = [jnp.max(jnp.abs(leaf.astype(_wide(leaf.dtype)))) for leaf in leaves]
    size = jnp.max(jnp.stack(sizes))
    ends = Ends(size, size)
    if any(map(jnp.iscomplexobj, leaves)):
        ends = Ends(down(size), up(size))
    tiny = 2 * max(flushed_below(leaf.dtype) for leaf in leaves)
    nonzero = jnp.any(jnp.stack([any_nonzero(leaf) for leaf in leaves]))
    upper = jnp.where(nonzero, jnp.maximum(ends.upper, tiny), 0)
    lower = jnp.minimum(ends.lower, jnp.finfo(size.dtype).max)
    lower = jnp.where(size > tiny, lower, 0)
    finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]))
    return Ends(jnp.where(finite, lower, jnp.nan), jnp.where(finite, upper, jnp.nan))


def enclose_dense(
    matrix: Array, error: Float[Array, ""] | float, effort: Effort
) -> Ends:
    """Of a real matrix that is off by no more than `error` in Frobenius norm."""
    # The default width for convolutions is not what a matrix has to be content with.
    rtol = min(effort.rtol, 1e-3)
    return enclose_matrix(
        matrix, error, effort.key, rtol=rtol, max_attempts=effort.max_steps
    )


def with_dense_form(operator: LinearOperator, ends: Ends, effort: Effort) -> Ends:
    """The better of the given ends and of those of the operator written out."""
    form = dense_form(operator)
    if form is None:
        return ends
    found = enclose_dense(form.matrix, form.error, effort)
    # What overflows when it is written out says nothing.
    known = jnp.isfinite(found.upper)
    upper = jnp.where(known, found.upper, jnp.inf)
    return intersection([ends, Ends(jnp.where(known, found.lower, 0), upper)])


def leading(operator: LinearOperator, effort: Effort) -> Triplets:
    """Its leading singular vectors, as close as the width asks for."""
    return leading_triplets(
        operator,
        effort.key,
        count=1,
        basis_size=_BASIS_SIZE,
        max_cycles=effort.max_steps,
        # The error of the norm is of second order in the residual.
        rtol=math.sqrt(effort.rtol) / 8,
    )


def _stretch_only(operator: LinearOperator, effort: Effort) -> Ends:
    """A lower end only: how much longer the operator, as it is evaluated, makes a
    vector. Its own rounding is not known; some is allowed for.
    """
    found = leading(operator, effort)
    image = apply_rows(operator, found.v)[0]
    image, vector = (jnp.concatenate(real_parts(x)) for x in (image, found.v[0]))
    scale = power_of_two(jnp.max(jnp.abs(image)))
    length = frobenius_lower(image / scale) / up(frobenius(vector))
    leaves = jtu.tree_leaves((operator.in_structure(), operator.out_structure()))
    coarsest = max((leaf.dtype for leaf in leaves), key=lambda t: jnp.finfo(t).eps)
    rounding = gamma(2 * (operator.in_size() + operator.out_size()), coarsest)
    lower = Ends(down(length * max(0.0, 1 - rounding)), length).times(scale).lower
    return Ends(_finite(lower), jnp.full((), jnp.inf, lower.dtype))


def _wide(dtype: Any) -> Any:
    """The working dtype, or its complex one."""
    complex_ = jnp.issubdtype(dtype, jnp.complexfloating)
    return widest(working_dtype(), jnp.complex64) if complex_ else working_dtype()


def _finite(value: Float[Array, ""]) -> Float[Array, ""]:
    return jnp.where(jnp.isfinite(value), value, 0)
