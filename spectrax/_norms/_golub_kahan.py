"""Golub-Kahan-Lanczos bidiagonalisation, restarted thickly.

Both bases are kept orthonormal explicitly, and the projection `B = U^H A V` of the
operator is recorded from the coefficients of that orthogonalisation. It is upper
bidiagonal in the first cycle and has a full column at each restart, so that one loop
serves both. Restarting keeps the best approximate triplets (Wu & Simon 2000; Baglama &
Reichel 2005), and with them most of what the earlier cycles had found.
"""

import dataclasses
import functools as ft
from collections.abc import Callable

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Float, Inexact, Int, PRNGKeyArray

from .._custom_types import LinearOperator, Rows
from .._linalg import svd
from .._operators import accumulation_dtype, adjoint_rows, apply_rows
from ._rows import inner, matmul, normalize_rows


class GolubKahan(eqx.Module):
    """Orthonormal bases, the projection `U^H A V`, and the vector to go on with."""

    left: Inexact[Array, "size out"]
    right: Inexact[Array, "size in"]
    projection: Inexact[Array, "size size"]
    next_right: Inexact[Array, " in"]
    next_norm: Float[Array, ""]
    scale: Float[Array, ""]


class Triplets(eqx.Module):
    """The leading approximate singular triplets, in decreasing order."""

    sigma: Float[Array, " count"]
    u: Inexact[Array, "count out"]
    v: Inexact[Array, "count in"]
    residual: Float[Array, ""]  # |A^H u - sigma v| of the first; A v = sigma u holds


def leading_triplets(
    operator: LinearOperator,
    key: PRNGKeyArray,
    *,
    count: int,
    basis_size: int,
    max_cycles: int,
    rtol: float,
) -> Triplets:
    """Restarts until the leading residual is at most `rtol * sigma`."""
    out_size, in_size = operator.out_size(), operator.in_size()
    dtype = accumulation_dtype(operator)
    apply = ft.partial(apply_rows, operator)
    adjoint = ft.partial(adjoint_rows, operator)
    # Random numbers take longer to compile than all the rest: they are drawn once.
    both = jr.normal(key, (1, out_size + in_size), dtype)
    left, right = (normalize_rows(part)[0] for part in jnp.split(both, [out_size], 1))
    if out_size >= in_size:
        process = _Process(apply, adjoint, left, right)
        return process.run(count, basis_size, max_cycles, rtol)
    # The right basis lives in the smaller space, so that it can become complete.
    process = _Process(adjoint, apply, right, left)
    found = process.run(count, basis_size, max_cycles, rtol)
    return Triplets(found.sigma, found.v, found.u, found.residual)


