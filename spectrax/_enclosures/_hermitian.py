"""`F^H F` at any frequency, in NumPy and float64, and a proof about its eigenvalues.

As in `_symbols.py`, with `C_s = sum_t K_t^H K_(t+s)`,

    F(w)^H F(w) = sum_s cos(w.s) (C_s + C_s^H) + i sin(w.s) (C_s - C_s^H)

over `s = 0`, counted half, and one of each pair of opposite offsets.

That no eigenvalue of a matrix `G` exceeds `theta` follows if the Cholesky factorisation
of `M = theta I - G` runs to its end in floating point. Its factor satisfies `R^H R = M
+ E` with `|E| <= gamma |R|^H |R|` entry by entry, whatever the order of the sums
(Higham 2002, theorem 10.3), and the diagonal of that equation bounds `|R|_F^2` by
`trace(M) / (1 - gamma)`. So `M >= -gamma / (1 - gamma) trace(M)` (Rump 2006). For real
matrices of size `n`, `gamma = (n + 1) u / (1 - (n + 1) u)`; eight times as much leaves
room for complex arithmetic, and for divisions as products with a reciprocal.
"""

import dataclasses
import itertools as it
import math

import numpy as np
import scipy.linalg
from jaxtyping import Bool, Complex, Float, Inexact, Int


# Unlike that of `numpy.linalg`, it works in place and says if it fails.
(_CHOLESKY,) = scipy.linalg.get_lapack_funcs(["potrf"], dtype=np.complex128)
# Entries of the matrices that are worked on at once: 32 MiB, and as much beside it.
_CHUNK_ENTRIES = 2**21
_UNIT = 2.0**-53
# Far above what all underflows of one matrix can add up to, as entries are about 1.
_UNDERFLOW = 1e-250


