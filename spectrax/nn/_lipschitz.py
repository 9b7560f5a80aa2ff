"""Lipschitz constants of activations and other parts without a weight."""

import functools as ft
import inspect
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


# Of a class: from an instance. Of a function: from the keyword arguments that a
# `functools.partial` gives to it.
_BY_TYPE: dict[type, Callable[[Any], Any]] = {}
_BY_FUNCTION: list[tuple[Callable[..., Any], Callable[..., Any]]] = []


def lipschitz_constant(activation: Callable[..., Any]) -> float | Float[Array, ""]:
    """The Lipschitz constant of an activation: the smallest `L` such that
    `|f(x) - f(y)| <= L |x - y|` for all `x` and `y`.

    **Kind:** exact, rounded up to a number of float64. From the 2-norm to the 2-norm;
    for functions that act entry by entry, also in every other p-norm.

    | functions of `jax.nn` | constant |
    |-|-|
    | `identity`, `relu`, `relu6`, `tanh`, `hard_tanh`, `soft_sign`, `softplus`, `squareplus`, `sparse_plus`, `log_sigmoid`, `celu`, `logsumexp` | 1 |
    | `sigmoid` | 1/4 |
    | `hard_sigmoid` | 1/6 |
    | `sparse_sigmoid`, `softmax` | 1/2 |
    | `leaky_relu`, `elu` | `max(1, abs(negative_slope))`, `max(1, abs(alpha))` |
    | `selu` | 1.7581 |
    | `gelu` | 1.12899, and 1.12890 with `approximate=False` |
    | `silu` | 1.09984 |
    | `hard_silu` | 3/2 |
    | `mish` | 1.08850 |

    Also known are `abs`, `sin`, `cos` and `arctan` of `jax.numpy`; `Identity`, `Lambda`,
    `PReLU` and the average and maximum pools of `equinox.nn`; and those of
    `spectrax.nn`. Options are given with `functools.partial`, as in
    `functools.partial(jax.nn.gelu, approximate=False)`.

    **Arguments:**

    - `activation`: a function or a module without weights that are constrained.

    **Returns:**

    A float. For a module whose constant depends on its arrays, a scalar array, which is
    not rounded up.

    **Raises:** `ValueError` if the constant is not known. State it with
    [`spectrax.nn.register_lipschitz_constant`][].

    !!! Example

        ```python
        import equinox as eqx
        import jax
        import spectrax

        print(spectrax.nn.lipschitz_constant(jax.nn.silu))  # 1.0998...
        print(spectrax.nn.lipschitz_constant(eqx.nn.AvgPool2d(2, stride=2)))  # 0.5
        ```
    """  # noqa: E501
    for cls in inspect.getmro(type(activation)):
        if cls in _BY_TYPE:
            return _BY_TYPE[cls](activation)
    for function, constant in _BY_FUNCTION:
        if function is activation:
            return constant()
    raise _unknown(activation)


def register_lipschitz_constant(
    activation: Callable[..., Any], constant: float | int | Callable[..., Any]
) -> None:
    """States the Lipschitz constant of an activation, for networks that bound theirs.

    Nothing checks the statement: a bound that is built on it holds if it does.
    Registering again replaces what was known.

    **Arguments:**

    - `activation`: a function, or a class such as an `equinox.Module`, which then
        stands for all its instances and subclasses.
    - `constant`: an upper bound on the Lipschitz constant in the 2-norm, a number. Or a
        function to one: from an instance of the class; from the keyword arguments that
        a `functools.partial` of the function has.

    **Raises:** `TypeError` if `activation` is neither a function nor a class,
    `ValueError` if a number is negative or not finite.

    !!! Example

        ```python
        import functools
        import jax.numpy as jnp
        import spectrax


        def wave(x, frequency=1.0):
            return jnp.sin(frequency * x)


        spectrax.nn.register_lipschitz_constant(wave, lambda frequency=1.0: frequency)
        fast = functools.partial(wave, frequency=30.0)
        assert spectrax.nn.lipschitz_constant(fast) == 30.0
        ```
    """
    if not callable(activation) or isinstance(activation, eqx.Module | ft.partial):
        raise TypeError(
            "expected a function or a class, got an instance of "
            f"{type(activation).__name__}. Pass the class, or the function inside a "
            "`functools.partial`, with a function of its options as the constant."
        )
    rule = constant if callable(constant) else _always(constant)
    if isinstance(activation, type):
        _BY_TYPE[activation] = rule
    else:
        # The first one is found.
        _BY_FUNCTION.insert(0, (activation, rule))


