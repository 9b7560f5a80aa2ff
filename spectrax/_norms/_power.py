"""One step of block power iteration on one operator."""

import functools as ft

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float, Inexact

from .._custom_types import LinearOperator, Rows, StructuredRows
from .._linalg import eigh
from .._operators import adjoint_rows, apply_rows
from ._rows import (
    inner,
    keep_where,
    matmul,
    normalize_rows,
    orthonormalize,
    phase_of,
    scale_down,
    unit_rows,
)


class PowerState(eqx.Module):
    """Approximate leading singular vectors of an operator: what power iteration carries
    from one step to the next.

    Immutable data. Row 0 is the leading pair; the other rows make it converge faster.
    Rows have unit length up to rounding, and are scaled to unit length again whenever
    they are used, so that averaging states does no harm.

    - `u`: left singular vectors, `[block, *output shape]`.
    - `v`: right singular vectors, `[block, *input shape]`.
    - `momentum`: the directions in which `v` last moved, `[block, *input shape]`;
        `None` for a block of one vector, which iterates without momentum.

    For an operator between pytrees, each field is a pytree of such arrays. For a
    Fourier multiplier, each has an axis for the modes in front, and the pairs are those
    of each mode's matrix: `u` is `[modes, block, out]`. Arrays are of the operator's
    dtype, or float32 if that is narrower.
    """

    u: StructuredRows
    v: StructuredRows
    momentum: StructuredRows | None


class RowState(eqx.Module):
    """The same with every vector raveled: the form in which the algorithms see it."""

    u: Inexact[Array, "... block out"]
    v: Inexact[Array, "... block in"]
    momentum: Inexact[Array, "... block in"] | None


def power_step(operator: LinearOperator, state: RowState) -> RowState:
    """One product with the operator's adjoint, then one with the operator.

    A block of one is the algorithm of Miyato et al. (2018): `v = A^H u / |A^H u|`, then
    `u = A v / |A v|`. A larger block takes the best pairs (Rayleigh-Ritz) in the span
    of three blocks: `A^H u`, the previous `v`, and the directions in which `v` moved
    before. The last two are what makes it a locally optimal block method (Knyazev 2001)
    and cost no further pass over the operator.

    Where the operator maps a vector to zero, the vector is kept as it was; if anything
    is not finite, the whole state is.
    """
    if state.momentum is None:
        new, finite = _single_step(operator, state)
    else:
        new, finite = _block_step(operator, state)
    return jtu.tree_map(ft.partial(jnp.where, finite), new, state)


def _single_step(
    operator: LinearOperator, state: RowState
) -> tuple[RowState, Bool[Array, ""]]:
    """The step, and whether everything is finite."""
    v, v_length = normalize_rows(adjoint_rows(operator, normalize_rows(state.u)[0]))
    v = keep_where(v_length > 0, v, state.v)
    u, u_length = normalize_rows(apply_rows(operator, v))
    finite = jnp.isfinite(v_length[0]) & jnp.isfinite(u_length[0])
    return RowState(keep_where(u_length > 0, u, state.u), v, None), finite


def _block_step(
    operator: LinearOperator, state: RowState
) -> tuple[RowState, Bool[Array, ""]]:
    assert state.momentum is not None
    block = state.u.shape[0]
    old, _ = unit_rows(state.v)
    moved, largest_moved = scale_down(adjoint_rows(operator, unit_rows(state.u)[0]))
    # Close to convergence the new directions differ little from the old: what matters
    # is the difference, scaled up before it is orthogonalised.
    new = _unit_part_outside(jnp.concatenate([moved, state.momentum]), old)
    basis = orthonormalize(jnp.concatenate([old, new]))
    images, largest_image = scale_down(apply_rows(operator, basis))
    coefficients = _best_combinations(images)[:block]
    v, _ = unit_rows(matmul(coefficients, basis))
    u, image_length = unit_rows(matmul(coefficients, images))
    momentum, _ = unit_rows(matmul(coefficients[:, block:], basis[block:]))
    new = RowState(
        keep_where(image_length > 0, u, state.u),
        keep_where(image_length > 0, v, state.v),
        momentum,
    )
    # Anything that is not finite shows in these, the small ones.
    finite = jnp.isfinite(largest_moved) & jnp.isfinite(largest_image)
    return new, finite & jnp.all(jnp.isfinite(coefficients))


def _unit_part_outside(rows: Rows, basis: Rows) -> Rows:
    rows, _ = unit_rows(rows)
    return unit_rows(rows - matmul(inner(rows, basis), basis))[0]


def _best_combinations(images: Rows) -> Inexact[Array, "block block"]:
    """Orthonormal rows `c`, such that `c @ images` are orthogonal and of decreasing
    length: the Rayleigh-Ritz procedure, if `images` are those of an orthonormal basis.

    Each row is signed so that it keeps pointing along its basis vector: successive
    vectors of an iteration then do not cancel when they are averaged.
    """
    _, vectors = eigh(inner(images, images))
    rows = jnp.conj(vectors[:, ::-1]).T
    return rows * jnp.conj(phase_of(jnp.diagonal(rows)))[:, None]


def leading_value(operator: LinearOperator, state: RowState) -> Float[Array, ""]:
    """`Re(u^H A v)` of the leading pair, which is held fixed; NaN if not finite."""
    u, v = _leading_pair(state)
    sigma = jnp.real(jnp.sum(jnp.conj(u) * apply_rows(operator, v)))
    return jnp.where(jnp.isfinite(sigma), sigma, jnp.nan)


def leading_residual(operator: LinearOperator, state: RowState) -> Float[Array, ""]:
    """`|A^H u - sigma v| / sigma` of the leading pair; 0 for a zero operator."""
    u, v = _leading_pair(state)
    sigma = leading_value(operator, state)
    _, length = normalize_rows(adjoint_rows(operator, u) - sigma.astype(v.dtype) * v)
    return length[0] / jnp.where(sigma == 0, 1, jnp.abs(sigma))


def _leading_pair(
    state: RowState,
) -> tuple[Inexact[Array, "1 out"], Inexact[Array, "1 in"]]:
    u, _ = normalize_rows(lax.stop_gradient(state.u[:1]))
    v, _ = normalize_rows(lax.stop_gradient(state.v[:1]))
    return u, v
