"""Operators that are matrices, or become one at the price of a bounded error."""

import functools as ft
import math

import equinox as eqx
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Float, Inexact

from .._custom_types import LinearOperator
from ._products import product
from ._rounding import (
    flushed_below,
    frobenius,
    power_of_two,
    real_parts,
    unit_roundoff,
    up,
    working_dtype,
)


# More entries than this are not written out unasked.
MOST_ENTRIES = 2**22


class DenseForm(eqx.Module):
    """A real matrix, and a bound in Frobenius norm on what it is off by. That of a
    complex operator is `[[X, -Y], [Y, X]]`, of the same norm.

    - `matrix`: in float64 if that is enabled, in float32 otherwise.
    - `error`: the bound, zero if the matrix is exact.
    """

    matrix: Float[Array, "rows columns"]
    error: Float[Array, ""]


@ft.singledispatch
def dense_form(operator: LinearOperator) -> DenseForm | None:
    """The operator written out, with a bound on what that is off by.

    **Arguments:**

    - `operator`: of any kind. By default `None`, as what a product rounds is not known.

    **Returns:** a [`spectrax.internal.DenseForm`][], or `None` if that is not known to
    be rigorous, or too large.

    **Raises:** nothing.
    """
    del operator
    return None


@dense_form.register
def _(operator: lx.MatrixLinearOperator) -> DenseForm:
    return exact_form(operator.matrix)


@dense_form.register(lx.TridiagonalLinearOperator)
@dense_form.register(lx.PyTreeLinearOperator)
@dense_form.register(lx.DiagonalLinearOperator)
@dense_form.register(lx.IdentityLinearOperator)
def _(operator: LinearOperator) -> DenseForm | None:
    return exact_form(operator.as_matrix()) if is_small(operator) else None


@dense_form.register
def _(operator: lx.TaggedLinearOperator) -> DenseForm | None:
    return dense_form(operator.operator)


@dense_form.register
def _(operator: lx.NegLinearOperator) -> DenseForm | None:
    form = dense_form(operator.operator)
    return None if form is None else DenseForm(-form.matrix, form.error)


@dense_form.register
def _(operator: lx.AddLinearOperator) -> DenseForm | None:
    forms = _both(operator)
    if forms is None:
        return None
    a, b = forms
    if a.matrix.shape != b.matrix.shape:
        return None
    total = a.matrix + b.matrix
    rounding = 2 * unit_roundoff(total.dtype) * _length(total)
    return DenseForm(total, up(a.error + b.error + rounding))


@dense_form.register
def _(operator: lx.ComposedLinearOperator) -> DenseForm | None:
    forms = _both(operator)
    if forms is None:
        return None
    a, b = forms
    if a.matrix.shape[1] != b.matrix.shape[0]:
        return None
    a_scale, b_scale = _scale(a.matrix), _scale(b.matrix)
    value, error = product(a.matrix / a_scale, b.matrix / b_scale)
    spread = a.error * _length(b.matrix) + _length(a.matrix) * b.error
    spread = up(spread + a.error * b.error)
    value = value * a_scale * b_scale
    # What is below the smallest normal number is lost, also before the last scale.
    lost = 4 * math.sqrt(value.size) * float(jnp.finfo(value.dtype).tiny)
    lost = lost * jnp.maximum(b_scale, 1)
    return DenseForm(value, up(error * a_scale * b_scale + spread) + lost)


def exact_form(matrix: Inexact[Array, "m n"]) -> DenseForm:
    """Of a matrix given by its entries, of which only subnormal ones may be lost."""
    lost = math.sqrt(2 * matrix.size) * flushed_below(matrix.dtype)
    return DenseForm(as_real(matrix), jnp.asarray(lost, working_dtype()))


def as_real(matrix: Inexact[Array, "m n"]) -> Float[Array, "_ _"]:
    """In the working dtype; a complex matrix as the real one of twice the size."""
    real, *rest = real_parts(matrix)
    if not rest:
        return real
    (imag,) = rest
    return jnp.block([[real, -imag], [imag, real]])


def is_small(operator: LinearOperator) -> bool:
    """Whether it may be written out unasked."""
    return operator.in_size() * operator.out_size() <= MOST_ENTRIES


def _both(
    operator: lx.AddLinearOperator | lx.ComposedLinearOperator,
) -> tuple[DenseForm, DenseForm] | None:
    """Of both parts, if they are known and small. If one is real and the other complex
    they do not fit.
    """
    if not is_small(operator):
        return None
    a, b = dense_form(operator.operator1), dense_form(operator.operator2)
    return None if a is None or b is None else (a, b)


def _scale(matrix: Float[Array, "m n"]) -> Float[Array, ""]:
    return power_of_two(jnp.max(jnp.abs(matrix)))


def _length(matrix: Float[Array, "m n"]) -> Float[Array, ""]:
    """The Frobenius norm, rounded up, of a matrix of any scale."""
    scale = _scale(matrix)
    return up(frobenius(matrix / scale) * scale)
