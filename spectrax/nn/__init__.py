"""Ready layers and neural operators."""

from ._activations import (
    group_sort as group_sort,
    HouseholderActivation as HouseholderActivation,
    max_min as max_min,
    scaled_gelu as scaled_gelu,
)
from ._adaptive import AdaptiveSpectralNorm as AdaptiveSpectralNorm
from ._attention import SpectralMultiheadAttention as SpectralMultiheadAttention
from ._centering import BatchCentering as BatchCentering
from ._fno import FNO as FNO
from ._fourier import FourierLayer as FourierLayer
from ._l2_attention import L2MultiheadAttention as L2MultiheadAttention
from ._layers import (
    AbstractSpectralConv as AbstractSpectralConv,
    SpectralConv1d as SpectralConv1d,
    SpectralConv2d as SpectralConv2d,
    SpectralConv3d as SpectralConv3d,
    SpectralLinear as SpectralLinear,
)
from ._lipschitz import (
    lipschitz_constant as lipschitz_constant,
    register_lipschitz_constant as register_lipschitz_constant,
)
from ._network import AbstractNetwork as AbstractNetwork
from ._neural_operator import (
    create_spectral_neural_operator as create_spectral_neural_operator,
    SpectralNeuralOperator as SpectralNeuralOperator,
)
from ._pooling import ScaledPool as ScaledPool
from ._residual import ResidualAverage as ResidualAverage
from ._transposed import (
    AbstractSpectralConvTranspose as AbstractSpectralConvTranspose,
    SpectralConvTranspose1d as SpectralConvTranspose1d,
    SpectralConvTranspose2d as SpectralConvTranspose2d,
    SpectralConvTranspose3d as SpectralConvTranspose3d,
)
