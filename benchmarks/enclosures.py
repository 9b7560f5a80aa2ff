"""How wide enclosures are, whether they hold, and what they cost.

Three tables. Matrices: `spectrax.enclose_norm` beside `jnp.linalg.svd`, time in one run
in rotating order, width against a float64 SVD. Convolutions: the upper end beside the
published bounds of `convolution_bounds.py`, against a float64 Lanczos value. Hard
cases: violations and the largest widths over batches of drawn matrices by kind.

    python benchmarks/enclosures.py [--json FILE] [--float64] [--short]

`--float64` enables it, so that everything is enclosed in float64.
"""

import argparse
import functools as ft
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import convolution_bounds as peers
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import scipy.linalg

import spectrax


_Row = dict[str, Any]

_IN_A_ROW = 5


def matrix_rows(shapes: list[tuple[int, int]], rounds: int) -> Iterator[_Row]:
    for shape in shapes:
        yield _matrix_row("gaussian", shape, rounds)
        # Made from an SVD of its own, which takes minutes for the largest.
        if math.prod(shape) < 2**24:
            yield _matrix_row("trained-like", shape, rounds)


def _matrix_row(kind: str, shape: tuple[int, int], rounds: int) -> _Row:
    matrix = _matrix(kind, shape)
    truth = float(np.linalg.norm(np.asarray(matrix, np.float64), 2))
    enclose = jax.jit(spectrax.enclose_norm)
    svd = jax.jit(ft.partial(jnp.linalg.svd, compute_uv=False))
    box = enclose(matrix)
    # Several in a row: after an SVD the threads of LAPACK stay busy for a while.
    functions: dict[str, Callable[[], Any]] = {
        "enclose": lambda: [
            enclose(matrix).upper.block_until_ready() for _ in range(_IN_A_ROW)
        ],
        "svd": lambda: [svd(matrix).block_until_ready() for _ in range(_IN_A_ROW)],
    }
    times = peers.time_together(functions, rounds, lapack_threads=None)
    times = {name: time / _IN_A_ROW for name, time in times.items()}
    return {
        "matrix": f"{shape[0]}x{shape[1]} {kind}",
        "below": 1 - float(box.lower) / truth,
        "above": float(box.upper) / truth - 1,
        "ms": times["enclose"],
        "svd ms": times["svd"],
        "ratio": times["enclose"] / times["svd"],
    }


def _matrix(kind: str, shape: tuple[int, int]) -> Any:
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=shape)
    if kind == "trained-like":
        # Singular values that fall like those of trained layers, `i^(-1/2)`.
        u, values, vh = np.linalg.svd(matrix, full_matrices=False)
        matrix = (u / np.sqrt(1 + np.arange(len(values)))) @ vh
    return jnp.asarray(matrix, jnp.float32)


def convolution_rows(n: int, rounds: int, shapes: list[Any]) -> Iterator[_Row]:
    trained = peers.trained_kernels()
    for shape in shapes:
        gaussian = peers.gaussian_kernel(shape, 0)
        for kind, kernel in (("gaussian", gaussian), ("trained", trained[shape])):
            kernel = jnp.asarray(kernel, jnp.float32)
            truth = peers.lanczos_truth(kernel, n)
            bounds = _bounds(kernel, n)
            values = {name: float(bound()) for name, bound in bounds.items()}
            times = peers.time_together(bounds, rounds)
            for name in bounds:
                yield {
                    "kernel": f"{'x'.join(map(str, shape))} {kind}",
                    "bound": name,
                    "above": values[name] / truth - 1,
                    "ms": times[name],
                    "to spectrax": times[name] / times["spectrax upper"],
                }


def _bounds(kernel: Any, n: int) -> dict[str, Callable[[], Any]]:
    """Each bound of a kernel, with 'same' zero padding at one size."""
    out, channels, k, _ = kernel.shape
    conv = eqx.nn.Conv2d(
        channels, out, k, padding=k // 2, use_bias=False, key=jr.key(0)
    )

    def enclose(kernel: Any, *, size: Any = (n, n)) -> spectrax.Enclosure:
        layer = eqx.tree_at(lambda conv: conv.weight, conv, kernel)
        return spectrax.enclose_norm(spectrax.layer_operator(layer, input_size=size))

    def jitted(function: Callable[[Any], Any]) -> Callable[[], Any]:
        compiled = jax.jit(function)
        return lambda: compiled(kernel)

    # XLA leaves out what the result does not need: the upper end alone.
    bounds: dict[str, Callable[[], Any]] = {
        "spectrax upper": jitted(lambda k: enclose(k).upper),
        "spectrax both ends": jitted(lambda k: enclose(k).upper + 0 * enclose(k).lower),
        "spectrax every size": jitted(lambda k: enclose(k, size=None).upper),
        "Gram, Fourier, T=6": jitted(lambda k: peers.gram_fourier(k, n, 6)),
        "Gram, kernels, T=3": jitted(lambda k: peers.gram_spatial(k, 3)),
        "Singla & Feizi": jitted(peers.singla_feizi),
        "Araujo et al.": jitted(peers.araujo),
        "flattened (no bound)": jitted(peers.flattened),
    }
    if max(kernel.shape) > 128:
        del bounds["Gram, kernels, T=3"]
    return bounds


