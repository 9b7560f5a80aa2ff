"""What a user may hand to a norm: a matrix or a lineax operator."""

import functools as ft
from typing import Any, TYPE_CHECKING, TypeAlias

import jax.numpy as jnp
import lineax as lx
import numpy as np
from jaxtyping import Array, Inexact

from .._custom_types import LinearOperator
from ._lattice import LatticeConvolution


Operator: TypeAlias = LinearOperator | LatticeConvolution

# What users hand over is looked at by `as_operator`, whose messages say what was
# expected; a run-time type checker must let it through to there.
if TYPE_CHECKING:
    OperatorLike: TypeAlias = Inexact[Array, "out in"] | Operator
else:
    OperatorLike: TypeAlias = Any


@ft.singledispatch
def as_operator(operator: object) -> Operator:
    """An operator from what a user hands over: a 2-D array becomes its matrix, and
    operators pass through unchanged.

    **Arguments:**

    - `operator`: a matrix, a lineax operator or a
        [`spectrax.LatticeConvolution`][]. A kind of operator that is not a lineax
        operator registers that it passes through.

    **Returns:** an operator.

    **Raises:** `TypeError` if `operator` is neither an array nor an operator, or not of
    a floating-point or complex dtype; `ValueError` if an array is not two-dimensional,
    or if anything is empty.
    """
    # Arrays are not registered, as a traced one has no class in common with them.
    if not isinstance(operator, Array | np.ndarray):
        raise TypeError(
            "expected `operator` to be a 2-D array or a `lineax` operator, got "
            f"{type(operator).__name__}. Pass `layer.weight`, or "
            "`spectrax.layer_operator(layer)` for a layer."
        )
    if not jnp.issubdtype(operator.dtype, jnp.inexact):
        raise TypeError(
            "expected an array of floating-point or complex dtype, got "
            f"{operator.dtype}. Convert it first, for example with `.astype(float)`."
        )
    if operator.ndim < 2:
        raise ValueError(
            "expected a 2-D array, got one of shape "
            f"{operator.shape}: a scalar or a vector is not a linear map between "
            "vectors. Choose a weight with at least two axes."
        )
    if operator.ndim > 2:
        raise ValueError(
            f"expected a 2-D array, got one of shape {operator.shape}. Use `jax.vmap` "
            "for a stack of matrices; for a convolution's kernel pass "
            "`spectrax.layer_operator(layer)`, or a `view` such as "
            "`spectrax.flattened_kernel`."
        )
    if operator.size == 0:
        raise ValueError(
            f"expected a matrix with entries, got one of shape {operator.shape}."
        )
    return lx.MatrixLinearOperator(jnp.asarray(operator))


@as_operator.register
def _(operator: lx.AbstractLinearOperator) -> Operator:
    if operator.in_size() == 0 or operator.out_size() == 0:
        raise ValueError(
            "expected an operator between spaces with dimensions, got one from "
            f"{operator.in_size()} to {operator.out_size()} entries."
        )
    return operator


@as_operator.register
def _(operator: LatticeConvolution) -> Operator:
    return operator
