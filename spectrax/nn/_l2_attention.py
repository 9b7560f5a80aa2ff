"""Self-attention that has a Lipschitz constant.

With `y_i = q_i / d^(1/4)` for the queries `q_i` of a head of size `d`, the attention
weights are `P_ij = K_ij / D_i`, where `K_ij = exp(-|y_i - y_j|^2)` and `D_i = sum_j
K_ij`. All that is not linear is the map from the `y_i` to the averages `G_i = sum_j
P_ij y_j`. Its derivative in a direction with components `e_j` is

    dG_i = sum_j P_ij e_j + 2 C_i e_i - 2 sum_j P_ij c_ij (u_ij . e_j)

with `u_ij = y_j - y_i`, `c_ij = y_j - G_i` and `C_i = sum_j P_ij c_ij c_ij^T`. For `N`
points, whatever the dimension:

- The largest eigenvalue of `C_i` is at most `v`, the solution of `v exp(v + 1) = N -
  1`. Its trace is at most `s = sum_j P_ij z_j`, `z_j = |u_ij|^2`, and `s <= v` means
  `sum_j exp(-z_j) (z_j - v) <= v` over the `N - 1` other points, where no term exceeds
  `exp(-v - 1)`.
- No column of `P` has a sum above `sqrt(N)`: with `w = 1 / D` the sums are `K w`, and
  as `K` is positive semidefinite with ones on its diagonal, `(K w)_j^2 <= w^T K w =
  sum_i w_i (K w)_i <= sum_i (K w)_i`, the sum of all entries of `P`, which is `N`. As
  the rows have the sum 1, the norm of `P` is at most `N^(1/4)`.
- No column of `P_ij |u_ij|^2` has a sum above `k = t sqrt(N) + (N - 1) y`, for every `y
  <= W(1 / e)` and `t = -1 - y - log(y) >= 0`: as `D_i >= 1 + exp(-z)`, `P_ij z <= t
  P_ij + (z - t) / (exp(z) + 1)`, and the largest value of the fraction is this `y`.
- By the Cauchy-Schwarz inequality over `j`, the last sum is of length at most
  `sqrt(v sum_j P_ij |u_ij|^2 |e_j|^2)`, and over all `i` at most `sqrt(v k)`.

So the norm of the derivative is at most `2 v + N^(1/4) + 2 sqrt(v k)`.
"""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from .._enclosures import enclose_norm, up


