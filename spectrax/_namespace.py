"""What NumPy and JAX write differently, for code that runs on the arrays of either.

Outside of `jit` such code runs on NumPy's, for which nothing has to be compiled.
"""

import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.core
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import threadpoolctl
from jaxtyping import Bool, Complex, Float, Inexact, Int, PyTree

from ._custom_types import AnyArray


_Tree = TypeVar("_Tree")
_Carry = TypeVar("_Carry")


def namespace(array: AnyArray) -> Any:
    """The module whose functions take this array."""
    return np if isinstance(array, np.ndarray | np.generic) else jnp


def is_concrete(tree: PyTree) -> bool:
    """Whether every array can be handed to NumPy as it is: none is traced, or spread
    over several devices.
    """

    def here(x: Any) -> bool:
        if isinstance(x, jax.core.Tracer | jax.ShapeDtypeStruct):
            return False
        return not isinstance(x, jax.Array) or len(x.devices()) == 1

    return all(map(here, jtu.tree_leaves(tree)))


def to_numpy(tree: _Tree) -> _Tree:
    """NumPy's arrays in the place of JAX's."""
    return jtu.tree_map(lambda x: np.asarray(x) if eqx.is_array(x) else x, tree)


def to_jax(tree: _Tree) -> _Tree:
    """The way back."""
    arrays = eqx.is_array_like
    return jtu.tree_map(lambda x: jnp.asarray(x) if arrays(x) else x, tree)


def matmul(
    a: Inexact[AnyArray, "*#batch a b"], b: Inexact[AnyArray, "*#batch b c"]
) -> Inexact[AnyArray, "*_batch a c"]:
    """A product that no accelerator rounds to fewer bits than its dtype has."""
    if isinstance(a, np.ndarray | np.generic):
        return np.matmul(a, b)
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def one_thread() -> contextlib.AbstractContextManager[object]:
    """NumPy's products on one thread, and no warnings of what is not finite.

    On a machine with other work to do, threads that wait for each other make small
    products a thousand times slower.
    """
    stack = contextlib.ExitStack()
    stack.enter_context(threadpoolctl.threadpool_limits(1, user_api="blas"))
    stack.enter_context(np.errstate(all="ignore"))
    return stack


def complex_of(
    real: Float[AnyArray, "*shape"], imaginary: Float[AnyArray, "*shape"]
) -> Complex[AnyArray, "*shape"]:
    """A complex number from its parts."""
    if isinstance(real, np.ndarray | np.generic):
        return real + 1j * imaginary
    return lax.complex(real, imaginary)


def places_of_largest(
    values: Inexact[AnyArray, "rows n"], count: int
) -> Int[AnyArray, "rows count"]:
    """Where the largest values of each row are, in decreasing order."""
    if isinstance(values, np.ndarray):
        return np.argsort(-values, axis=1, kind="stable")[:, :count].astype(np.int32)
    return lax.top_k(values, count)[1]


def take(
    array: Inexact[AnyArray, "rows n *rest"], places: Int[AnyArray, "rows count"]
) -> Inexact[AnyArray, "rows count *rest"]:
    """Of each row the entries at its places."""
    rows = namespace(array).arange(array.shape[0], dtype=places.dtype)[:, None]
    return array[rows, places]


def while_loop(
    unfinished: Callable[[_Carry], Bool[AnyArray, ""]],
    body: Callable[[_Carry], _Carry],
    start: _Carry,
) -> _Carry:
    """`body` again and again, as long as it is `unfinished`."""
    if any(isinstance(leaf, jax.Array) for leaf in jtu.tree_leaves(start)):
        return lax.while_loop(unfinished, body, start)
    while unfinished(start):
        start = body(start)
    return start
