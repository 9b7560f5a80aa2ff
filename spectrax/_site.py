"""One constrained weight: its place, its estimate, its constraint."""

import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from ._constraints import AbstractConstraint
from ._norms import AbstractEstimator
from ._operators import as_operator, Operator
from ._select import rule_at
from ._tree import follow, Path


View = Callable[[Array], Operator | Array]


class Site(eqx.Module):
    """One constrained weight: where it is, and what belongs to it."""

    path: Path = eqx.field(static=True)
    view: View | None = eqx.field(static=True)
    input_size: tuple[int, ...] | None = eqx.field(static=True)
    estimator: AbstractEstimator
    # The constraint is found in the model if it is trained, else in the state.
    trained_constraint: AbstractConstraint | None
    fixed_constraint: eqx.nn.StateIndex | None
    estimate: eqx.nn.StateIndex

    def constraint(self, state: eqx.nn.State) -> AbstractConstraint:
        """The constraint, wherever it is."""
        if self.fixed_constraint is None:
            assert self.trained_constraint is not None
            return self.trained_constraint
        return state.get(self.fixed_constraint)


def make_site(
    module: PyTree,
    path: Path,
    view: View | None,
    input_size: tuple[int, ...] | None,
    estimator: AbstractEstimator,
    constraint: AbstractConstraint,
    key: PRNGKeyArray,
) -> Site:
    """A site with its first estimate, and the constraint made for its norm."""
    operators, depth = _operators(module, path, view, input_size)
    estimate = _init(estimator, operators, key, depth)
    constraint = constraint.init(_sigma(estimator, operators, estimate, depth))
    trained = constraint.trainable
    return Site(
        path=path,
        view=view,
        input_size=input_size,
        estimator=estimator,
        trained_constraint=constraint if trained else None,
        fixed_constraint=None if trained else eqx.nn.StateIndex(constraint),
        estimate=eqx.nn.StateIndex(estimate),
    )


def site_norm(module: PyTree, site: Site, state: eqx.nn.State) -> Float[Array, "..."]:
    """The norm of a site's raw weight, one for each layer of a stack."""
    operators, depth = site_operators(module, site)
    return _sigma(site.estimator, operators, state.get(site.estimate), depth)


def advance_site(
    module: PyTree, site: Site, state: eqx.nn.State, num_steps: int | None
) -> eqx.nn.State:
    """The state with this site's estimate brought up to date."""
    operators, depth = site_operators(module, site)
    estimate = state.get(site.estimate)
    new = _advance(site.estimator, operators, estimate, depth, num_steps)
    return state.set(site.estimate, new)


def site_operators(module: PyTree, site: Site) -> tuple[Operator, int]:
    """How a site's weight acts, and the number of stacked axes: the operator's arrays
    have those axes in front, so that it is to be used under as many `vmap`s.
    """
    return _operators(module, site.path, site.view, site.input_size)


def site_view(module: PyTree, site: Site) -> tuple[Callable[[Array], Operator], int]:
    """From one weight of a site's stack to its operator, and the number of stacked
    axes.
    """
    return _view(module, site.path, site.view, site.input_size)


def _operators(
    module: PyTree, path: Path, view: View | None, input_size: tuple[int, ...] | None
) -> tuple[Operator, int]:
    build, depth = _view(module, path, view, input_size)
    return over_stack(build, depth)(follow(module, path)), depth


def _view(
    module: PyTree, path: Path, view: View | None, input_size: tuple[int, ...] | None
) -> tuple[Callable[[Array], Operator], int]:
    weight = follow(module, path)
    layer, rule = rule_at(module, path)

    def build(weight: Array) -> Operator:
        if view is not None:
            return as_operator(view(weight))
        return rule.view(layer, weight, input_size)

    # An array of no known layer may have any number of axes if the view says so.
    strange = layer is None and view is not None
    return build, 0 if strange else rule.stack_ndim(layer, weight)


def over_stack(function: Callable[..., Any], depth: int) -> Callable[..., Any]:
    """Maps over the first `depth` axes of every array among the arguments."""
    for _ in range(depth):
        function = eqx.filter_vmap(function)
    return function


# Compiled even where the caller is not, as these are many small operations.
@eqx.filter_jit
def _init(
    estimator: AbstractEstimator, operators: Operator, key: PRNGKeyArray, depth: int
) -> PyTree:
    return over_stack(ft.partial(estimator.init, key=key), depth)(operators)


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
