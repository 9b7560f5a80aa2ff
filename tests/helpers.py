"""Independent truth, and the matrices on which norms go wrong."""

from collections.abc import Sequence
from typing import Any

import hypothesis.strategies as st
import numpy as np


def true_norm(matrix: Any) -> float:
    """The spectral norm by a dense SVD in float64 or complex128."""
    matrix = np.asarray(matrix)
    wide = np.complex128 if np.iscomplexobj(matrix) else np.float64
    return float(np.linalg.norm(matrix.astype(wide), 2))


# Kinds of matrices, all of norm about 1 before they are scaled.
KINDS = (
    "gaussian",
    "zero",
    "rank one",
    "repeated top",
    "clustered top",
    "one entry",
    "hilbert",
    "ones",
)


def make_matrix(
    kind: str, shape: tuple[int, int], seed: int, *, imaginary: bool = False
) -> np.ndarray:
    """A matrix of the given kind, of dtype float64 or complex128."""
    rng = np.random.default_rng(seed)

    def gaussian(*size: int) -> np.ndarray:
        real = rng.normal(size=size)
        return real + 1j * rng.normal(size=size) if imaginary else real

    m, n = shape
    k = min(shape)
    if kind == "gaussian":
        return gaussian(m, n) / np.sqrt(m + n)
    if kind == "zero":
        return 0 * gaussian(m, n)
    if kind == "rank one":
        left, right = gaussian(m), gaussian(n)
        return np.outer(left, right) / np.linalg.norm(left) / np.linalg.norm(right)
    if kind in ("repeated top", "clustered top"):
        left, _ = np.linalg.qr(gaussian(m, k))
        right, _ = np.linalg.qr(gaussian(n, k))
        values = np.linspace(1, 0.1, k)
        gap = 0.0 if kind == "repeated top" else 1e-4
        values[: (k + 1) // 2] = 1 - gap * np.arange((k + 1) // 2)
        return (left * values) @ right.conj().T
    if kind == "one entry":
        matrix = 0 * gaussian(m, n)
        matrix[rng.integers(m), rng.integers(n)] = 1
        return matrix
    if kind == "hilbert":
        i, j = np.indices(shape)
        return (1 / (1 + i + j)).astype(gaussian(1).dtype)
    assert kind == "ones"
    return (np.ones(shape) / np.sqrt(m * n)).astype(gaussian(1).dtype)


def matrices(
    shapes: Sequence[tuple[int, int]],
    *,
    kinds: Sequence[str] = KINDS,
    exponents: Sequence[int] = (0,),
    imaginary: bool = False,
) -> st.SearchStrategy[np.ndarray]:
    """Draws one of the kinds, in one of the shapes, times ten to one of the powers."""
    return st.builds(
        lambda kind, shape, seed, exponent: (
            make_matrix(kind, shape, seed, imaginary=imaginary) * 10.0**exponent
        ),
        st.sampled_from(kinds),
        st.sampled_from(shapes),
        st.integers(0, 2**32 - 1),
        st.sampled_from(exponents),
    )
