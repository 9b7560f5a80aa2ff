"""What power iteration asks of an operator: vectors to start from, a step, their value
and their residual. A kind of operator registers its own; here is what does for any.
"""

import functools as ft
from collections.abc import Callable
from typing import Any, TYPE_CHECKING, TypeAlias

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from .._custom_types import LinearOperator, Rows, StructuredRows
from .._operators import accumulation_dtype, pack_rows, unpack_rows
from ._golub_kahan import leading_triplets
from ._lattice_power import LatticePowerState
from ._power import leading_residual, leading_value, power_step, PowerState, RowState
from ._rows import random_rows


# As with `OperatorLike`: a wrong one gets a message of ours.
if TYPE_CHECKING:
    PowerStateLike: TypeAlias = PowerState | LatticePowerState
else:
    PowerStateLike: TypeAlias = Any


@ft.singledispatch
def init_vectors(
    operator: LinearOperator, key: PRNGKeyArray, block_size: int, num_steps: int
) -> PowerStateLike:
    """The vectors that [`spectrax.init_power_state`][] starts from.

    **Arguments:**

    - `operator`: of any kind. By default the leading pairs after some steps of
        Golub-Kahan-Lanczos bidiagonalisation.
    - `key`: randomness of the start.
    - `block_size`: how many pairs are wanted. No more than there are.
    - `num_steps`: how many steps they are worth.

    **Returns:** a pytree of arrays, which the three functions below understand.

    **Raises:** nothing; the arguments have been looked at.
    """
    return start(operator, key, block_size, num_steps)


@ft.singledispatch
def step_vectors(
    operator: LinearOperator, vectors: PowerStateLike, num_steps: int
) -> PowerStateLike:
    """The vectors some steps later, as in [`spectrax.power_iterate`][].

    **Arguments:**

    - `operator`: of any kind. By default each step is a block step with products with
        the operator and its adjoint.
    - `vectors`: those that `init_vectors` made for an operator of this shape.
    - `num_steps`: how many steps. With 0 the vectors are kept.

    **Returns:** vectors of the same shapes and dtypes.

    **Raises:** `TypeError` or `ValueError` if they are those of another operator.
    """
    rows = to_rows(operator, vectors)
    return to_public(
        operator, repeat(ft.partial(power_step, operator), rows, num_steps)
    )


@ft.singledispatch
def vectors_value(
    operator: LinearOperator, vectors: PowerStateLike
) -> Float[Array, ""]:
    """What the vectors say of the norm, as in [`spectrax.singular_value`][].

    **Kind:** an estimate, never above the norm (rounding apart).

    **Arguments:**

    - `operator`: of any kind. By default `Re(u^H A v)` of the leading pair.
    - `vectors`: those that `init_vectors` made for an operator of this shape.

    **Returns:** a real scalar, differentiable in the operator with the vectors held
    fixed.

    **Raises:** as `step_vectors`.
    """
    return leading_value(operator, to_rows(operator, vectors))


@ft.singledispatch
def vectors_residual(
    operator: LinearOperator, vectors: PowerStateLike
) -> Float[Array, ""]:
    """How far from converged the vectors are.

    **Arguments:**

    - `operator`: of any kind. By default `|A^H u - sigma v| / sigma` of the leading
        pair.
    - `vectors`: those that `init_vectors` made for an operator of this shape.

    **Returns:** a real scalar, zero if they have converged.

    **Raises:** as `step_vectors`.
    """
    return leading_residual(operator, to_rows(operator, vectors))


# Compiled even where the caller is not, as these are many small operations.
@eqx.filter_jit
def start(
    operator: LinearOperator, key: PRNGKeyArray, block_size: int, num_steps: int
) -> PowerState:
    """The default of `init_vectors`."""
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
    return to_public(operator, RowState(u, v, momentum))


def repeat(step: Callable[[PyTree], PyTree], state: PyTree, num_steps: int) -> PyTree:
    """So many steps, in a loop if there are several."""
    if num_steps <= 1:
        return step(state) if num_steps == 1 else state
    return lax.fori_loop(0, num_steps, lambda _, carry: step(carry), state)


def to_rows(operator: LinearOperator, state: PowerStateLike) -> RowState:
    """The state with every vector raveled, after a look at its shapes."""
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


def to_public(operator: LinearOperator, rows: RowState) -> PowerState:
    """The way back."""
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
