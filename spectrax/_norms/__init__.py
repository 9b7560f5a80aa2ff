from ._estimators import (
    AbstractEstimator as AbstractEstimator,
    ExactSVD as ExactSVD,
    Kind as Kind,
    PowerIteration as PowerIteration,
)
from ._lattice_power import (
    LatticePowerState as LatticePowerState,
    searched_norm as searched_norm,
)
from ._power import PowerState as PowerState
from ._power_iteration import (
    init_power_state as init_power_state,
    power_iterate as power_iterate,
    PowerStateLike as PowerStateLike,
    singular_value as singular_value,
)
from ._rows import stop_gradient as stop_gradient
from ._spectral_norm import (
    exact_norm as exact_norm,
    NormSolution as NormSolution,
    spectral_norm as spectral_norm,
)
