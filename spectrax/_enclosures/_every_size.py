"""The enclosure of the norm of a convolution at every input size."""

import math

import jax
import lineax as lx
import numpy as np

from .._operators import LatticeConvolution
from ._convolution import enclose_lattice
from ._drift import perturbation_factor, root_up
from ._enclose import default_width, Effort, enclose
from ._enclosure import enclose_in_memory, Enclosure, in_memory
from ._ends import Ends
from ._lattice_proof import enclose_kernel
from ._rounding import working_dtype


@enclose.register
def _(operator: LatticeConvolution, effort: Effort) -> Ends:
    return enclose_lattice(operator, rtol=effort.rtol)


@default_width.register
def _(operator: LatticeConvolution) -> float:
    del operator
    return 1e-2


@perturbation_factor.register
def _(operator: LatticeConvolution) -> float:
    # The symbol is a sum of one matrix for each tap.
    return operator.gain * root_up(operator.kernel[0, 0, 0].size)


@enclose_in_memory.register
def _(operator: LatticeConvolution, width: float) -> Enclosure | None:
    if not in_memory(operator.kernel):
        return None
    lower, upper = enclose_kernel(np.asarray(operator.kernel), width)
    upper = _up(upper * operator.gain) if operator.gain != 1 else upper
    dtype = np.dtype(working_dtype())
    finfo = np.finfo(dtype)
    if math.isnan(upper):
        result = lx.RESULTS.nonfinite_input
    else:
        if upper > 0:
            upper = max(upper, float(finfo.tiny))
        lower = min(lower, float(finfo.max))
        # Below the smallest normal number, JAX may take any number for zero.
        lower = 0.0 if lower < 2 * float(finfo.tiny) else lower
        lower, upper = (
            _rounded(lower, -math.inf, dtype),
            _rounded(upper, math.inf, dtype),
        )
        narrow = upper - lower <= width * upper + float(finfo.tiny)
        reached = narrow and math.isfinite(upper)
        result = lx.RESULTS.successful if reached else lx.RESULTS.max_steps_reached
    # A conversion by `jax.numpy` would be compiled.
    lower, upper = (jax.device_put(np.asarray(end, dtype)) for end in (lower, upper))
    return Enclosure(lower, upper, result)


def _rounded(value: float, toward: float, dtype: np.dtype) -> float:
    """To a number of this dtype, on the given side."""
    with np.errstate(over="ignore"):
        rounded = dtype.type(value)
    past = float(rounded) < value if toward > 0 else float(rounded) > value
    return float(np.nextafter(rounded, dtype.type(toward)) if past else rounded)


def _up(value: float) -> float:
    return math.nextafter(value, math.inf)
