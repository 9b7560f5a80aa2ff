"""A module with constrained weights, and what can be done with it: one walk each."""

import functools as ft
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast, TypeVar

import equinox as eqx
import jax
import jax.tree_util as jtu
from jaxtyping import PyTree

from ._certify import certified_site_weight
from ._constraints import AbstractConstraint, apply_scale
from ._lazy import multiplies_by_weight, ScaledWeight
from ._site import advance_site, Site, site_norm, SiteState
from ._tree import follow, nodes, replace


_State = TypeVar("_State", bound=eqx.nn.State | None)


class Wrapped(eqx.nn.StatefulLayer):
    """A module some of whose weights are constrained: what [`spectrax.wrap`][] returns.

    A pytree with the raw weights as its trainable leaves. The vectors of power
    iteration and fixed bounds are in the `equinox.nn.State`. Made by `wrap`, from the
    constrained weights (`sites`) with their `constraints` and first `states`. Ready
    layers such as [`spectrax.nn.SpectralLinear`][] are subclasses.

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
        """Used by `wrap` and by subclasses; without `sites` nothing is constrained."""
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
                    "`model(*args, state)`, got none. The state comes with the model: "
                    "`model, state = spectrax.constrain(module)`. Or call "
                    "`spectrax.unwrap(model, state)`, which needs none."
                )
            return self.module(*args, **kwargs)
        module = self.module
        if self.sites:
            state = advance(self, state)
            module = unwrap(self, state, lazy=True)
        if _is_stateful(module):
            args, kwargs = _put(args, kwargs, place, [state])
            return module(*args, **kwargs)
        args, kwargs = _put(args, kwargs, place, [])
        return module(*args, **kwargs), state

    def is_stateful(self) -> bool:
        """Whether a state has to be passed: not once it is unwrapped."""
        return bool(self.sites) or _is_stateful(self.module)


def advance(model: PyTree, state: _State, *, num_steps: int | None = None) -> _State:
    """Brings the estimates of all constrained weights up to date with the weights.

    To be called once after (or before) each update of the weights; any number of calls
    of the model can then share one [`spectrax.unwrap`][]. Calling a wrapped model does
    it by itself. Modules in inference mode are left alone.

    On a model without constraints it does nothing, so that one training step serves
    both.

    **Arguments:**

    - `model`: what `wrap` or `constrain` returned, any pytree with such modules in it,
        or any other one.
    - `state`: the model's state. As always with `equinox.nn.State`, the old one becomes
        invalid. Without constraints it may be `None`.
    - `num_steps`: steps of power iteration; by default as many as each weight's
        estimator was made with.

    **Returns:**

    The new state. It carries no derivative. Without constraints, `state` as it came.

    **Cost:** for each weight, that of its estimator's step: see
    [`spectrax.PowerIteration`][].

    **Raises:** `TypeError` if something is constrained and `state` is `None`;
    `ValueError` if `num_steps < 0` or, by Equinox, if `state` is an old one.

    !!! Example

        A GAN's critic sees real and generated samples with the same weights:

        ```python
        import equinox as eqx
        import jax
        import spectrax

        key = jax.random.key(0)
        critic = eqx.nn.MLP(2, "scalar", width_size=32, depth=2, key=key)
        critic, state = spectrax.constrain(critic)


        @eqx.filter_value_and_grad(has_aux=True)
        def loss(critic, state, real, fake):
            state = spectrax.advance(critic, state)
            plain = spectrax.unwrap(critic, state, lazy=True)
            difference = jax.vmap(plain)(fake) - jax.vmap(plain)(real)
            return difference.mean(), state


        real, fake = jax.random.normal(key, (2, 16, 2))
        (value, state), gradient = loss(critic, state, real, fake)
        ```
    """
    new_state: eqx.nn.State | None = state
    for wrapped in _find_wrapped(model):
        if wrapped.memory is None or _is_frozen(wrapped):
            continue
        new = [
            advance_site(wrapped.module, site, site_state, num_steps)
            for site, site_state, _ in sites_of(wrapped, new_state)
        ]
        new_state = _checked(new_state).set(wrapped.memory, tuple(new))
    return cast(_State, new_state)


def unwrap(
    model: PyTree,
    state: eqx.nn.State | None,
    *,
    lazy: bool = False,
    certified: bool = False,
    progress: Callable[[Sequence[Any]], Iterable[Any]] = iter,
) -> PyTree:
    """The model as it was before it was wrapped, with constrained weights.

    Of the original classes and with true arrays, so that its structure is that of the
    original. It is differentiable: a loss of the result has derivatives with respect to
    the raw weights in `model`, through the norms (whose singular vectors are held
    fixed) and through trained bounds.

    A model without constraints is returned as it is, so that one training step serves
    both.

    **Kind:** as the estimator's. With power iteration the norms are those that the
    state has seen: call `advance` after an update of the weights. With
    `certified=True`, proven: the norm of every constrained weight as it is stored, in
    its own dtype after the last rounding, is at most its bound.

    **Arguments:**

    - `model`: what `wrap` or `constrain` returned, any pytree with such modules in it,
        or any other one.
    - `state`: the model's state. It stays valid. Without constraints it may be `None`.
    - `lazy`: for the loss of a training step. In layers that do nothing with their
        weight but multiply by it (`Linear`, `Embedding`, `GRUCell`, `LSTMCell` of
        Equinox, not in a stack) a [`spectrax.ScaledWeight`][] takes the place of the
        weight, and scales the output. The layers are of the original classes, but the
        tree has two arrays where the weight had one. Other layers have arrays.
    - `certified`: for deployment. The weights are scaled down further, until
        [`spectrax.enclose_norm`][] proves the bound, by about the width of that
        enclosure: 1e-4 or less for matrices, up to 1% for convolutions at every input
        size (inside of `jit` several percent in three dimensions), of which the raw
        weight's proven norm takes the place of the estimate. They carry no derivative.
    - `progress`: wraps the sequence of weights while they are worked on, as `tqdm.tqdm`
        does, which then shows how far it has come. Proofs take time.

    **Returns:**

    `model` with each wrapped module replaced by its plain one. Inside another module,
    whose own code passes a state, it is replaced by a [`spectrax.Wrapped`][] with
    nothing left to do, which can be called with a state and without.

    **Cost:** for each weight, one product with a vector, and one pass to scale it
    unless that is done lazily. If certified, two or three enclosures; one, and nothing
    to compile, for a convolution at every input size outside of `jit` (two in bfloat16
    and float16).

    **Raises:** `TypeError` if something is constrained and `state` is `None`;
    `ValueError` by Equinox if `state` is an old one, or if `lazy` and `certified` are
    both asked for; if certified, also if the `view` of a weight is an operator for
    which there is no upper bound. By `equinox.error_if`, if a weight to be certified is
    not finite.
    """
    if lazy and certified:
        raise ValueError(
            "expected `lazy` or `certified`, got both. A certified weight is an array: "
            "its norm is proven as it is stored. Leave out `lazy=True`."
        )
    found = [
        (wrapped.module, *site)
        for wrapped in _find_wrapped(model)
        for site in sites_of(wrapped, state)
    ]
    constrained = ft.partial(_constrained, lazy=lazy, certified=certified)
    values = iter([constrained(*site) for site in progress(found)])

    def plain(wrapped: Wrapped) -> PyTree:
        paths = [site.path for site in wrapped.sites]
        return replace(wrapped.module, paths, [next(values) for _ in paths])

    return _without_constraints(model, plain, inside_module=False)


def _without_constraints(
    node: PyTree, plain: Callable[[Wrapped], PyTree], *, inside_module: bool
) -> PyTree:
    """The tree with plain modules, inside modules with shells that can be called."""
    if isinstance(node, Wrapped):
        if not node.sites:
            return node
        return Wrapped(plain(node)) if inside_module else plain(node)
    children, structure = jtu.tree_flatten(
        node, is_leaf=lambda inner: inner is not node
    )
    if jtu.treedef_is_leaf(structure):
        return node
    walk = ft.partial(
        _without_constraints,
        plain=plain,
        inside_module=inside_module or isinstance(node, eqx.Module),
    )
    return jtu.tree_unflatten(structure, map(walk, children))


def sites_of(
    wrapped: Wrapped, state: eqx.nn.State | None
) -> list[tuple[Site, SiteState, AbstractConstraint]]:
    """Each constrained weight with what it carries and its constraint."""
    if wrapped.memory is None:
        return []
    found = []
    for site, trained, own in zip(
        wrapped.sites,
        wrapped.constraints,
        _checked(state).get(wrapped.memory),
        strict=True,
    ):
        constraint = own.constraint if trained is None else trained
        assert constraint is not None
        found.append((site, own, constraint))
    return found


def _find_wrapped(model: PyTree) -> list[Wrapped]:
    return [node for _, node in nodes(model, _is_wrapped) if _is_wrapped(node)]


def _is_frozen(wrapped: Wrapped) -> bool:
    if isinstance(wrapped.inference, jax.Array):
        raise TypeError(
            "expected `inference` of a wrapped model to be True or False, got a traced "
            "array: the model went through a JAX transformation as a whole, as in the "
            "carry of `jax.lax.scan`. Pass its arrays only, with "
            "`equinox.partition(model, equinox.is_array)`, or let the function close "
            "over the model and carry the state."
        )
    return wrapped.inference


def _checked(state: eqx.nn.State | None) -> eqx.nn.State:
    if state is None:
        raise TypeError(
            "expected the `equinox.nn.State` of a constrained model, got None. It "
            "comes with the model: `model, state = spectrax.constrain(module)`."
        )
    return state


def _constrained(
    module: PyTree,
    site: Site,
    state: SiteState,
    constraint: AbstractConstraint,
    *,
    lazy: bool,
    certified: bool,
) -> Any:
    """What stands in the place of a site's raw weight."""
    if certified:
        return certified_site_weight(module, site, state, constraint)
    weight = follow(module, site.path)
    scale = constraint.scale(site_norm(module, site, state))
    layer = follow(module, site.path[:-1])
    if lazy and scale.ndim == 0 and multiplies_by_weight(layer):
        return ScaledWeight(weight, scale)
    return apply_scale(weight, scale)


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


def _is_wrapped(node: Any) -> bool:
    return isinstance(node, Wrapped)


def _is_index(node: Any) -> bool:
    return isinstance(node, eqx.nn.StateIndex)


def _is_stateful(module: PyTree) -> bool:
    return any(_is_index(node) for _, node in nodes(module, _is_index))
