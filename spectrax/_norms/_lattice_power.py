"""Power iteration for a convolution at every input size at once.

The norm is the maximum over the frequencies `w` of `sigma(F(w))`. The frequencies are
cut into cells, and in each cell one candidate climbs to the highest point there: block
power iteration on `F(w)`, then, with `u` and `v` fixed, the frequency of the cell at
which `|u^H F(w) v|` is largest, a trigonometric polynomial with one coefficient per
tap. The best candidate leads. As none may leave its cell, a maximum that grows anywhere
is seen.

The cost is a few products with the kernel as a small dense matrix, whatever the size of
the images.
"""

import functools as ft
import itertools as it
import math

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import lineax as lx
import numpy as np
from jaxtyping import Array, Complex, Float, Inexact, Int, PRNGKeyArray

from .._dtypes import real_dtype, unit_complex
from .._operators import accumulation_dtype, LatticeConvolution
from ._power import leading_residual, leading_value, power_step, RowState
from ._rows import phase_of, random_rows


_MOST_CELLS = 512
_NEWTON_STEPS = 2
# Candidates that a step moves: the best ones, and some of the others in turn.
_BEST, _IN_TURN = 6, 4


class LatticePowerState(eqx.Module):
    """What power iteration carries for a convolution at every input size.

    Immutable data, with one candidate for each cell of frequencies.

    - `u`, `v`, `momentum`: as in [`spectrax.PowerState`][], complex amplitudes of plane
        waves: `[groups, cells, block, channels]`.
    - `frequency`: of each candidate, `[groups, cells, dim]`, in radians per tap.
    - `value`: of each candidate when it was last moved, `|u^H F v|`, `[groups, cells]`.
    - `leader`: the best candidate of each group, `[groups]`.
    - `turn`: counts the steps, `[groups]`.
    """

    # Under `vmap` a part of it may lack the first axes.
    u: Complex[Array, "*groups cells block out"]
    v: Complex[Array, "*groups cells block in"]
    momentum: Complex[Array, "*groups cells block in"] | None
    frequency: Float[Array, "*groups cells dim"]
    value: Float[Array, "*groups cells"]
    leader: Int[Array, "*groups"]
    turn: Int[Array, "*groups"]


def init_lattice_state(
    operator: LatticeConvolution, key: PRNGKeyArray, block_size: int, num_steps: int
) -> LatticePowerState:
    """Random vectors off the cells' centres, then `num_steps` steps.

    Off the centres, as the symbol of a real kernel is real at some of them: vectors
    become real there, and then see no slope even where there is no maximum.
    """
    groups, out, in_ = operator.kernel.shape[:3]
    block = min(block_size, out, in_)
    centres, width = _cells(operator)
    dtype = accumulation_dtype(operator)
    u_key, v_key = jr.split(key)

    def start(key: PRNGKeyArray, size: int) -> Complex[Array, "g c block size"]:
        rows = random_rows(key, groups * len(centres) * block, size, dtype)
        return rows.reshape(groups, len(centres), block, size)

    v = start(v_key, in_)
    frequency = jnp.asarray(centres + 0.3 * width, real_dtype(dtype))
    state = LatticePowerState(
        u=start(u_key, out),
        v=v,
        momentum=jnp.zeros_like(v) if block > 1 else None,
        frequency=jnp.broadcast_to(frequency, (groups, *frequency.shape)),
        value=jnp.zeros((groups, len(centres)), frequency.dtype),
        leader=jnp.zeros(groups, jnp.int32),
        turn=jnp.zeros(groups, jnp.int32),
    )
    everyone = jnp.broadcast_to(jnp.arange(len(centres)), (groups, len(centres)))
    return lax.fori_loop(
        0, num_steps, lambda _, state: _step(operator, state, everyone), state
    )


def lattice_power_step(
    operator: LatticeConvolution, state: LatticePowerState
) -> LatticePowerState:
    """One step of the best candidates and of those whose turn it is. The leaders are
    chosen anew among them.
    """
    groups, cells = state.value.shape
    if cells <= _BEST + _IN_TURN:
        chosen = jnp.broadcast_to(jnp.arange(cells), (groups, cells))
    else:
        _, best = lax.top_k(state.value, _BEST)
        following = jnp.arange(_IN_TURN, dtype=state.turn.dtype)
        turns = state.turn[:, None] * _IN_TURN + following[None]
        others = (turns % cells).astype(best.dtype)
        chosen = jnp.concatenate([best, others], axis=1)
    return _step(operator, state, chosen)


