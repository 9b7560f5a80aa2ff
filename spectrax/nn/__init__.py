"""Layers and networks with their norms under a constraint from the start."""

from ._adaptive import AdaptiveSpectralNorm as AdaptiveSpectralNorm
from ._attention import SpectralMultiheadAttention as SpectralMultiheadAttention
from ._layers import (
    SpectralConv1d as SpectralConv1d,
    SpectralConv2d as SpectralConv2d,
    SpectralConv3d as SpectralConv3d,
    SpectralLinear as SpectralLinear,
)
from ._transposed import (
    SpectralConvTranspose1d as SpectralConvTranspose1d,
    SpectralConvTranspose2d as SpectralConvTranspose2d,
    SpectralConvTranspose3d as SpectralConvTranspose3d,
)
