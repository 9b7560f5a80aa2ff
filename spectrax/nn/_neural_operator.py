"""A neural operator on functions sampled at points, with a bound on its Lipschitz
constant.

The network is `L_n, B_n, s, ..., B_1, s, L_1`, with linear layers `L` and an activation
`s` at each point alone, and blocks `B` of attention between points. As the norm over
all points is the root of the sum of squares over them, `L` at each point alone has the
Lipschitz constant of one `L`, however many points there are, and `s` as well. The
attention of a block is divided by the growth of its constant with the number of
points, so that what is left depends on its weights only. That of the network is at most
the product of all.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from .._constraints import LearnableBound, Normalize
from .._enclosures import enclose_norm, up
from .._norms import AbstractEstimator, PowerIteration
from .._wrap import with_constraints
from ._activations import max_min
from ._l2_attention import l2_attention_growth, L2MultiheadAttention
from ._lipschitz import lipschitz_constant
from ._network import AbstractNetwork
from ._residual import ResidualAverage


class SpectralNeuralOperator(AbstractNetwork):
    """A neural operator of linear layers, attention and activations, all with a bound
    on their Lipschitz constants.

    It maps a function that is sampled at points to another one at the same points:
    linear layers and activations act at each point alone, attention mixes the points.
    It does not know where the points are, unless coordinates are among the channels.

    Each hidden layer is a linear layer, the activation, and a block `(1 - a) x + a
    A(x)` with a trained `a` between 0 and 1 and with [`spectrax.nn.L2MultiheadAttention`][]
    `A`, divided by the growth of its Lipschitz constant with the number of points. A
    linear layer comes last. The weights are constrained by [`spectrax.wrap`][]: those
    of attention have norm 1, those of linear layers `initial_bound`.

    Made with its state by [`spectrax.nn.create_spectral_neural_operator`][], which
    explains the arguments `input_dim`, `output_dim`, `hidden_dims`, `num_heads`,
    `activation`, `use_attention`, `use_adaptive_bounds`, `initial_bound`, `estimator`
    and `key`. Called as `y, state = model(x, state)` with `x` of shape `[points,
    input_dim]`, or as `y = spectrax.unwrap(model, state)(x)`.
    """  # noqa: E501

    layers: tuple[eqx.nn.Linear, ...]
    blocks: tuple[ResidualAverage, ...]
    activation: Callable[..., Any]

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        hidden_dims: Sequence[int],
        num_heads: int,
        *,
        activation: Callable[..., Any] = max_min,
        use_attention: bool = True,
        use_adaptive_bounds: bool = False,
        initial_bound: float | int = 1.0,
        estimator: AbstractEstimator = PowerIteration(),
        key: PRNGKeyArray,
    ):
        sizes = (input_dim, *hidden_dims, output_dim)
        _check_sizes(sizes, num_heads if use_attention else None, activation)
        weights_key, starts_key = jr.split(key)
        layers = tuple(
            eqx.nn.Linear(size, next_size, key=jr.fold_in(weights_key, 2 * i))
            for i, (size, next_size) in enumerate(zip(sizes, sizes[1:], strict=False))
        )
        blocks = tuple(
            _block(num_heads, size, jr.fold_in(weights_key, 2 * i + 1))
            for i, size in enumerate(hidden_dims if use_attention else ())
        )
        bound = LearnableBound if use_adaptive_bounds else Normalize
        count = 1 + use_attention
        self.layers, self.blocks = with_constraints(
            (layers, blocks),
            where=lambda both: list(both)[:count],
            constraint=[bound(initial_bound), Normalize()][:count],
            estimator=estimator,
            key=starts_key,
        )
        self.activation = activation

    def forward(self, x: Float[Array, "points input"]) -> Float[Array, "points output"]:
        """The function at the points, `[points, output_dim]`."""
        channels = self.layers[0].in_features
        if x.ndim != 2 or x.shape[1] != channels or len(x) == 0:
            raise ValueError(
                f"expected a function at points, of shape [points, {channels}], got "
                f"{x.shape}. For a batch of functions use `jax.vmap`."
            )
        for i, layer in enumerate(self.layers[:-1]):
            x = jax.vmap(lambda point, layer=layer: self.activation(layer(point)))(x)
            if self.blocks:
                x = self.blocks[i](x)
        return jax.vmap(self.layers[-1])(x)

    def plain_bound(self) -> Float[Array, ""]:
        """The product of the norms of linear layers, of the constants of the
        activations, and of `(1 - a) + a b` for each block of attention, with `b` from
        the norms of its weights.
        """
        linear = [enclose_norm(layer.weight).upper for layer in self.layers]
        between = jnp.asarray(lipschitz_constant(self.activation), linear[0].dtype)
        blocks = [_bound_of_block(block) for block in self.blocks]
        factors = [*linear, *blocks, *[between] * (len(self.layers) - 1)]
        return up(jnp.prod(jnp.stack(factors)), roundings=16 + 2 * len(factors))


def create_spectral_neural_operator(
    input_dim: int,
    output_dim: int,
    hidden_dims: Sequence[int],
    num_heads: int,
    *,
    activation: Callable[..., Any] = max_min,
    use_attention: bool = True,
    use_adaptive_bounds: bool = False,
    initial_bound: float | int = 1.0,
    estimator: AbstractEstimator = PowerIteration(),
    key: PRNGKeyArray,
) -> tuple[SpectralNeuralOperator, eqx.nn.State]:
    """A [`spectrax.nn.SpectralNeuralOperator`][] and its state.

    **Arguments:**

    - `input_dim`: channels of the input at each point, coordinates among them.
    - `output_dim`: channels of the output.
    - `hidden_dims`: channels after each hidden layer.
    - `num_heads`: heads of attention; must divide all of `hidden_dims`.
    - `activation`: a function of the channels of one point, of known Lipschitz constant
        (see [`spectrax.nn.lipschitz_constant`][]). By default one of constant 1, for
        which all of `hidden_dims` must be even.
    - `use_attention`: if `False`, nothing mixes the points, and `num_heads` is without
        meaning.
    - `use_adaptive_bounds`: if `True`, the bound of each linear layer is trained with
        the weights ([`spectrax.LearnableBound`][]). `lipschitz_bound` follows it.
    - `initial_bound`: the norm of the weight of each linear layer, from the start or,
        if it is not trained, for ever.
    - `estimator`: how norms are found while training.
    - `key`: randomness of the weights.

    **Returns:**

    The model and its state: `y, state = model(x, state)`. With as many linear layers as
    hidden ones and one more, `lipschitz_bound` is at most about `initial_bound ** (1 +
    len(hidden_dims))` at the start.

    **Raises:** `ValueError` if there is no hidden layer, if a number of channels is
    below 1, if `num_heads` is below 1 or does not divide a hidden one, if the
    activation changes the number of channels or has no known Lipschitz constant, or if
    `initial_bound` is not positive and finite.

    !!! Example

        ```python
        import jax
        import spectrax

        key = jax.random.key(0)
        model, state = spectrax.nn.create_spectral_neural_operator(
            3, 1, (32, 32), num_heads=4, key=key
        )
        functions = jax.random.normal(key, (16, 50, 3))
        state = spectrax.advance(model, state)
        plain = spectrax.unwrap(model, state)
        outputs = jax.vmap(plain)(functions)
        print(plain.lipschitz_bound())  # below 1, for 50 points and any other number
        ```
    """
    return eqx.nn.make_with_state(SpectralNeuralOperator)(
        input_dim,
        output_dim,
        hidden_dims,
        num_heads,
        activation=activation,
        use_attention=use_attention,
        use_adaptive_bounds=use_adaptive_bounds,
        initial_bound=initial_bound,
        estimator=estimator,
        key=key,
    )


class _ScaledAttention(eqx.Module):
    """Attention of Lipschitz constant 1 at every number of points, if its weights have
    norms of at most 1.
    """

    attention: L2MultiheadAttention

    def __call__(self, x: Float[Array, "points size"]) -> Float[Array, "points size"]:
        head_size = self.attention.size // self.attention.num_heads
        scale = math.sqrt(head_size) / l2_attention_growth(len(x))
        return scale * self.attention(x)


def _block(num_heads: int, size: int, key: PRNGKeyArray) -> ResidualAverage:
    attention = L2MultiheadAttention(num_heads, size, key=key)
    return ResidualAverage(_ScaledAttention(attention), learnable=True)


def _bound_of_block(block: ResidualAverage) -> Float[Array, ""]:
    assert isinstance(block.layer, _ScaledAttention)
    bound = block.layer.attention.weights_bound()
    weight = block.weight().astype(bound.dtype)
    return up((1 - weight) + weight * bound)


def _check_sizes(
    sizes: tuple[int, ...], num_heads: int | None, activation: Callable[..., Any]
) -> None:
    hidden = sizes[1:-1]
    if not hidden or min(sizes) < 1:
        raise ValueError(
            "expected at least one hidden layer and at least one channel everywhere, "
            f"got input_dim={sizes[0]}, hidden_dims={hidden}, output_dim={sizes[-1]}."
        )
    if num_heads is not None and any(
        num_heads < 1 or size % num_heads for size in hidden
    ):
        raise ValueError(
            "expected a number of heads that divides all hidden_dims, as each of them "
            f"has attention, got num_heads={num_heads} and hidden_dims={hidden}. "
            "Choose other sizes, or `use_attention=False`."
        )
    lipschitz_constant(activation)
    for size in hidden:
        point = jax.ShapeDtypeStruct((size,), jnp.zeros(()).dtype)
        shape = eqx.filter_eval_shape(activation, point).shape
        if shape != (size,):
            raise ValueError(
                "expected an activation that keeps the number of channels, got "
                f"{size} to {shape}."
            )
