"""What to do with a norm: turn it into the factor by which a weight is scaled."""

import abc
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.core
import jax.lax as lax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Inexact, Real

from ._dtypes import widest
from ._norms import PowerStateLike, singular_value
from ._operators import Operator


_Bound = float | int | Real[Array, "*stack"] | Real[np.ndarray, "*stack"]


class AbstractConstraint(eqx.Module):
    """A rule from the norm `sigma` of a weight to the factor that scales the weight.

    `wrap` makes one instance for each weight, with `init`. If it is `trainable` that
    instance is part of the model, where an optimizer finds its arrays; if not, it is
    part of the state, where none does.
    """

    trainable: eqx.AbstractClassVar[bool]

    @abc.abstractmethod
    def init(self, sigma: Float[Array, "*stack"]) -> "AbstractConstraint":
        """The instance for one weight (or a stack of them), of norm `sigma` now."""

    @abc.abstractmethod
    def target(self) -> Float[Array, "*stack"]:
        """The norm that is allowed."""

    @abc.abstractmethod
    def scale(self, sigma: Float[Array, "*stack"]) -> Float[Array, "*stack"]:
        """The factor by which a weight of norm `sigma` is to be multiplied."""


class Normalize(AbstractConstraint):
    """Scales a weight so that its norm is `bound`: `W * bound / sigma` (Miyato et al.
    2018, equation 8, for `bound=1`). A zero weight stays zero, with zero derivatives.

    **Arguments:**

    - `bound`: the norm to have, positive and finite. A number, or an array with one for
        each weight of a stack.

    **Raises:** `ValueError` if `bound` is not positive and finite.
    """

    trainable: ClassVar[bool] = False

    bound: Any = 1.0

    def __check_init__(self):
        _check_positive(self.bound, "bound")

    def init(self, sigma: Float[Array, "*stack"]) -> "Normalize":
        """With one bound for each weight of the stack."""
        return Normalize(_stacked(self.bound, sigma, "bound"))

    def target(self) -> Float[Array, "*stack"]:
        """The bound."""
        return jnp.asarray(self.bound)

    def scale(self, sigma: Float[Array, "*stack"]) -> Float[Array, "*stack"]:
        """`bound / sigma`, and 0 at 0."""
        return _ratio(self.target(), sigma, at_zero=0.0)


class Clip(AbstractConstraint):
    """Scales a weight down if its norm is above `bound`, and never up:
    `W * min(1, bound / sigma)`. A zero weight is left alone.

    Below the bound the weight is the raw weight, exactly, and its derivative the
    identity; above it the derivative is that of `Normalize`, so that the norm can
    shrink again.

    **Arguments:**

    - `bound`: the largest norm to allow, positive and finite. A number, or an array
        with one for each weight of a stack.

    **Raises:** `ValueError` if `bound` is not positive and finite.
    """

    trainable: ClassVar[bool] = False

    bound: Any = 1.0

    def __check_init__(self):
        _check_positive(self.bound, "bound")

    def init(self, sigma: Float[Array, "*stack"]) -> "Clip":
        """With one bound for each weight of the stack."""
        return Clip(_stacked(self.bound, sigma, "bound"))

    def target(self) -> Float[Array, "*stack"]:
        """The bound."""
        return jnp.asarray(self.bound)

    def scale(self, sigma: Float[Array, "*stack"]) -> Float[Array, "*stack"]:
        """`min(1, bound / sigma)`."""
        return _clipped(self.target(), sigma)


class ClipToInitial(AbstractConstraint):
    """`Clip`, with the norm that each weight has when it is wrapped, times `factor`, as
    its bound.

    For transfer learning: a pretrained model starts unchanged to the last bit (if
    `factor >= 1`), and each norm then stays in `[0, factor * initial norm]`. The
    initial norm is the estimator's, rounded up by 16 units in the last place. A weight
    that is zero when it is wrapped stays zero.

    **Arguments:**

    - `factor`: positive and finite.
    - `bound`: not to be given; the instance made for a weight has its bound here.

    **Raises:** `ValueError` if `factor` is not positive and finite.
    """

    trainable: ClassVar[bool] = False

    factor: float = eqx.field(static=True, default=1.0)
    bound: Float[Array, "*stack"] | None = None

    def __check_init__(self):
        _check_positive(self.factor, "factor")

    def init(self, sigma: Float[Array, "*stack"]) -> "ClipToInitial":
        """With `factor * sigma` as the bound."""
        roundup = 1 + 16 * float(jnp.finfo(sigma.dtype).eps)
        return ClipToInitial(self.factor, self.factor * roundup * sigma)

    def target(self) -> Float[Array, "*stack"]:
        """The bound, once there is one."""
        if self.bound is None:
            raise ValueError(
                "expected a `ClipToInitial` that has seen a weight, got one that has "
                "not. `spectrax.wrap` shows it the initial norms; by hand, call "
                "`.init(sigma)`."
            )
        return self.bound

    def scale(self, sigma: Float[Array, "*stack"]) -> Float[Array, "*stack"]:
        """`min(1, bound / sigma)`."""
        return _clipped(self.target(), sigma)


