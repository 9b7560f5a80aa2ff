"""The spectral norm, converged."""

from typing import Literal, overload

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
from jaxtyping import Array, Float, PRNGKeyArray

from .._operators import as_operator, Operator, OperatorLike
from ._converged import converged_norm, converged_residual, default_tolerance
from ._triplet import TripletFinder


class NormSolution(eqx.Module):
    """A norm and how it was reached: what [`spectrax.spectral_norm`][] returns if it is
    asked for its result.

    - `value`: the norm.
    - `residual`: `|A^H u - value v| / value` at the end, 0 for a zero operator.
    - `result`: a `lineax.RESULTS`: `successful`, `max_steps_reached` if the residual is
        above the tolerance, or `nonfinite_input`.
    """

    value: Float[Array, ""]
    residual: Float[Array, ""]
    result: lx.RESULTS


@overload
def spectral_norm(
    operator: OperatorLike,
    *,
    key: PRNGKeyArray | None = None,
    rtol: float | None = None,
    max_steps: int = 1024,
    with_result: Literal[False] = False,
) -> Float[Array, ""]: ...
@overload
def spectral_norm(
    operator: OperatorLike,
    *,
    key: PRNGKeyArray | None = None,
    rtol: float | None = None,
    max_steps: int = 1024,
    with_result: Literal[True],
) -> NormSolution: ...
def spectral_norm(
    operator: OperatorLike,
    *,
    key: PRNGKeyArray | None = None,
    rtol: float | None = None,
    max_steps: int = 1024,
    with_result: bool = False,
) -> Float[Array, ""] | NormSolution:
    """The spectral norm of an operator: its largest singular value
    `max |A x|_2 / |x|_2`, converged.

    **Kind:** an estimate, from Golub-Kahan-Lanczos bidiagonalisation with thick
    restarts (Baglama & Reichel 2005). It stops at a residual `|A^H u - sigma v|` of at
    most `rtol * sigma`; a singular value then lies within that distance, and the error
    is of second order in it. Rounding apart it is never above the norm.

    **Derivatives:** of any order, forward and reverse. The first is `Re(u^H dA v)`, the
    higher ones come from implicit differentiation of the singular vectors, one
    conjugate gradient solve each. At a repeated largest singular value the norm is not
    differentiable: the first derivative is then one subgradient `u v^H`, and higher
    ones hold the singular vectors fixed. At zero all derivatives are zero.

    **Arguments:**

    - `operator`: a matrix of shape `[out, in]`, any `lineax` operator, or what
        `spectrax.layer_operator` returns. Real or complex; float16 and bfloat16 are
        computed in float32.
    - `key`: randomness of the starting vector. Optional; a fixed key if not given.
    - `rtol`: the relative residual at which to stop; `eps ** 0.75` of the dtype by
        default, 6e-6 in float32 and 2e-12 in float64.
    - `max_steps`: the most products with the operator and its adjoint. If they do not
        suffice the current estimate is returned, a lower bound up to rounding. For the
        convolution at every input size it counts after the search for the best
        frequency, which takes 128 steps of power iteration.
    - `with_result`: whether to return, with the norm, how far it converged. For the
        convolution at every input size that is at the frequency that was found; that
        no other is better, only [`spectrax.enclose_norm`][] can say.

    **Returns:**

    A real scalar, of dtype float32 or wider. A zero operator has norm 0; one with a NaN
    or an infinity has norm NaN. With `with_result=True` a [`spectrax.NormSolution`][].

    **Cost:** two products with the operator and `O(32 (out + in))` further operations
    per step; 32 steps at least, unless `min(out, in)` is smaller.

    **Raises:** `TypeError` or `ValueError` if `operator` is not a matrix or an
    operator, if `rtol` is negative or if `max_steps` is not positive.

    !!! Example

        ```python
        import jax
        import jax.numpy as jnp
        import spectrax

        matrix = jnp.diag(jnp.array([3.0, 2.0, 1.0]))
        print(spectrax.spectral_norm(matrix))  # 3.0
        print(jax.grad(spectrax.spectral_norm)(matrix))  # 1 at the top left
        ```
    """
    operator = as_operator(operator)
    if rtol is not None and not rtol >= 0:
        raise ValueError(f"expected `rtol` to be non-negative, got {rtol}.")
    if max_steps < 1:
        raise ValueError(f"expected `max_steps` to be positive, got {max_steps}.")
    key = jr.key(0) if key is None else key
    tolerance = default_tolerance(operator) if rtol is None else rtol
    find = TripletFinder(key, tolerance, max_steps, dense=False)
    value = converged_norm(operator, find)
    return _solution(operator, value, find) if with_result else value


def exact_norm(operator: Operator) -> Float[Array, ""]:
    """The norm by dense singular value decompositions; derivatives as above."""
    return converged_norm(operator, TripletFinder(jr.key(0), 0.0, 1, dense=True))


def _solution(
    operator: Operator, value: Float[Array, ""], find: TripletFinder
) -> NormSolution:
    residual = converged_residual(operator, find)
    # What rounding alone leaves is not for further steps to remove.
    floor = 64 * float(jnp.finfo(residual.dtype).eps)
    result = lx.RESULTS.where(
        residual <= max(find.rtol, floor),
        lx.RESULTS.successful,
        lx.RESULTS.max_steps_reached,
    )
    result = lx.RESULTS.where(jnp.isnan(value), lx.RESULTS.nonfinite_input, result)
    return NormSolution(value, residual, result)
