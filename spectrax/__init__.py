"""Spectral normalization and Lipschitz control for JAX and Equinox."""

import importlib.metadata

from . import _certify_kernel as _certify_kernel, nn as nn
from ._constrained import (
    Constrained as Constrained,
    constrained_weights as constrained_weights,
)
from ._constraints import (
    AbstractConstraint as AbstractConstraint,
    Clip as Clip,
    ClipToInitial as ClipToInitial,
    LearnableBound as LearnableBound,
    Normalize as Normalize,
    normalize as normalize,
)
from ._enclosures import (
    enclose_norm as enclose_norm,
    Enclosure as Enclosure,
    GramIteration as GramIteration,
    probable_upper_bound as probable_upper_bound,
)
from ._inspect import (
    Summary as Summary,
    summary as summary,
    SummaryRow as SummaryRow,
)
from ._lazy import ScaledWeight as ScaledWeight
from ._norms import (
    AbstractEstimator as AbstractEstimator,
    ExactSVD as ExactSVD,
    init_power_state as init_power_state,
    LatticePowerState as LatticePowerState,
    NormSolution as NormSolution,
    power_iterate as power_iterate,
    PowerIteration as PowerIteration,
    PowerState as PowerState,
    singular_value as singular_value,
    spectral_norm as spectral_norm,
)
from ._operators import (
    flattened_kernel as flattened_kernel,
    fourier_multiplier as fourier_multiplier,
    LatticeConvolution as LatticeConvolution,
)
from ._rules import layer_operator as layer_operator, register_layer as register_layer
from ._wrap import (
    constrain as constrain,
    with_constraint as with_constraint,
    wrap as wrap,
)
from ._wrapped import advance as advance, unwrap as unwrap, Wrapped as Wrapped


__version__ = importlib.metadata.version("spectrax-norm")
