"""A weight with a constraint on its norm, as a node of the model's own tree."""

import functools as ft
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.tree_util as jtu
from jaxtyping import Array, Float, Inexact, PRNGKeyArray, PyTree

from ._certify import certified_weights
from ._constraints import AbstractConstraint, apply_scale
from ._lazy import ScaledWeight
from ._norms import AbstractEstimator
from ._operators import Operator
from ._rules import BoundView
from ._tree import over_stack


class Memory(NamedTuple):
    """What a constrained weight carries in the `equinox.nn.State`."""

    vectors: PyTree
    # `None` if the constraint is trained: it is then part of the model.
    constraint: AbstractConstraint | None


class Constrained(eqx.Module):
    """A weight with a constraint on its norm, in the place of the weight.

    What [`spectrax.constrain`][] puts into a model, for [`spectrax.unwrap`][] to take
    out again. How the weight acts is fixed with it, so that nothing is looked up later:
    a model that was pickled works where its layer types were never registered. `wrap`
    makes it, with a `key` for the starting vectors.

    - `weight`: the raw weight, the leaf that is trained.
    - `constraint`: the constraint if it is trained, as a [`spectrax.LearnableBound`][]
        is, else `None`: a fixed one is in the state, where no optimizer finds it.
    - `memory`: where the vectors of the estimator are in the state.
    - `view`: from one weight to its operator.
    - `estimator`: how the norm is found.
    - `ndim`: how many axes one weight has; those in front of them are of a stack.
    - `products_only`: whether the layer only multiplies by its weight, so that a
        [`spectrax.ScaledWeight`][] will do in its place.
    - `inference`: if `True`, nothing advances. Set by `equinox.nn.inference_mode`.

    Anything else that is done with it, such as a product, raises a `TypeError` that
    says to unwrap the model first.

    !!! Example

        ```python
        import equinox as eqx
        import jax
        import spectrax

        mlp = eqx.nn.MLP(8, 4, width_size=16, depth=2, key=jax.random.key(0))
        model, state = spectrax.constrain(mlp)
        node = model.module.layers[0].weight
        print(node.weight.shape)  # of the raw weight
        print(node.norm(state), node.bound(state))  # its norm, and the allowed one
        normalized = node.unwrap(state)
        ```
    """

    weight: Inexact[Array, "..."]
    constraint: AbstractConstraint | None
    memory: eqx.nn.StateIndex
    view: BoundView = eqx.field(static=True)
    estimator: AbstractEstimator = eqx.field(static=True)
    ndim: int = eqx.field(static=True)
    products_only: bool = eqx.field(static=True)
    inference: bool

    def __init__(
        self,
        weight: Inexact[Array, "..."],
        view: BoundView,
        constraint: AbstractConstraint,
        estimator: AbstractEstimator,
        *,
        ndim: int,
        products_only: bool,
        key: PRNGKeyArray,
    ):
        """Used by `wrap`."""
        self.weight = weight
        self.view = view
        self.estimator = estimator
        self.ndim = ndim
        self.products_only = products_only
        self.inference = False
        operators = self.operators()
        # Not compiled as a whole: of a convolution it is found without a compiler.
        start = over_stack(ft.partial(estimator.init, key=key), self.stack_ndim)
        vectors = start(operators)
        sigma = over_stack(estimator.sigma, self.stack_ndim)(operators, vectors)
        made = constraint.init(sigma)
        trained, fixed = (made, None) if made.trainable else (None, made)
        self.constraint = trained
        self.memory = eqx.nn.StateIndex(Memory(vectors, fixed))

    @property
    def stack_ndim(self) -> int:
        """How many leading axes of the weight are a stack of weights."""
        return self.weight.ndim - self.ndim

    def operators(self) -> Operator:
        """How the raw weight acts: an operator whose arrays have the stacked axes in
        front, so that it is to be used under as many `vmap`s.
        """
        return over_stack(self.view, self.stack_ndim)(self.weight)

    def norm(self, state: eqx.nn.State | None) -> Float[Array, "*stack"]:
        """The norm of the raw weight, as the estimator sees it."""
        vectors = self.recall(state).vectors
        return _sigma(self.estimator, self.operators(), vectors, self.stack_ndim)

    def bound(self, state: eqx.nn.State | None) -> Float[Array, "*stack"]:
        """The norm that is allowed."""
        return self.rule(state).target()

    def residual(self, state: eqx.nn.State | None) -> Float[Array, "*stack"]:
        """How far the vectors are from converged: the estimator's `residual`."""
        vectors = self.recall(state).vectors
        residual = over_stack(self.estimator.residual, self.stack_ndim)
        return residual(self.operators(), vectors)

    def rule(self, state: eqx.nn.State | None) -> AbstractConstraint:
        """The constraint, wherever it is kept."""
        if self.constraint is not None:
            return self.constraint
        constraint = self.recall(state).constraint
        assert constraint is not None
        return constraint

    def advance(
        self, state: eqx.nn.State | None, *, num_steps: int | None = None
    ) -> eqx.nn.State:
        """The state with vectors brought up to date with the weight."""
        vectors, constraint = self.recall(state)
        assert state is not None
        if self._is_frozen():
            return state
        operators, depth = self.operators(), self.stack_ndim
        vectors = _advance(self.estimator, operators, vectors, depth, num_steps)
        return state.set(self.memory, Memory(vectors, constraint))

    def with_constraint(
        self, state: eqx.nn.State, constraint: AbstractConstraint
    ) -> "Constrained":
        """The same weight and vectors with another constraint, whose first state is in
        the node, as in one that `make_with_state` has not seen.
        """
        made = constraint.init(self.norm(state))
        trained, fixed = (made, None) if made.trainable else (None, made)
        memory = Memory(self.recall(state).vectors, fixed)
        return eqx.tree_at(
            lambda node: (node.constraint, node.memory),
            self,
            (trained, eqx.nn.StateIndex(memory)),
            is_leaf=lambda x: x is None,
        )

    def unwrap(
        self, state: eqx.nn.State | None, *, lazy: bool = False
    ) -> Inexact[Array, "..."] | ScaledWeight:
        """The constrained weight."""
        scale = self.rule(state).scale(self.norm(state))
        is_matrix = scale.ndim == 0 and self.weight.ndim == 2
        if lazy and self.products_only and is_matrix:
            return ScaledWeight(self.weight, scale)
        return apply_scale(self.weight, scale)

    def certify(self, state: eqx.nn.State | None) -> Inexact[Array, "..."]:
        """The weight, or the whole stack of them, with proof that the bound is kept."""
        return certified_weights(
            self.weight,
            self.view,
            self.stack_ndim,
            self.rule(state),
            ft.partial(self.norm, state),
        )

    def recall(self, state: eqx.nn.State | None) -> Memory:
        """What the state holds for this weight."""
        if state is None:
            raise TypeError(
                "expected the `equinox.nn.State` of a constrained model, got None. It "
                "comes with the model: `model, state = spectrax.constrain(module)`, or "
                "`equinox.nn.make_with_state`. What `spectrax.unwrap` returns needs "
                "none."
            )
        try:
            return state.get(self.memory)
        except KeyError as error:
            raise ValueError(
                "expected the state of this model, got one that has nothing of its "
                "constrained weights. Both come from one call: `model, state = "
                "spectrax.constrain(module)`, or `equinox.nn.make_with_state` around "
                "what calls `spectrax.wrap`."
            ) from error

    def _is_frozen(self) -> bool:
        if isinstance(self.inference, jax.Array):
            raise TypeError(
                "expected `inference` of a constrained weight to be True or False, got "
                "a traced array: the model went through a JAX transformation as a "
                "whole, as in the carry of `jax.lax.scan`. Pass its arrays only, with "
                "`equinox.partition(model, equinox.is_array)`, or let the function "
                "close over the model and carry the state."
            )
        return self.inference

    def __jax_array__(self) -> Array:
        raise TypeError(self._message())

    def __getattr__(self, name: str) -> Any:
        # Also what looks for the array that it takes this for is told.
        is_of_array = hasattr(jax.Array, name) and not name.startswith("_")
        own = f"{type(self).__name__!r} object has no attribute {name!r}"
        raise AttributeError(self._message() if is_of_array else own)

    def _message(self) -> str:
        return (
            "expected a model without constraints, got a `spectrax.Constrained` weight "
            "in it. Call `spectrax.unwrap(model, state)` first, or the model that "
            "`wrap` or `constrain` returned; the raw weight is its attribute `weight`."
        )

    def _refuse(self, *_: Any) -> Any:
        raise TypeError(self._message())

    # NumPy's and JAX's arrays leave it to this class what `x @ weight` means.
    __array_ufunc__ = None
    __matmul__ = __rmatmul__ = __mul__ = __rmul__ = __add__ = __radd__ = _refuse
    __sub__ = __rsub__ = __truediv__ = __getitem__ = __iter__ = _refuse


