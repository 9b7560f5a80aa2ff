"""The leading singular triplet, with derivatives of every order."""

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Inexact, PRNGKeyArray, PyTree

from .._custom_types import LinearOperator
from .._linalg import svd
from .._operators import accumulation_dtype, adjoint_rows, apply_rows
from ._golub_kahan import leading_triplets
from ._implicit import solve_on_complement
from ._rows import normalize_rows, stop_gradient


_BASIS_SIZE = 32


class Triplet(eqx.Module):
    """The leading singular triplet: `A v = sigma u`, `A^H u = sigma v`."""

    sigma: Float[Array, ""]
    u: Inexact[Array, " out"]
    v: Inexact[Array, " in"]


class TripletFinder(eqx.Module):
    """How a leading singular triplet is computed; its derivatives do not depend on it.

    - `key`: randomness of the start.
    - `rtol`: the relative residual at which to stop.
    - `max_steps`: the most products with the operator and its adjoint.
    - `dense`: whether by a decomposition of the dense matrix in their place.
    """

    key: PRNGKeyArray
    rtol: float = eqx.field(static=True)
    max_steps: int = eqx.field(static=True)
    dense: bool = eqx.field(static=True)

    def __call__(self, operator: LinearOperator) -> Triplet:
        """Finds the triplet, without derivatives."""
        operator = stop_gradient(operator)
        if self.dense:
            matrix = operator.as_matrix().astype(accumulation_dtype(operator))
            u, sigma, vh = svd(matrix)
            found = Triplet(sigma[0], u[:, 0], jnp.conj(vh[0]))
        else:
            cycles = max(1, self.max_steps // _BASIS_SIZE)
            leading = leading_triplets(
                operator,
                self.key,
                count=1,
                basis_size=_BASIS_SIZE,
                max_cycles=cycles,
                rtol=self.rtol,
            )
            found = Triplet(leading.sigma[0], leading.u[0], leading.v[0])
        return stop_gradient(found)


@eqx.filter_custom_jvp
def differentiable_norm(
    operator: LinearOperator, find: TripletFinder
) -> Float[Array, ""]:
    """`sigma`, with the derivative `d sigma = Re(u^H dA v)`.

    Where the norm has no derivative this is that of one of its branches: at a repeated
    largest singular value `u v^H` is a subgradient of the norm, a convex function; at
    zero, the subgradient is zero.
    """
    return differentiable_triplet(operator, find).sigma


@differentiable_norm.def_jvp
def _norm_jvp(
    primals: tuple[LinearOperator, TripletFinder], tangents: tuple[PyTree, PyTree]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    operator, find = primals
    triplet = differentiable_triplet(operator, find)
    change, _ = _changes(operator, tangents[0], triplet)
    return triplet.sigma, _rate(change, triplet)


@eqx.filter_custom_jvp
def differentiable_triplet(operator: LinearOperator, find: TripletFinder) -> Triplet:
    """The triplet, with the derivatives of its vectors by implicit differentiation.

    Differentiate `A v = s u` and `A^H u = s v`, write `a = dA v - u ds` and
    `b = dA^H u - v ds`, and eliminate `dv`:

        (s^2 I - A A^H) du = s a + A b      on the complement of u,
        dv = (A^H du + b) / s.

    For a tall operator the same is solved for `dv`, in the smaller space. The vectors
    are unique up to a common phase; here `u^H du = 0` (or `v^H dv = 0`) chooses it,
    and the norm's derivatives do not depend on it.
    """
    return find(operator)


@differentiable_triplet.def_jvp
def _triplet_jvp(
    primals: tuple[LinearOperator, TripletFinder], tangents: tuple[PyTree, PyTree]
) -> tuple[Triplet, Triplet]:
    operator, find = primals
    triplet = differentiable_triplet(operator, find)
    sigma, u, v = triplet.sigma, triplet.u, triplet.v
    change, adjoint_change = _changes(operator, tangents[0], triplet)
    rate = _rate(change, triplet)
    safe = jnp.where(sigma > 0, sigma, 1).astype(u.dtype)
    a = (change - u * rate.astype(u.dtype)) / safe
    b = (adjoint_change - v * rate.astype(v.dtype)) / safe

    def image(x: Inexact[Array, " in"]) -> Inexact[Array, " out"]:
        return apply_rows(operator, x[None])[0] / safe

    def adjoint_image(x: Inexact[Array, " out"]) -> Inexact[Array, " in"]:
        return adjoint_rows(operator, x[None])[0] / safe

    key = jr.fold_in(find.key, 1)
    if u.size <= v.size:
        du, simple = solve_on_complement(
            lambda x: image(adjoint_image(x)), u, a + image(b), key
        )
        dv = adjoint_image(du) + b
    else:
        dv, simple = solve_on_complement(
            lambda x: adjoint_image(image(x)), v, b + adjoint_image(a), key
        )
        du = image(dv) + a
    simple &= sigma > 0
    return triplet, Triplet(rate, jnp.where(simple, du, 0), jnp.where(simple, dv, 0))


def triplet_residual(operator: LinearOperator, find: TripletFinder) -> Float[Array, ""]:
    """`|A^H u - sigma v| / sigma` of what is found, 0 for a zero operator."""
    operator = stop_gradient(operator)
    triplet = find(operator)
    image = adjoint_rows(operator, triplet.u[None])
    safe = jnp.where(triplet.sigma > 0, triplet.sigma, 1)
    # Scaled first, so that nothing overflows when it is squared.
    difference = image / safe.astype(image.dtype) - triplet.v[None]
    _, length = normalize_rows(difference)
    return jnp.where(triplet.sigma == 0, 0, length[0])


def _changes(
    operator: LinearOperator, tangent: PyTree, triplet: Triplet
) -> tuple[Inexact[Array, " out"], Inexact[Array, " in"]]:
    """`dA v` and `dA^H u`."""
    _, change = eqx.filter_jvp(
        lambda a: apply_rows(a, triplet.v[None])[0], (operator,), (tangent,)
    )
    _, adjoint_change = eqx.filter_jvp(
        lambda a: adjoint_rows(a, triplet.u[None])[0], (operator,), (tangent,)
    )
    return change, adjoint_change


def _rate(change: Inexact[Array, " out"], triplet: Triplet) -> Float[Array, ""]:
    rate = jnp.real(jnp.vdot(triplet.u, change))
    return jnp.where(triplet.sigma > 0, rate, 0)
