"""The proof that no eigenvalue of a matrix exceeds a given number.

If `M = theta I - G` has a Cholesky factor `L`, then `M = L L^T + R >= -|R|`, hence
`lambda_max(G) <= theta + |R|`. The residual `R` is bounded for the factor as it is, so
that nothing is assumed of how the factor was found (Rump 2006 bounds it a priori).

The factor is computed by blocks of columns. Each is the block of `M` less a product of
the columns before it: that product, with its error, is also most of the residual.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .._linalg import cholesky
from .._norms._rows import matmul
from ._products import product
from ._rounding import frobenius, unit_roundoff, up


_BLOCKS = 16
_SMALLEST_BLOCK = 64


def eigenvalue_bound(
    gram: Float[Array, "n n"], theta: Float[Array, ""]
) -> tuple[Float[Array, ""], Bool[Array, ""]]:
    """An upper bound on the largest eigenvalue of a symmetric matrix, a little above
    `theta`, and whether it was proven: it is not if `theta` is too small.
    """
    size = gram.shape[0]
    u = unit_roundoff(gram.dtype)
    diagonal = theta - jnp.diagonal(gram)
    shifted = jnp.tril(-gram, -1) + jnp.diag(diagonal)
    width = max(-(-size // _BLOCKS), min(size, _SMALLEST_BLOCK))
    factor = jnp.zeros((size, 0), gram.dtype)
    squares = jnp.zeros((), gram.dtype)
    for start in range(0, size, width):
        block = shifted[start:, start : start + width]
        columns, residual = _next_columns(block, factor[start:])
        squares = squares + residual**2
        columns = jnp.pad(columns, ((start, 0), (0, 0)))
        factor = jnp.concatenate([factor, columns], axis=1)
    # Both halves: a symmetric matrix has at most twice the squares of its lower half.
    residual = up(jnp.sqrt(2 * up(squares)))
    bound = up(theta + up(2 * u * jnp.max(jnp.abs(diagonal)) + residual))
    # Where there is no factor there are only NaNs.
    proven = jnp.isfinite(bound)
    return jnp.where(proven, bound, jnp.inf), proven


def _next_columns(
    block: Float[Array, "rows width"], before: Float[Array, "rows start"]
) -> tuple[Float[Array, "rows width"], Float[Array, ""]]:
    """The factor's next columns, from the diagonal down, and their residual's bound.

    `block` is that of `M`, of which only the lower half counts, and `before` are the
    same rows of the columns before.
    """
    width = block.shape[1]
    error = jnp.zeros((), block.dtype)
    if before.shape[1] > 0:
        known, error = product(before, before[:width].T)
        block = block - known
    corner = cholesky(block[:width])
    below = matmul(block[width:], _triangular_inverse(corner).T)
    columns = jnp.concatenate([corner, below])
    # With the corner as `D + S`, `S` strictly lower, the lower half of
    # `columns @ corner.T` is that of `columns D + strict @ S.T`.
    strict = jnp.concatenate([jnp.tril(corner, -1), below])
    scaled = columns * jnp.diagonal(corner)[None]
    rest = block - scaled
    square, square_error = product(strict, strict[:width].T)
    residual = jnp.tril(rest - square)
    roundings = frobenius(block) + frobenius(scaled) + frobenius(rest)
    roundings = 2 * unit_roundoff(block.dtype) * (roundings + frobenius(residual))
    return columns, up(frobenius(residual) + error + square_error + roundings)


def _triangular_inverse(lower: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """By products alone: after a triangular solve the threads of LAPACK stay busy for a
    while, which costs more than everything here. Rounding is seen in the residual.

    With `L = D (I + N)`, `N^n = 0`, the inverse of `I + N` is
    `(I - N) (I + N^2) (I + N^4) ...`.
    """
    diagonal = jnp.diagonal(lower)
    identity = jnp.eye(lower.shape[0], dtype=lower.dtype)
    power = jnp.tril(lower, -1) / diagonal[:, None]
    inverse = identity - power
    for _ in range(max(0, (lower.shape[0] - 1).bit_length() - 1)):
        power = matmul(power, power)
        inverse = matmul(inverse, identity + power)
    return inverse / diagonal[None]
