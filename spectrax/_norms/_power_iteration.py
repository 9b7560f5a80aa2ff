"""Power iteration as pure functions: state in, state out."""

import functools as ft
from collections.abc import Callable
from typing import Any, TYPE_CHECKING, TypeAlias

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import lineax as lx
import numpy as np
from jaxtyping import Array, Float, Inexact, PRNGKeyArray, PyTree

from .._custom_types import LinearOperator, Rows, StructuredRows
from .._dtypes import at_least_float32, real_dtype
from .._operators import (
    accumulation_dtype,
    as_operator,
    LatticeConvolution,
    mode_matrices,
    OperatorLike,
    pack_rows,
    unpack_rows,
)
from ._golub_kahan import leading_triplets
from ._lattice_power import (
    FORESIGHT,
    init_lattice_state,
    lattice_power_step,
    lattice_residual,
    lattice_value,
    LatticePowerState,
    MOST_MOVES,
    RISE,
)
from ._power import leading_residual, leading_value, power_step, PowerState, RowState
from ._rows import largest_of, random_rows, stop_gradient


# As with `OperatorLike`: a wrong one gets a message of ours.
if TYPE_CHECKING:
    PowerStateLike: TypeAlias = PowerState | LatticePowerState
else:
    PowerStateLike: TypeAlias = Any

DEFAULT_BLOCK_SIZE = 8
DEFAULT_INIT_STEPS = 32
# Of the matrices of a Fourier multiplier, each of which is followed on its own.
_MOST_PAIRS_PER_MODE = 2


def init_power_state(
    operator: OperatorLike,
    *,
    key: PRNGKeyArray | None = None,
    block_size: int = DEFAULT_BLOCK_SIZE,
    num_steps: int = DEFAULT_INIT_STEPS,
) -> PowerState | LatticePowerState:
    """Singular vectors to start power iteration from.

    The leading `block_size` pairs after `num_steps` steps of Golub-Kahan-Lanczos
    bidiagonalisation, which come closer than as many power steps.

    **Arguments:**

    - `operator`: a matrix of shape `[out, in]`, a `lineax` operator, or what
        `spectrax.layer_operator` returns.
    - `key`: randomness of the starting vectors. Optional; a fixed key if not given.
    - `block_size`: how many pairs to carry. More pairs track a changing operator more
        closely, and each step's products take more vectors. It is cut to the
        smaller side of the operator, beyond which there are no further pairs. One pair
        is the power iteration of Miyato et al. (2018). For a Fourier multiplier it is
        the number of pairs for each mode, and cut to 2. For a convolution at every
        input size one vector is carried for each cell of frequencies, and this is with
        how many of them, at least, a step goes on after it has moved all.
    - `num_steps`: steps of the bidiagonalisation. With 0 the vectors are random. For a
        convolution at every input size, four times as many as steps of its own search,
        of which each is several moves.

    **Returns:**

    A [`spectrax.PowerState`][] (for the convolution at every input size a
    [`spectrax.LatticePowerState`][]). It carries no derivative. For a
    [`spectrax.fourier_multiplier`][] its arrays have the modes as a first axis, as
    each mode's matrix is followed on its own: the largest norms of a block-diagonal
    operator are often so close that vectors of the whole would converge slowly.

    **Cost:** two products with the operator per step.

    **Raises:** `TypeError` or `ValueError` if `operator` is not a matrix or an
    operator, `block_size < 1` or `num_steps < 0`.
    """
    operator = stop_gradient(as_operator(operator))
    check_count(block_size, "block_size", least=1)
    check_num_steps(num_steps)
    key = jr.key(0) if key is None else key
    if isinstance(operator, LatticeConvolution):
        return stop_gradient(init_lattice_state(operator, key, block_size, num_steps))
    if (matrices := mode_matrices(operator)) is not None:
        block = min(block_size, _MOST_PAIRS_PER_MODE)

        def init(matrix: Inexact[Array, "out in"]) -> PowerState:
            return _init(lx.MatrixLinearOperator(matrix), key, block, num_steps)

        return stop_gradient(jax.vmap(init)(matrices))
    return stop_gradient(_init(operator, key, block_size, num_steps))


# Compiled even where the caller is not, as these are many small operations.
@eqx.filter_jit
def _init(
    operator: LinearOperator, key: PRNGKeyArray, block_size: int, num_steps: int
) -> PowerState:
    in_size, out_size = operator.in_size(), operator.out_size()
    block = min(block_size, in_size, out_size)
    dtype = accumulation_dtype(operator)
    if num_steps > 0:
        found = leading_triplets(
            operator,
            key,
            count=block,
            basis_size=max(num_steps, block),
            max_cycles=1,
            rtol=0.0,
        )
        finite = jnp.all(jnp.isfinite(found.u)) & jnp.all(jnp.isfinite(found.v))
        u = jnp.where(finite, found.u, jnp.eye(block, out_size, dtype=dtype))
        v = jnp.where(finite, found.v, jnp.eye(block, in_size, dtype=dtype))
    else:
        u_key, v_key = jr.split(key)
        u = random_rows(u_key, block, out_size, dtype)
        v = random_rows(v_key, block, in_size, dtype)
    momentum = jnp.zeros_like(v) if block > 1 else None
    return _to_public(operator, RowState(u, v, momentum))


