"""Ready layers and neural operators."""

from ._activations import (
    group_sort as group_sort,
    HouseholderActivation as HouseholderActivation,
    max_min as max_min,
    scaled_gelu as scaled_gelu,
)
from ._centering import BatchCentering as BatchCentering
from ._fno import FNO as FNO
from ._fourier import FourierLayer as FourierLayer
from ._lipschitz import (
    lipschitz_constant as lipschitz_constant,
    register_lipschitz_constant as register_lipschitz_constant,
)
from ._pooling import ScaledPool as ScaledPool
from ._residual import ResidualAverage as ResidualAverage