def _step(
    operator: LatticeConvolution,
    state: LatticePowerState,
    chosen: Int[Array, "groups chosen"],
) -> LatticePowerState:
    """One step of the chosen candidates."""
    centres, width = _cells(operator)
    centres = jnp.asarray(centres, state.frequency.dtype)
    offsets = jnp.asarray(_offsets(width), state.frequency.dtype)

    def group_step(
        kernel: Array, chosen: Array, rows: RowState, frequency: Array, value: Array
    ) -> tuple[RowState, Array, Array, Array]:
        group = LatticeConvolution(kernel[None], 1.0)
        old = jtu.tree_map(lambda x: x[chosen], rows)
        moved, places, values = _move(
            group, offsets, centres[chosen], frequency[chosen], old
        )
        # As with the vectors: what a weight that is not finite gives is not kept.
        values = jnp.where(jnp.isfinite(values), values, value[chosen])
        best = chosen[jnp.argmax(values)].astype(jnp.int32)
        rows, frequency, value = jtu.tree_map(
            lambda whole, part: whole.at[chosen].set(part),
            (rows, frequency, value),
            (moved, places, values),
        )
        return rows, frequency, value, best

    rows = RowState(state.u, state.v, state.momentum)
    rows, frequency, value, leader = jax.vmap(group_step)(
        operator.kernel, chosen, rows, state.frequency, state.value
    )
    return LatticePowerState(
        rows.u, rows.v, rows.momentum, frequency, value, leader, state.turn + 1
    )


def lattice_value(
    operator: LatticeConvolution, state: LatticePowerState
) -> Float[Array, ""]:
    """The largest of the leaders' values, over the groups."""

    def group_value(kernel: Array, state: LatticePowerState) -> Float[Array, ""]:
        return leading_value(*_leader(kernel, state))

    return operator.gain * jnp.max(jax.vmap(group_value)(operator.kernel, state))


