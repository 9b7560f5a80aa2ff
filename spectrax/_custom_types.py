from typing import Any, TypeAlias

import lineax as lx
from jaxtyping import Array, Complex, Float, Inexact, PyTree


# A matrix, or anything that lineax can multiply with. Public functions take either.
Matrix: TypeAlias = Inexact[Array, "out in"]
LinearOperator: TypeAlias = lx.AbstractLinearOperator

# A block of vectors kept as rows: one vector per row, each raveled.
Rows: TypeAlias = Inexact[Array, "_ _"]
# The same block in the structure of the operator's input or output.
StructuredRows: TypeAlias = PyTree[Inexact[Array, "block ..."]]

RealScalar: TypeAlias = Float[Array, ""]
InexactScalar: TypeAlias = Float[Array, ""] | Complex[Array, ""]
DType: TypeAlias = Any
