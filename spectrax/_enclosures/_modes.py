"""The enclosure of the norm of a matrix for each Fourier mode."""

import jax

from .._operators import FourierMultiplier
from ._drift import perturbation_factor
from ._enclose import Effort, enclose, enclose_dense
from ._ends import Ends, largest


@enclose.register
def _(operator: FourierMultiplier, effort: Effort) -> Ends:
    modes = operator.matrices()
    return largest(jax.vmap(lambda mode: enclose_dense(mode, 0.0, effort))(modes))


@perturbation_factor.register
def _(operator: FourierMultiplier) -> float:
    del operator
    return 1.0
