"""Constraints on the weights of a model that does not know of them."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, PRNGKeyArray, PyTree

from ._constrained import (
    Constrained,
    constrained_weights,
    is_constrained,
)
from ._constraints import AbstractConstraint, Normalize
from ._norms import AbstractEstimator, PowerIteration
from ._operators import Operator
from ._rules import acts_as_registered, BoundView
from ._select import check_weight, find_weights, rule_at, select_weights
from ._tree import as_path, nodes, Path, path_string, replace
from ._wrapped import without_wrappers, Wrapped


View = Callable[[Array], Operator | Array]


def wrap(
    module: PyTree,
    *,
    constraint: AbstractConstraint | Sequence[AbstractConstraint] = Normalize(),
    estimator: AbstractEstimator | Sequence[AbstractEstimator] = PowerIteration(),
    where: Callable[[PyTree], Any] | None = None,
    view: View | None = None,
    input_size: Sequence[int] | None = None,
    state: eqx.nn.State | None = None,
    key: PRNGKeyArray | None = None,
) -> Wrapped:
    """Constrains the weights of a layer, or of every layer of a model.

    The module's own code does not change: at each call it runs with constrained weights
    in the place of the raw ones. A model and its state come from
    [`spectrax.constrain`][]; `wrap` itself is for the `__init__` of another module that
    `equinox.nn.make_with_state` makes.

    What the bound of a weight means, for each layer type: for `Linear`, `Conv1d/2d/3d`
    and `ConvTranspose1d/2d/3d` it bounds the layer's Lipschitz constant, for
    convolutions at every input size; for [`spectrax.nn.FourierLayer`][] at every
    resolution. For `Embedding` it is the norm of the table, which no embedding exceeds
    in length. For `GRUCell` and `LSTMCell` it holds for `weight_ih` and `weight_hh`,
    each with all gates stacked. `MultiheadAttention` and `MLP` are constrained in their
    `Linear` layers; dot-product attention itself has no global Lipschitz constant.
    Other types: [`spectrax.register_layer`][].

    **Arguments:**

    - `module`: a layer or any pytree of layers. Weights with axes in front, as
        `equinox.filter_vmap` makes them, are stacks with one norm each. Weights tied by
        `equinox.nn.Shared` are one weight.
    - `constraint`: what is done with the norm: [`spectrax.Normalize`][],
        [`spectrax.Clip`][], [`spectrax.ClipToInitial`][] or
        [`spectrax.LearnableBound`][].
    - `estimator`: how the norm is found: [`spectrax.PowerIteration`][],
        [`spectrax.GramIteration`][] or [`spectrax.ExactSVD`][].
    - `where`: chooses layers, submodules or arrays, as in `equinox.tree_at`:
        `where=lambda model: [model.layers[0], model.head]`. By default, every layer of
        a known type. If it returns a sequence, `constraint` and `estimator` may be
        sequences of the same length, one for each node.
    - `view`: how the chosen weights act, a function from a weight to a matrix or an
        operator; it replaces what is known of the layer. `spectrax.flattened_kernel`
        gives the reshaped kernel of Miyato et al. (2018).
    - `input_size`: for the chosen convolutions, the spatial sizes of their input. The
        bound is then on the norm at this size (and for zero padding at smaller ones),
        instead of at every size.
    - `state`: the state of `module`, if it has been separated from it already, as with
        a trained model that has `equinox.nn.BatchNorm`.
    - `key`: randomness of the starting vectors. Optional; a fixed key if not given.

    **Returns:**

    A [`spectrax.Wrapped`][]. Called as `y, state = wrapped(*args, state)`.

    **Cost:** here, 32 products of each weight and its adjoint with a vector. At each
    call, that of [`spectrax.advance`][] and [`spectrax.unwrap`][].

    **Raises:** `ValueError` if there is nothing to constrain, if something is wrapped
    already, if a weight has fewer than two axes, if it is transformed again by
    `equinox.nn.WeightNorm` or `SpectralNorm`, if its layer is of a subclass with a
    `__call__` of its own that is not registered, if a weight is chosen twice, if the
    lengths of sequences differ, or if `input_size` fits no chosen layer; `TypeError` if
    `where` selects something that is not an array of floating-point or complex dtype.
    Warns if it passes by a matrix that no known layer has as its weight.

    !!! Example

        ```python
        import equinox as eqx
        import jax
        import spectrax

        key = jax.random.key(0)


        class Critic(eqx.Module):
            features: spectrax.Wrapped
            head: eqx.nn.Linear

            def __init__(self, key):
                keys = jax.random.split(key)
                self.features = spectrax.wrap(eqx.nn.MLP(64, 32, 128, 2, key=keys[0]))
                self.head = eqx.nn.Linear(32, 1, key=keys[1])

            def __call__(self, x, state):
                x, state = self.features(x, state)
                return self.head(x), state


        critic, state = eqx.nn.make_with_state(Critic)(key)
        y, state = eqx.filter_jit(critic)(jax.random.normal(key, (64,)), state)
        ```
    """
    return Wrapped(
        with_constraints(
            module,
            constraint=constraint,
            estimator=estimator,
            where=where,
            view=view,
            input_size=input_size,
            state=state,
            key=key,
        )
    )


def constrain(
    module: PyTree,
    *,
    constraint: AbstractConstraint | Sequence[AbstractConstraint] = Normalize(),
    estimator: AbstractEstimator | Sequence[AbstractEstimator] = PowerIteration(),
    where: Callable[[PyTree], Any] | None = None,
    view: View | None = None,
    input_size: Sequence[int] | None = None,
    state: eqx.nn.State | None = None,
    key: PRNGKeyArray | None = None,
) -> tuple[Wrapped, eqx.nn.State]:
    """A model with constrained weights, and its state.

    The same as `equinox.nn.make_with_state(spectrax.wrap)(module, ...)`.

    **Arguments:** those of [`spectrax.wrap`][], which has them in full.

    - `module`: a layer or any pytree of layers.
    - `constraint`: what is done with the norm, by default `Normalize()`.
    - `estimator`: how the norm is found.
    - `where`: chooses layers, submodules or arrays, by default every known layer.
    - `view`: how the chosen weights act, if not as their layers say.
    - `input_size`: of the chosen convolutions, by default every size.
    - `state`: that of `module`, if it has been separated from it already.
    - `key`: randomness of the starting vectors.

    **Returns:**

    A [`spectrax.Wrapped`][] and an `equinox.nn.State`. Either call it, as `y, state =
    model(*args, state)`, or use [`spectrax.advance`][] once for each update and the
    plain module that [`spectrax.unwrap`][] returns.

    **Cost:** as `wrap`.

    **Raises:** as `wrap`.

    !!! Example

        ```python
        import equinox as eqx
        import jax
        import optax
        import spectrax

        key = jax.random.key(0)
        mlp = eqx.nn.MLP(64, 10, width_size=128, depth=2, key=key)
        model, state = spectrax.constrain(mlp)
        optimizer = optax.adam(1e-3)
        memory = optimizer.init(eqx.filter(model, eqx.is_inexact_array))


        @eqx.filter_value_and_grad
        def loss(model, state, x, y):
            network = spectrax.unwrap(model, state, lazy=True)
            return ((jax.vmap(network)(x) - y) ** 2).mean()


        @eqx.filter_jit
        def step(model, state, memory, x, y):
            value, gradient = loss(model, state, x, y)
            change, memory = optimizer.update(gradient, memory)
            model = eqx.apply_updates(model, change)
            return model, spectrax.advance(model, state), memory, value


        x = jax.random.normal(key, (32, 64))
        model, state, memory, value = step(model, state, memory, x, x[:, :10])
        ```
    """
    return eqx.nn.make_with_state(wrap)(
        module,
        constraint=constraint,
        estimator=estimator,
        where=where,
        view=view,
        input_size=input_size,
        state=state,
        key=key,
    )


def with_constraint(
    model: PyTree,
    state: eqx.nn.State,
    constraint: AbstractConstraint | Sequence[AbstractConstraint],
    *,
    where: Callable[[PyTree], Any] | None = None,
) -> tuple[PyTree, eqx.nn.State]:
    """A constrained model with another constraint: another bound, or one of another
    kind. Weights, and the vectors of the estimators, stay what they are.

    **Arguments:**

    - `model`: what `constrain` returned, or any pytree with constrained weights in it.
    - `state`: the state of the whole model. It stays valid.
    - `constraint`: what is done with the norms from now on.
    - `where`: chooses nodes of `model`, as in `equinox.tree_at`; by default all of it.
        If it returns a sequence, `constraint` may be one of the same length.

    **Returns:**

    The model and the state. Between fixed constraints of one kind their structure
    stays, so that nothing is compiled anew.

    **Cost:** one product of each weight with a vector.

    **Raises:** `ValueError` if there is no constrained weight in what was chosen, or if
    the lengths of sequences differ.

    !!! Example

        ```python
        import equinox as eqx
        import jax
        import spectrax

        mlp = eqx.nn.MLP(8, 4, width_size=16, depth=2, key=jax.random.key(0))
        model, state = spectrax.constrain(mlp, constraint=spectrax.Normalize(2.0))
        model, state = spectrax.with_constraint(model, state, spectrax.Normalize(1.0))
        print(spectrax.summary(model, state))
        ```
    """
    chosen = model if where is None else where(model)
    several = where is not None and isinstance(chosen, list | tuple)
    targets = [constrained_weights(node) for node in (chosen if several else [chosen])]
    if not all(targets):
        raise ValueError(
            "expected a model with constrained weights, got "
            f"{type(chosen).__name__} in which there are none. Constrain it first: "
            "`model, state = spectrax.constrain(model)`."
        )
    constraints = _for_each(
        constraint, AbstractConstraint, "constraint", targets, several=several
    )
    new = {
        id(node): node.with_constraint(state, constraint_)
        for nodes_, constraint_ in zip(targets, constraints, strict=True)
        for node in nodes_
    }
    changed = iter([new.get(id(node)) for node in constrained_weights(model)])

    def with_new(node: Any) -> Any:
        return (next(changed) or node) if is_constrained(node) else node

    def make() -> PyTree:
        initial = with_state(model, state)
        return jtu.tree_map(with_new, initial, is_leaf=is_constrained)

    return eqx.nn.make_with_state(make)()


def with_constraints(
    module: PyTree,
    *,
    constraint: Any,
    estimator: Any,
    where: Callable[[PyTree], Any] | None = None,
    view: View | None = None,
    input_size: Sequence[int] | None = None,
    state: eqx.nn.State | None = None,
    key: PRNGKeyArray | None = None,
) -> PyTree:
    """The module with constrained weights as nodes, with the arguments of `wrap`.

    For `wrap` itself and for the `__init__` of classes that inherit from `Wrapped`.
    """
    _check_unwrapped(module)
    if state is not None:
        module = with_state(module, state)
    if where is None:
        targets, several = [find_weights(module)], False
    else:
        targets, several = select_weights(module, where)
    constraints = _for_each(
        constraint, AbstractConstraint, "constraint", targets, several=several
    )
    estimators = _for_each(
        estimator, AbstractEstimator, "estimator", targets, several=several
    )
    size = None if input_size is None else _checked_size(input_size)
    key = jr.key(0) if key is None else key
    found: dict[Path, Constrained] = {}
    fitting = False
    for paths, constraint_, estimator_ in zip(
        targets, constraints, estimators, strict=True
    ):
        for path in paths:
            if path in found:
                raise ValueError(
                    f"expected each weight once, got `{path_string(path)}` twice. Let "
                    "`where` return nodes that do not overlap."
                )
            weight = check_weight(module, path, with_view=view is not None)
            layer, rule = rule_at(module, path)
            fitting |= rule.sized and view is None
            # An array of no known layer has as many axes as the view wants.
            strange = layer is None and view is not None
            found[path] = Constrained(
                weight,
                rule.view_of(layer, size) if view is None else BoundView(view),
                constraint_,
                estimator_,
                ndim=weight.ndim if strange else rule.weight_ndim(layer),
                products_only=rule.products_only and acts_as_registered(layer),
                key=jr.fold_in(key, len(found)),
            )
    if size is not None and not fitting:
        raise ValueError(
            f"expected `input_size` with a convolution among the chosen layers, got "
            f"{size} and none whose norm depends on it. Leave it out."
        )
    return replace(module, list(found), list(found.values()))


def _checked_size(input_size: Any) -> tuple[int, ...]:
    sizes = input_size if isinstance(input_size, list | tuple) else [input_size, None]
    if not all(isinstance(size, int | np.integer) for size in sizes):
        raise TypeError(
            "expected `input_size` to be a sequence of integers, the spatial sizes of "
            f"the input without channels, as in `(32, 32)`; got {input_size!r}."
        )
    return tuple(int(size) for size in sizes)


def _for_each(
    value: Any, kind: type, name: str, targets: Sequence[Any], *, several: bool
) -> list[Any]:
    """One value for each target of `where`."""
    if isinstance(value, kind):
        return [value] * len(targets)
    values = list(value) if isinstance(value, list | tuple) else [value]
    if not all(isinstance(one, kind) for one in values):
        raise TypeError(
            f"expected `{name}` to be a spectrax {name} such as those of the API, or a "
            f"sequence of them, got {value!r}. Pass an instance, with its parentheses."
        )
    if not several or len(values) != len(targets):
        raise ValueError(
            f"expected one `{name}`, or as many as `where` returns nodes "
            f"({len(targets) if several else 'it returns no sequence'}), got "
            f"{len(values)}."
        )
    return values


def with_state(module: PyTree, state: eqx.nn.State) -> PyTree:
    """Writes the values of a state back as the initial ones of a module."""
    indices = [node for _, node in nodes(module, _is_index) if _is_index(node)]
    if not indices:
        raise ValueError(
            "expected `state` with a module that carries state, got one with none. "
            "Leave it out: the constraints' own state is made here."
        )

    def initial(node: Any) -> Any:
        return eqx.nn.StateIndex(state.get(node)) if _is_index(node) else node

    return jtu.tree_map(initial, module, is_leaf=_is_index)


def _check_unwrapped(module: PyTree) -> None:
    for key_path, node in nodes(without_wrappers(module), is_constrained):
        if is_constrained(node):
            raise ValueError(
                "expected a module without constraints, got one whose weight "
                f"`{path_string(as_path(key_path))}` is constrained already. Constrain "
                "each weight once: choose with `where`, or `spectrax.unwrap` it first; "
                "for another bound, `spectrax.with_constraint`."
            )


def _is_index(node: Any) -> bool:
    return isinstance(node, eqx.nn.StateIndex)
