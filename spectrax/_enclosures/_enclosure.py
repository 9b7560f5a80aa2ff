"""What users call: both ends of a norm, with the proof behind each."""

import functools as ft

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from .._norms._rows import stop_gradient
from .._operators import as_operator, Operator, OperatorLike
from ._enclose import default_width, Effort, enclose


class Enclosure(eqx.Module):
    """Both ends of a norm: `lower <= norm <= upper`, floating point included.

    - `lower`, `upper`: real scalars. `upper` is infinite where nothing is proven, and
        both are NaN if the operator has a NaN or an infinity.
    - `result`: whether the width that was asked for has been reached: a
        `lineax.RESULTS`, `successful`, `max_steps_reached` or `nonfinite_input`. The
        ends hold in any case.
    """

    lower: Float[Array, "*batch"]
    upper: Float[Array, "*batch"]
    result: lx.RESULTS


def enclose_norm(
    operator: OperatorLike,
    *,
    key: PRNGKeyArray | None = None,
    rtol: float | None = None,
    max_steps: int = 16,
    materialise: bool = False,
) -> Enclosure:
    """A rigorous enclosure of the spectral norm of an operator.

    **Kind:** a lower and an upper bound, proven for the numbers in memory: the rounding
    of every operation that leads to them is bounded and added. The page on
    [enclosures](../guide/enclosures.md) has the derivations. The proof assumes IEEE
    arithmetic in products of matrices, whatever the order of their sums; precision is
    set such that accelerators do not round to fewer bits.

    How each operator is bounded from above:

    - Matrices: a Cholesky factor of `theta I - A^T A`, with the residual of that
        factor, for a `theta` just above an eigenvalue found by Lanczos' method (Rump
        2011). In float32 products are split so that their leading parts are exact.
    - Convolutions of one input size: the largest `sigma(F(w))` over a grid of
        frequencies that is fine enough for the padding, by Gram iteration (Delattre et
        al. 2023). Small ones are written out as matrices as well.
    - Convolutions of all sizes: branch and bound over cells of frequencies, in NumPy
        and float64, with a Cholesky factor of `theta I - F^H F` at the centre of each
        (Rump 2006). Under `jit` and other transformations: Gram iteration on a grid
        between whose points the symbol can rise only so far.
    - [`spectrax.fourier_multiplier`][]: mode by mode. Diagonals: their largest entry.
    - Sums, products and multiples of lineax operators: by the triangle inequality and
        submultiplicativity, and written out as matrices if they are small.
    - Any other operator: `upper` is infinite, unless it is materialised. `lower` is how
        much longer the operator makes some vector, as it is evaluated.

    **Derivatives:** none. Differentiate [`spectrax.spectral_norm`][].

    **Arguments:**

    - `operator`: a matrix of shape `[out, in]`, any `lineax` operator, or what
        `spectrax.layer_operator` returns. Real or complex; float16 and bfloat16 are
        exact inputs. Under `jax.vmap`, a batch of them.
    - `key`: randomness of the starting vectors. Optional; a fixed key if not given. The
        ends hold for every key.
    - `rtol`: the width asked for, `(upper - lower) / upper`. By default 1e-3 for
        matrices (2e-5 if float64 is enabled) and 1e-2 for convolutions.
    - `max_steps`: the most attempts at a proof, each after further Lanczos steps.
    - `materialise`: whether to write out an operator of unknown structure as a matrix,
        from its products with all unit vectors, and enclose that.

    **Returns:**

    A [`spectrax.Enclosure`][], of dtype float64 if that is enabled and float32
    otherwise.

    **Cost:** for a matrix about four products `A^T A`; the guide has the times beside
    an SVD. For a convolution of one input size some 14 products of matrices with as
    many rows as channels for each frequency of the grid, half as many frequencies as
    pixels. For all sizes one Cholesky factor for each cell: some 50 to 500 cells for
    kernels of 3x3, the more, the closer `sigma(F(w))` is to its supremum over all
    frequencies, and 2^14 at most, then with a wider enclosure (2^18 for small
    matrices). Nothing is compiled, and products are on one thread.
    Under `jit` the grid has as many frequencies whatever the kernel, and
    each shape is compiled.

    **Raises:** `TypeError` or `ValueError` if `operator` is not a matrix or an
    operator, if `rtol` or `max_steps` is not positive.

    !!! Example

        ```python
        import equinox as eqx
        import jax
        import spectrax

        matrix = jax.random.normal(jax.random.key(0), (64, 32))
        box = spectrax.enclose_norm(matrix)
        print(box.lower, box.upper)

        conv = eqx.nn.Conv2d(3, 8, 3, padding=1, key=jax.random.key(1))
        print(spectrax.enclose_norm(spectrax.layer_operator(conv)))
        ```
    """
    operator = as_operator(operator)
    if rtol is not None and not rtol > 0:
        raise ValueError(f"expected `rtol` to be positive, got {rtol}.")
    if max_steps < 1:
        raise ValueError(f"expected `max_steps` to be positive, got {max_steps}.")
    width = default_width(operator) if rtol is None else rtol
    found = enclose_in_memory(operator, width)
    if found is not None:
        return found
    key = jr.key(0) if key is None else key
    return _enclosure(stop_gradient(operator), key, width, max_steps, materialise)


def in_memory(array: Array | np.ndarray) -> bool:
    """Whether all entries are there to be looked at: not while JAX traces a function,
    and not if some are on the devices of other processes.
    """
    if isinstance(array, np.ndarray):
        return True
    return not isinstance(array, jax.core.Tracer) and array.is_fully_addressable


@ft.singledispatch
def enclose_in_memory(operator: Operator, width: float) -> Enclosure | None:
    """What [`spectrax.enclose_norm`][] returns, if the kind of operator has a proof
    without compilation.

    **Kind:** a lower and an upper bound, rounding included.

    **Arguments:**

    - `operator`: of any kind. By default there is none.
    - `width`: the width asked for, `(upper - lower) / upper`.

    **Returns:** a [`spectrax.Enclosure`][], or `None`, as also where JAX traces the
    operator's arrays.

    **Raises:** nothing; the operator has been looked at.
    """
    del operator, width
    return None


# Compiled even where the caller is not, as these are many small operations.
@eqx.filter_jit
def _enclosure(
    operator: Operator,
    key: PRNGKeyArray,
    width: float,
    max_steps: int,
    materialise: bool,  # noqa: FBT001
) -> Enclosure:
    ends = enclose(operator, Effort(key, width, max_steps, materialise))
    nonfinite = jnp.isnan(ends.upper)
    lower = jnp.where(nonfinite, jnp.nan, ends.lower)
    tiny = jnp.finfo(lower.dtype).tiny
    narrow = ends.upper - lower <= width * ends.upper + tiny
    reached = narrow & jnp.isfinite(ends.upper)
    result = lx.RESULTS.where(
        reached, lx.RESULTS.successful, lx.RESULTS.max_steps_reached
    )
    result = lx.RESULTS.where(nonfinite, lx.RESULTS.nonfinite_input, result)
    return Enclosure(lower, ends.upper, result)
