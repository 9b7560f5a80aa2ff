"""Products of an operator with a block of vectors, kept as rows.

Rows are what makes a block cheap: for a matrix `W` both `W @ V.T` and `U @ W` read
`W` in the order in which it lies in memory, whereas `W.T @ u` makes XLA transpose the
whole weight first.
"""

import functools as ft
import math

import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jaxtyping import Array, Inexact, PyTree

from .._custom_types import DType, LinearOperator, Rows, StructuredRows
from .._dtypes import at_least_float32


@ft.singledispatch
def accumulation_dtype(operator: LinearOperator) -> DType:
    """The dtype in which products with the operator are accumulated: float32 or wider,
    and complex if its vectors are.

    **Arguments:**

    - `operator`: of any kind. By default that of its input and output decides.

    **Returns:** a dtype.

    **Raises:** `ValueError` if one of input and output is real and the other complex.
    """
    leaves = jtu.tree_leaves((operator.in_structure(), operator.out_structure()))
    dtypes = {leaf.dtype for leaf in leaves}
    if len({jnp.issubdtype(dtype, jnp.complexfloating) for dtype in dtypes}) > 1:
        raise ValueError(
            "expected an operator whose input and output are all real or all complex, "
            f"got dtypes {sorted(map(str, dtypes))}. Compose it with a cast."
        )
    return at_least_float32(*dtypes)


def pack_rows(rows: StructuredRows, dtype: DType) -> Rows:
    """Ravels every vector of a block: `[block, *shape]` to `[block, size]`."""
    leaves = jtu.tree_leaves(rows)
    flat = [leaf.reshape(leaf.shape[0], -1).astype(dtype) for leaf in leaves]
    return flat[0] if len(flat) == 1 else jnp.concatenate(flat, axis=1)


def unpack_rows(
    rows: Rows, structure: PyTree[jax.ShapeDtypeStruct], dtype: DType | None = None
) -> StructuredRows:
    """Undoes `pack_rows`. Leaves have dtype `dtype`, by default the structure's own."""
    leaves, treedef = jtu.tree_flatten(structure)
    sizes = [math.prod(leaf.shape) for leaf in leaves]
    splits = [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)]
    parts = jnp.split(rows, splits, axis=1) if splits else [rows]
    return jtu.tree_unflatten(
        treedef,
        [
            part.reshape(-1, *leaf.shape).astype(leaf.dtype if dtype is None else dtype)
            for part, leaf in zip(parts, leaves, strict=True)
        ],
    )


@ft.singledispatch
def apply_rows(operator: LinearOperator, rows: Rows) -> Rows:
    """`A v` for every row `v`.

    **Arguments:**

    - `operator`: of any kind. By default its `mv` is mapped over the rows.
    - `rows`: vectors of the operator's input, each raveled, `[block, in_size]`.

    **Returns:** `[block, out_size]`, of the dtype of `rows`.

    **Raises:** what the operator does if it does not fit.
    """
    structured = unpack_rows(rows, operator.in_structure())
    return pack_rows(jax.vmap(operator.mv)(structured), rows.dtype)


@ft.singledispatch
def adjoint_rows(operator: LinearOperator, rows: Rows) -> Rows:
    """`A^H u` for every row `u`: the conjugate transpose, `conj(A^T conj(u))`.

    **Arguments:**

    - `operator`: of any kind. By default the `mv` of its transpose is mapped.
    - `rows`: vectors of the operator's output, each raveled, `[block, out_size]`.

    **Returns:** `[block, in_size]`, of the dtype of `rows`.

    **Raises:** what the operator does if it does not fit.
    """
    structured = unpack_rows(jnp.conj(rows), operator.out_structure())
    return jnp.conj(pack_rows(jax.vmap(operator.T.mv)(structured), rows.dtype))


def _matmul(
    a: Inexact[Array, "a b"], b: Inexact[Array, "b c"]
) -> Inexact[Array, "a c"]:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


@apply_rows.register
def _(operator: lx.MatrixLinearOperator, rows: Rows) -> Rows:
    return _matmul(operator.matrix.astype(rows.dtype), rows.T).T


@adjoint_rows.register
def _(operator: lx.MatrixLinearOperator, rows: Rows) -> Rows:
    return jnp.conj(_matmul(jnp.conj(rows), operator.matrix.astype(rows.dtype)))