def is_constrained(node: Any) -> bool:
    """Whether a node of a tree is a constrained weight."""
    return isinstance(node, Constrained)


def constrained_weights(tree: PyTree) -> list[Constrained]:
    """The constrained weights of a model, in the order of its fields.

    **Arguments:**

    - `tree`: what `constrain` returned, or any pytree.

    **Returns:**

    A list of [`spectrax.Constrained`][], empty if nothing is constrained. Of trained
    bounds, `[node.constraint.target() for node in ...]` are the values.

    **Raises:** nothing.

    !!! Example

        ```python
        import equinox as eqx
        import jax
        import spectrax

        mlp = eqx.nn.MLP(8, 4, width_size=16, depth=2, key=jax.random.key(0))
        model, state = spectrax.constrain(mlp)
        for node in spectrax.constrained_weights(model):
            print(node.weight.shape, node.norm(state), node.bound(state))
        ```
    """
    leaves = jtu.tree_leaves(tree, is_leaf=is_constrained)
    return [leaf for leaf in leaves if is_constrained(leaf)]


# Compiled even where the caller is not, as these are many small operations.
@eqx.filter_jit
def _advance(
    estimator: AbstractEstimator,
    operators: Operator,
    vectors: PyTree,
    depth: int,
    num_steps: int | None,
) -> PyTree:
    step = ft.partial(estimator.advance, num_steps=num_steps)
    return over_stack(step, depth)(operators, vectors)


@eqx.filter_jit
def _sigma(
    estimator: AbstractEstimator, operators: Operator, vectors: PyTree, depth: int
) -> Float[Array, "..."]:
    return over_stack(estimator.sigma, depth)(operators, vectors)
