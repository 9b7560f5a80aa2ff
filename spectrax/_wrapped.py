"""A module with constrained weights, and what can be done with it: one walk each."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast, TypeVar

import equinox as eqx
import jax.tree_util as jtu
from jaxtyping import PyTree

from ._constrained import Constrained, constrained_weights, is_constrained
from ._constraints import AbstractConstraint
from ._tree import as_path, nodes, path_string


_State = TypeVar("_State", bound=eqx.nn.State | None)


class Wrapped(eqx.nn.StatefulLayer):
    """A module some of whose weights are constrained: what [`spectrax.wrap`][] returns.

    A pytree with the raw weights as its trainable leaves. The vectors of power
    iteration and fixed bounds are in the `equinox.nn.State`. Ready layers such as
    [`spectrax.nn.SpectralLinear`][] are subclasses.

    - `module`: the module as it was given, with a [`spectrax.Constrained`][] in the
        place of each constrained weight.
    """

    module: Any
    # As many weights are constrained; fewer are found where one was replaced.
    count: int = eqx.field(static=True)

    def __init__(self, module: PyTree):
        """Used by `wrap` and by subclasses; nothing is constrained in a plain one."""
        self.module = module
        self.count = len(constrained_weights(module))

    @property
    def weights(self) -> tuple[Constrained, ...]:
        """The constrained weights, in the order of the module's fields."""
        return tuple(constrained_weights(self.module))

    @property
    def raw(self) -> Any:
        """The module with the raw weights, as it would be without constraints."""
        return jtu.tree_map(
            lambda node: node.weight if is_constrained(node) else node,
            self.module,
            is_leaf=is_constrained,
        )

    @property
    def constraints(self) -> tuple[AbstractConstraint | None, ...]:
        """Of each constrained weight the constraint if it is trained, as a
        [`spectrax.LearnableBound`][] is, else `None`. [`spectrax.summary`][] shows all
        of them.
        """
        return tuple(node.constraint for node in self.weights)

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
            if self.weights:
                raise TypeError(
                    "expected an `equinox.nn.State` among the arguments, as in "
                    "`model(*args, state)`, got none. The state comes with the model: "
                    "`model, state = spectrax.constrain(module)`. Or call "
                    "`spectrax.unwrap(model, state)`, which needs none."
                )
            return self.module(*args, **kwargs)
        module = self.module
        if self.weights:
            state = advance(module, state)
            module = unwrap(module, state, lazy=True)
        if _is_stateful(module):
            args, kwargs = _put(args, kwargs, place, [state])
            return module(*args, **kwargs)
        args, kwargs = _put(args, kwargs, place, [])
        return module(*args, **kwargs), state

    def __getattr__(self, name: str) -> Any:
        message = f"{type(self).__name__!r} object has no attribute {name!r}"
        # Also asked while the fields are set.
        if not name.startswith("_") and hasattr(vars(self).get("module"), name):
            message += (
                f". The module in it has: `model.module.{name}` with constrained "
                f"weights as nodes, `model.raw.{name}` with raw ones, "
                f"`spectrax.unwrap(model, state).{name}` with those that act."
            )
        raise AttributeError(message)

    def is_stateful(self) -> bool:
        """Whether a state has to be passed: not once it is unwrapped."""
        return _is_stateful(self.module)


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
    for node in constrained_weights(model):
        new_state = node.advance(new_state, num_steps=num_steps)
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
        Cast a model to another dtype before and not after: that rounds, and may make a
        norm larger than it was proven to be.
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
    which there is no upper bound. `RuntimeError` if no proof is found, as for a weight
    that is not finite. While a function is traced nothing is raised, so that the
    program can be exported: such a weight is then NaN.
    """
    if lazy and certified:
        raise ValueError(
            "expected `lazy` or `certified`, got both. A certified weight is an array: "
            "its norm is proven as it is stored. Leave out `lazy=True`."
        )
    found = [
        (path_string(as_path(key_path)), node)
        for key_path, node in nodes(without_wrappers(model), is_constrained)
        if is_constrained(node)
    ]
    if not found and not any(_is_to_do(node) for _, node in nodes(model, _is_to_do)):
        return model
    values = iter(
        [
            _certified(name, node, state)
            if certified
            else node.unwrap(state, lazy=lazy)
            for name, node in progress(found)
        ]
    )
    plain = jtu.tree_map(
        lambda node: next(values) if is_constrained(node) else node,
        model,
        is_leaf=is_constrained,
    )
    return _without_shells(model, plain)


def _certified(name: str, node: Constrained, state: eqx.nn.State | None) -> Any:
    try:
        return node.certify(state)
    except ValueError as error:
        raise ValueError(f"`{name}` cannot be certified: {error}") from error


def without_wrappers(model: PyTree) -> PyTree:
    """The model with the module in the place of every `Wrapped`, as users know it."""
    return jtu.tree_map(
        lambda node: node.module if _is_wrapped(node) else node,
        model,
        is_leaf=_is_wrapped,
    )


def _without_shells(model: PyTree, plain: PyTree) -> PyTree:
    """`plain`, with the module in the place of each `Wrapped` that had something to do
    in `model`; inside of other modules, whose code passes a state, with one that has
    nothing left to do.
    """

    def stop(node: Any) -> bool:
        return isinstance(node, eqx.Module)

    def bare(before: Any, after: Any) -> Any:
        if not _is_wrapped(before):
            return jtu.tree_map(_done, before, after, is_leaf=_is_whole)
        return _done(before, after).module if before.count else after

    before, structure = jtu.tree_flatten(model, is_leaf=stop)
    return jtu.tree_unflatten(
        structure, map(bare, before, structure.flatten_up_to(plain))
    )


def _done(before: Any, after: Any) -> Any:
    """A `Wrapped` with nothing left to do; other nodes as they are."""
    if not _is_wrapped(before):
        return after
    if len(before.weights) != before.count:
        warnings.warn(
            f"expected a module with {before.count} constrained weights, as when it "
            f"was wrapped, got one with {len(before.weights)}: others were put in "
            "their places, which nothing constrains. Put a raw weight in the place of "
            "`layer.weight.weight`, or wrap the module anew. If a layer without a "
            "constraint is meant, make the model with `spectrax.Wrapped(module)`.",
            stacklevel=2,
        )
    return Wrapped(after.module)


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


def _is_index(node: Any) -> bool:
    return isinstance(node, eqx.nn.StateIndex)


def _is_stateful(module: PyTree) -> bool:
    return any(_is_index(node) for _, node in nodes(module, _is_index))


def _is_wrapped(node: Any) -> bool:
    return isinstance(node, Wrapped)


def _is_whole(node: Any) -> bool:
    return _is_wrapped(node) or is_constrained(node)


def _is_to_do(node: Any) -> bool:
    return isinstance(node, Wrapped) and node.count > 0