def power_iterate(
    operator: OperatorLike,
    state: PowerStateLike,
    *,
    num_steps: int = 1,
) -> PowerState | LatticePowerState:
    """Power iteration: brings the vectors of `state` closer to the operator's leading
    singular vectors.

    One step is one product with the adjoint and one with the operator. With one pair,
    `v = A^H u / |A^H u|` and `u = A v / |A v|` (Miyato et al. 2018, algorithm 1). With
    more, the best pairs (Rayleigh-Ritz) from the span of those products, the previous
    `v` and the directions in which it last moved: a locally optimal block method
    (Knyazev 2001).

    **Arguments:**

    - `operator`: as in [`spectrax.init_power_state`][].
    - `state`: from `init_power_state`, for an operator of this shape.
    - `num_steps`: how many steps. With 0 the state is returned as it is. For
        convolutions the last step is followed by further ones, up to sixteen, as long
        as the value still rises.

    **Returns:**

    The new state. It carries no derivative: the iteration sees a stopped operator. A
    vector that the operator maps to zero is kept, and if the operator has a NaN or an
    infinity all of them are.

    **Raises:** `TypeError` or `ValueError` if `operator` is not a matrix or an
    operator, if `state` is of other shapes, or if `num_steps < 0`.

    !!! Example

        ```python
        import jax
        import spectrax

        weight = jax.random.normal(jax.random.key(0), (256, 128))
        state = spectrax.init_power_state(weight)
        state = spectrax.power_iterate(weight, state, num_steps=5)
        sigma = spectrax.singular_value(weight, state)
        ```
    """
    operator = stop_gradient(as_operator(operator))
    check_num_steps(num_steps)
    if isinstance(operator, LatticeConvolution):
        step = ft.partial(lattice_power_step, operator)
        state = _checked_lattice_state(operator, state)
        return stop_gradient(_repeat(step, state, num_steps))
    if (matrices := mode_matrices(operator)) is not None:
        state = _checked_mode_state(matrices, state)
        return jax.vmap(ft.partial(power_iterate, num_steps=num_steps))(matrices, state)
    rows = _to_rows(operator, state)
    step = ft.partial(power_step, operator)
    if num_steps > 0 and _is_convolution(operator):
        rows = _followed(operator, _repeat(step, rows, num_steps - 1))
    else:
        rows = _repeat(step, rows, num_steps)
    return stop_gradient(_to_public(operator, rows))


def singular_value(
    operator: OperatorLike,
    state: PowerStateLike,
) -> Float[Array, ""]:
    """`Re(u^H A v)` for the leading pair of `state`: the power iteration's estimate of
    the spectral norm.

    **Kind:** an estimate, never above the norm (rounding apart), as `u` and `v` are
    unit vectors. Its error is of second order in that of the vectors.

    **Derivatives:** in the operator, with `u` and `v` held fixed: `Re(u^H dA v)`. As
    the norm's own first derivative has that form, it is accurate when the vectors are.
    Second derivatives are zero; use [`spectrax.spectral_norm`][] where they matter.

    **Arguments:**

    - `operator`: as in [`spectrax.init_power_state`][].
    - `state`: vectors for it. They are scaled to unit length here.

    **Returns:**

    A real scalar of dtype float32 or wider. Zero for a zero operator, NaN for one with
    a NaN or an infinity.

    **Cost:** one product with the operator.

    **Raises:** as `power_iterate`.
    """
    operator = as_operator(operator)
    if isinstance(operator, LatticeConvolution):
        return lattice_value(operator, _checked_lattice_state(operator, state))
    if (matrices := mode_matrices(operator)) is not None:
        state = _checked_mode_state(matrices, state)
        return largest_of(jax.vmap(singular_value)(matrices, state))
    return leading_value(operator, _to_rows(operator, state))


def residual_norm(
    operator: OperatorLike,
    state: PowerStateLike,
) -> Float[Array, ""]:
    """`|A^H u - sigma v| / sigma` of the leading pair: zero if it has converged."""
    operator = as_operator(operator)
    if isinstance(operator, LatticeConvolution):
        return lattice_residual(operator, _checked_lattice_state(operator, state))
    if (matrices := mode_matrices(operator)) is not None:
        state = _checked_mode_state(matrices, state)
        leading = jnp.argmax(jax.vmap(singular_value)(matrices, state))
        return jax.vmap(residual_norm)(matrices, state)[leading]
    return leading_residual(operator, _to_rows(operator, state))


def check_num_steps(num_steps: int, name: str = "num_steps") -> None:
    """Raises if `num_steps` is not a count."""
    check_count(num_steps, name, least=0)


def check_count(count: Any, name: str, *, least: int) -> None:
    """Raises if `count` is not an integer of at least `least`."""
    if isinstance(count, bool) or not isinstance(count, int | np.integer):
        raise TypeError(
            f"expected `{name}` to be an integer, got {count!r} of type "
            f"{type(count).__name__}."
        )
    if count < least:
        raise ValueError(f"expected `{name}` to be at least {least}, got {count}.")


