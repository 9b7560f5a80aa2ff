from typing import Any, TYPE_CHECKING, TypeAlias

import lineax as lx
import numpy as np
from jaxtyping import Array, Inexact, PyTree


LinearOperator: TypeAlias = lx.AbstractLinearOperator

# A block of vectors kept as rows: one vector per row, each raveled.
Rows: TypeAlias = Inexact[Array, "_ _"]
# The same block in the structure of the operator's input or output.
StructuredRows: TypeAlias = PyTree[Inexact[Array, "block ..."]]

DType: TypeAlias = Any

# For code that runs on the arrays of NumPy and of JAX, which have the same methods.
if TYPE_CHECKING:
    AnyArray: TypeAlias = Any
else:
    AnyArray: TypeAlias = Array | np.ndarray | np.generic