@dataclasses.dataclass(frozen=True)
class SquaredSymbols:
    """`F^H F` for `K / scale`, in the smaller of the two channel dimensions.

    - `even`, `odd`: `C_s + C_s^H` and `C_s - C_s^H`.
    - `offsets`: `s`, on the axes with more than one tap.
    - `taps`: how many taps those axes have.
    - `error`: for each group, a bound on the Frobenius norm of what a computed matrix
        is off by, if only one of its triangles is looked at.
    - `largest`: the largest entry of each group's kernel, never more than its norm.
    """

    even: Inexact[np.ndarray, "groups terms n n"]
    odd: Inexact[np.ndarray, "groups terms n n"]
    offsets: Int[np.ndarray, "terms dim"]
    taps: tuple[int, ...]
    error: Float[np.ndarray, " groups"]
    largest: Float[np.ndarray, " groups"]
    scale: float

    @property
    def size(self) -> int:
        """The number of rows of each matrix."""
        return self.even.shape[-1]

    @property
    def symmetric(self) -> bool:
        """Whether opposite frequencies have the same singular values."""
        return not np.iscomplexobj(self.even)

    @property
    def chunk(self) -> int:
        """How many matrices are worked on at once."""
        return max(1, _CHUNK_ENTRIES // max(self.size**2, 4 * len(self.offsets)))

    def at(
        self,
        group: int,
        numerator: Int[np.ndarray, "points dim"],
        denominator: Int[np.ndarray, "points dim"],
    ) -> Complex[np.ndarray, "points n n"]:
        """The matrices at the frequencies `2 pi numerator / denominator`."""
        angles = np.zeros((len(numerator), len(self.offsets)))
        for axis in range(self.offsets.shape[1]):
            period = denominator[:, axis, None]
            # Whole parts of a turn, reduced before they are rounded.
            turns = np.outer(numerator[:, axis], self.offsets[:, axis]) % period
            turns = np.where(2 * turns >= period, turns - period, turns)
            angles += 2 * math.pi * (turns / period)
        return self.combined(group, np.cos(angles), np.sin(angles))

    def combined(
        self,
        group: int,
        cosines: Float[np.ndarray, "points terms"],
        sines: Float[np.ndarray, "points terms"],
    ) -> Complex[np.ndarray, "points n n"]:
        """The sum over the offsets, for each row of a table."""
        even, odd = (x[group].reshape(len(x[group]), -1) for x in (self.even, self.odd))
        if self.symmetric:
            matrices = np.empty((len(cosines), even.shape[1]), complex)
            matrices.real = cosines @ even
            matrices.imag = sines @ odd
        else:
            matrices = cosines.astype(complex) @ even + 1j * sines @ odd
        return matrices.reshape(-1, self.size, self.size)

    def quadratic_forms(
        self, group: int, vector: Complex[np.ndarray, " n"]
    ) -> tuple[Float[np.ndarray, " terms"], Float[np.ndarray, " terms"]]:
        """What `cos(w.s)` and `sin(w.s)` are multiplied with in `v^H F^H F v`."""
        pairs = np.outer(np.conj(vector), vector).reshape(-1)
        even, odd = (x[group].reshape(len(x[group]), -1) for x in (self.even, self.odd))
        if self.symmetric:
            return even @ np.real(pairs), -(odd @ np.imag(pairs))
        return np.real(even @ pairs), -np.imag(odd @ pairs)

    def below(
        self,
        group: Int[np.ndarray, " points"],
        numerator: Int[np.ndarray, "points dim"],
        denominator: Int[np.ndarray, "points dim"],
        limit: Float[np.ndarray, " points"],
    ) -> Bool[np.ndarray, " points"]:
        """Whether `sigma(F(w)) <= limit` is proven, for each of many frequencies."""
        proven = np.zeros(len(group), bool)
        rounding = self.size * _gamma(8 * (self.size + 4)) + 8 * _UNIT
        theta = limit**2 * (1 - 4 * _UNIT) * (1 - 2 * rounding) - self.error[group]
        for one in np.unique(group):
            mine = np.flatnonzero((group == one) & (theta > 0))
            for start in range(0, len(mine), self.chunk):
                some = mine[start : start + self.chunk]
                matrices = self.at(int(one), numerator[some], denominator[some])
                proven[some] = _below(matrices, theta[some])
        return proven

    def rayleigh_lower(
        self,
        group: int,
        numerator: Int[np.ndarray, " dim"],
        denominator: Int[np.ndarray, " dim"],
        vector: Complex[np.ndarray, " n"],
    ) -> float:
        """At most the norm: `|F(w) v| / |v|`, rounded down."""
        matrix = self.at(group, numerator[None], denominator[None])[0]
        square = float(np.vdot(vector, vector).real)
        value = float(np.vdot(vector, matrix @ vector).real)
        rounding = _gamma(8 * (self.size + 4)) * float(np.linalg.norm(matrix))
        bound = value / square - 2 * rounding - float(self.error[group])
        known = float(self.largest[group]) * (1 - 4 * _UNIT)
        # Comparisons with NaN are false: then the largest entry is what is known.
        root = math.sqrt(bound) * (1 - 8 * _UNIT) if bound > 0 else 0.0
        return root if root > known else known


def squared_symbols(
    kernel: Inexact[np.ndarray, "groups out in *taps"],
) -> SquaredSymbols:
    """For a kernel of float64 or complex128, finite and not zero."""
    if kernel.shape[1] < kernel.shape[2]:
        kernel = np.swapaxes(kernel, 1, 2)
    taps = tuple(k for k in kernel.shape[3:] if k > 1)
    kernel = kernel.reshape(*kernel.shape[:3], *taps)
    parts = np.stack([np.real(kernel), np.imag(kernel)])
    largest = np.max(np.abs(parts), axis=(0, *range(2, parts.ndim)))
    exponent = int(np.frexp(np.max(largest))[1]) - 1
    scaled = np.ldexp(parts[0], -exponent)
    if np.iscomplexobj(kernel):
        scaled = scaled + 1j * np.ldexp(parts[1], -exponent)
    # The taps in front, so that a block of them is one tall matrix.
    scaled = np.moveaxis(scaled, (1, 2), (-2, -1))
    even, odd, error = _correlate(scaled, taps)
    offsets = np.array(_half(taps), int).reshape(even.shape[1], len(taps))
    terms = _norms(even) + _norms(odd)
    # Of the table and of the products with it.
    table = _gamma(8 * len(offsets) + 24 * len(taps) + 32)
    error = 4 * (error + table * np.sum(terms, axis=1)) + _UNDERFLOW
    largest = np.ldexp(largest, -exponent)
    return SquaredSymbols(even, odd, offsets, taps, error, largest, 2.0**exponent)


def _below(
    matrices: Complex[np.ndarray, "points n n"], theta: Float[np.ndarray, " points"]
) -> Bool[np.ndarray, " points"]:
    np.negative(matrices, out=matrices)
    diagonals = np.einsum("pii->pi", matrices)
    diagonals += theta[:, None]
    proven = np.zeros(len(matrices), bool)
    for i, matrix in enumerate(matrices):
        # Of the transposed matrix, which has the same eigenvalues, and in its place.
        _, info = _CHOLESKY(matrix.T, lower=True, clean=False, overwrite_a=True)
        # A NaN, which not every implementation looks for, would be on the diagonal.
        proven[i] = info == 0 and np.all(diagonals[i].real > 0)
    return proven


def _correlate(
    kernel: Inexact[np.ndarray, "groups *taps out n"], taps: tuple[int, ...]
) -> tuple[
    Inexact[np.ndarray, "groups terms n n"],
    Inexact[np.ndarray, "groups terms n n"],
    Float[np.ndarray, " groups"],
]:
    """`C_s + C_s^H` and `C_s - C_s^H`, and the sum of bounds on their errors."""
    groups, n = kernel.shape[0], kernel.shape[-1]
    offsets = _half(taps)
    shape = groups, len(offsets), n, n
    even, odd = np.empty(shape, kernel.dtype), np.empty(shape, kernel.dtype)
    error = np.zeros(groups)
    for i, offset in enumerate(offsets):
        pairs = list(zip(offset, taps, strict=True))
        first = tuple(slice(max(0, -s), k - max(0, s)) for s, k in pairs)
        second = tuple(slice(max(0, s), k - max(0, -s)) for s, k in pairs)
        a = kernel[(slice(None), *first)].reshape(groups, -1, n)
        b = kernel[(slice(None), *second)].reshape(groups, -1, n)
        product = np.matmul(np.conj(np.swapaxes(a, 1, 2)), b)
        if not any(offset):
            # Counted once, and not with its opposite.
            product = product / 2
        adjoint = np.conj(np.swapaxes(product, 1, 2))
        np.add(product, adjoint, out=even[:, i])
        np.subtract(product, adjoint, out=odd[:, i])
        error += 2 * _gamma(4 * a.shape[1] + 8) * _norms(a) * _norms(b)
    return even, odd, error


def _norms(matrices: Inexact[np.ndarray, "*stack m n"]) -> Float[np.ndarray, "*stack"]:
    """Upper bounds on Frobenius norms, for entries that have been scaled."""
    total = np.sum(np.square(np.abs(matrices)), axis=(-2, -1))
    count = matrices.shape[-1] * matrices.shape[-2]
    return np.sqrt(total) * (1 + _gamma(count + 8)) + math.sqrt(count) * 1e-150


def _half(taps: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Zero, and one of each pair of opposite offsets between two taps."""
    offsets = it.product(*(range(1 - k, k) for k in taps))
    return [offset for offset in offsets if offset >= (0,) * len(taps)]


def _gamma(count: int) -> float:
    """The relative error of a sum of so many products, a little rounded up."""
    return count * _UNIT / (1 - count * _UNIT) * (1 + 1e-12)
