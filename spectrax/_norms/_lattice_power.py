"""Power iteration for a convolution at every input size at once.

The norm is the maximum over the frequencies `w` of `sigma(F(w))`. The frequencies are
cut into cells with one candidate each. A step moves all of them, so that a maximum that
grows anywhere is seen at once, and then goes on with the most promising, until none of
them rises any more: few moves while the kernel changes slowly, and more where another
direction or another frequency takes over.
"""

import itertools as it
import math

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Complex, Float, Inexact, Int, PRNGKeyArray

from .._custom_types import AnyArray
from .._dtypes import at_least_float32, real_dtype
from .._namespace import (
    complex_of,
    is_concrete,
    matmul,
    namespace,
    one_thread,
    places_of_largest,
    take,
    to_jax,
    to_numpy,
    while_loop,
)
from .._operators import LatticeConvolution
from ._candidates import (
    apply,
    apply_adjoint,
    Candidates,
    Cells,
    move,
    plane_waves,
    unit,
)
from ._rows import largest_of, stop_gradient


_MOST_CELLS = 512
# A candidate that went on rising for so many moves as in its last one could become the
# best, or the best better: by how much it has to be to be worth a move.
FORESIGHT, RISE = 4.0, 1e-4
MOST_MOVES = 16
# Of what is added to the vectors, the length.
_LITTLE = 1e-2
# Of the search in float64: leaders, and steps.
_FEW, _SEARCH_STEPS = 4, 64
# All candidates are moved a quarter of them at a time, or so many.
_PARTS, _MOST_AT_ONCE = 4, 32


class LatticePowerState(eqx.Module):
    """What power iteration carries for a convolution at every input size.

    Immutable data, with one candidate for each cell of frequencies.

    - `v`: the vector of each candidate, complex amplitudes of plane waves,
        `[groups, cells, channels]`.
    - `frequency`: of each candidate, `[groups, cells, dim]`, in radians per tap.
    - `value`: of each candidate when it was last moved, at most `|F(w) v|`,
        `[groups, cells]`.
    - `block_size`: with how many candidates of each group a step goes on.
    """

    # Under `vmap` a part of it may lack the first axes.
    v: Complex[AnyArray, "*groups cells in"]
    frequency: Float[AnyArray, "*groups cells dim"]
    value: Float[AnyArray, "*groups cells"]
    block_size: int = eqx.field(static=True)


