"""Layers and neural operators whose weights are constrained, ready for use."""

from ._fourier import FourierLayer as FourierLayer
from ._fno import FNO as FNO
