"""Gram iteration: the largest eigenvalue of a Hermitian matrix from repeated squaring.

`lambda(G)^2 = lambda(G^2)`, and after `T` squarings the Frobenius norm exceeds the
largest eigenvalue only by its root of order `2^T` (Delattre et al. 2023).

A Hermitian matrix `X + iY` is kept as the one real matrix `A = X + Y`, which has the
same Frobenius norm and is any real matrix at all, as `X = (A + A^T) / 2` is symmetric
and `Y = (A - A^T) / 2` antisymmetric. The square `X^2 - Y^2 + i (XY + YX)` is then

    A' = A A^T + (A + A^T) (A - A^T) / 2,

two real products in the place of three or four. Their rounding is at most
`2 gamma(n + 4) |A|_F^2`. With `error_t` that bound, and `scale_t` the power of two by
which the square was divided, the bound comes down again from the last Frobenius norm:

    U_t = sqrt(scale_t U_(t+1) + error_t),   U_T = |A_T|_F.
"""

import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._norms._rows import matmul
from ._rounding import gamma, power_of_two, up


# `X + Y` for each Hermitian matrix `X + iY` of a stack.
HermitianStack = Float[Array, "points n n"]


def gram_iteration(
    matrices: HermitianStack, num_steps: int
) -> tuple[Float[Array, " points"], HermitianStack]:
    """Upper bounds on the largest absolute eigenvalues, and the last squares."""
    rounding = 2 * gamma(matrices.shape[-1] + 5, matrices.dtype)
    norms = _frobenius(matrices)
    first = power_of_two(norms)
    matrices, norms = matrices / first[:, None, None], norms / first
    scales, errors = [], []
    for _ in range(num_steps):
        # An upper bound on the norm of the square, which is at least `1 / sqrt(n)` of
        # it: nothing overflows, and what is flushed to zero is far below one unit of
        # roundoff of the norm, for which there is room in `gamma`.
        scale = power_of_two(norms**2)
        matrices = _square(matrices) / scale[:, None, None]
        scales.append(scale)
        errors.append(up(rounding * norms**2))
        norms = _frobenius(matrices)
    bound = norms
    for scale, error in zip(reversed(scales), reversed(errors), strict=True):
        bound = up(jnp.sqrt(up(scale * bound + error)))
    return up(first * bound), matrices


def real_form(matrix: Float[Array, "n n"]) -> Float[Array, "_ _"]:
    """`[[X, -Y], [Y, X]]`, with the eigenvalues of `X + iY`, each twice."""
    x, y = (matrix + matrix.T) / 2, (matrix - matrix.T) / 2
    return jnp.block([[x, -y], [y, x]])


def _square(matrices: HermitianStack) -> HermitianStack:
    transposed = jnp.swapaxes(matrices, -1, -2)
    mixed = matmul(matrices + transposed, matrices - transposed)
    return matmul(matrices, transposed) + mixed / 2


def _frobenius(matrices: HermitianStack) -> Float[Array, " points"]:
    """Upper bounds on the Frobenius norms, in two stages as in `frobenius`."""
    partial = jnp.sum(jnp.square(matrices), axis=-1)
    total = jnp.sum(lax.optimization_barrier(partial), axis=-1)
    error = gamma(2 * matrices.shape[-1] + 4, total.dtype)
    # Squares that were flushed to zero, as those of a matrix far smaller than others.
    lost = matrices.shape[-1] * float(jnp.finfo(total.dtype).tiny) ** 0.5
    return up(jnp.sqrt(total) * (1 + error) + lost)
