"""Multiplication by a matrix at each Fourier mode."""

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Inexact


class FourierMultiplier(eqx.Module):
    """The function of `fourier_multiplier`: `y[:, k] = weight[:, :, k] x[:, k]`."""

    weight: Inexact[Array, "out in *modes"]

    def __call__(self, x: Inexact[Array, "in *modes"]) -> Inexact[Array, "out *modes"]:
        """Each mode by its own matrix."""
        return jnp.einsum("oi...,i...->o...", self.weight, x, precision="highest")

    def matrices(self) -> Inexact[Array, "modes out in"]:
        """Those of all modes: the blocks of which the whole is the diagonal."""
        flat = self.weight.reshape(*self.weight.shape[:2], -1)
        return jnp.moveaxis(flat, -1, 0)


def fourier_multiplier(
    weight: Inexact[Array, "out in *modes"],
) -> lx.FunctionLinearOperator:
    """The linear part of a Fourier layer (Li et al. 2021, equation 5): at each mode `k`
    the channels are multiplied by a matrix of its own, `y[:, k] = weight[:, :, k]
    x[:, k]`.

    The discrete Fourier transform is unitary up to a factor that its inverse takes
    back, so that the norm of the layer is the norm of this operator, the largest over
    the modes. It does not depend on the size of the grid.

    **Arguments:**

    - `weight`: an array of shape `[out, in, *modes]`, as a rule complex.

    **Returns:**

    A `lineax.FunctionLinearOperator` from `[in, *modes]` to `[out, *modes]`, linear in
    `weight`, for which [`spectrax.enclose_norm`][] knows a bound mode by mode.

    **Raises:** `ValueError` if `weight` has fewer than three axes or no entries.

    !!! Example

        ```python
        import jax
        import jax.numpy as jnp
        import spectrax

        weight = jax.random.normal(jax.random.key(0), (8, 4, 16), jnp.complex64)
        box = spectrax.enclose_norm(spectrax.fourier_multiplier(weight))
        print(box.lower, box.upper)
        ```
    """
    if weight.ndim < 3 or weight.size == 0:
        raise ValueError(
            "expected a weight of shape [out, in, *modes] with at least one axis of "
            f"modes and with entries, got shape {weight.shape}. A single matrix is an "
            "operator as it is."
        )
    structure = jax.ShapeDtypeStruct(weight.shape[1:], weight.dtype)
    return lx.FunctionLinearOperator(
        FourierMultiplier(weight), structure, closure_convert=False
    )


def mode_matrices(operator: object) -> Inexact[Array, "modes out in"] | None:
    """The matrices of an operator made by `fourier_multiplier`, `None` for others."""
    function = getattr(operator, "fn", None)
    return function.matrices() if isinstance(function, FourierMultiplier) else None