@dataclasses.dataclass(frozen=True)
class _Process:
    apply: Callable[[Rows], Rows]
    adjoint: Callable[[Rows], Rows]
    # Random unit vectors. Shifted cyclically they are as random, and independent: where
    # a fresh direction is needed, one of those is taken.
    random_left: Inexact[Array, "1 out"]
    random_right: Inexact[Array, "1 in"]

    def run(
        self, count: int, basis_size: int, max_cycles: int, rtol: float
    ) -> Triplets:
        size = min(basis_size, self.random_right.size)
        keep = min(max(count, size // 3), size - 1)
        bases = self.extend(self.empty(size), 0, 0)
        if max_cycles > 1 and keep > 0:
            bases = self.restart(bases, keep, max_cycles, rtol)
        values, (left, right), residual = _ritz(bases)
        return Triplets(
            values[:count] * bases.scale,
            left[:count],
            right[:count],
            residual * bases.scale,
        )

    def empty(self, size: int) -> GolubKahan:
        left, right = self.random_left, self.random_right
        # One product tells the scale at which squares and products neither overflow nor
        # vanish; everything below is relative to it.
        _, length = normalize_rows(self.apply(right))
        scale = jnp.where((length[0] > 0) & jnp.isfinite(length[0]), length[0], 1)
        return GolubKahan(
            left=jnp.zeros((size, left.size), left.dtype),
            right=jnp.zeros((size, right.size), right.dtype),
            projection=jnp.zeros((size, size), right.dtype),
            next_right=right[0],
            next_norm=jnp.zeros((), scale.dtype),
            scale=scale,
        )

    def extend(
        self, bases: GolubKahan, start: int, cycle: int | Int[Array, ""]
    ) -> GolubKahan:
        """Fills the bases from row `start` on."""
        scale = bases.scale.astype(bases.right.dtype)
        size = bases.left.shape[0]

        def body(j: Int[Array, ""], bases: GolubKahan) -> GolubKahan:
            shift = cycle * size + j + 1
            fresh_left = jnp.roll(self.random_left, shift, axis=1)
            fresh_right = jnp.roll(self.random_right, shift, axis=1)
            right = bases.right.at[j].set(bases.next_right)
            image = self.apply(bases.next_right[None]) / scale
            u, alpha, column = _orthogonalize(fresh_left, image, bases.left)
            left = bases.left.at[j].set(u)
            column = column.at[j].set(alpha.astype(column.dtype))
            projection = bases.projection.at[:, j].set(column)
            image = self.adjoint(u[None]) / scale
            v, beta, _ = _orthogonalize(fresh_right, image, right)
            return GolubKahan(left, right, projection, v, beta, bases.scale)

        return lax.fori_loop(start, size, body, bases)

    def restart(
        self, bases: GolubKahan, keep: int, max_cycles: int, rtol: float
    ) -> GolubKahan:
        """Repeats: keep the best `keep` triplets, extend the bases again."""

        def unfinished(carry: tuple[GolubKahan, Int[Array, ""]]) -> Bool[Array, ""]:
            values, _, residual = _ritz(carry[0])
            return (carry[1] < max_cycles) & (residual > rtol * values[0])

        def cycle(
            carry: tuple[GolubKahan, Int[Array, ""]],
        ) -> tuple[GolubKahan, Int[Array, ""]]:
            bases, count = carry
            return self.extend(_truncate(bases, keep), keep, count), count + 1

        bases, _ = lax.while_loop(unfinished, cycle, (bases, jnp.asarray(1)))
        return bases


def _orthogonalize(
    fresh: Inexact[Array, "1 n"], row: Inexact[Array, "1 n"], basis: Rows
) -> tuple[Inexact[Array, " n"], Float[Array, ""], Inexact[Array, " size"]]:
    """The unit vector, length and coefficients of `row` relative to `basis`.

    If nothing is left of `row`, the length is zero and the vector made of `fresh`: an
    invariant subspace was found, and the search goes on outside it. That is how
    repeated singular values are all found.
    """
    row, before = normalize_rows(row)
    rest, coefficients = _project_out(row, basis)
    _, length = normalize_rows(rest)
    tiny = 100 * float(jnp.finfo(rest.dtype).eps)
    exhausted = length[0] <= tiny
    fresh, _ = _project_out(fresh, basis)
    direction, _ = normalize_rows(jnp.where(exhausted, fresh, rest))
    # Once more, as what was left may have been small.
    direction, _ = _project_out(direction, basis)
    direction, _ = normalize_rows(direction)
    length = jnp.where(exhausted, 0, before[0] * length[0])
    return direction[0], length, before[0].astype(row.dtype) * coefficients[0]


def _project_out(
    row: Inexact[Array, "1 n"], basis: Rows
) -> tuple[Inexact[Array, "1 n"], Inexact[Array, "1 size"]]:
    coefficients = inner(row, basis)
    return row - matmul(coefficients, basis), coefficients


def _ritz(
    bases: GolubKahan,
) -> tuple[Float[Array, " size"], tuple[Rows, Rows], Float[Array, ""]]:
    # A basis as large as the space is invariant, whatever rounding says.
    size = bases.left.shape[0]
    complete = size == bases.right.shape[1]
    x, values, yh = svd(bases.projection)
    left = matmul(x.T, bases.left)
    right = matmul(jnp.conj(yh), bases.right)
    residual = jnp.abs(x[size - 1, 0]) * bases.next_norm
    return values, (left, right), jnp.where(complete, 0, residual)


def _truncate(bases: GolubKahan, keep: int) -> GolubKahan:
    values, (left, right), _ = _ritz(bases)
    size = values.shape[0]
    kept = (jnp.arange(size) < keep)[:, None]
    diagonal = jnp.where(kept[:, 0], values, 0).astype(bases.projection.dtype)
    return GolubKahan(
        left=jnp.where(kept, left, 0),
        right=jnp.where(kept, right, 0),
        projection=jnp.diag(diagonal),
        next_right=bases.next_right,
        next_norm=bases.next_norm,
        scale=bases.scale,
    )
