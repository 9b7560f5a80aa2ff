# Those that only register what a kind of operator does.
from . import _every_size as _every_size, _modes as _modes, _one_size as _one_size
from ._converged import (
    converged_norm as converged_norm,
    converged_residual as converged_residual,
    current_norm as current_norm,
    reference_norm as reference_norm,
    smaller_side as smaller_side,
)
from ._estimators import (
    AbstractEstimator as AbstractEstimator,
    ExactSVD as ExactSVD,
    Kind as Kind,
    PowerIteration as PowerIteration,
)
from ._lattice_power import LatticePowerState as LatticePowerState
from ._power import PowerState as PowerState
from ._power_iteration import (
    init_power_state as init_power_state,
    power_iterate as power_iterate,
    singular_value as singular_value,
)
from ._rows import stop_gradient as stop_gradient
from ._spectral_norm import (
    exact_norm as exact_norm,
    NormSolution as NormSolution,
    spectral_norm as spectral_norm,
)
from ._triplet import TripletFinder as TripletFinder
from ._vectors import (
    init_vectors as init_vectors,
    PowerStateLike as PowerStateLike,
    step_vectors as step_vectors,
    vectors_residual as vectors_residual,
    vectors_value as vectors_value,
)