class LearnableBound(AbstractConstraint):
    """Scales a weight so that its norm is a bound that is trained with the model:
    `W * bound / sigma`, the `gamma` of sigma-reparametrisation (Zhai et al. 2023) and
    the adaptive bound of spectrally normalized operators.

    The bound is positive by construction. What is trained is `raw`, with
    `bound = exp(raw)`, or `bound = maximum * sigmoid(raw)` if there is a maximum, which
    is then never reached. Mind weight decay: it pulls `raw` to 0, the bound to 1 or to
    half of the maximum. Exclude `raw` from it if that is not wanted.

    **Arguments:**

    - `bound`: the bound at the start, positive, finite, and below `maximum`.
    - `maximum`: a cap on the bound. `None` for no cap.

    **Raises:** `ValueError` if `bound` or `maximum` is not positive and finite, or if
    `bound >= maximum`.
    """

    trainable: ClassVar[bool] = True

    raw: Float[Array, "*stack"]
    maximum: float | None = eqx.field(static=True)

    def __init__(self, bound: _Bound = 1.0, *, maximum: float | None = None):
        _check_positive(bound, "bound")
        initial = jnp.asarray(bound, dtype=float)
        if maximum is None:
            self.raw = jnp.log(initial)
        else:
            _check_positive(maximum, "maximum")
            if not np.all(np.asarray(bound) < maximum):
                raise ValueError(
                    f"expected `bound` to be below `maximum={maximum}`, got {bound}: "
                    "it approaches the maximum but never reaches it."
                )
            self.raw = jnp.log(initial) - jnp.log(maximum - initial)
        self.maximum = maximum

    def init(self, sigma: Float[Array, "*stack"]) -> "LearnableBound":
        """With one bound for each weight of the stack."""
        raw = _stacked(self.raw, sigma, "bound")
        return eqx.tree_at(lambda constraint: constraint.raw, self, raw)

    def target(self) -> Float[Array, "*stack"]:
        """The bound as it is now."""
        if self.maximum is None:
            return jnp.exp(self.raw)
        return self.maximum * jax.nn.sigmoid(self.raw)

    def scale(self, sigma: Float[Array, "*stack"]) -> Float[Array, "*stack"]:
        """`bound / sigma`, and 0 at 0."""
        return _ratio(self.target(), sigma, at_zero=0.0)


def normalize(
    weight: Inexact[Array, "..."],
    state: PowerStateLike,
    *,
    bound: _Bound = 1.0,
    view: Callable[[Array], Operator] | None = None,
) -> Inexact[Array, "..."]:
    """Spectral normalization: `weight * bound / sigma`, with
    `sigma = spectrax.singular_value(weight, state)`.

    **Kind:** the norm of the result is `bound` as far as `sigma` is the norm of
    `weight`. As `sigma` is an estimate from below, it can exceed `bound` by the error
    of `sigma`.

    **Derivatives:** with `u` and `v` held fixed, as in Miyato et al. (2018, equation
    11). A zero weight gives zero, with zero derivatives.

    **Arguments:**

    - `weight`: a matrix of shape `[out, in]`, or an array of any shape with a `view`.
    - `state`: singular vectors, from [`spectrax.init_power_state`][] and
        [`spectrax.power_iterate`][] for `weight` or `view(weight)`.
    - `bound`: the norm to have, positive and finite.
    - `view`: how the weight acts, a linear function from the weight to an operator,
        such as [`spectrax.flattened_kernel`][]. By default the weight is a matrix.

    **Returns:**

    An array of the shape and dtype of `weight`. For float16 and bfloat16 it is rounded
    once, at the end.

    **Cost:** one product with the operator.

    **Raises:** `TypeError` or `ValueError` if `weight` is not a matrix (and there is no
    `view`), if `state` is of other shapes, or if `bound` is not positive and finite.

    !!! Example

        ```python
        import jax
        import jax.numpy as jnp
        import spectrax

        weight = jax.random.normal(jax.random.key(0), (256, 128))
        state = spectrax.init_power_state(weight)
        state = spectrax.power_iterate(weight, state, num_steps=20)
        normalized = spectrax.normalize(weight, state)
        print(jnp.linalg.norm(normalized, 2))  # 1.0
        ```
    """
    _check_positive(bound, "bound")
    sigma = singular_value(weight if view is None else view(weight), state)
    return apply_scale(weight, Normalize(bound).init(sigma).scale(sigma))


