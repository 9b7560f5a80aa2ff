"""The norm of a convolution at every input size: vectors, value, and what converges."""

import functools as ft
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from .._dtypes import at_least_float32, real_dtype
from .._operators import LatticeConvolution
from ._converged import (
    converged_norm,
    converged_residual,
    current_norm,
    reference_norm,
    smaller_side,
)
from ._lattice_norm import lattice_norm, lattice_norm_residual
from ._lattice_power import (
    init_lattice_state,
    lattice_power_step,
    lattice_residual,
    lattice_value,
    LatticePowerState,
    searched_norm,
)
from ._power_iteration import init_power_state
from ._triplet import TripletFinder
from ._vectors import (
    init_vectors,
    PowerStateLike,
    repeat,
    step_vectors,
    vectors_residual,
    vectors_value,
)


@init_vectors.register
def _(
    operator: LatticeConvolution, key: PRNGKeyArray, block_size: int, num_steps: int
) -> LatticePowerState:
    return init_lattice_state(operator, key, block_size, num_steps)


@step_vectors.register
def _(
    operator: LatticeConvolution, vectors: PowerStateLike, num_steps: int
) -> LatticePowerState:
    step = ft.partial(lattice_power_step, operator)
    return repeat(step, _checked(operator, vectors), num_steps)


@vectors_value.register
def _(operator: LatticeConvolution, vectors: PowerStateLike) -> Float[Array, ""]:
    return lattice_value(operator, _checked(operator, vectors))


@vectors_residual.register
def _(operator: LatticeConvolution, vectors: PowerStateLike) -> Float[Array, ""]:
    return lattice_residual(operator, _checked(operator, vectors))


@converged_norm.register
def _(operator: LatticeConvolution, find: TripletFinder) -> Float[Array, ""]:
    return lattice_norm(operator, find)


@converged_residual.register
def _(operator: LatticeConvolution, find: TripletFinder) -> Float[Array, ""]:
    return lattice_norm_residual(operator, find)


@current_norm.register
def _(operator: LatticeConvolution, estimate: float) -> float:
    found = float(vectors_value(operator, init_power_state(operator)))
    return found if math.isnan(found) else max(found, estimate)


@reference_norm.register
def _(operator: LatticeConvolution) -> float:
    return searched_norm(operator)


@smaller_side.register
def _(operator: LatticeConvolution) -> int:
    del operator
    raise TypeError(
        "expected an operator between spaces of finite size, got a convolution at "
        "every input size. Build it with `spectrax.layer_operator(layer, "
        "input_size=...)`, or use `spectrax.enclose_norm`."
    )


def _checked(operator: LatticeConvolution, state: PowerStateLike) -> LatticePowerState:
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
