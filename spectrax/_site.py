"""One constrained weight: its place, its estimate, its constraint."""

import dataclasses
import functools as ft
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from ._constraints import AbstractConstraint
from ._norms import AbstractEstimator
from ._operators import as_operator, Operator
from ._rules import WeightRule
from ._select import rule_at
from ._tree import follow, Path


View = Callable[[Array], Operator | Array]


@dataclasses.dataclass(frozen=True)
class Site:
    """One constrained weight: where it is, how it acts, how its norm is found.

    Holds no arrays: what belongs to the weight is in a `SiteState`.
    """

    path: Path
    view: View | None
    input_size: tuple[int, ...] | None
    estimator: AbstractEstimator


class SiteState(NamedTuple):
    """What a site carries from step to step."""

    estimate: PyTree
    # `None` if the constraint is trained: it is then part of the model.
    constraint: AbstractConstraint | None


def init_site(
    module: PyTree, site: Site, constraint: AbstractConstraint, key: PRNGKeyArray
) -> tuple[SiteState, AbstractConstraint | None]:
    """A site's first state, with the constraint made for its norm, and that constraint
    if it is to be trained.
    """
    operators, depth = site_operators(module, site)
    estimate = _init(site.estimator, operators, key, depth)
    sigma = over_stack(site.estimator.sigma, depth)(operators, estimate)
    constraint = constraint.init(sigma)
    if constraint.trainable:
        return SiteState(estimate, None), constraint
    return SiteState(estimate, constraint), None


def site_norm(module: PyTree, site: Site, state: SiteState) -> Float[Array, "..."]:
    """The norm of a site's raw weight, one for each layer of a stack."""
    operators, depth = site_operators(module, site)
    return _sigma(site.estimator, operators, state.estimate, depth)


def advance_site(
    module: PyTree, site: Site, state: SiteState, num_steps: int | None
) -> SiteState:
    """The state with this site's estimate brought up to date."""
    operators, depth = site_operators(module, site)
    estimate = _advance(site.estimator, operators, state.estimate, depth, num_steps)
    return SiteState(estimate, state.constraint)


def site_operators(module: PyTree, site: Site) -> tuple[Operator, int]:
    """How a site's weight acts, and the number of stacked axes: the operator's arrays
    have those axes in front, so that it is to be used under as many `vmap`s.
    """
    build, depth = site_view(module, site)
    return over_stack(build, depth)(follow(module, site.path)), depth


class WeightView(eqx.Module):
    """From one weight of a site's stack to its operator. A pytree, and not a closure,
    so that what is compiled for it is found again.
    """

    layer: Any
    rule: WeightRule
    view: View | None = eqx.field(static=True)
    input_size: tuple[int, ...] | None = eqx.field(static=True)

    def __call__(self, weight: Array) -> Operator:
        """How the weight acts."""
        if self.view is not None:
            return as_operator(self.view(weight))
        return self.rule.view(self.layer, weight, self.input_size)


def site_view(module: PyTree, site: Site) -> tuple[WeightView, int]:
    """A site's view, and the number of stacked axes."""
    weight = follow(module, site.path)
    layer, rule = rule_at(module, site.path)
    # An array of no known layer may have any number of axes if the view says so.
    strange = layer is None and site.view is not None
    depth = 0 if strange else rule.stack_ndim(layer, weight)
    return WeightView(layer, rule, site.view, site.input_size), depth


def over_stack(function: Callable[..., Any], depth: int) -> Callable[..., Any]:
    """Maps over the first `depth` axes of every array among the arguments."""
    for _ in range(depth):
        function = eqx.filter_vmap(function)
    return function


# Not compiled as a whole: of a convolution it is found without a compiler.
def _init(
    estimator: AbstractEstimator, operators: Operator, key: PRNGKeyArray, depth: int
) -> PyTree:
    return over_stack(ft.partial(estimator.init, key=key), depth)(operators)


# Compiled even where the caller is not, as these are many small operations.
@eqx.filter_jit
def _advance(
    estimator: AbstractEstimator,
    operators: Operator,
    estimate: PyTree,
    depth: int,
    num_steps: int | None,
) -> PyTree:
    step = ft.partial(estimator.advance, num_steps=num_steps)
    return over_stack(step, depth)(operators, estimate)


@eqx.filter_jit
def _sigma(
    estimator: AbstractEstimator, operators: Operator, estimate: PyTree, depth: int
) -> Float[Array, "..."]:
    return over_stack(estimator.sigma, depth)(operators, estimate)