def apply_scale(
    weight: Inexact[Array, "..."], scale: Float[Array, "*stack"]
) -> Inexact[Array, "..."]:
    """`weight * scale` in the wider dtype, rounded once to that of `weight`."""
    scale = jnp.expand_dims(scale, tuple(range(scale.ndim, weight.ndim)))
    wide = widest(weight.dtype, scale.dtype)
    return (weight.astype(wide) * scale.astype(wide)).astype(weight.dtype)


def _ratio(
    bound: Float[Array, "*stack"], sigma: Float[Array, "*stack"], *, at_zero: float
) -> Float[Array, "*stack"]:
    """`bound / |sigma|`; `at_zero` where that is not a finite number, as for a zero
    weight. A NaN stays one.

    Written as `bound / (sigma * unit) * unit`, where the constant `unit` is a power of
    two close to `1 / sigma`. That changes no bit of it, but the derivatives are those
    of `1 / x` close to 1, in units of the norm, where those of `1 / sigma` overflow.
    A compiler would merge `x / a / a` into `x / (a * a)`, hence the products.
    """
    # Vectors that lag far behind the weight can see a negative value, and a constraint
    # never changes the sign of a weight. A model may be cast after it was wrapped.
    sigma, bound = jnp.abs(sigma), bound.astype(sigma.dtype)
    zero = sigma <= bound * float(jnp.finfo(sigma.dtype).tiny)
    sigma = jnp.where(zero, 1, sigma)
    unit = 1 / _power_of_two(sigma)
    return jnp.where(zero, at_zero, bound / (sigma * unit) * unit)


def _power_of_two(numbers: Float[Array, "*stack"]) -> Float[Array, "*stack"]:
    """Close to each number, so that it and its inverse are neither zero nor infinite;
    without a derivative.
    """
    info = jnp.finfo(numbers.dtype)
    within = jnp.clip(numbers, float(info.tiny), 1 / float(info.tiny))
    return lax.reduce_precision(lax.stop_gradient(within), info.nexp, 0)


def _clipped(
    bound: Float[Array, "*stack"], sigma: Float[Array, "*stack"]
) -> Float[Array, "*stack"]:
    inside = jnp.abs(sigma) <= bound.astype(sigma.dtype)
    # Where inside, the other branch must not meet a zero.
    ratio = _ratio(bound, jnp.where(inside, 1, sigma), at_zero=1.0)
    return jnp.where(inside, 1, ratio)


def _stacked(bound: Any, sigma: Float[Array, "*stack"], name: str) -> Array:
    bound = jnp.asarray(bound, sigma.dtype)
    try:
        bound = jnp.broadcast_to(bound, sigma.shape)
    except ValueError as error:
        raise ValueError(
            f"expected `{name}` to be a number or an array that broadcasts to "
            f"{sigma.shape}, one value for each weight of the stack; got shape "
            f"{bound.shape}."
        ) from error
    return bound


def _check_positive(value: Any, name: str) -> None:
    """For concrete values; a traced one cannot be looked at."""
    if isinstance(value, jax.core.Tracer):
        return
    if value is None or np.asarray(value).dtype.kind not in "fiuV":
        raise TypeError(
            f"expected `{name}` to be a real number or an array of them, got {value!r} "
            f"of type {type(value).__name__}."
        )
    concrete = np.asarray(value, dtype=float)
    if not (np.all(concrete > 0) and np.all(np.isfinite(concrete))):
        raise ValueError(
            f"expected `{name}` to be positive and finite, got {value}. To remove a "
            "constraint do not wrap the weight; to freeze a weight at zero, set it so."
        )
