"""Dtypes, chosen explicitly: nothing here relies on implicit promotion."""

from typing import Any

import jax
import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array, Complex, Float


def widest(*dtypes: Any) -> Any:
    """The dtype that holds values of all the given ones, whatever promotion is set."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*dtypes)


def at_least_float32(*dtypes: Any) -> Any:
    """The same, and no narrower than float32: what products are accumulated in."""
    return widest(jnp.float32, *dtypes)


def unit_complex(angle: Float[Array, "*shape"]) -> Complex[Array, "*shape"]:
    """`exp(i angle)`."""
    return lax.complex(jnp.cos(angle), jnp.sin(angle))


def real_dtype(dtype: Any) -> Any:
    """The dtype of the absolute values of a floating-point or complex dtype."""
    return jnp.finfo(dtype).dtype
