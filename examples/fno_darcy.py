"""A Fourier neural operator for Darcy flow, whose Lipschitz constant is bounded.

Solves `-div(a grad u) = 1` with `u = 0` on the boundary of the unit square for random
piecewise constant `a`, by finite differences. Trains operators from `a` to `u`: a
plain FNO, some whose layers have norm 1, and one whose layers learn their norms.
Prints test errors at two resolutions and with noise on the input, the proven bound on
each Lipschitz constant beside the largest stretching that a search finds, and what high
learning rates do. Ends with exit code 1 if a bound was broken.

    python examples/fno_darcy.py [--out DIR] [--seed N] [--steps N] [--smoke]
"""

import argparse
import functools as ft
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import scipy.sparse as sp
import scipy.sparse.linalg as spl
from jaxtyping import Array, Float, PyTree
from matplotlib.figure import Figure
from tqdm import tqdm

import spectrax


# Points along each side, those on the boundary included. The training grid is every
# second point of the fine one.
FINE = 65
NUM_TRAIN, NUM_TEST = 512, 128
BATCH_SIZE = 16
PEAK_RATE = 2e-3
OPTIMIZER = optax.scale_by_adam()

# The two values of the coefficient are -1 and 1 to the networks, and the solutions have
# standard deviation 1. All Lipschitz constants are between these scaled functions.
LOW, HIGH = 3.0, 12.0
# The solution operator stretches some differences, and no layer passes on all that
# comes in, so the output of a network with layers of norm 1 is multiplied by a number.
# Its proven bound counts it.
OUTPUT_SCALES = (10.0, 3.0)

NOISE = (0.0, 0.2, 0.5, 1.0, 2.0)
RATES = (1e-2, 1e-1, 1.0)
# Rounding of the search's float32 numbers, relative.
ROUNDING = 1e-4

Grids = Float[Array, "batch 1 n n"] | Float[np.ndarray, "batch 1 n n"]
Network = Callable[[Float[Array, "1 n n"]], Float[Array, "1 n n"]]


# --- Data --------------------------------------------------------------------------


class Data(NamedTuple):
    """Coefficients and solutions on the fine grid, `[samples, 1, n, n]`, scaled."""

    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]


def coefficient(rng: np.random.Generator, size: int, modes: int = 24) -> np.ndarray:
    """12 where a Gaussian field with covariance `(9 - Laplacian)^-2` is positive, 3
    elsewhere (Li et al. 2021, appendix A.3.2)."""
    k = np.arange(modes)
    waves = np.cos(np.pi * np.outer(k, np.linspace(0, 1, size)))
    waves[1:] *= math.sqrt(2)
    deviation = 1 / (np.pi**2 * (k[:, None] ** 2 + k**2) + 9)
    field = waves.T @ (deviation * rng.normal(size=(modes, modes))) @ waves
    return np.where(field > 0, HIGH, LOW)


@ft.cache
def differences(size: int) -> tuple[sp.csr_array, sp.csr_array]:
    """From the values at the nodes to those across each edge of the grid."""
    one = sp.diags_array([-1.0, 1.0], offsets=[0, 1], shape=(size - 1, size))  # pyright: ignore
    identity = sp.eye_array(size)
    scale = size - 1
    return sp.csr_array(scale * sp.kron(one, identity)), sp.csr_array(
        scale * sp.kron(identity, one)
    )


def solve(a: np.ndarray) -> np.ndarray:
    """The solution at the nodes, by the five-point scheme of second order, with the
    harmonic mean of the coefficient on each edge."""

    def conductivity(p: np.ndarray, q: np.ndarray) -> sp.dia_array:
        return sp.diags_array((2 * p * q / (p + q)).ravel())

    along_x, along_y = differences(len(a))
    matrix = along_x.T @ conductivity(a[:-1], a[1:]) @ along_x
    matrix += along_y.T @ conductivity(a[:, :-1], a[:, 1:]) @ along_y
    inside = np.zeros(a.shape, bool)
    inside[1:-1, 1:-1] = True
    keep = np.flatnonzero(inside)
    u = np.zeros(a.shape)
    system = sp.csc_array(matrix)[:, keep][keep]
    u[inside] = np.asarray(spl.spsolve(system, np.ones(len(keep))))
    return u


