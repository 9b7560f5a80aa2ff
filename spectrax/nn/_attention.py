"""Multi-head attention with its projections under a constraint."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Inexact, PRNGKeyArray

from .._constraints import AbstractConstraint, Normalize
from .._norms import AbstractEstimator, PowerIteration
from .._rules import register_layer
from .._wrap import with_constraints
from .._wrapped import Wrapped


class HeadProjections(eqx.Module):
    """One linear map for each head, all of the same input: `y_h = W_h x + b_h`.

    With the heads' outputs after one another it is the `equinox.nn.Linear` that was
    cut.
    """

    weight: Inexact[Array, "*stack heads size in"]
    bias: Inexact[Array, "*stack features"] | None

    def __call__(
        self, x: Inexact[Array, " in"], *, key: PRNGKeyArray | None = None
    ) -> Inexact[Array, " features"]:
        del key
        y = (self.weight @ x).reshape(-1)
        return y if self.bias is None else y + self.bias


class HeadSum(eqx.Module):
    """The sum of one linear map of each head's part of the input: `sum_h W_h x_h + b`.

    With the blocks side by side it is the `equinox.nn.Linear` that was cut.
    """

    weight: Inexact[Array, "*stack heads out size"]
    bias: Inexact[Array, "*stack out"] | None

    def __call__(
        self, x: Inexact[Array, " features"], *, key: PRNGKeyArray | None = None
    ) -> Inexact[Array, " out"]:
        del key
        heads, _, size = self.weight.shape
        y = jnp.einsum("hoi,hi->o", self.weight, x.reshape(heads, size))
        return y if self.bias is None else y + self.bias


# The heads are a stack, so that each has a norm and a bound of its own.
register_layer(HeadProjections)
register_layer(HeadSum)


class SpectralMultiheadAttention(Wrapped):
    """`equinox.nn.MultiheadAttention` whose four projections are constrained: those of
    query, key and value, and the one of the output.

    The same as `spectrax.wrap(eqx.nn.MultiheadAttention(...))`, with the same raw
    weights for the same `key`. Masks, cross-attention, dropout and `process_heads` are
    Equinox's own.

    **What is bounded.** With `per_head=False` the norm of each whole projection, all
    heads stacked. With `per_head=True` that of every head's own block of it: of
    `num_heads` blocks `[qk_size, query_size]` of the query's, `[qk_size, key_size]` of
    the key's, `[vo_size, value_size]` of the value's, and `[output_size, vo_size]` of
    the output's. Each has its own norm and, with [`spectrax.LearnableBound`][], its own
    trained bound. The norm of a whole projection is then
    at most `sqrt(num_heads)` times that of its blocks.

    **What is not.** Dot-product attention has no global Lipschitz constant, whatever
    the norms of its projections: the scores multiply inputs with inputs, so that its
    Jacobian can grow with the square of their size (Kim et al. 2021, theorem 3.1).
    Bounded projections keep it from growing with the weights, no more. Attention with a
    Lipschitz constant is [`spectrax.nn.L2MultiheadAttention`][].

    **Kind:** as the estimator's; see [`spectrax.unwrap`][].

    **Arguments:**

    - `num_heads`: the number of heads.
    - `query_size`: channels of the query `[q_seq, query_size]`.
    - `key_size`: channels of the key `[kv_seq, key_size]`. By default `query_size`.
    - `value_size`: channels of the value `[kv_seq, value_size]`, likewise.
    - `output_size`: channels of the output `[q_seq, output_size]`, likewise.
    - `qk_size`: channels over which each head compares query and key. By default
        `query_size // num_heads`.
    - `vo_size`: channels of each head's value, likewise.
    - `use_query_bias`: whether to add a bias to the projected query.
    - `use_key_bias`: the same for the key.
    - `use_value_bias`: the same for the value.
    - `use_output_bias`: the same for the output.
    - `dropout_p`: the probability of dropout of attention weights.
    - `inference`: if `True`, dropout does nothing.
    - `dtype`: of the weights. By default JAX's floating-point dtype.
    - `per_head`: whether each head's block has a bound of its own.
    - `constraint`: what is done with each norm, as in [`spectrax.wrap`][].
    - `estimator`: how each norm is found, as in `wrap`.
    - `key`: randomness of the initial weights.

    A [`spectrax.Wrapped`][], called as
    `y, state = layer(query, key, value, state=state)`, with `mask` after the value and
    with `key` (for dropout) and `inference` as keyword arguments.

    **Cost:** that of `wrap`.

    **Raises:** what `equinox.nn.MultiheadAttention` and `wrap` raise.

    !!! Example

        ```python
        import equinox as eqx
        import jax
        import jax.numpy as jnp
        import spectrax

        make = eqx.nn.make_with_state(spectrax.nn.SpectralMultiheadAttention)
        layer, state = make(4, 16, key=jax.random.key(0))
        x = jax.random.normal(jax.random.key(1), (10, 16))
        causal = jnp.tril(jnp.ones((10, 10), bool))
        y, state = layer(x, x, x, causal, state)
        ```
    """

    def __init__(
        self,
        num_heads: int,
        query_size: int,
        key_size: int | None = None,
        value_size: int | None = None,
        output_size: int | None = None,
        qk_size: int | None = None,
        vo_size: int | None = None,
        use_query_bias: bool = False,  # noqa: FBT001, FBT002
        use_key_bias: bool = False,  # noqa: FBT001, FBT002
        use_value_bias: bool = False,  # noqa: FBT001, FBT002
        use_output_bias: bool = False,  # noqa: FBT001, FBT002
        dropout_p: float = 0.0,
        inference: bool = False,  # noqa: FBT001, FBT002
        dtype: Any = None,
        *,
        per_head: bool = False,
        constraint: AbstractConstraint = Normalize(),
        estimator: AbstractEstimator = PowerIteration(),
        key: PRNGKeyArray,
    ):
        attention = eqx.nn.MultiheadAttention(
            num_heads,
            query_size,
            key_size,
            value_size,
            output_size,
            qk_size,
            vo_size,
            use_query_bias,
            use_key_bias,
            use_value_bias,
            use_output_bias,
            dropout_p,
            inference,
            dtype,
            key=key,
        )
        if per_head:
            attention = _cut_into_heads(attention)
        module = with_constraints(attention, constraint=constraint, estimator=estimator)
        super().__init__(module)


def _cut_into_heads(attention: eqx.nn.MultiheadAttention) -> eqx.nn.MultiheadAttention:
    heads = attention.num_heads

    def projections(linear: eqx.nn.Linear) -> HeadProjections:
        features, in_size = linear.weight.shape
        weight = linear.weight.reshape(heads, features // heads, in_size)
        return HeadProjections(weight, linear.bias)

    def summed(linear: eqx.nn.Linear) -> HeadSum:
        out_size, features = linear.weight.shape
        weight = linear.weight.reshape(out_size, heads, features // heads)
        return HeadSum(jnp.moveaxis(weight, 1, 0), linear.bias)

    return eqx.tree_at(
        lambda attention: (
            attention.query_proj,
            attention.key_proj,
            attention.value_proj,
            attention.output_proj,
        ),
        attention,
        (
            projections(attention.query_proj),
            projections(attention.key_proj),
            projections(attention.value_proj),
            summed(attention.output_proj),
        ),
    )
