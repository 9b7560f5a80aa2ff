import lineax as lx
from jaxtyping import Array, Inexact


def flattened_kernel(weight: Inexact[Array, "..."]) -> lx.MatrixLinearOperator:
    """The kernel of a convolution reshaped to a matrix of shape `[out, -1]`.

    This is the view of Miyato et al. (2018, section 2.1) and of most libraries. It is
    here for parity with them. **Its norm is not the norm of the convolution**: it is
    the norm of the map from one patch to one output pixel, and a convolution applies
    that map to overlapping patches. For stride 1 the true norm can be larger by a
    factor of up to `sqrt(number of taps)` (an all-ones 3x3 kernel: 3 against 9). Use it
    to reproduce published results; use `spectrax.layer_operator` for a bound that
    holds.

    **Arguments:**

    - `weight`: an array of shape `[out, ...]` with at least two axes, as in
        `equinox.nn.Conv2d.weight`.

    **Returns:**

    A `lineax.MatrixLinearOperator` of shape `[out, size of the rest]`, linear in
    `weight`.

    **Raises:** `ValueError` if `weight` has fewer than two axes.
    """
    if weight.ndim < 2:
        raise ValueError(
            "expected a kernel with at least two axes, [out, ...], got shape "
            f"{weight.shape}."
        )
    return lx.MatrixLinearOperator(weight.reshape(weight.shape[0], -1))