def rounded_root(value: Fraction) -> float:
    """The square root of a rational number, rounded up."""
    root = math.sqrt(value)
    while Fraction(root) ** 2 < value:
        root = math.nextafter(root, math.inf)
    return root


def _always(constant: float | int) -> Callable[..., float]:
    if not 0 <= constant < math.inf:
        raise ValueError(
            "expected a Lipschitz constant that is not negative and finite, got "
            f"{constant}. A function without one is not bounded by anything."
        )
    return lambda *_: float(constant)


def _of_partial(partial: ft.partial) -> Any:
    for function, constant in _BY_FUNCTION:
        if function is partial.func and not partial.args:
            return constant(**partial.keywords)
    raise _unknown(partial)


def _unknown(activation: Any) -> ValueError:
    return ValueError(
        f"expected an activation of known Lipschitz constant, got {activation!r}. "
        "State it with `spectrax.nn.register_lipschitz_constant(activation, constant)`;"
        " of a lambda, give it a name first."
    )


# Those with a number of digits were computed with 50 from the condition that the
# second derivative vanishes, and rounded up.
_NUMBERS: list[tuple[Callable[..., Any], float]] = [
    (jax.nn.identity, 1.0),
    (jax.nn.relu, 1.0),
    (jax.nn.relu6, 1.0),
    (jax.nn.tanh, 1.0),
    (jax.nn.hard_tanh, 1.0),
    (jax.nn.soft_sign, 1.0),
    (jax.nn.softplus, 1.0),
    (jax.nn.sparse_plus, 1.0),
    (jax.nn.log_sigmoid, 1.0),
    # The gradient is a vector of probabilities, of length at most 1.
    (jax.nn.logsumexp, 1.0),
    (jax.nn.sigmoid, 0.25),
    (jax.nn.hard_sigmoid, math.nextafter(1 / 6, 1)),
    (jax.nn.sparse_sigmoid, 0.5),
    (jax.nn.selu, 1.758099340847377),
    # x tanh(x / 2) = 2, and then (1 + x / 2) / 2.
    (jax.nn.silu, 1.099839320128867),
    (jax.nn.hard_silu, 1.5),
    (jax.nn.mish, 1.0884981612517279),
    (jnp.abs, 1.0),
    (jnp.sin, 1.0),
    (jnp.cos, 1.0),
    (jnp.arctan, 1.0),
]
for _function, _number in _NUMBERS:
    register_lipschitz_constant(_function, _number)

# x = sqrt(2), and then (1 + erf(1)) / 2 + exp(-1) / sqrt(pi).
EXACT_GELU = 1.1289041451851549
TANH_GELU = 1.1289930686587719


# The names of the arguments are those of the functions.
def _gelu(approximate: bool = True) -> float:  # noqa: FBT001, FBT002
    return TANH_GELU if approximate else EXACT_GELU


def _leaky_relu(negative_slope: float = 0.01) -> float:
    return max(1.0, abs(negative_slope))


def _elu(alpha: float = 1.0) -> float:
    return max(1.0, abs(alpha))


def _celu(alpha: float = 1.0) -> float:
    del alpha  # The derivative exp(x / alpha) does not exceed 1.
    return 1.0


def _squareplus(b: float = 4) -> float:
    del b
    return 1.0


def _softmax(axis: int | tuple[int, ...] | None = -1) -> float:
    # diag(p) - p p^T has row sums 2 p (1 - p), at most 1/2.
    del axis
    return 0.5


register_lipschitz_constant(jax.nn.gelu, _gelu)
register_lipschitz_constant(jax.nn.leaky_relu, _leaky_relu)
register_lipschitz_constant(jax.nn.elu, _elu)
register_lipschitz_constant(jax.nn.celu, _celu)
register_lipschitz_constant(jax.nn.squareplus, _squareplus)
register_lipschitz_constant(jax.nn.softmax, _softmax)

_BY_TYPE[ft.partial] = _of_partial
register_lipschitz_constant(eqx.nn.Identity, 1.0)
register_lipschitz_constant(eqx.nn.Lambda, lambda layer: lipschitz_constant(layer.fn))
register_lipschitz_constant(
    eqx.nn.PReLU,
    lambda layer: jnp.maximum(1.0, jnp.max(jnp.abs(layer.negative_slope))),
)