def _repeat(step: Callable[[PyTree], PyTree], state: PyTree, num_steps: int) -> PyTree:
    if num_steps <= 1:
        return step(state) if num_steps == 1 else state
    return lax.fori_loop(0, num_steps, lambda _, carry: step(carry), state)


def _is_convolution(operator: LinearOperator) -> bool:
    function = getattr(operator, "fn", None)
    return isinstance(function, eqx.nn.Conv | eqx.nn.ConvTranspose)


def _followed(operator: LinearOperator, rows: RowState) -> RowState:
    """A step, and further ones as long as the value rises.

    Where a direction that was not the leading one takes over, as happens to kernels
    early in training, a single step stays behind it by some percent.
    """

    def unfinished(carry: tuple[RowState, Array, Array, Array]) -> Array:
        _, value, rise, count = carry
        rising = value + FORESIGHT * rise > value * (1 + RISE)
        return (count < 1) | (rising & (count < MOST_MOVES))

    def body(
        carry: tuple[RowState, Array, Array, Array],
    ) -> tuple[RowState, Array, Array, Array]:
        old, before, _, count = carry
        new = power_step(operator, old)
        value = leading_value(operator, new)
        return new, value, value - before, count + 1

    value = leading_value(operator, rows)
    start = rows, value, jnp.zeros_like(value), jnp.zeros((), jnp.int32)
    return lax.while_loop(unfinished, body, start)[0]


def _to_rows(operator: LinearOperator, state: PowerStateLike) -> RowState:
    if not isinstance(state, PowerState):
        raise TypeError(
            "expected `state` to be a `PowerState` from "
            f"`spectrax.init_power_state(operator)`, got {type(state).__name__}."
        )
    out_structure, in_structure = operator.out_structure(), operator.in_structure()
    _check_rows("u", state.u, out_structure)
    _check_rows("v", state.v, in_structure)
    dtype = accumulation_dtype(operator)
    momentum = None if state.momentum is None else pack_rows(state.momentum, dtype)
    return RowState(pack_rows(state.u, dtype), pack_rows(state.v, dtype), momentum)


def _to_public(operator: LinearOperator, rows: RowState) -> PowerState:
    in_structure = operator.in_structure()
    dtype = accumulation_dtype(operator)

    def structured(block: Rows) -> StructuredRows:
        return unpack_rows(block, in_structure, dtype)

    return PowerState(
        unpack_rows(rows.u, operator.out_structure(), dtype),
        structured(rows.v),
        None if rows.momentum is None else structured(rows.momentum),
    )


def _check_rows(
    name: str, rows: StructuredRows, structure: PyTree[jax.ShapeDtypeStruct]
) -> None:
    got = jtu.tree_map(lambda x: x.shape[1:], rows)
    expected = jtu.tree_map(lambda x: x.shape, structure)
    if got != expected:
        raise ValueError(
            f"expected `state.{name}` to hold vectors of shape {expected}, those of "
            f"the operator, got {got}. Make the state with "
            "`spectrax.init_power_state(operator)` for an operator of this shape. Of a "
            "model, use the state that was made with it, and under `jax.vmap` give it "
            "`in_axes=None` and `out_axes=None`."
        )


def _checked_mode_state(
    matrices: Inexact[Array, "modes out in"], state: PowerStateLike
) -> PowerState:
    got = state.u.shape[:1] if isinstance(state, PowerState) else type(state).__name__
    if not isinstance(state, PowerState) or got != matrices.shape[:1]:
        raise ValueError(
            "expected a `PowerState` with an axis in front for the modes of the "
            f"Fourier multiplier, {matrices.shape[:1]}, got {got}. Make the state with "
            "`spectrax.init_power_state(operator)` for an operator of this shape."
        )
    return state


def _checked_lattice_state(
    operator: LatticeConvolution, state: PowerStateLike
) -> LatticePowerState:
    if not isinstance(state, LatticePowerState):
        raise TypeError(
            "expected `state` to be a `LatticePowerState`, as the operator is a "
            f"convolution at every input size; got {type(state).__name__}. Make it "
            "with `spectrax.init_power_state(operator)`."
        )
    groups, _, in_ = operator.kernel.shape[:3]
    expected = (groups, in_), (groups, operator.dim)
    got = state.v.shape[::2], state.frequency.shape[::2]
    if got != expected:
        raise ValueError(
            "expected `state` to have (groups, in) and (groups, dim) "
            f"{expected}, those of the convolution, got {got}. Make the state with "
            "`spectrax.init_power_state(operator)` for an operator of this shape."
        )
    if not jnp.iscomplexobj(state.v):
        raise TypeError(
            "expected `state.v` to be complex amplitudes of plane waves, got "
            f"{state.v.dtype}: a cast to a real dtype drops their imaginary part. Cast "
            "the real arrays of a state only."
        )
    real = real_dtype(at_least_float32(operator.kernel.dtype))
    v = state.v.astype(np.result_type(real, np.complex64))
    frequency, value = state.frequency.astype(real), state.value.astype(real)
    return LatticePowerState(v, frequency, value, state.block_size)
