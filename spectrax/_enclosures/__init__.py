from ._enclose import check_provable as check_provable
from ._enclosure import (
    enclose_norm as enclose_norm,
    Enclosure as Enclosure,
    in_memory as in_memory,
)
from ._estimator import GramIteration as GramIteration
from ._lattice_proof import (
    enclose_kernel as enclose_kernel,
    in_float64 as in_float64,
    proves_kernel_below as proves_kernel_below,
)
from ._probable import probable_upper_bound as probable_upper_bound
from ._rounding import up as up