_KINDS = (
    "gaussian",
    "zero",
    "rank one",
    "repeated top",
    "hilbert",
    "toeplitz",
    "hadamard",
)


def hard_rows(count: int) -> Iterator[_Row]:
    """Violations and largest widths, for a few shapes, scales from 1e-38 to 1e+37."""
    enclose = jax.jit(jax.vmap(spectrax.enclose_norm))
    for kind in _KINDS:
        cases, violations, below, above = 0, 0, 0.0, 0.0
        for shape in ((1, 1), (1, 9), (5, 3), (16, 16), (40, 70), (64, 64)):
            for exponent in (-38, -20, 0, 20, 37):
                batch = np.stack([_hard(kind, shape, seed) for seed in range(count)])
                batch = (batch * 10.0**exponent).astype(np.float32)
                box = enclose(jnp.asarray(batch))
                truths = np.linalg.norm(batch.astype(np.float64), 2, axis=(1, 2))
                lower, upper = np.asarray(box.lower), np.asarray(box.upper)
                # Norms above the largest number have no finite upper end.
                fits = truths < np.finfo(np.float32).max
                slack = 1e-14 * truths  # of the float64 SVD itself
                violations += int(np.sum(lower > truths + slack))
                violations += int(np.sum(upper < truths - slack))
                cases += count
                if exponent > -38 and kind != "zero":
                    below = max(
                        below, float(np.max((1 - lower / truths)[fits], initial=0))
                    )
                    above = max(
                        above, float(np.max((upper / truths - 1)[fits], initial=0))
                    )
        yield {
            "kind": kind,
            "cases": cases,
            "violations": violations,
            "below": below,
            "above": above,
        }


def _hard(kind: str, shape: tuple[int, int], seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    m, n = shape
    if kind == "zero":
        return np.zeros(shape)
    if kind == "rank one":
        return np.outer(rng.normal(size=m), rng.normal(size=n))
    if kind == "repeated top":
        q, _ = np.linalg.qr(rng.normal(size=(max(shape),) * 2))
        return q[:m, :n]
    if kind == "hilbert":
        return 1 / (1 + seed + np.add.outer(np.arange(m), np.arange(n)))
    if kind == "toeplitz":
        return scipy.linalg.toeplitz(rng.normal(size=m), rng.normal(size=n))
    if kind == "hadamard":
        signs = scipy.linalg.hadamard(128)
        return np.asarray(signs, float)[rng.permutation(128)[:m]][:, :n]
    return rng.normal(size=shape)


def print_table(rows: Iterator[_Row]) -> list[_Row]:
    found: list[_Row] = []
    for row in rows:
        if not found:
            print(" | ".join(row), flush=True)
        print(" | ".join(_cell(value) for value in row.values()), flush=True)
        found.append(row)
    print()
    return found


def _cell(value: Any) -> str:
    return f"{value:.2g}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json")
    parser.add_argument("--float64", action="store_true")
    parser.add_argument("--short", action="store_true", help="small sizes only")
    arguments = parser.parse_args()
    jax.config.update("jax_enable_x64", arguments.float64)
    shapes = [(512, 512), (1024, 1024), (4096, 1024), (4096, 4096)]
    kernels = [(64, 64, 3, 3), (128, 64, 3, 3), (256, 256, 3, 3), (64, 3, 7, 7)]
    if arguments.short:
        shapes, kernels = shapes[:1], kernels[3:]
    tables = {"hard": print_table(hard_rows(4 if arguments.short else 500))}
    tables["matrices"] = print_table(matrix_rows(shapes, 5))
    if not arguments.float64:
        tables["convolutions"] = print_table(convolution_rows(32, 5, kernels))
        tables["small inputs"] = print_table(convolution_rows(8, 5, kernels[:1]))
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(tables, file, indent=1)


if __name__ == "__main__":
    main()