def init_lattice_state(
    operator: LatticeConvolution, key: PRNGKeyArray, block_size: int, num_steps: int
) -> LatticePowerState:
    """Random vectors, then a third of `num_steps` steps, each of which is some moves.

    Of a concrete kernel by NumPy, for which nothing has to be compiled.
    """
    kernel = _widened(operator.kernel)
    steps = -(-num_steps // 3)
    if is_concrete((kernel, key)):
        seed = np.asarray(jr.key_data(key)).ravel().tolist()
        return to_jax(_searched(np.asarray(kernel), seed, block_size, steps))
    shape = _shape_of_parts(kernel)
    parts = jr.normal(key, shape, real_dtype(kernel.dtype))
    state = _off_centre(kernel, parts, block_size)

    def step(i: Array, state: LatticePowerState) -> LatticePowerState:
        return _step(kernel, state, little=jnp.where(2 * i < steps, _LITTLE, 0.0))

    return lax.fori_loop(0, steps, step, state)


def searched_norm(operator: LatticeConvolution) -> float:
    """The largest singular value of the symbol at the best frequency that a search in
    float64 finds, in NumPy: independent of any state, and never above the norm.
    """
    kernel = np.asarray(operator.kernel)
    complex_ = np.iscomplexobj(kernel)
    kernel = kernel.astype(np.complex128 if complex_ else np.float64)
    if not np.all(np.isfinite(kernel)):
        return math.nan
    # Few are moved in the end, as one of them converges slowly where others are close.
    state = _searched(kernel, [0], _FEW, _SEARCH_STEPS)
    waves = plane_waves(kernel, take(state.frequency, _first(state)))
    flat = kernel.reshape(*kernel.shape[:3], -1)
    symbols = np.einsum("goit,gt->goi", flat, waves[:, 0])
    return operator.gain * float(np.linalg.norm(symbols, 2, axis=(1, 2)).max())


def _searched(
    kernel: Inexact[np.ndarray, "groups out in *taps"],
    seed: list[int],
    block_size: int,
    num_steps: int,
) -> LatticePowerState:
    """So many steps from random vectors, in NumPy. The second half adds nothing to the
    vectors, so that they converge.
    """
    draw = np.random.default_rng(seed).standard_normal(_shape_of_parts(kernel))
    state = _off_centre(kernel, draw.astype(real_dtype(kernel.dtype)), block_size)
    with one_thread():
        for i in range(num_steps):
            state = _step(kernel, state, little=_LITTLE if 2 * i < num_steps else 0.0)
    return state


def _shape_of_parts(
    kernel: Inexact[AnyArray, "groups out in *taps"],
) -> tuple[int, int, int, int]:
    groups, _, in_ = kernel.shape[:3]
    return 2, groups, _cells(kernel).centre.shape[1], in_


def _off_centre(
    kernel: Inexact[AnyArray, "groups out in *taps"],
    parts: Float[AnyArray, "2 groups cells in"],
    block_size: int,
) -> LatticePowerState:
    """The state at the start, with vectors of these real and imaginary parts.

    Off the cells' centres, as the symbol of a real kernel is real at some of them:
    vectors become real there, and then see no slope even where there is no maximum.
    """
    xp = namespace(kernel)
    cells = _cells(kernel)
    v, _ = unit(complex_of(parts[0], parts[1]))
    frequency = cells.centre + 0.6 * cells.half
    frequency = xp.broadcast_to(frequency, (len(v), *frequency.shape[1:]))
    return LatticePowerState(v, frequency, xp.zeros_like(parts[0, ..., 0]), block_size)


def lattice_power_step(
    operator: LatticeConvolution, state: LatticePowerState
) -> LatticePowerState:
    """A move of every candidate, and more of the most promising."""
    return _step(_widened(operator.kernel), state, little=_LITTLE)


def _step(
    kernel: Inexact[AnyArray, "groups out in *taps"],
    state: LatticePowerState,
    *,
    little: float | Float[Array, ""],
) -> LatticePowerState:
    """Some candidates at a time: first each once, then the most promising, as long as
    any of them could rise above the best. One loop for both, as what is in a loop is
    compiled once.

    A `little` of everything is added to the vectors first, so that a direction which
    they have lost altogether is found again if it grows, and that none stays where it
    rises only if frequency and vector change together. The moves after it leave less
    than 1e-4 of it in the value.
    """
    xp = namespace(kernel)
    cells = _cells(kernel)
    count = state.value.shape[1]
    centre = xp.broadcast_to(cells.centre, state.frequency.shape)
    some = max(state.block_size, min(_MOST_AT_ONCE, -(-count // _PARTS)))
    some = min(some, count)
    parts = -(-count // some)
    everyone = xp.arange(count, dtype=np.int32)

    def unfinished(carry: tuple[AnyArray, AnyArray]) -> AnyArray:
        rows, moves = carry
        enough = xp.max(rows[..., -2]) * (1 + RISE)
        rising = (xp.max(rows[..., -1]) > enough) & (moves < parts + MOST_MOVES)
        return (moves < parts + 1) | rising

    def body(carry: tuple[AnyArray, AnyArray]) -> tuple[AnyArray, AnyArray]:
        rows, moves = carry
        in_turn = (moves * some + everyone[:some]) % count
        best = places_of_largest(rows[..., -1], some)
        places = xp.where(moves < parts, in_turn[None], best)
        chosen = (places[..., None] == everyone[None, None]).astype(rows.dtype)
        old, centre = _from_rows(matmul(chosen, rows), kernel)
        added = xp.where(moves < parts, little, 0.0).astype(old.v.dtype)
        added = added * _scattered(places, kernel)
        new = move(kernel, Cells(centre, cells.half), old, added)
        new_rows = _to_rows(new, centre, _promise(new, old))
        keep = xp.max(chosen, axis=1)[..., None] == 0
        rows = xp.where(keep, rows, matmul(xp.swapaxes(chosen, 1, 2), new_rows))
        return rows, moves + 1

    before = Candidates(state.v, state.frequency, state.value)
    start = _to_rows(before, centre, state.value), xp.zeros((), np.int32)
    rows, _ = while_loop(unfinished, body, start)
    found, _ = _from_rows(rows, kernel)
    return LatticePowerState(*found, state.block_size)


def _to_rows(
    candidates: Candidates,
    centre: Float[AnyArray, "groups some dim"],
    promise: Float[AnyArray, "groups some"],
) -> Float[AnyArray, "groups some all"]:
    """All that belongs to a candidate, in one row of real numbers, so that one product
    picks some of them. Value and promise come last.
    """
    xp = namespace(promise)
    v, frequency, value = candidates
    numbers = xp.stack([value, promise], axis=-1)
    parts = [xp.real(v), xp.imag(v), frequency, centre, numbers]
    return xp.concatenate(parts, axis=-1)


def _from_rows(
    rows: Float[AnyArray, "groups some all"],
    kernel: Inexact[AnyArray, "groups out in *taps"],
) -> tuple[Candidates, Float[AnyArray, "groups some dim"]]:
    """The candidates, and the centres of their cells."""
    in_, dim = kernel.shape[2], kernel.ndim - 3
    v = complex_of(rows[..., :in_], rows[..., in_ : 2 * in_])
    frequency = rows[..., 2 * in_ : 2 * in_ + dim]
    centre = rows[..., 2 * in_ + dim : 2 * in_ + 2 * dim]
    return Candidates(v, frequency, rows[..., -2]), centre


def _scattered(
    places: Int[AnyArray, "groups some"],
    kernel: Inexact[AnyArray, "groups out in *taps"],
) -> Complex[AnyArray, "groups some in"]:
    """A vector of about unit length for each place, whose entries are spread evenly
    over a square and repeat nowhere, so that it has something of every direction.

    Fractional parts of quadratic sequences, which cost a product: whatever needs the
    vectors may compute them anew.
    """
    xp = namespace(kernel)
    size, dtype = kernel.shape[2], real_dtype(kernel.dtype)
    place = np.arange(1, size + 1)
    amount = math.sqrt(6 / size)

    def part(quadratic: float, linear: float) -> AnyArray:
        start = xp.asarray(quadratic * place**2 % 1, dtype)[None, None]
        stride = xp.asarray(linear * place % 1, dtype)[None, None]
        turns = start + stride * (places[..., None] + 1).astype(dtype)
        return amount * (turns - xp.floor(turns) - 0.5)

    return complex_of(part(0.6180339887, 0.7548776662), part(0.4142135624, 0.569840291))


def _promise(new: Candidates, old: Candidates) -> Float[AnyArray, "groups some"]:
    """What a value becomes if it goes on rising as it did."""
    rise = new.value - old.value
    return new.value + FORESIGHT * namespace(rise).maximum(rise, 0)


def lattice_value(
    operator: LatticeConvolution, state: LatticePowerState
) -> Float[Array, ""]:
    """The largest of the groups' `|F(w) v|`, each at its best candidate; NaN if not
    finite.

    Differentiable in the kernel, with `v` and `u = F v / |F v|` held fixed.
    """
    values, _, _ = _leaders(operator, state)
    sigma = largest_of(jnp.asarray(values))
    return operator.gain * jnp.where(jnp.isfinite(sigma), sigma, jnp.nan)


def lattice_residual(
    operator: LatticeConvolution, state: LatticePowerState
) -> Float[Array, ""]:
    """`|F^H u - sigma v| / sigma` of the leader of the best group. How far its
    frequency is from the best one is not part of it.
    """
    values, u, (kernel, waves, v) = _leaders(operator, state)
    with np.errstate(all="ignore"):
        rest = apply_adjoint(kernel, waves, u)
        rest = rest - values[:, None, None].astype(v.dtype) * v
        _, length = unit(rest)
    best = jnp.argmax(jnp.asarray(values))
    sigma = jnp.asarray(values)[best]
    return jnp.asarray(length)[best, 0] / jnp.where(sigma == 0, 1, jnp.abs(sigma))


def leading_frequency(state: LatticePowerState) -> Float[Array, "groups dim"]:
    """Of the best candidate of each group."""
    return take(state.frequency, _first(state))[:, 0]


def _leaders(
    operator: LatticeConvolution, state: LatticePowerState
) -> tuple[
    Float[AnyArray, " groups"], Complex[AnyArray, "groups 1 out"], tuple[AnyArray, ...]
]:
    """`Re(u^H F v)` of each group's best candidate, `u`, and what `F v` is made of. Of
    concrete arrays by NumPy.
    """
    if is_concrete((operator, state)):
        operator, state = to_numpy((operator, state))
    kernel = _widened(operator.kernel)
    xp = namespace(kernel)
    state = stop_gradient(state)
    with np.errstate(all="ignore"):
        waves = plane_waves(kernel, take(state.frequency, _first(state)))
        v, _ = unit(take(state.v, _first(state)))
        image = apply(kernel, waves, v)
        u, _ = unit(stop_gradient(image))
        values = xp.sum(xp.real(xp.conj(u) * image), axis=(1, 2))
    return values, u, (kernel, waves, v)


def _first(state: LatticePowerState) -> Int[AnyArray, "groups 1"]:
    return namespace(state.value).argmax(state.value, axis=1)[:, None]


def _widened(
    kernel: Inexact[AnyArray, "groups out in *taps"],
) -> Inexact[AnyArray, "groups out in *taps"]:
    return kernel.astype(at_least_float32(kernel.dtype))


def _cells(kernel: Inexact[AnyArray, "groups out in *taps"]) -> Cells:
    """For real kernels, whose symbol is conjugated by a change of sign of the
    frequency, one cell of each such pair.
    """
    xp = namespace(kernel)
    taps = kernel.shape[3:]
    most = int(_MOST_CELLS ** (1 / len(taps)) + 1e-9)
    # The symbol has degree k - 1. With three cells per degree, and eight at least, few
    # candidates end on a lesser maximum of their cell; with two, up to one in five did.
    # An even number, so that the symbol of a real kernel is real at some centres and at
    # no edge, where a vector that became real could not go on.
    fine = [max(8, 3 * (k - 1) + (k - 1) % 2) for k in taps]
    counts = [1 if k == 1 else min(n, most) for k, n in zip(taps, fine, strict=True)]
    points = list(it.product(*map(range, counts)))
    if not xp.iscomplexobj(kernel):
        points = [
            p
            for p in points
            if p <= tuple(-j % n for j, n in zip(p, counts, strict=True))
        ]
    width = 2 * math.pi / np.array(counts, float)
    dtype = real_dtype(kernel.dtype)
    centres = np.array(points, float) * width
    return Cells(
        xp.asarray(centres[None], dtype), xp.asarray(width[None, None] / 2, dtype)
    )
