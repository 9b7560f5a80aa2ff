"""Constraints on the weights of a model that does not know of them."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax.random as jr
import jax.tree_util as jtu
from jaxtyping import PRNGKeyArray, PyTree

from ._certify import certified_site_weight
from ._constraints import AbstractConstraint, apply_scale, Normalize
from ._norms import AbstractEstimator, PowerIteration
from ._scaled import ScaledLayer, scales_output
from ._select import check_weight, find_weights, rule_at, select_weights
from ._site import advance_site, init_site, Site, site_norm, SiteState, View
from ._tree import as_path, follow, nodes, Path, path_string, replace


class Wrapped(eqx.nn.StatefulLayer):
    """A module some of whose weights are constrained: what [`spectrax.wrap`][] returns.

    A pytree with the raw weights as its trainable leaves. The vectors of power
    iteration and fixed bounds are in the `equinox.nn.State`. Made by `wrap`, from the
    constrained weights (`sites`) with their `constraints` and first `states`.

    - `module`: the module as it was given, with raw weights.
    - `constraints`: of each constrained weight the constraint if it is trained, as a
        `LearnableBound` is, else `None`. [`spectrax.summary`][] shows all of them.
    - `inference`: if `True`, nothing advances. Set by `equinox.nn.inference_mode`.
    """

    module: Any
    constraints: tuple[AbstractConstraint | None, ...]
    # One index for all sites, as JAX walks through all of this at each call.
    memory: eqx.nn.StateIndex | None
    sites: tuple[Site, ...] = eqx.field(static=True)
    inference: bool

    def __init__(
        self,
        module: PyTree,
        sites: Sequence[Site] = (),
        constraints: Sequence[AbstractConstraint | None] = (),
        states: Sequence[SiteState] = (),
    ):
        """Used by `wrap`; without `sites` nothing is constrained."""
        self.module = module
        self.constraints = tuple(constraints)
        self.memory = eqx.nn.StateIndex(tuple(states)) if sites else None
        self.sites = tuple(sites)
        self.inference = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Advances the state, then calls the module with constrained weights.

        **Arguments:** the module's own, then `state`, the last positional or a keyword
        argument.

        **Returns:**

        The module's output and the new state. A module that itself carries state, as
        one with `equinox.nn.BatchNorm` does, is handed the state and returns the pair
        itself.

        **Raises:** `TypeError` if there is no state.
        """
        state, place = _find_state(args, kwargs)
        if state is None:
            if self.sites:
                raise TypeError(
                    "expected an `equinox.nn.State` among the arguments, as in "
                    "`model(*args, state)`, got none. The state comes from "
                    "`equinox.nn.make_with_state(spectrax.wrap)(module)`."
                )
            return self.module(*args, **kwargs)
        module = self.module
        if self.sites:
            state = advance(self, state)
            module = unwrap(self, state)
        if _is_stateful(module):
            args, kwargs = _put(args, kwargs, place, [state])
            return module(*args, **kwargs)
        args, kwargs = _put(args, kwargs, place, [])
        return module(*args, **kwargs), state

    def is_stateful(self) -> bool:
        """Whether a state has to be passed: not once it is unwrapped."""
        return bool(self.sites) or _is_stateful(self.module)


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
    in the place of the raw ones. To be made into a model and its state by
    `equinox.nn.make_with_state(spectrax.wrap)(module)`, or inside the `__init__` of
    another module that is made so.

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
    already, if a weight has fewer than two axes, if a weight is chosen twice, if the
    lengths of sequences differ, or if `input_size` fits no chosen layer; `TypeError` if
    `where` selects something that is not an array of floating-point or complex dtype.
    Warns if it passes by a matrix that no known layer has as its weight.

    !!! Example

        ```python
        import equinox as eqx
        import jax
        import spectrax

        key = jax.random.key(0)
        mlp = eqx.nn.MLP(64, 10, width_size=128, depth=2, key=key)
        model, state = eqx.nn.make_with_state(spectrax.wrap)(mlp)


        @eqx.filter_jit
        def evaluate(model, state, x):
            return model(x, state)


        y, state = evaluate(model, state, jax.random.normal(key, (64,)))
        ```
    """
    _check_unwrapped(module)
    if state is not None:
        module = _with_state(module, state)
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
    size = None if input_size is None else tuple(input_size)
    key = jr.key(0) if key is None else key
    sites: list[Site] = []
    trained: list[AbstractConstraint | None] = []
    states: list[SiteState] = []
    fitting = False
    for paths, constraint_, estimator_ in zip(
        targets, constraints, estimators, strict=True
    ):
        for path in paths:
            if any(site.path == path for site in sites):
                raise ValueError(
                    f"expected each weight once, got `{path_string(path)}` twice. Let "
                    "`where` return nodes that do not overlap."
                )
            check_weight(module, path)
            sized = rule_at(module, path)[1].sized and view is None
            fitting |= sized
            site = Site(path, view, size if sized else None, estimator_)
            site_key = jr.fold_in(key, len(sites))
            state_, trained_ = init_site(module, site, constraint_, site_key)
            sites.append(site)
            states.append(state_)
            trained.append(trained_)
    if size is not None and not fitting:
        raise ValueError(
            f"expected `input_size` with a convolution among the chosen layers, got "
            f"{size} and none whose norm depends on it. Leave it out."
        )
    return Wrapped(module, sites, trained, states)


def advance(
    model: PyTree, state: eqx.nn.State, *, num_steps: int | None = None
) -> eqx.nn.State:
    """Brings the estimates of all constrained weights up to date with the weights.

    To be called once after (or before) each update of the weights; any number of calls
    of the model can then share one [`spectrax.unwrap`][]. Calling a wrapped model does
    it by itself. Modules in inference mode are left alone.

    **Arguments:**

    - `model`: what `wrap` returned, or any pytree with such modules in it.
    - `state`: the model's state. As always with `equinox.nn.State`, the old one becomes
        invalid.
    - `num_steps`: steps of power iteration; by default as many as each weight's
        estimator was made with.

    **Returns:**

    The new state. It carries no derivative.

    **Cost:** for each weight, that of its estimator's step: see
    [`spectrax.PowerIteration`][].

    **Raises:** `ValueError` if nothing in `model` is wrapped, if `num_steps < 0`, or,
    by Equinox, if `state` is an old one.

    !!! Example

        A GAN's critic sees real and generated samples with the same weights:

        ```python
        import equinox as eqx
        import jax
        import spectrax

        key = jax.random.key(0)
        critic = eqx.nn.MLP(2, "scalar", width_size=32, depth=2, key=key)
        critic, state = eqx.nn.make_with_state(spectrax.wrap)(critic)


        @eqx.filter_value_and_grad(has_aux=True)
        def loss(critic, state, real, fake):
            state = spectrax.advance(critic, state)
            plain = spectrax.unwrap(critic, state)
            difference = jax.vmap(plain)(fake) - jax.vmap(plain)(real)
            return difference.mean(), state


        real, fake = jax.random.normal(key, (2, 16, 2))
        (value, state), gradient = loss(critic, state, real, fake)
        ```
    """
    for wrapped in wrapped_modules(model, "advance"):
        if wrapped.inference:
            continue
        new = [
            advance_site(wrapped.module, site, site_state, num_steps)
            for site, site_state, _ in sites_of(wrapped, state)
        ]
        if wrapped.memory is not None:
            state = state.set(wrapped.memory, tuple(new))
    return state


def unwrap(model: PyTree, state: eqx.nn.State, *, certified: bool = False) -> PyTree:
    """The model as it was before it was wrapped, with constrained weights.

    Of the original classes, with all their methods, and differentiable: a loss of the
    result has derivatives with respect to the raw weights in `model`, through the norms
    (whose singular vectors are held fixed) and through trained bounds.

    **Kind:** as the estimator's. With power iteration the norms are those that the
    state has seen: call `advance` after an update of the weights. With
    `certified=True`, proven: the norm of every constrained weight as it is stored, in
    its own dtype after the last rounding, is at most its bound.

    **Arguments:**

    - `model`: what `wrap` returned, or any pytree with such modules in it.
    - `state`: the model's state. It stays valid.
    - `certified`: for deployment. The weights are scaled down further, until
        [`spectrax.enclose_norm`][] proves the bound: by about the width of that
        enclosure, 1e-4 or less for matrices and up to 1% for convolutions at every
        input size, of which the raw weight's proven norm takes the place of the
        estimate. They carry no derivative.

    **Returns:**

    `model` with each wrapped module replaced by its plain one. Inside another module,
    whose own code passes a state, it is replaced by a [`spectrax.Wrapped`][] with
    nothing left to do, which can be called with a state and without.

    **Cost:** for each weight, one product with a vector and one pass to scale it. Where
    `unwrap` is called while JAX differentiates, as in the loss of a training step,
    `Linear` and `Embedding` layers scale their output instead, and cost no such pass;
    to `isinstance`, `jax.tree` functions and in their attributes they are the layers
    with scaled weights. If certified, two or three enclosures; one, and nothing to
    compile, for a convolution at every input size outside of `jit` (two in bfloat16 and
    float16).

    **Raises:** `ValueError` if nothing in `model` is wrapped or, by Equinox, if `state`
    is an old one; if certified, also if the `view` of a weight is an operator for which
    there is no upper bound. By `equinox.error_if`, if a weight to be certified is not
    finite.
    """
    wrapped_modules(model, "unwrap")

    def plain(key_path: tuple[Any, ...], node: Any) -> Any:
        if not isinstance(node, Wrapped):
            return node
        module = _constrained(node, state, certified)
        inside_module = any(isinstance(key, jtu.GetAttrKey) for key in key_path)
        return Wrapped(module) if inside_module else module

    return jtu.tree_map_with_path(plain, model, is_leaf=_is_wrapped)


def wrapped_modules(model: PyTree, caller: str) -> list[Wrapped]:
    """All wrapped modules in a pytree; raises if there is none."""
    found = [node for _, node in nodes(model, _is_wrapped) if _is_wrapped(node)]
    if not any(wrapped.sites for wrapped in found):
        raise ValueError(
            f"`spectrax.{caller}` expected a model with something wrapped in it, got "
            f"{type(model).__name__} with nothing. Wrap it first: `model, state = "
            "equinox.nn.make_with_state(spectrax.wrap)(model)`."
        )
    return found


def sites_of(
    wrapped: Wrapped, state: eqx.nn.State
) -> list[tuple[Site, SiteState, AbstractConstraint]]:
    """Each constrained weight with what it carries and its constraint."""
    if wrapped.memory is None:
        return []
    found = []
    for site, trained, own in zip(
        wrapped.sites, wrapped.constraints, state.get(wrapped.memory), strict=True
    ):
        constraint = own.constraint if trained is None else trained
        assert constraint is not None
        found.append((site, own, constraint))
    return found


def _constrained(
    wrapped: Wrapped,
    state: eqx.nn.State,
    certified: bool,  # noqa: FBT001
) -> PyTree:
    paths, values = [], []
    for site, own, constraint in sites_of(wrapped, state):
        if certified:
            path = site.path
            value = certified_site_weight(wrapped.module, site, own, constraint)
        else:
            path, value = _replacement(wrapped.module, site, own, constraint)
        paths.append(path)
        values.append(value)
    return replace(wrapped.module, paths, values)


def _replacement(
    module: PyTree, site: Site, state: SiteState, constraint: AbstractConstraint
) -> tuple[Path, Any]:
    """What a site's constraint puts in, and where: a weight, or a layer with it."""
    weight = follow(module, site.path)
    scale = constraint.scale(site_norm(module, site, state))
    owner = site.path[:-1]
    layer = follow(module, owner)
    if scales_output(layer, weight, scale):
        return owner, ScaledLayer(layer, scale)
    return site.path, apply_scale(weight, scale)


