from ._enclose import check_provable as check_provable
from ._enclosure import enclose_norm as enclose_norm, Enclosure as Enclosure
from ._estimator import GramIteration as GramIteration
from ._probable import probable_upper_bound as probable_upper_bound
from ._rounding import up as up