def lattice_residual(
    operator: LatticeConvolution, state: LatticePowerState
) -> Float[Array, ""]:
    """The residual of the leader of the best group. How far its frequency is from the
    best one is not part of it.
    """

    def group_values(
        kernel: Array, state: LatticePowerState
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        leader = _leader(kernel, state)
        return leading_value(*leader), leading_residual(*leader)

    values, residuals = jax.vmap(group_values)(operator.kernel, state)
    return residuals[jnp.argmax(values)]


def _leader(
    kernel: Inexact[Array, "out in *taps"], state: LatticePowerState
) -> tuple[lx.MatrixLinearOperator, RowState]:
    """The leader of one group and the matrix on which it lives."""
    frequency = lax.stop_gradient(state.frequency[state.leader])
    matrix = _at_frequency(LatticeConvolution(kernel[None], 1.0), frequency)
    return matrix, RowState(state.u[state.leader], state.v[state.leader], None)


def _move(
    operator: LatticeConvolution,
    offsets: Float[Array, "points dim"],
    centres: Float[Array, "cells dim"],
    frequency: Float[Array, "cells dim"],
    rows: RowState,
) -> tuple[RowState, Float[Array, "cells dim"], Float[Array, " cells"]]:
    """The step of some candidates of a convolution with one group."""

    def iterate(matrix: Complex[Array, "out in"], rows: RowState) -> RowState:
        return power_step(lx.MatrixLinearOperator(matrix), rows)

    rows = jax.vmap(iterate)(operator.symbol(frequency)[0], rows)
    amplitudes = operator.amplitudes(rows.u[:, 0], rows.v[:, 0])
    climb = ft.partial(_climb, operator.tap_positions(), offsets)
    frequency, value = jax.vmap(climb)(amplitudes, centres, frequency)
    # `u^H F(w) v` at the new frequency, made real and positive again.
    phase = phase_of(value)[:, None, None]
    rows = eqx.tree_at(lambda rows: rows.u, rows, rows.u * phase)
    return rows, frequency, jnp.abs(value)


def _climb(
    positions: Float[Array, "taps dim"],
    offsets: Float[Array, "points dim"],
    amplitudes: Complex[Array, " taps"],
    centre: Float[Array, " dim"],
    current: Float[Array, " dim"],
) -> tuple[Float[Array, " dim"], Complex[Array, ""]]:
    """The frequency of the cell at which `|u^H F(w) v|` is largest, and `u^H F v`."""
    largest = jnp.max(jnp.abs(amplitudes))
    # Frequencies are compared by squares, which must not overflow.
    usable = (largest > 0) & jnp.isfinite(largest)
    scale = jnp.where(usable, largest, 1).astype(amplitudes.dtype)
    amplitudes = amplitudes / scale
    weights = positions.astype(amplitudes.dtype)

    def wave(frequency: Float[Array, " dim"]) -> Complex[Array, " taps"]:
        return amplitudes * unit_complex(positions @ frequency)

    def better(new: Array, old: Array) -> Array:
        higher = jnp.abs(jnp.sum(wave(new))) > jnp.abs(jnp.sum(wave(old)))
        inside = jnp.all(jnp.abs(new - centre) <= jnp.max(offsets, axis=0) * 1.0001)
        return jnp.where(higher & inside, new, old)

    def newton(frequency: Float[Array, " dim"]) -> Float[Array, " dim"]:
        terms = wave(frequency)
        # `f = |sum|^2 / 2`; a derivative of `sum` brings down `i` times the positions.
        value, moments = jnp.sum(terms), terms @ weights
        curvature = (weights.T * terms[None]) @ weights
        gradient = -jnp.imag(jnp.conj(value) * moments)
        hessian = jnp.real(
            jnp.outer(jnp.conj(moments), moments) - jnp.conj(value) * curvature
        )
        # An axis with one tap has no say: its row is zero and must not be singular.
        hessian -= jnp.diag(jnp.where(jnp.diagonal(hessian) == 0, 1.0, 0.0))
        return better(frequency - _solve(hessian, gradient), frequency)

    grid = centre[None] + offsets
    on_grid = grid[jnp.argmax(jnp.abs(unit_complex(grid @ positions.T) @ amplitudes))]
    best = better(on_grid, current)
    best = lax.fori_loop(0, _NEWTON_STEPS, lambda _, w: newton(w), best)
    return best, scale * jnp.sum(wave(best))


def _solve(
    matrix: Float[Array, "dim dim"], right: Float[Array, " dim"]
) -> Float[Array, " dim"]:
    """Gaussian elimination, as a batched call to LAPACK waits for threads (see
    `_linalg`). Without pivots: what fails, or is inaccurate, is no better frequency.
    """
    rows = [jnp.append(matrix[i], right[i]) for i in range(len(right))]
    for i, pivot in enumerate(rows):
        rows = [
            r if j == i else r - r[i] / pivot[i] * pivot for j, r in enumerate(rows)
        ]
    return jnp.stack([row[-1] / row[i] for i, row in enumerate(rows)])


def _at_frequency(
    operator: LatticeConvolution, frequency: Float[Array, " dim"]
) -> lx.MatrixLinearOperator:
    return lx.MatrixLinearOperator(operator.symbol(frequency[None])[0, 0])


def _cells(
    operator: LatticeConvolution,
) -> tuple[Float[np.ndarray, "cells dim"], Float[np.ndarray, " dim"]]:
    """The cells' centres and width. For real kernels, whose symbol is conjugated by a
    change of sign of the frequency, one cell of each such pair.
    """
    taps = operator.kernel.shape[3:]
    most = int(_MOST_CELLS ** (1 / operator.dim) + 1e-9)
    # The symbol has degree k - 1. With four cells per degree, and eight at least, few
    # candidates end on a lesser maximum of their cell; with two, up to one in five did.
    counts = [1 if k == 1 else min(max(8, 4 * (k - 1)), most) for k in taps]
    points = list(it.product(*map(range, counts)))
    if not jnp.iscomplexobj(operator.kernel):
        points = [
            p
            for p in points
            if p <= tuple(-j % n for j, n in zip(p, counts, strict=True))
        ]
    width = 2 * math.pi / np.array(counts, float)
    return np.array(points, float) * width, width


def _offsets(width: Float[np.ndarray, " dim"]) -> Float[np.ndarray, "points dim"]:
    """Points in a cell, relative to its centre, for Newton's method to start from.

    An even number, so that the centre is none of them: see `init_lattice_state`.
    """
    axes = [w * np.linspace(-0.5, 0.5, 6) for w in width]
    return np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(width))