def _for_each(
    value: Any, kind: type, name: str, targets: list[list[Path]], *, several: bool
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


def _find_state(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[eqx.nn.State | None, int | str]:
    for place, value in [*enumerate(args), *kwargs.items()]:
        if isinstance(value, eqx.nn.State):
            return value, place
    return None, 0


def _put(
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    place: int | str,
    values: list[eqx.nn.State],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with the one at `place` replaced by `values`, one or none."""
    if isinstance(place, int):
        return (*args[:place], *values, *args[place + 1 :]), kwargs
    rest = {name: value for name, value in kwargs.items() if name != place}
    if values:
        rest[place] = values[0]
    return args, rest


def _with_state(module: PyTree, state: eqx.nn.State) -> PyTree:
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
    for key_path, node in nodes(module, _is_wrapped):
        if _is_wrapped(node) and node.sites:
            raise ValueError(
                "expected a module without constraints, got one that is already "
                f"wrapped at {path_string(as_path(key_path))}. Constrain each weight "
                "once: choose with `where`, or `spectrax.unwrap` it first."
            )


def _is_wrapped(node: Any) -> bool:
    return isinstance(node, Wrapped)


def _is_index(node: Any) -> bool:
    return isinstance(node, eqx.nn.StateIndex)


def _is_stateful(module: PyTree) -> bool:
    return any(_is_index(node) for _, node in nodes(module, _is_index))
