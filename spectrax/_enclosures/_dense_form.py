"""Operators that are matrices, or become one at the price of a bounded error."""

import functools as ft
import math

import equinox as eqx
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Float, Inexact

from .._custom_types import LinearOperator
from ._correlation import written_out
from ._geometry import axes_of, correlation_kernel
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
    """

    matrix: Float[Array, "rows columns"]
    error: Float[Array, ""]


@ft.singledispatch
def dense_form(operator: LinearOperator) -> DenseForm | None:
    """The operator written out, or `None` if that is not known to be rigorous."""
    del operator
    return None


@dense_form.register(lx.MatrixLinearOperator)
@dense_form.register(lx.TridiagonalLinearOperator)
@dense_form.register(lx.PyTreeLinearOperator)
@dense_form.register(lx.DiagonalLinearOperator)
@dense_form.register(lx.IdentityLinearOperator)
def _(operator: LinearOperator) -> DenseForm | None:
    if isinstance(operator, lx.MatrixLinearOperator):
        return exact_form(operator.matrix)
    return exact_form(operator.as_matrix()) if _is_small(operator) else None


@dense_form.register
def _(operator: lx.FunctionLinearOperator) -> DenseForm | None:
    layer = operator.fn
    is_convolution = isinstance(layer, eqx.nn.Conv | eqx.nn.ConvTranspose)
    if not is_convolution or not _is_small(operator):
        return None
    axes = axes_of(layer, operator)
    matrix, error = written_out(correlation_kernel(layer), axes)
    if isinstance(layer, eqx.nn.ConvTranspose):
        matrix = matrix.T
    # Subnormal taps may be lost before they are entries, up to one of each in a sum.
    lost = math.sqrt(2 * matrix.size) * layer.weight[0, 0].size
    lost = lost * flushed_below(layer.weight.dtype)
    # The real form of a complex matrix has its error twice.
    error = up(1.5 * error + jnp.asarray(lost, error.dtype)) + exact_form(matrix).error
    return DenseForm(as_real(matrix), error)


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
    total = a.matrix + b.matrix
    rounding = 2 * unit_roundoff(total.dtype) * _length(total)
    return DenseForm(total, up(a.error + b.error + rounding))


@dense_form.register
def _(operator: lx.ComposedLinearOperator) -> DenseForm | None:
    forms = _both(operator)
    if forms is None:
        return None
    a, b = forms
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


def _is_small(operator: LinearOperator) -> bool:
    return operator.in_size() * operator.out_size() <= MOST_ENTRIES


def _both(
    operator: lx.AddLinearOperator | lx.ComposedLinearOperator,
) -> tuple[DenseForm, DenseForm] | None:
    """Of both parts, if they are known, small, and both real or both complex."""
    if not _is_small(operator):
        return None
    a, b = dense_form(operator.operator1), dense_form(operator.operator2)
    if a is None or b is None:
        return None
    if isinstance(operator, lx.AddLinearOperator):
        fits = a.matrix.shape == b.matrix.shape
    else:
        fits = a.matrix.shape[1] == b.matrix.shape[0]
    return (a, b) if fits else None


def _scale(matrix: Float[Array, "m n"]) -> Float[Array, ""]:
    return power_of_two(jnp.max(jnp.abs(matrix)))


def _length(matrix: Float[Array, "m n"]) -> Float[Array, ""]:
    """The Frobenius norm, rounded up, of a matrix of any scale."""
    scale = _scale(matrix)
    return up(frobenius(matrix / scale) * scale)
