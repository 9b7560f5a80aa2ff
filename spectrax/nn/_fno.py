"""The Fourier neural operator, with a Lipschitz bound at every resolution."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from .._constraints import AbstractConstraint, Normalize
from .._enclosures import enclose_norm, up
from .._norms import AbstractEstimator, PowerIteration
from .._rules import layer_operator
from .._wrap import with_constraints
from ._activations import max_min
from ._fourier import FourierLayer
from ._lipschitz import lipschitz_constant
from ._network import AbstractNetwork


Activation = Callable[[Array], Array]


class FNO(AbstractNetwork):
    """The Fourier neural operator (Li et al. 2021), a map between functions on a grid
    of any resolution, with a bound on its Lipschitz constant.

        y = P x + C c                                   lifting
        y = act(K_i y)              i = 1, ..., depth   blocks
        z = output_scale * (Q act(H y))                 projection

    `P`, `H`, `Q` are pointwise linear maps with biases. `K_i` is a
    [`spectrax.nn.FourierLayer`][] with a bypass and a bias: the integral operator and
    the pointwise linear map of a block as one operator with one norm, the largest over
    the frequencies of `|S(k) + W|`. Constraining the two each on its own would bound
    their sum only by the sum of their norms, as if both were largest at the same
    frequency and in the same direction. `c` are the coordinates of the points.

    **Lipschitz bound:** for any two inputs on the same grid,
    `|f(x) - f(y)| <= L |x - y|` in the Euclidean norm over channels and points, and so
    in every multiple of it, such as the root mean square or the discrete L2 norm. With
    a constraint of bound `b`,

        L = output_scale * b^(depth + 3) * (Lipschitz constant of act)^(depth + 1),

    as far as the norms are converged; `lipschitz_bound` proves the number. It holds at
    every resolution, as the norm of each layer does. It is a product over the layers,
    and the true constant can be much smaller. The coordinates, zero padding and biases
    have no part in it: they add the same to both outputs, or nothing. That is why `C`
    is not constrained.

    A network with `L = 1` cannot learn an operator that needs more. Scale the data, so
    that the operator needs little, and choose `output_scale` above what it still needs;
    or learn the bounds with `constraint=spectrax.LearnableBound(...)`.

    **Arguments:**

    - `num_spatial_dims`: 1, 2 or 3; the number of axes of the grid.
    - `in_channels`, `out_channels`: the channels of the input and output functions.
    - `width`: the channels between.
    - `modes`: the frequencies to keep, as in `FourierLayer`.
    - `depth`: how many blocks.
    - `activation`: a function or module of known
        [`spectrax.nn.lipschitz_constant`][], called with `[width, *grid]`. By default
        [`spectrax.nn.max_min`][], for which `width` has to be even. One of your own has
        to be stated with [`spectrax.nn.register_lipschitz_constant`][].
    - `coordinates`: whether the network sees them: along each axis
        `jax.numpy.linspace(0, 1, n)`.
    - `padding`: for domains that are not periodic: the fraction of each axis by which
        the grid is extended with zeros before the blocks; cut off behind them.
    - `output_scale`: a fixed factor on the output.
    - `constraint`: as in [`spectrax.wrap`][]. `None` for the plain network without
        state and without any bound but that of its weights as they are.
    - `estimator`: as in `spectrax.wrap`.
    - `dtype`: of the weights; JAX's default if not given.
    - `key`: randomness of the weights.

    Called as `y, state = model(x, state)` with `x` of shape `[in_channels, *grid]`, or
    as `y = spectrax.unwrap(model, state)(x)`. If constrained, its weights are
    [`spectrax.Constrained`][], except for that of the coordinates.

    **Raises:** `ValueError` if `depth` or `width` is not positive, if `padding` is
    negative, if `output_scale` is not positive, if the Lipschitz constant of
    `activation` is not known (unless `constraint=None`), and as `FourierLayer`.

    !!! Example

        ```python
        import equinox as eqx
        import jax
        import spectrax

        key = jax.random.key(0)
        make = eqx.nn.make_with_state(spectrax.nn.FNO)
        model, state = make(2, 1, 1, width=8, modes=4, depth=2, key=key)
        y, state = model(jax.random.normal(key, (1, 16, 16)), state)

        plain = spectrax.unwrap(model, state)
        y = plain(jax.random.normal(key, (1, 32, 32)))  # at another resolution
        print(plain.lipschitz_bound())  # 1, and what is left for rounding
        ```
    """

    lifting: eqx.nn.Linear
    position: eqx.nn.Linear | None
    blocks: tuple[FourierLayer, ...]
    hidden: eqx.nn.Linear
    projection: eqx.nn.Linear
    activation: Activation
    padding: float = eqx.field(static=True)
    output_scale: float = eqx.field(static=True)

    def __init__(
        self,
        num_spatial_dims: int,
        in_channels: int,
        out_channels: int,
        width: int,
        modes: int | Sequence[int],
        depth: int,
        *,
        activation: Activation = max_min,
        coordinates: bool = True,
        padding: float | int = 0.0,
        output_scale: float | int = 1.0,
        constraint: AbstractConstraint | None = Normalize(),
        estimator: AbstractEstimator = PowerIteration(),
        dtype: Any = None,
        key: PRNGKeyArray,
    ):
        _check(width, depth, padding, output_scale)
        network_key, wrap_key = jr.split(key)
        keys = iter(jr.split(network_key, depth + 4))

        def linear(inputs: int, outputs: int) -> eqx.nn.Linear:
            return eqx.nn.Linear(inputs, outputs, dtype=dtype, key=next(keys))

        def block() -> FourierLayer:
            return FourierLayer(
                num_spatial_dims,
                width,
                width,
                modes,
                use_bypass=True,
                use_bias=True,
                dtype=dtype,
                key=next(keys),
            )

        lifting = linear(in_channels, width)
        # The coordinates do not depend on the input function.
        self.position = linear(num_spatial_dims, width) if coordinates else None
        blocks = tuple(block() for _ in range(depth))
        layers = lifting, blocks, linear(width, width), linear(width, out_channels)
        if constraint is not None:
            lipschitz_constant(activation)  # raises if it is not known
            layers = with_constraints(
                layers, constraint=constraint, estimator=estimator, key=wrap_key
            )
        self.lifting, self.blocks, self.hidden, self.projection = layers
        self.activation = activation
        self.padding = float(padding)
        self.output_scale = float(output_scale)

    def forward(self, x: Float[Array, "in *grid"]) -> Float[Array, "out *grid"]:
        """The function `[out_channels, *grid]` for the one `[in_channels, *grid]`."""
        grid = x.shape[1:]
        y = _pointwise(self.lifting, x)
        if self.position is not None:
            y = y + _pointwise(self.position, _coordinates(grid, x.dtype))
        extra = [round(self.padding * n) for n in grid]
        y = jnp.pad(y, [(0, 0), *((0, n) for n in extra)])
        for block in self.blocks:
            y = self.activation(block(y))
        y = y[(slice(None), *(slice(n) for n in grid))]
        y = self.activation(_pointwise(self.hidden, y))
        return self.output_scale * _pointwise(self.projection, y)

    def plain_bound(self) -> Float[Array, ""]:
        """The product of the norms, of the activation's constants and of the output's
        scale.
        """
        activations = lipschitz_constant(self.activation) ** (len(self.blocks) + 1)
        layers = [self.lifting, *self.blocks, self.hidden, self.projection]
        norms = [enclose_norm(layer_operator(layer)).upper for layer in layers]
        bound = up(jnp.asarray(self.output_scale * activations, norms[0].dtype))
        for norm in norms:
            bound = up(bound * norm)
        return bound


def _pointwise(
    layer: eqx.nn.Linear, x: Float[Array, "in *grid"]
) -> Float[Array, "out *grid"]:
    flat = jax.vmap(layer, in_axes=1, out_axes=1)(x.reshape(x.shape[0], -1))
    return flat.reshape(-1, *x.shape[1:])


def _coordinates(grid: tuple[int, ...], dtype: Any) -> Float[Array, "dim *grid"]:
    axes = [jnp.linspace(0, 1, n, dtype=dtype) for n in grid]
    return jnp.stack(jnp.meshgrid(*axes, indexing="ij"))


def _check(
    width: int, depth: int, padding: float | int, output_scale: float | int
) -> None:
    if width < 1 or depth < 1:
        raise ValueError(
            f"expected `width` and `depth` to be positive, got {width} and {depth}."
        )
    if not padding >= 0:
        raise ValueError(
            "expected `padding` to be a fraction of the grid, not negative, got "
            f"{padding}."
        )
    if not 0 < output_scale < float("inf"):
        raise ValueError(
            f"expected `output_scale` to be positive and finite, got {output_scale}."
        )
