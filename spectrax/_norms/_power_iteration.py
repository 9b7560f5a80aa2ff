"""Power iteration as pure functions: state in, state out."""

from typing import Any

import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from .._operators import as_operator, OperatorLike
from ._lattice_power import LatticePowerState
from ._power import PowerState
from ._rows import stop_gradient
from ._vectors import (
    init_vectors,
    PowerStateLike,
    step_vectors,
    vectors_residual,
    vectors_value,
)


DEFAULT_BLOCK_SIZE = 8
DEFAULT_INIT_STEPS = 32


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
    return stop_gradient(init_vectors(operator, key, block_size, num_steps))


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
    operator, state = stop_gradient((as_operator(operator), state))
    check_num_steps(num_steps)
    return stop_gradient(step_vectors(operator, state, num_steps))


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
    return vectors_value(as_operator(operator), state)


def residual_norm(
    operator: OperatorLike,
    state: PowerStateLike,
) -> Float[Array, ""]:
    """`|A^H u - sigma v| / sigma` of the leading pair: zero if it has converged."""
    return vectors_residual(as_operator(operator), state)


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
