"""An upper bound that holds with a stated probability, over the starting vector."""

import math
from typing import cast, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from .._custom_types import LinearOperator
from .._norms import init_power_state, power_iterate, singular_value, smaller_side
from .._norms._golub_kahan import leading_triplets
from .._norms._rows import stop_gradient
from .._operators import as_operator, OperatorLike


def probable_upper_bound(
    operator: OperatorLike,
    *,
    num_steps: int = 64,
    failure_probability: float = 1e-6,
    method: Literal["lanczos", "power"] = "lanczos",
    key: PRNGKeyArray,
) -> Float[Array, ""]:
    """An upper bound on the spectral norm of any operator, which holds with a stated
    probability over the random start.

    From products with the operator alone nothing can be proven: a start orthogonal to
    the leading singular vector never finds it. A start uniform on the sphere rarely is.
    With `n` the smaller of the operator's two sizes (twice that if it is complex), `k`
    steps and `sigma` what they find, the norm exceeds `sigma / sqrt(1 - e)` with
    probability at most

    - `1.648 sqrt(n) exp(-(2 k - 1) sqrt(e))` for Lanczos' method,
    - `min(0.824, 0.354 / sqrt(e (k - 1))) sqrt(n) (1 - e)^(k - 1/2)` for the power
        method

    on `A^H A`, for every operator (Kuczynski & Wozniakowski 1992). Here `e` is chosen
    such that this is the failure probability.

    **Kind:** an upper bound with the given probability of failure, in exact arithmetic:
    rounding is not accounted for. [`spectrax.enclose_norm`][] has bounds without a
    probability, for operators of known structure.

    **Derivatives:** none.

    **Arguments:**

    - `operator`: a matrix of shape `[out, in]` or any `lineax` operator.
    - `num_steps`: products with the operator and its adjoint. The relative excess falls
        like `(log(n) / num_steps)^2` for Lanczos' method, like `log(n) / num_steps` for
        the power method.
    - `failure_probability`: between 0 and 1.
    - `method`: `"lanczos"`, the sharper one, or `"power"`, for what
        [`spectrax.power_iterate`][] does with one vector from a random start.
    - `key`: randomness of the start. The probability is over this key: a key chosen by
        its result has no guarantee.

    **Returns:**

    A real scalar. Infinite if so few steps guarantee nothing.

    **Cost:** two products with the operator per step, and `num_steps` vectors of memory
    for Lanczos' method.

    **Raises:** `ValueError` if `num_steps < 2`, if `failure_probability` is not between
    0 and 1, or if `method` is unknown; `TypeError` if `operator` is not a matrix or a
    `lineax` operator.

    !!! Example

        ```python
        import jax
        import spectrax

        matrix = jax.random.normal(jax.random.key(0), (64, 32))
        key = jax.random.key(1)
        bound = spectrax.probable_upper_bound(matrix, failure_probability=1e-9, key=key)
        ```
    """
    operator = stop_gradient(as_operator(operator))
    size = smaller_side(operator)
    if num_steps < 2:
        raise ValueError(f"expected `num_steps` to be at least 2, got {num_steps}.")
    if not 0 < failure_probability < 1:
        raise ValueError(
            "expected `failure_probability` to be between 0 and 1, got "
            f"{failure_probability}."
        )
    if method not in ("lanczos", "power"):
        raise ValueError(
            f'expected `method` to be "lanczos" or "power", got {method!r}.'
        )
    if method == "lanczos":
        error = _lanczos_error(size, num_steps, failure_probability)
        found = leading_triplets(
            cast(LinearOperator, operator),  # the others have no smaller side
            key,
            count=1,
            basis_size=num_steps,
            max_cycles=1,
            rtol=0.0,
        )
        sigma = found.sigma[0]
    else:
        error = _power_error(size, num_steps, failure_probability)
        start = init_power_state(operator, key=key, block_size=1, num_steps=0)
        steps = power_iterate(operator, start, num_steps=num_steps)
        sigma = singular_value(operator, steps)
    factor = math.inf if error >= 1 else 1 / math.sqrt(1 - error)
    return stop_gradient(jnp.where(sigma > 0, sigma * factor, sigma))


def _lanczos_error(size: int, steps: int, probability: float) -> float:
    """The relative error of the largest eigenvalue that has this probability."""
    return (math.log(1.648 * math.sqrt(size) / probability) / (2 * steps - 1)) ** 2


def _power_error(size: int, steps: int, probability: float) -> float:
    """The same for the power method, by bisection: the probability falls with it."""

    def failure(error: float) -> float:
        factor = min(0.824, 0.354 / math.sqrt(error * (steps - 1)))
        return factor * math.sqrt(size) * (1 - error) ** (steps - 0.5)

    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if failure(middle) > probability else (low, middle)
    return high
