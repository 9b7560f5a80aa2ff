"""What lineax asks of an operator, answered for those without special structure."""

import lineax as lx
from jaxtyping import Array, Shaped

from .._custom_types import LinearOperator


def register_without_structure(kind: type[LinearOperator]) -> None:
    """Answers lineax's questions for a class of operators between single arrays, of
    which nothing is known but products and the matrix: it has no structure such as
    symmetry, and is linear as it is. `lineax.conj` is left.

    **Arguments:**

    - `kind`: a subclass of `lineax.AbstractLinearOperator`.

    **Raises:** nothing.
    """
    for question in (
        lx.is_symmetric,
        lx.is_diagonal,
        lx.is_tridiagonal,
        lx.has_unit_diagonal,
        lx.is_lower_triangular,
        lx.is_upper_triangular,
        lx.is_positive_semidefinite,
        lx.is_negative_semidefinite,
    ):
        question.register(kind)(_no)
    lx.linearise.register(kind)(_itself)
    lx.materialise.register(kind)(_materialised)
    lx.diagonal.register(kind)(_diagonal)
    lx.tridiagonal.register(kind)(_tridiagonal)


def _no(operator: LinearOperator) -> bool:
    del operator
    return False


def _itself(operator: LinearOperator) -> LinearOperator:
    return operator


def _materialised(operator: LinearOperator) -> LinearOperator:
    out, in_ = operator.out_structure(), operator.in_structure()
    return lx.PyTreeLinearOperator(
        operator.as_matrix().reshape(*out.shape, *in_.shape), out
    )


def _diagonal(operator: LinearOperator) -> Shaped[Array, " size"]:
    return lx.diagonal(lx.materialise(operator))


def _tridiagonal(
    operator: LinearOperator,
) -> tuple[Shaped[Array, " size"], Shaped[Array, " _"], Shaped[Array, " _"]]:
    return lx.tridiagonal(lx.materialise(operator))
