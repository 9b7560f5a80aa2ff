# Those that only register what a kind of operator does.
from . import _every_size as _every_size, _modes as _modes, _one_size as _one_size
from ._dense_form import dense_form as dense_form, DenseForm as DenseForm
from ._drift import perturbation_factor as perturbation_factor
from ._enclose import (
    check_provable as check_provable,
    default_width as default_width,
    Effort as Effort,
    enclose as enclose,
    is_provable as is_provable,
)
from ._enclosure import (
    enclose_in_memory as enclose_in_memory,
    enclose_norm as enclose_norm,
    Enclosure as Enclosure,
    in_memory as in_memory,
)
from ._ends import Ends as Ends
from ._estimator import GramIteration as GramIteration
from ._lattice_proof import (
    enclose_kernel as enclose_kernel,
    in_float64 as in_float64,
    proves_kernel_below as proves_kernel_below,
)
from ._probable import probable_upper_bound as probable_upper_bound
from ._rounding import up as up
