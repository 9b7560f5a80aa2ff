"""The enclosure of the norm of any operator: each kind by its own argument."""

import dataclasses
import functools as ft
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jaxtyping import Array, Float, PRNGKeyArray

from .._custom_types import LinearOperator
from .._dtypes import widest
from .._norms._golub_kahan import leading_triplets, Triplets
from .._operators import (
    apply_rows,
    convolution_operator,
    convolution_transpose_operator,
    FourierMultiplier,
    LatticeConvolution,
    Operator,
    unpack_rows,
)
from ._convolution import enclose_correlation, enclose_lattice, MOST_POINTS
from ._correlation import correlation, stretch
from ._dense import enclose_matrix
from ._dense_form import dense_form
from ._ends import Ends, intersection, largest
from ._geometry import axes_of, correlation_kernel, grid_of
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


_KNOWN_FUNCTIONS = eqx.nn.Conv | eqx.nn.ConvTranspose | FourierMultiplier
_TRANSPARENT = (
    lx.TaggedLinearOperator
    | lx.NegLinearOperator
    | lx.MulLinearOperator
    | lx.DivLinearOperator
)
_BASIS_SIZE = 32
# Convolutions of no more entries are written out as well. Other paddings than zeros,
# and strides, have looser bounds otherwise.
_MOST_ENTRIES_WITH_ZEROS = 2**16
_MOST_ENTRIES_OTHERWISE = 2**20


@dataclasses.dataclass(frozen=True)
class Effort:
    """How narrow the enclosure is wanted, and what may be done for it."""

    key: PRNGKeyArray
    rtol: float
    max_steps: int
    materialise: bool


def check_provable(operator: Operator) -> None:
    """Raises if no upper bound on the operator's norm can be proven."""
    if not _provable(operator):
        raise ValueError(
            "expected an operator whose norm can be bounded from above: a matrix, a "
            "convolution, a Fourier multiplier, or a sum or product of such; got "
            f"{type(operator).__name__}, of which only products are known. Return a "
            "matrix from the `view`, for example with `.as_matrix()`."
        )


def _provable(operator: Operator) -> bool:
    if isinstance(operator, lx.AddLinearOperator | lx.ComposedLinearOperator):
        return _provable(operator.operator1) and _provable(operator.operator2)
    if isinstance(operator, _TRANSPARENT):
        return _provable(operator.operator)
    if isinstance(operator, lx.FunctionLinearOperator):
        return isinstance(operator.fn, _KNOWN_FUNCTIONS)
    return enclose.dispatch(type(operator)) is not enclose.dispatch(object)


@ft.singledispatch
def enclose(operator: Operator, effort: Effort) -> Ends:
    """Both ends. Here for operators of which nothing is known but their products."""
    assert isinstance(operator, lx.AbstractLinearOperator)
    return _enclose_unknown(operator, effort)


@enclose.register
def _(operator: LatticeConvolution, effort: Effort) -> Ends:
    return enclose_lattice(operator, rtol=effort.rtol)


@enclose.register
def _(operator: lx.MatrixLinearOperator, effort: Effort) -> Ends:
    return _enclose_matrix(operator.matrix, 0.0, effort)


@enclose.register(lx.PyTreeLinearOperator)
@enclose.register(lx.TridiagonalLinearOperator)
def _(operator: LinearOperator, effort: Effort) -> Ends:
    return _enclose_matrix(operator.as_matrix(), 0.0, effort)


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
    return _with_dense_form(operator, sum_of_both, effort)


@enclose.register
def _(operator: lx.ComposedLinearOperator, effort: Effort) -> Ends:
    a, b = enclose(operator.operator1, effort), enclose(operator.operator2, effort)
    both = Ends(jnp.zeros_like(a.lower), a.times(b.upper).upper)
    return _with_dense_form(operator, both, effort)


@enclose.register
def _(operator: lx.FunctionLinearOperator, effort: Effort) -> Ends:
    function = operator.fn
    if isinstance(function, FourierMultiplier):
        modes = function.matrices()
        ends = jax.vmap(lambda mode: _enclose_matrix(mode, 0.0, effort))(modes)
        return largest(ends)
    if isinstance(function, eqx.nn.Conv | eqx.nn.ConvTranspose):
        return _enclose_convolution(operator, function, effort)
    return _enclose_unknown(operator, effort)


def _enclose_unknown(operator: LinearOperator, effort: Effort) -> Ends:
    if effort.materialise:
        return _enclose_matrix(operator.as_matrix(), 0.0, effort)
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


def _enclose_matrix(
    matrix: Array, error: Float[Array, ""] | float, effort: Effort
) -> Ends:
    # The default width for convolutions is not what a matrix has to be content with.
    rtol = min(effort.rtol, 1e-3)
    return enclose_matrix(
        matrix, error, effort.key, rtol=rtol, max_attempts=effort.max_steps
    )


def _with_dense_form(operator: LinearOperator, ends: Ends, effort: Effort) -> Ends:
    """The better of the given ends and of those of the operator written out."""
    form = dense_form(operator)
    if form is None:
        return ends
    found = _enclose_matrix(form.matrix, form.error, effort)
    # What overflows when it is written out says nothing.
    known = jnp.isfinite(found.upper)
    upper = jnp.where(known, found.upper, jnp.inf)
    return intersection([ends, Ends(jnp.where(known, found.lower, 0), upper)])


def _enclose_convolution(
    operator: lx.FunctionLinearOperator,
    layer: eqx.nn.Conv | eqx.nn.ConvTranspose,
    effort: Effort,
) -> Ends:
    """At one input size."""
    axes = axes_of(layer, operator)
    folded = _folded(layer)
    grid, factor = grid_of(axes)
    if math.prod(grid.count) <= 2 * MOST_POINTS:
        upper = enclose_correlation(folded, axes)
    else:
        # So large an input comes close to the supremum over all of them.
        upper = enclose_lattice(folded, rtol=effort.rtol).times(factor).upper
    kernel = correlation_kernel(layer)
    map_ = correlation(kernel, axes)
    rows = unpack_rows(_leading(map_, effort).v, map_.in_structure())
    ends = Ends(stretch(kernel, axes, rows[0]), upper)
    tight = all(axis.mode == "zeros" and axis.stride == 1 for axis in axes)
    most = _MOST_ENTRIES_WITH_ZEROS if tight else _MOST_ENTRIES_OTHERWISE
    if operator.in_size() * operator.out_size() > most:
        return ends
    return _with_dense_form(operator, ends, effort)


def _folded(layer: eqx.nn.Conv | eqx.nn.ConvTranspose) -> LatticeConvolution:
    """On the lattice, its stride in the channels, without the padding's gain."""
    if isinstance(layer, eqx.nn.ConvTranspose):
        operator = convolution_transpose_operator(layer, layer.weight, None)
    else:
        operator = convolution_operator(layer, layer.weight, None)
    assert isinstance(operator, LatticeConvolution)
    return LatticeConvolution(operator.kernel, gain=1.0)


def _leading(operator: LinearOperator, effort: Effort) -> Triplets:
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
    found = _leading(operator, effort)
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
