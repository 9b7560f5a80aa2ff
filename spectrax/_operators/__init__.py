from ._convert import (
    as_operator as as_operator,
    Operator as Operator,
    OperatorLike as OperatorLike,
)
from ._convolution import Axis as Axis, Convolution as Convolution
from ._flatten import flattened_kernel as flattened_kernel
from ._fourier import (
    fourier_multiplier as fourier_multiplier,
    FourierMultiplier as FourierMultiplier,
)
from ._lattice import LatticeConvolution as LatticeConvolution
from ._lineax import register_without_structure as register_without_structure
from ._products import (
    accumulation_dtype as accumulation_dtype,
    adjoint_rows as adjoint_rows,
    apply_rows as apply_rows,
    pack_rows as pack_rows,
    unpack_rows as unpack_rows,
)
from ._views import (
    convolution_operator as convolution_operator,
    convolution_transpose_operator as convolution_transpose_operator,
)
