"""The converged norm of a convolution at every input size, and its derivatives."""

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Bool, Complex, Float, Inexact, PyTree

from .._linalg import solve
from .._operators import LatticeConvolution
from ._lattice_power import init_lattice_state, leading_frequency
from ._rows import largest_of, stop_gradient
from ._triplet import (
    differentiable_norm,
    differentiable_triplet,
    triplet_residual,
    TripletFinder,
)


# The search for the frequency, from a cold start: for every kernel in the tests it ends
# within 1e-8 of the supremum, and within 2e-8 after a third of the steps.
_BLOCK_SIZE = 8
_NUM_STEPS = 288


def lattice_norm(operator: LatticeConvolution, find: TripletFinder) -> Float[Array, ""]:
    """`gain` times the largest `sigma(F(w))` over the frequencies and the groups.

    At the best frequency `w` the derivative of `sigma(F(w))` with respect to `w` is
    zero, so that the first derivative of the maximum is that of `sigma` at fixed `w`;
    further ones need the derivative of `w`, which `_best_frequencies` has.
    """
    frequencies = _best_frequencies(operator, find)

    def group_norm(kernel: Array, frequency: Array) -> Float[Array, ""]:
        return _sigma_at(kernel, frequency, find)

    return operator.gain * largest_of(
        jax.vmap(group_norm)(operator.kernel, frequencies)
    )


def lattice_norm_residual(
    operator: LatticeConvolution, find: TripletFinder
) -> Float[Array, ""]:
    """The largest residual over the groups, each at its best frequency."""
    frequencies = _best_frequencies(operator, find)

    def group_residual(kernel: Array, frequency: Array) -> Float[Array, ""]:
        return triplet_residual(
            lx.MatrixLinearOperator(_symbol(kernel, frequency)), find
        )

    return jnp.max(jax.vmap(group_residual)(operator.kernel, frequencies))


@eqx.filter_custom_jvp
def _best_frequencies(
    operator: LatticeConvolution, find: TripletFinder
) -> Float[Array, "groups dim"]:
    """Where each group's `sigma(F(w))` is largest, found by power iteration."""
    operator = stop_gradient(operator)
    state = init_lattice_state(operator, find.key, _BLOCK_SIZE, _NUM_STEPS)
    return stop_gradient(leading_frequency(state))


@_best_frequencies.def_jvp
def _best_frequencies_jvp(
    primals: tuple[LatticeConvolution, TripletFinder], tangents: tuple[PyTree, PyTree]
) -> tuple[Float[Array, "groups dim"], Float[Array, "groups dim"]]:
    """`grad sigma(F(w)) = 0` holds for every kernel, hence `dw = -H^-1 d(grad)`."""
    operator, find = primals
    frequencies = _best_frequencies(operator, find)

    def rate(kernel: Array, change: Array, frequency: Array) -> Array:
        _, slope_change = jax.jvp(
            lambda k: _slope(k, frequency, find), (kernel,), (change,)
        )
        hessian, usable = _hessian(kernel, frequency, find)
        return jnp.where(usable, -solve(hessian, slope_change)[0], 0)

    rates = jax.vmap(rate)(operator.kernel, tangents[0].kernel, frequencies)
    return frequencies, rates


def _symbol(
    kernel: Inexact[Array, "out in *taps"], frequency: Float[Array, " dim"]
) -> Complex[Array, "out in"]:
    return LatticeConvolution(kernel[None], 1.0).symbol(frequency[None])[0, 0]


def _sigma_at(
    kernel: Inexact[Array, "out in *taps"],
    frequency: Float[Array, " dim"],
    find: TripletFinder,
) -> Float[Array, ""]:
    matrix = lx.MatrixLinearOperator(_symbol(kernel, frequency))
    return differentiable_norm(matrix, find)


def _slope(
    kernel: Inexact[Array, "out in *taps"],
    frequency: Float[Array, " dim"],
    find: TripletFinder,
) -> Float[Array, " dim"]:
    """The gradient of `sigma(F(w))` with respect to `w`: `Re(u^H dF/dw v)`."""
    triplet = differentiable_triplet(
        lx.MatrixLinearOperator(_symbol(kernel, frequency)), find
    )
    slopes = jax.jacfwd(lambda w: _symbol(kernel, w))(frequency)
    return jnp.real(jnp.einsum("o,oid,i->d", jnp.conj(triplet.u), slopes, triplet.v))


def _hessian(
    kernel: Inexact[Array, "out in *taps"],
    frequency: Float[Array, " dim"],
    find: TripletFinder,
) -> tuple[Float[Array, "dim dim"], Bool[Array, ""]]:
    """The second derivatives in `w`, and whether they are those of a proper maximum.

    If they are not, as for a kernel with one tap, whose symbol is constant, the
    frequency is held fixed, and the matrix returned is a harmless one.
    """
    hessian = jax.jacfwd(lambda w: _slope(kernel, w, find))(frequency)
    dim = frequency.size
    taps = jnp.array(kernel.shape[2:])
    # An axis with one tap has no say in anything.
    hessian = hessian - jnp.diag(jnp.where(taps == 1, 1.0, 0.0).astype(hessian.dtype))
    sigma = lax.stop_gradient(_sigma_at(kernel, frequency, find))
    identity = jnp.eye(dim, dtype=hessian.dtype)
    # All eigenvalues below that, if the pivots say that the rest is positive definite.
    rest = -lax.stop_gradient(hessian) - 1e-6 * sigma * identity
    _, pivots = solve(rest, jnp.zeros(dim, hessian.dtype))
    usable = jnp.all(pivots > 0)
    return jnp.where(usable, hessian, -identity), usable
