"""Ways to estimate a norm while training: what `wrap` is told to use."""

import abc
from typing import Any, ClassVar, Generic, Literal, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from .._dtypes import real_dtype
from .._operators import accumulation_dtype, Operator
from ._power_iteration import (
    check_count,
    check_num_steps,
    DEFAULT_BLOCK_SIZE,
    DEFAULT_INIT_STEPS,
    init_power_state,
    power_iterate,
    residual_norm,
    singular_value,
)
from ._spectral_norm import exact_norm


_State = TypeVar("_State")
Kind = Literal["estimate", "upper bound", "exact"]


class AbstractEstimator(eqx.Module, Generic[_State]):
    """How the norm of a weight is found at each step of training.

    An estimator is configuration: it holds no arrays. What it carries from step to step
    is a separate state, a pytree of arrays.

    A subclass says as a class variable of what `kind` its `sigma` is: `"estimate"`
    (never above the norm), `"upper bound"` (never below it) or `"exact"`, each up to
    rounding. [`spectrax.summary`][] prints it.
    """

    kind: eqx.AbstractClassVar[Kind]

    @abc.abstractmethod
    def init(self, operator: Operator, *, key: PRNGKeyArray) -> _State:
        """The state for an operator, converged enough to be used at once."""

    @abc.abstractmethod
    def advance(
        self, operator: Operator, state: _State, *, num_steps: int | None = None
    ) -> _State:
        """The state after an update of the operator, `num_steps` steps later (by
        default as many as the estimator was made with). It carries no derivative.
        """

    @abc.abstractmethod
    def sigma(self, operator: Operator, state: _State) -> Float[Array, ""]:
        """The norm, differentiable in the operator."""

    @abc.abstractmethod
    def residual(self, operator: Operator, state: _State) -> Float[Array, ""]:
        """How far from converged: `|A^H u - sigma v| / sigma`, 0 if exact."""


class PowerIteration(AbstractEstimator[Any]):
    """Power iteration, a few steps at every update: [`spectrax.power_iterate`][].

    **Kind:** an estimate, never above the norm (rounding apart). While training it
    lags behind the weights; the guide to training says how far.

    **Arguments:**

    - `num_steps`: steps at each update.
    - `block_size`: how many singular pairs to carry, cut to the smaller side of each
        weight, and to 2 for each mode of a Fourier layer. With the default of 8 a step
        is a locally optimal block step. With 1, and `num_steps=1`, it is the algorithm
        of Miyato et al. (2018), from a converged start. For a convolution at every
        input size: [`spectrax.init_power_state`][].
    - `init_steps`: steps for the first state; with 0 it is random.

    **Cost:** two products of the weight with some vectors per step: `block_size` with
    its adjoint and three times as many with the weight itself (one and one if
    `block_size=1`). For a convolution at every input size, the kernel and its adjoint
    times one complex vector for each cell of frequencies (34 for a 3x3 kernel), and a
    quarter as many in each of the further rounds, one as a rule.

    **Raises:** `ValueError` if `num_steps < 0`, `block_size < 1` or `init_steps < 0`.
    """

    kind: ClassVar[Kind] = "estimate"
    num_steps: int = eqx.field(static=True, default=1)
    block_size: int = eqx.field(static=True, default=DEFAULT_BLOCK_SIZE)
    init_steps: int = eqx.field(static=True, default=DEFAULT_INIT_STEPS)

    def __check_init__(self):
        check_num_steps(self.num_steps)
        check_num_steps(self.init_steps, "init_steps")
        check_count(self.block_size, "block_size", least=1)

    def init(self, operator: Operator, *, key: PRNGKeyArray) -> Any:
        """As [`spectrax.init_power_state`][]."""
        return init_power_state(
            operator, key=key, block_size=self.block_size, num_steps=self.init_steps
        )

    def advance(
        self, operator: Operator, state: Any, *, num_steps: int | None = None
    ) -> Any:
        """As [`spectrax.power_iterate`][]."""
        num_steps = self.num_steps if num_steps is None else num_steps
        new = power_iterate(operator, state, num_steps=num_steps)
        # A state keeps its dtypes, also where model or state were cast after wrapping.
        return jax.tree.map(lambda x, old: x.astype(old.dtype), new, state)

    def sigma(self, operator: Operator, state: Any) -> Float[Array, ""]:
        """As [`spectrax.singular_value`][]."""
        return singular_value(operator, state)

    def residual(self, operator: Operator, state: Any) -> Float[Array, ""]:
        """Of the leading pair."""
        return residual_norm(operator, state)


class ExactSVD(AbstractEstimator[tuple[()]]):
    """A dense singular value decomposition at every use.

    **Kind:** exact up to the rounding of the decomposition. For a convolution without
    an input size, exact at the frequency that an iteration found to be the best.

    **Derivatives:** of any order, as those of [`spectrax.spectral_norm`][].

    **Cost:** `O(min(out, in) * out * in)` per weight at every use, with nothing carried
    over: many times the cost of the layer itself. A convolution with an input size is
    written out as a matrix. For small models, and for tests.
    """

    kind: ClassVar[Kind] = "exact"

    def init(self, operator: Operator, *, key: PRNGKeyArray) -> tuple[()]:
        """There is nothing to carry."""
        del operator, key
        return ()

    def advance(
        self,
        operator: Operator,
        state: tuple[()],
        *,
        num_steps: int | None = None,
    ) -> tuple[()]:
        """Does nothing: each use computes the norm anew."""
        del operator, num_steps
        return state

    def sigma(self, operator: Operator, state: tuple[()]) -> Float[Array, ""]:
        """The largest singular value."""
        del state
        return exact_norm(operator)

    def residual(self, operator: Operator, state: tuple[()]) -> Float[Array, ""]:
        """Zero."""
        del state
        return jnp.zeros((), real_dtype(accumulation_dtype(operator)))