def load_data(path: Path, count: int, num_test: int, size: int, seed: int) -> Data:
    """From the file if it is there; made and written otherwise."""
    if not path.exists():
        rng = np.random.default_rng(seed)
        fields = [coefficient(rng, size) for _ in range(count)]
        bar = tqdm(fields, desc="solving", unit="system", disable=None)
        solutions = [solve(a) for a in bar]
        np.savez_compressed(
            path,
            a=np.array(fields, np.float32),
            u=np.array(solutions, np.float32),
        )
    with np.load(path) as arrays:
        a, u = arrays["a"][:, None], arrays["u"][:, None]
    x = (2 * a - (LOW + HIGH)) / (HIGH - LOW)
    y = u / u[num_test:].std()
    return Data((x[num_test:], y[num_test:]), (x[:num_test], y[:num_test]))


def coarse(values: np.ndarray) -> np.ndarray:
    return values[..., ::2, ::2]


# --- Training ----------------------------------------------------------------------


def relative_errors(
    network: Network, x: Grids, y: Grids, batch_size: int = 16
) -> Float[Array, " batch"]:
    """`|f(x) - y| / |y|` of each sample, in the L2 norm over the grid."""
    difference = jax.lax.map(network, x, batch_size=batch_size) - y

    def length(values: Grids) -> Float[Array, " batch"]:
        return jnp.linalg.norm(values.reshape(len(values), -1), axis=1)

    return length(difference) / length(y)


@eqx.filter_jit
def test_error(network: Network, x: Grids, y: Grids) -> Float[Array, ""]:
    return jnp.mean(relative_errors(network, x, y))


@eqx.filter_jit
def train_step(
    model: PyTree,
    state: eqx.nn.State | None,
    opt_state: optax.OptState,
    rate: Float[Array, ""],
    x: Grids,
    y: Grids,
) -> tuple[PyTree, Any, optax.OptState, Float[Array, ""]]:
    """One update. Two lines are new, and do nothing to a plain model."""
    state = spectrax.advance(model, state)

    @eqx.filter_value_and_grad
    def loss(model: PyTree) -> Float[Array, ""]:
        network = spectrax.unwrap(model, state, lazy=True)
        return jnp.mean(relative_errors(network, x, y, len(x)))

    value, gradient = loss(model)
    updates, opt_state = OPTIMIZER.update(gradient, opt_state)
    updates = jax.tree.map(lambda update: -rate * update, updates)
    return eqx.apply_updates(model, updates), state, opt_state, value


def make_models(seed: int, *, smoke: bool) -> dict[str, Callable[[], PyTree]]:
    """From the same random numbers, all of the same architecture."""
    width, modes, depth = (4, 3, 1) if smoke else (16, 8, 4)
    make = ft.partial(spectrax.nn.FNO, 2, 1, 1, width, modes, depth, key=jr.key(seed))
    scales = OUTPUT_SCALES[:1] if smoke else OUTPUT_SCALES
    largest = OUTPUT_SCALES[0]
    learned = spectrax.LearnableBound(1.0)
    return {
        "plain": ft.partial(make, constraint=None),
        **{f"norm 1, times {s:g}": ft.partial(make, output_scale=s) for s in scales},
        f"learned, times {largest:g}": ft.partial(
            make, output_scale=largest, constraint=learned
        ),
    }


class Fit(NamedTuple):
    """A trained network, constrained but otherwise ordinary."""

    network: Any
    losses: list[float]
    seconds: float  # per step, the median


def fit(
    make: Callable[[], PyTree],
    data: Data,
    *,
    rate: Callable[[float], float],
    num_steps: int,
    seed: int,
    title: str,
) -> Fit:
    """`rate` is the learning rate as a function of the part of the steps taken."""
    model, state = eqx.nn.make_with_state(make)()
    opt_state = OPTIMIZER.init(eqx.filter(model, eqx.is_inexact_array))
    x, y = map(coarse, data.train)
    rng = np.random.default_rng(seed)
    losses, times = [], []
    for i in tqdm(range(num_steps), desc=title, unit="step", disable=None):
        batch = rng.choice(len(x), BATCH_SIZE, replace=False)
        step_rate = jnp.asarray(rate(i / num_steps), jnp.float32)
        start = time.perf_counter()
        model, state, opt_state, value = train_step(
            model, state, opt_state, step_rate, jnp.asarray(x[batch]), y[batch]
        )
        losses.append(float(value))
        times.append(time.perf_counter() - start)
    state = spectrax.advance(model, state)  # for the last update of the weights
    model = spectrax.unwrap(model, state)
    return Fit(model, losses, float(np.median(times)))