class L2MultiheadAttention(eqx.Module):
    """Self-attention with weights from distances, which has a Lipschitz constant (Kim
    et al. 2021). Dot-product attention has none.

    For points `x_i`, with `d` the size of a head and `W_h`, `V_h` of shape `[d, size]`,

    - `q_i = W_h x_i`, the query and the key in one,
    - `P_ij = exp(-|q_i - q_j|^2 / sqrt(d)) / sum_k exp(-|q_i - q_k|^2 / sqrt(d))`,
    - head `h` gives `V_h W_h^T sum_j P_ij q_j / sqrt(d)`, and `output_proj` mixes the
        heads.

    There are no biases: those of the queries would cancel. It does not depend on the
    order of the points; put coordinates among the channels if it should.

    To constrain its weights, hand it to [`spectrax.wrap`][]: all queries are one
    weight, and the values one for each head. Then `lipschitz_bound` is at most the
    constant of the table in `lipschitz_bound`, over `sqrt(d)`.

    **Arguments:**

    - `num_heads`: heads, each of size `d = size // num_heads`.
    - `size`: channels of each point, of the input and of the output.
    - `key`: randomness of the weights.

    In it are also `query_proj`, of weight `[size, size]` with the heads one after
    another, `value_proj`, a stack of weight `[num_heads, d, size]`, and `output_proj`.

    **Raises:** `ValueError` if `num_heads` is below 1 or does not divide `size`.

    !!! Example

        ```python
        import equinox as eqx
        import jax
        import spectrax

        key = jax.random.key(0)
        attention = spectrax.nn.L2MultiheadAttention(4, 32, key=key)
        model, state = spectrax.constrain(attention)
        x = jax.random.normal(key, (20, 32))
        y, state = model(x, state)
        print(spectrax.unwrap(model, state).lipschitz_bound(20))
        ```
    """

    query_proj: eqx.nn.Linear
    value_proj: eqx.nn.Linear
    output_proj: eqx.nn.Linear
    num_heads: int = eqx.field(static=True)
    size: int = eqx.field(static=True)

    def __init__(self, num_heads: int, size: int, *, key: PRNGKeyArray):
        if num_heads < 1 or size < 1 or size % num_heads != 0:
            raise ValueError(
                "expected a number of heads that divides the number of channels, got "
                f"num_heads={num_heads} and size={size}."
            )

        def values(key: PRNGKeyArray) -> eqx.nn.Linear:
            return eqx.nn.Linear(size, size // num_heads, use_bias=False, key=key)

        query, value, output = jr.split(key, 3)
        self.query_proj = eqx.nn.Linear(size, size, use_bias=False, key=query)
        self.value_proj = eqx.filter_vmap(values)(jr.split(value, num_heads))
        self.output_proj = eqx.nn.Linear(size, size, use_bias=False, key=output)
        self.num_heads = num_heads
        self.size = size

    def __call__(
        self,
        x: Float[Array, "points size"],
        mask: Bool[Array, " points"] | None = None,
        *,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "points size"]:
        """**Arguments:**

        - `x`: the points, an array of shape `[points, size]`. For a batch of such
            arrays use `jax.vmap`.
        - `mask`: which points there are, for arrays that are filled up to a length. The
            others are not seen by any point, and their output is zero. Other masks have
            no bound here, and are refused.
        - `key`: not used; so that it can stand in `equinox.nn.Sequential`.

        **Returns:** an array of shape `[points, size]`.

        **Cost:** `points^2 size` products for the weights and as many for the averages.
        """
        del key
        if x.ndim != 2 or x.shape[1] != self.size:
            raise ValueError(
                f"expected points of shape [points, {self.size}], got {x.shape}. For a "
                "batch use `jax.vmap`."
            )
        if mask is not None and mask.shape != x.shape[:1]:
            raise ValueError(
                f"expected a mask of shape {x.shape[:1]}, which says of each point "
                f"whether it is there, got {mask.shape}. For a mask of pairs of points "
                "no Lipschitz constant is proven."
            )
        if mask is not None:
            # Whatever they are filled up with, even NaN.
            x = jnp.where(mask[:, None], x, 0)
        head_size = self.size // self.num_heads
        queries = jax.vmap(self.query_proj)(x)
        queries = queries.reshape(-1, self.num_heads, head_size)
        averages = jax.vmap(_average, in_axes=(1, None), out_axes=1)(queries, mask)
        mixed = jnp.einsum("nhd,hvd->nhv", averages, self._heads())
        output = jax.vmap(self.output_proj)(mixed.reshape(-1, self.size))
        return output / math.sqrt(head_size)

    def lipschitz_bound(self, num_points: int) -> Float[Array, ""]:
        """How far apart two sets of so many points can be torn: `|f(x) - f(y)| <= bound
        |x - y|`, in the 2-norm over all entries.

        **Kind:** an upper bound, the rounding of its own computation included: it is
        `c(N) / sqrt(d) |W| max_h |V_h W_h^T| |W_O|`, with `W` all `W_h` on top of each
        other, and norms from [`spectrax.enclose_norm`][]. `c(N)` holds in every
        dimension and grows as `N^(1/4) log(N)`; it is 4 times below that of Kim et al.
        (2021, theorem 3.2), `sqrt(N) (4 v + 1)`, at 64 points, and 10 times at 1024.
        How it is derived stands in [Attention](../api/nn-attention.md).

        | points | 1 | 2 | 4 | 16 | 64 | 256 | 1024 | 4096 |
        |-|-|-|-|-|-|-|-|-|
        | `c(N)` | 1 | 2.31 | 4.05 | 9.58 | 19.4 | 34.8 | 58.8 | 96.3 |

        It also holds with a mask, for the points that are there.

        **Arguments:**

        - `num_points`: the number of points `N`, or more.

        **Returns:** a scalar.

        **Cost:** an enclosure of each weight.

        **Raises:** `ValueError` if `num_points` is below 1.
        """
        growth = l2_attention_growth(num_points)
        root = math.sqrt(self.size // self.num_heads)
        return up(self.weights_bound() * (growth / root))

    def weights_bound(self) -> Float[Array, ""]:
        """The part of `lipschitz_bound` that is due to the weights, at most 1 if they
        have norms of at most 1: `|W| max_h |V_h W_h^T| |W_O|`.

        **Kind:** an upper bound.

        **Returns:** a scalar.

        **Cost:** an enclosure of each weight.
        """
        queries, outputs = self.query_proj.weight, self.output_proj.weight

        def head(
            value: Float[Array, "head_size size"], query: Float[Array, "head_size size"]
        ) -> Float[Array, ""]:
            both = lx.MatrixLinearOperator(value) @ lx.MatrixLinearOperator(query).T
            return enclose_norm(both).upper

        queries_by_head = queries.reshape(self.num_heads, -1, self.size)
        heads = eqx.filter_vmap(head)(self.value_proj.weight, queries_by_head)
        ends = (
            enclose_norm(queries).upper,
            jnp.max(heads),
            enclose_norm(outputs).upper,
        )
        return up(ends[0] * ends[1] * ends[2])

    def _heads(self) -> Float[Array, "heads head_size head_size"]:
        """`V_h W_h^T` of each head."""
        queries = self.query_proj.weight.reshape(self.num_heads, -1, self.size)
        return jnp.einsum("hvs,hds->hvd", self.value_proj.weight, queries)


def _average(
    queries: Float[Array, "points size"], mask: Bool[Array, " points"] | None
) -> Float[Array, "points size"]:
    """`sum_j P_ij q_j` of one head."""
    # Near the origin distances lose fewer digits. The weights do not change by that.
    points = queries - jnp.mean(queries, axis=0, keepdims=True)
    squares = jnp.sum(jnp.square(points), axis=1)
    # Less `|q_i|^2`, which the softmax does not see.
    logits = (2 * points @ points.T - squares[None, :]) / math.sqrt(queries.shape[1])
    if mask is None:
        return jax.nn.softmax(logits, axis=1) @ queries
    weights = jax.nn.softmax(logits, axis=1, where=mask[None, :])
    return jnp.where(mask[:, None], weights @ queries, 0)


def l2_attention_growth(num_points: int) -> float:
    """An upper bound on the norm of the derivative of all `y` to all `G`, as derived
    above, rounding included.
    """
    if num_points < 1:
        raise ValueError(f"expected at least one point, got {num_points}.")
    if num_points == 1:
        return 1.0
    others, root = num_points - 1, math.sqrt(num_points)
    variance = _lambert_upper(others / math.e)
    # The best `y` of those that are allowed; any of them gives a bound.
    best = root / (others - root) if others > root else math.inf
    y = min(best, _lambert_upper(1 / math.e))
    column = max(0.0, -1 - y - math.log(y)) * root + others * y
    growth = 2 * variance + math.sqrt(root) + 2 * math.sqrt(variance * column)
    return growth * (1 + 1e-13)


def _lambert_upper(value: float) -> float:
    """A number not below Lambert's `W(value)`, the solution of `w exp(w) = value`."""
    # Newton's method descends to the solution of a convex equation from above.
    w = math.log1p(value)
    for _ in range(64):
        w -= (w * math.exp(w) - value) / ((1 + w) * math.exp(w))
    while w * math.exp(w) < value * (1 + 1e-14):
        w *= 1 + 1e-15
    return w
