"""What a converged norm is made of, for any operator. A kind registers its own."""

import functools as ft

import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
from jaxtyping import Array, Float, Inexact

from .._custom_types import LinearOperator
from .._operators import accumulation_dtype, Operator
from ._triplet import differentiable_norm, triplet_residual, TripletFinder


# More entries than this are not written out for `reference_norm`.
_LARGEST_DENSE = 2**24
_MAX_STEPS = 1024


@ft.singledispatch
def converged_norm(operator: LinearOperator, find: TripletFinder) -> Float[Array, ""]:
    """The norm that [`spectrax.spectral_norm`][] returns, or, if `find.dense` says so,
    [`spectrax.ExactSVD`][].

    **Kind:** an estimate, never above the norm (rounding apart).

    **Arguments:**

    - `operator`: of any kind. By default the value of the leading singular triplet,
        with derivatives of every order.
    - `find`: how a triplet is found: tolerance, steps, a key, and whether by a
        decomposition of the dense matrix.

    **Returns:** a real scalar, differentiable in the operator.

    **Raises:** nothing; the operator has been looked at.
    """
    return differentiable_norm(operator, find)


@ft.singledispatch
def converged_residual(
    operator: LinearOperator, find: TripletFinder
) -> Float[Array, ""]:
    """The residual of what `converged_norm` found, `|A^H u - sigma v| / sigma`.

    **Arguments:**

    - `operator`: of any kind. By default that of the leading triplet.
    - `find`: as for `converged_norm`.

    **Returns:** a real scalar, zero for a zero operator.

    **Raises:** nothing; the operator has been looked at.
    """
    return triplet_residual(operator, find)


@ft.singledispatch
def current_norm(operator: LinearOperator, estimate: float) -> float:
    """What [`spectrax.summary`][] prints as the norm that an estimator sees.

    **Kind:** an estimate.

    **Arguments:**

    - `operator`: of any kind, its arrays concrete. By default the estimate is returned;
        a kind whose estimate may have missed where the norm is now looks for itself.
    - `estimate`: that of the estimator.

    **Returns:** a number.

    **Raises:** nothing.
    """
    del operator
    return estimate


@ft.singledispatch
def reference_norm(operator: LinearOperator) -> float:
    """The norm as [`spectrax.summary`][] finds it if it is asked for the true one:
    without any state, in float64 if possible.

    **Kind:** exact up to rounding where the operator can be written out; an estimate
    otherwise.

    **Arguments:**

    - `operator`: of any kind, its arrays concrete. By default it is written out, and
        decomposed by NumPy, if it has at most 2^24 entries.

    **Returns:** a number.

    **Raises:** nothing.
    """
    if operator.in_size() * operator.out_size() > _LARGEST_DENSE:
        return float(converged_norm(operator, default_finder(operator)))
    return dense_norm(lx.materialise(operator).as_matrix()[None])


@ft.singledispatch
def smaller_side(operator: LinearOperator) -> int:
    """The dimension of the smaller of an operator's two spaces, over the real numbers:
    how far a random vector may be from a singular one, which
    [`spectrax.probable_upper_bound`][] asks.

    **Arguments:**

    - `operator`: of any kind. By default by its input and output.

    **Returns:** a count.

    **Raises:** `TypeError` for the kinds that have no finite size.
    """
    size = min(operator.in_size(), operator.out_size())
    complex_ = jnp.issubdtype(accumulation_dtype(operator), jnp.complexfloating)
    return 2 * size if complex_ else size


def default_finder(operator: Operator) -> TripletFinder:
    """Golub-Kahan-Lanczos bidiagonalisation with the defaults of `spectral_norm`."""
    return TripletFinder(
        jr.key(0), default_tolerance(operator), _MAX_STEPS, dense=False
    )


def default_tolerance(operator: Operator) -> float:
    """The residual at which to stop, by the precision of the operator's dtype."""
    return float(jnp.finfo(accumulation_dtype(operator)).eps) ** 0.75


def dense_norm(matrices: Inexact[Array, "some out in"]) -> float:
    """The largest norm of some matrices, in float64."""
    wide = np.complex128 if jnp.iscomplexobj(matrices) else np.float64
    return float(np.linalg.norm(np.asarray(matrices, wide), 2, axis=(1, 2)).max())
