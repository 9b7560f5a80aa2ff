"""The enclosure of the norm of a convolution of one input size."""

import math

import jax.numpy as jnp

from .._operators import Convolution, unpack_rows
from ._convolution import enclose_correlation, enclose_lattice, MOST_POINTS
from ._correlation import correlation, stretch, written_out
from ._dense_form import as_real, dense_form, DenseForm, exact_form, is_small
from ._drift import perturbation_factor, root_up
from ._enclose import default_width, Effort, enclose, leading, with_dense_form
from ._ends import Ends
from ._geometry import grid_of
from ._rounding import flushed_below, up


# Convolutions of no more entries are written out as well. Other paddings than zeros,
# and strides, have looser bounds otherwise.
_MOST_ENTRIES_WITH_ZEROS = 2**16
_MOST_ENTRIES_OTHERWISE = 2**20


@enclose.register
def _(operator: Convolution, effort: Effort) -> Ends:
    axes, folded = operator.axes, operator.on_lattice()
    grid, factor = grid_of(axes)
    if math.prod(grid.count) <= 2 * MOST_POINTS:
        upper = enclose_correlation(folded, axes)
    else:
        # So large an input comes close to the supremum over all of them.
        upper = enclose_lattice(folded, rtol=effort.rtol).times(factor).upper
    kernel = operator.kernel()
    map_ = correlation(kernel, axes)
    rows = unpack_rows(leading(map_, effort).v, map_.in_structure())
    ends = Ends(stretch(kernel, axes, rows[0]), upper)
    tight = all(axis.mode == "zeros" and axis.stride == 1 for axis in axes)
    most = _MOST_ENTRIES_WITH_ZEROS if tight else _MOST_ENTRIES_OTHERWISE
    if operator.in_size() * operator.out_size() > most:
        return ends
    return with_dense_form(operator, ends, effort)


@default_width.register
def _(operator: Convolution) -> float:
    del operator
    return 1e-2


@dense_form.register
def _(operator: Convolution) -> DenseForm | None:
    if not is_small(operator):
        return None
    matrix, error = written_out(operator.kernel(), operator.axes)
    if operator.transposed:
        matrix = matrix.T
    # Subnormal taps may be lost before they are entries, up to one of each in a sum.
    lost = math.sqrt(2 * matrix.size) * operator.weight[0, 0].size
    lost = lost * flushed_below(operator.weight.dtype)
    # The real form of a complex matrix has its error twice.
    error = up(1.5 * error + jnp.asarray(lost, error.dtype)) + exact_form(matrix).error
    return DenseForm(as_real(matrix), error)


@perturbation_factor.register
def _(operator: Convolution) -> float:
    # The symbol is a sum of one matrix for each tap.
    return grid_of(operator.axes)[1] * root_up(operator.weight[0, 0].size)
