"""Multiplication by a matrix at each Fourier mode."""

import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Inexact

from ._lineax import register_without_structure


class FourierMultiplier(lx.AbstractLinearOperator):
    """A matrix for each Fourier mode, `y[:, k] = weight[:, :, k] x[:, k]`: the operator
    that [`spectrax.fourier_multiplier`][] makes. Its transpose is another one.

    - `weight`: `[out, in, *modes]`.
    """

    weight: Inexact[Array, "out in *modes"]

    def mv(self, vector: Inexact[Array, "in *modes"]) -> Inexact[Array, "out *modes"]:
        """Each mode by its own matrix."""
        return jnp.einsum("oi...,i...->o...", self.weight, vector, precision="highest")

    def matrices(self) -> Inexact[Array, "modes out in"]:
        """Those of all modes: the blocks of which the whole is the diagonal."""
        flat = self.weight.reshape(*self.weight.shape[:2], -1)
        return jnp.moveaxis(flat, -1, 0)

    def as_matrix(self) -> Inexact[Array, "out_size in_size"]:
        """Mostly zeros, as no mode sees another."""
        flat = self.weight.reshape(*self.weight.shape[:2], -1)
        identity = jnp.eye(flat.shape[2], dtype=flat.dtype)
        blocks = jnp.einsum("oim,mn->omin", flat, identity, precision="highest")
        return blocks.reshape(self.out_size(), self.in_size())

    def transpose(self) -> "FourierMultiplier":
        """The transposed matrices."""
        return FourierMultiplier(jnp.swapaxes(self.weight, 0, 1))

    def in_structure(self) -> jax.ShapeDtypeStruct:
        """Channels and modes."""
        return jax.ShapeDtypeStruct(self.weight.shape[1:], self.weight.dtype)

    def out_structure(self) -> jax.ShapeDtypeStruct:
        """Channels and modes."""
        shape = self.weight.shape[0], *self.weight.shape[2:]
        return jax.ShapeDtypeStruct(shape, self.weight.dtype)


register_without_structure(FourierMultiplier)


@lx.conj.register
def _(operator: FourierMultiplier) -> FourierMultiplier:
    return FourierMultiplier(jnp.conj(operator.weight))


def fourier_multiplier(weight: Inexact[Array, "out in *modes"]) -> FourierMultiplier:
    """The linear part of a Fourier layer (Li et al. 2021, equation 5): at each mode `k`
    the channels are multiplied by a matrix of its own, `y[:, k] = weight[:, :, k]
    x[:, k]`.

    The discrete Fourier transform is unitary up to a factor that its inverse takes
    back, so that the norm of the layer is the norm of this operator, the largest over
    the modes. It does not depend on the size of the grid.

    **Arguments:**

    - `weight`: an array of shape `[out, in, *modes]`, as a rule complex.

    **Returns:**

    A `lineax` operator from `[in, *modes]` to `[out, *modes]`, a
    [`spectrax.internal.FourierMultiplier`][], whose norm is found, followed and
    enclosed mode by mode.

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
    return FourierMultiplier(weight)