def decaying(part: float) -> float:
    """A short rise, then half a cosine."""
    return PEAK_RATE * min(1.0, 20 * part + 0.05) * (1 + math.cos(math.pi * part)) / 2


# --- The search for what is stretched most -----------------------------------------


@eqx.filter_jit
def stretching(network: Network, x: Grids, key: Array, steps: int) -> Array:
    """The norm of the Jacobian at each point, from below, by power iteration."""

    def norm_at(x: Float[Array, "1 n n"], d: Float[Array, "1 n n"]) -> Array:
        def step(_: Array, d: Array) -> Array:
            _, change = jax.jvp(network, (x,), (d,))
            _, pullback = jax.vjp(network, x)
            (d,) = pullback(change)
            return d / jnp.linalg.norm(d)

        d = jax.lax.fori_loop(0, steps, step, d / jnp.linalg.norm(d))
        return jnp.linalg.norm(jax.jvp(network, (x,), (d,))[1])

    return jax.vmap(norm_at)(jnp.asarray(x), jr.normal(key, x.shape))


def largest_stretching(network: Network, x: np.ndarray, seed: int, steps: int) -> float:
    """At samples, at one grey value, and at noise: never above a Lipschitz constant."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=x[:2].shape).astype(np.float32)
    points = np.concatenate([x, 0 * x[:1], noise])
    found = stretching(network, points, jr.key(seed), steps)
    return float(jnp.nanmax(found))


def noise_errors(network: Network, x: np.ndarray, y: np.ndarray, seed: int) -> list:
    """The mean error against the true solutions, with noise on the inputs."""
    noise = np.random.default_rng(seed).normal(size=x.shape).astype(np.float32)
    return [float(test_error(network, x + s * noise, y)) for s in NOISE]


# --- What is shown -----------------------------------------------------------------


class Row(NamedTuple):
    title: str
    coarse: float
    fine: float
    noisy: list[float]
    found: float
    bound: float
    seconds: float


def evaluate(title: str, fitted: Fit, data: Data, *, seed: int, smoke: bool) -> Row:
    network = fitted.network
    x, y = data.test
    few = coarse(x)[: 2 if smoke else 8]
    return Row(
        title=title,
        coarse=float(test_error(network, coarse(x), coarse(y))),
        fine=float(test_error(network, x, y)),
        noisy=noise_errors(network, coarse(x), coarse(y), seed),
        found=largest_stretching(network, few, seed, 5 if smoke else 30),
        bound=float(network.lipschitz_bound()),
        seconds=fitted.seconds,
    )


def print_rows(rows: Sequence[Row], points: tuple[int, int]) -> None:
    small, large = (f"{n}x{n}" for n in points)
    names = ["relative L2 test error", small, large, "found", "proven", "ms/step"]
    print("{:<24}{:>9}{:>9}{:>13}{:>10}{:>9}".format(*names))
    print("-" * 74)
    for row in rows:
        print(
            f"{row.title:<24}{row.coarse:>9.2%}{row.fine:>9.2%}{row.found:>13.2f}"
            f"{row.bound:>10.2f}{1e3 * row.seconds:>9.1f}"
        )
    print("found, proven: lower and upper bound on the Lipschitz constant\n")
    print(f"{'error, input noise of':<24}" + "".join(f"{s:>9g}" for s in NOISE))
    print("-" * (24 + 9 * len(NOISE)))
    for row in rows:
        print(f"{row.title:<24}" + "".join(f"{e:>9.2%}" for e in row.noisy))
    print()


def print_rates(table: dict[str, list[float]], num_steps: int) -> None:
    print(f"{f'error, {num_steps} steps at rate':<24}", end="")
    print("".join(f"{rate:>9g}" for rate in RATES))
    print("-" * (24 + 9 * len(RATES)))
    for title, errors in table.items():
        # Ten times the size of the solution, or no number at all.
        cells = (f"{e:>9.2%}" if e < 10 else f"{'diverged':>9}" for e in errors)
        print(f"{title:<24}" + "".join(cells))
    print()


def draw(
    fits: dict[str, Fit], rows: Sequence[Row], rates: dict, data: Data, path: Path
) -> None:
    figure = Figure(figsize=(11, 6), layout="constrained")
    top, bottom = np.asarray(figure.subfigures(2, 1))
    draw_sample(top, fits, data)
    left, middle, right = bottom.subplots(1, 3)
    for title, fitted in fits.items():
        window = max(1, len(fitted.losses) // 50)
        smooth = np.convolve(fitted.losses, np.ones(window) / window, "valid")
        left.semilogy(smooth, label=title)
    left.set(xlabel="step", ylabel="relative error", title="training")
    for row in rows:
        middle.plot(NOISE, row.noisy, marker="o")
    middle.set(xlabel="noise on the input", title="test error with noise")
    for errors in rates.values():
        right.loglog(RATES, np.minimum(errors, 10), marker="o")
    right.set(xlabel="learning rate", title="test error, few steps at a fixed rate")
    for ax in (left, middle, right):
        ax.grid(alpha=0.3)
    left.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def draw_sample(figure: Any, fits: dict[str, Fit], data: Data) -> None:
    x, y = data.test[0][0], data.test[1][0]
    axes = figure.subplots(1, 2 + len(fits))
    axes[0].imshow(x[0], cmap="gray", interpolation="nearest")
    axes[0].set_title("coefficient a", fontsize=9)
    image = axes[1].imshow(y[0], interpolation="nearest")
    axes[1].set_title("solution u", fontsize=9)
    figure.colorbar(image, ax=axes[1], shrink=0.7)
    errors = [
        np.abs(np.asarray(fitted.network(jnp.asarray(x))) - y)[0]
        for fitted in fits.values()
    ]
    most = max(error.max() for error in errors)
    for ax, title, error in zip(axes[2:], fits, errors, strict=True):
        image = ax.imshow(
            error, cmap="magma", vmin=0, vmax=most, interpolation="nearest"
        )
        ax.set_title(f"error, {title}", fontsize=9)
    figure.colorbar(image, ax=axes[-1], shrink=0.7)
    for ax in axes:
        ax.set(xticks=[], yticks=[])


# --- The promise -------------------------------------------------------------------


def verify(rows: Sequence[Row]) -> None:
    """Exits with code 1 and a message if a network stretches more than is proven."""
    broken = [
        f"{row.title}: stretches {row.found:.6f} times, proven was {row.bound:.6f}"
        for row in rows
        if not row.found <= row.bound * (1 + ROUNDING)
    ]
    if broken:
        sys.exit("The promise does not hold.\n" + "\n".join(broken))
    print("No network stretched a difference by more than its proven bound.")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("examples/output"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="updates of the weights")
    parser.add_argument("--smoke", action="store_true", help="small grids, few steps")
    args = parser.parse_args(argv)
    if args.steps is None:
        args.steps = 4 if args.smoke else 500
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    size = 17 if args.smoke else FINE
    num_test = 8 if args.smoke else NUM_TEST
    count = num_test + (24 if args.smoke else NUM_TRAIN)
    path = args.out / f"darcy_{count}_{size}_{args.seed}.npz"
    data = load_data(path, count, num_test, size, args.seed)

    models = make_models(args.seed, smoke=args.smoke)
    run = ft.partial(fit, data=data, seed=args.seed)
    fits = {
        title: run(model, rate=decaying, num_steps=args.steps, title=title)
        for title, model in models.items()
    }
    few = max(1, args.steps // 6)
    rates = {title: [] for title in models}
    x, y = map(coarse, data.test)
    for title, model in models.items():
        for rate in RATES:
            label = f"{title}, rate {rate:g}"
            found = run(model, rate=lambda _, r=rate: r, num_steps=few, title=label)
            error = float(test_error(found.network, x, y))
            rates[title].append(error if math.isfinite(error) else math.inf)

    rows = [
        evaluate(title, fitted, data, seed=args.seed, smoke=args.smoke)
        for title, fitted in fits.items()
    ]
    print_rows(rows, (size // 2 + 1, size))
    print_rates(rates, few)
    draw(fits, rows, rates, data, args.out / "fno_darcy.png")
    print(f"The figure is {args.out / 'fno_darcy.png'}")
    verify(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
