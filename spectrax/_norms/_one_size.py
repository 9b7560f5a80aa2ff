"""Power iteration on a convolution of one input size, which follows what rises."""

import functools as ft

import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array

from .._operators import Convolution
from ._lattice_power import FORESIGHT, MOST_MOVES, RISE
from ._power import leading_value, power_step, PowerState, RowState
from ._vectors import PowerStateLike, repeat, step_vectors, to_public, to_rows


@step_vectors.register
def _(operator: Convolution, vectors: PowerStateLike, num_steps: int) -> PowerState:
    rows = to_rows(operator, vectors)
    if num_steps > 0:
        rows = repeat(ft.partial(power_step, operator), rows, num_steps - 1)
        rows = _followed(operator, rows)
    return to_public(operator, rows)


def _followed(operator: Convolution, rows: RowState) -> RowState:
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
