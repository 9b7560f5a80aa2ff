"""A weight times a scale, multiplied out only where somebody asks for the array."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Inexact

from ._constraints import apply_scale
from ._dtypes import widest


def _of_the_array(name: str) -> Callable[..., Any]:
    def method(self: "ScaledWeight", *args: Any) -> Any:
        return getattr(self.__jax_array__(), name)(*args)

    return method


class ScaledWeight(eqx.Module):
    """The weight `scale * raw`, whose products are `scale * (raw @ x)`: a scaled copy
    of a large weight costs more memory traffic than the layer itself.

    What `spectrax.unwrap(model, state, lazy=True)` puts into layers. `@` multiplies by
    it, an index takes rows of it, and for everything else (arithmetic, methods of
    `jax.Array`, functions of `jax.numpy`) it is multiplied out and is the array that it
    stands for. Products are accumulated in float32 or wider and rounded once, after the
    scale.

    - `raw`: the trained weight, `[out, in]`.
    - `scale`: a real scalar.

    **Cost:** that of the layer, and one number for each of its outputs.
    """

    # NumPy's arrays leave it to this class what `x @ weight` means.
    __array_ufunc__ = None

    raw: Inexact[Array, "out in"]
    scale: Float[Array, ""]

    def __matmul__(self, x: Inexact[Array, "in *batch"]) -> Inexact[Array, "..."]:
        """`scale * (raw @ x)`."""
        dtype = jnp.promote_types(self.raw.dtype, x.dtype)
        wide = widest(dtype, self.scale.dtype)
        product = jnp.matmul(self.raw, x, preferred_element_type=wide)
        return _scaled(product, self.scale).astype(dtype)

    def __getitem__(self, index: Any) -> Inexact[Array, "..."]:
        """Those rows or entries of the scaled weight."""
        chosen = self.raw[index]
        wide = widest(chosen.dtype, self.scale.dtype)
        return _scaled(chosen.astype(wide), self.scale).astype(chosen.dtype)

    def __jax_array__(self) -> Inexact[Array, "out in"]:
        """The scaled weight."""
        return apply_scale(self.raw, self.scale)

    def __getattr__(self, name: str) -> Any:
        """A public attribute of the array, such as `T` or `reshape`."""
        if name.startswith("_") or not hasattr(jax.Array, name):
            message = f"{type(self).__name__!r} object has no attribute {name!r}"
            raise AttributeError(message)
        return getattr(self.__jax_array__(), name)

    __rmatmul__ = _of_the_array("__rmatmul__")
    __add__, __radd__ = _of_the_array("__add__"), _of_the_array("__radd__")
    __sub__, __rsub__ = _of_the_array("__sub__"), _of_the_array("__rsub__")
    __mul__, __rmul__ = _of_the_array("__mul__"), _of_the_array("__rmul__")
    __truediv__, __rtruediv__ = (
        _of_the_array("__truediv__"),
        _of_the_array("__rtruediv__"),
    )
    __pow__, __neg__ = _of_the_array("__pow__"), _of_the_array("__neg__")
    __abs__, __len__ = _of_the_array("__abs__"), _of_the_array("__len__")
    __iter__ = _of_the_array("__iter__")

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the weight."""
        return self.raw.shape

    @property
    def ndim(self) -> int:
        """The number of axes: 2."""
        return self.raw.ndim

    @property
    def dtype(self) -> DTypeLike:
        """That of the weight."""
        return self.raw.dtype


def _scaled(
    output: Inexact[Array, "..."], scale: Float[Array, ""]
) -> Inexact[Array, "..."]:
    """`scale * output`.

    Written as a matrix product, since the derivative in `scale` then is one too, summed
    over the whole batch: several times faster on the CPU than its plain reductions.
    """
    return lax.dot_general(
        output[..., None],
        scale.astype(output.dtype)[None],
        (((output.ndim,), (0,)), ((), ())),
        precision=lax.Precision.HIGHEST,
    )
