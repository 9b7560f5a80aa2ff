"""Physics-informed networks with and without spectral normalization.

Solves the Poisson equation on a square with a network whose loss takes its Hessian with
respect to the inputs, at several learning rates and from several starts: with plain
layers, with layers of norm 1, and with layers whose norms are learned; each with and
without a known factor in front that lets a network of norm 1 be as steep as the
solution. Prints the errors against the exact solution, and draws how they came about.
Ends with exit code 1 if a solution is steeper than its network may be.

    python examples/pinn_stability.py [--out DIR] [--seed N] [--steps N] [--smoke]
"""

import argparse
import itertools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree
from matplotlib.figure import Figure
from tqdm import tqdm

import spectrax


CONSTRAINTS: dict[str, spectrax.AbstractConstraint | None] = {
    "none": None,
    "fixed": spectrax.Normalize(1.0),
    "learned": spectrax.LearnableBound(1.0),
}
SLOPE = math.pi  # the largest slope of the solution
FACTORS = (1.0, 4 * SLOPE)
RATES = (1e-3, 1e-2, 1e-1, 3e-1)
BOUNDARY_WEIGHT = 10.0
NUM_INNER, NUM_EDGE = 144, 48
CHUNK = 10  # updates between two movements of the progress bar

# A norm is estimated from below while training, so a slope may exceed its bound by the
# error of the estimate.
LARGEST_EXCESS = 1e-2
ROUNDING = 1e-4  # of float32 slopes, relative
FAILED = 0.1  # the relative error from which on the table counts a run as failed

Point = Float[Array, "2"]
Points = Float[Array, "points 2"]
Scalar = Float[Array, ""]
Network = Callable[[Point], Scalar]


class Lanes(NamedTuple):
    """What tells the runs with one constraint from each other: an entry for each."""

    factor: Array
    rate: Array
    seed: Array


class Run(NamedTuple):
    """A network in training; `state` is `None` if nothing in it is constrained."""

    model: PyTree
    state: eqx.nn.State | None
    opt_state: optax.OptState


class Result(NamedTuple):
    """What came of the runs, with axes for factors, rates and seeds in front."""

    losses: Float[np.ndarray, "factors rates seeds steps"]
    bounds: Float[np.ndarray, "factors rates seeds steps"]
    error: Float[np.ndarray, "factors rates seeds"]
    slope: Float[np.ndarray, "factors rates seeds"]
    limit: Float[np.ndarray, "factors rates seeds"]


# --- The problem -------------------------------------------------------------------


def exact(x: Point) -> Scalar:
    """The solution on [-1, 1] x [-1, 1], zero on the boundary."""
    return jnp.prod(jnp.sin(math.pi * x))


def source(x: Point) -> Scalar:
    """The Laplacian of the solution."""
    return -2 * math.pi**2 * exact(x)


def solution(network: Network, factor: Array) -> Network:
    """As steep as the network times the factor.

    The factor could as well stand behind the network. In front of it, it also brings
    the first layer to the part of the activation that is curved.
    """
    return lambda x: network(factor * x)


def loss(u: Network, inner: Points, edge: Points) -> Scalar:
    """Of the equation, relative to its source, and of the boundary."""

    def residual(x: Point) -> Scalar:
        return jnp.trace(jax.hessian(u)(x)) - source(x)

    inside = jnp.mean(jax.vmap(residual)(inner) ** 2) / math.pi**4
    return inside + BOUNDARY_WEIGHT * jnp.mean(jax.vmap(u)(edge) ** 2)


def draw_points(key: PRNGKeyArray) -> tuple[Points, Points]:
    """In the square, and on its four sides."""
    inner_key, edge_key = jr.split(key)
    inner = jr.uniform(inner_key, (NUM_INNER, 2), minval=-1, maxval=1)
    along = jr.uniform(edge_key, (NUM_EDGE,), minval=-1, maxval=1)
    side = jnp.where(jnp.arange(NUM_EDGE) % 2 == 0, -1.0, 1.0)
    half = NUM_EDGE // 2
    vertical = jnp.stack([side[:half], along[:half]], axis=1)
    horizontal = jnp.stack([along[half:], side[half:]], axis=1)
    return inner, jnp.concatenate([vertical, horizontal])


# --- Training ----------------------------------------------------------------------


def optimizer(rate: Array, num_steps: int) -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(rate, num_steps))


def start(
    lane: Lanes,
    constraint: spectrax.AbstractConstraint | None,
    size: tuple[int, int],
    steps: int,
) -> Run:
    """A network, the same for every constraint. Sine is 1-Lipschitz."""
    key = jr.key(lane.seed)
    mlp = eqx.nn.MLP(2, "scalar", *size, activation=jnp.sin, key=key)
    model, state = mlp, None
    if constraint is not None:
        model, state = spectrax.constrain(mlp, constraint=constraint)
    weights = eqx.filter(model, eqx.is_inexact_array)
    return Run(model, state, optimizer(lane.rate, steps).init(weights))


def learned_bound(model: PyTree) -> Scalar:
    """The product over the layers; 1 where no bound is learned."""
    trained = model.constraints if isinstance(model, spectrax.Wrapped) else ()
    bounds = [constraint.target() for constraint in trained if constraint is not None]
    return math.prod(bounds, start=jnp.ones(()))


def train_step(run: Run, lane: Lanes, key: PRNGKeyArray, steps: int) -> Any:
    """One update; its loss and the bound at which it was found."""
    inner, edge = draw_points(key)
    model, state, opt_state = run
    state = spectrax.advance(model, state)  # once per update

    @eqx.filter_value_and_grad
    def value_and_gradient(model: PyTree) -> Scalar:
        u = solution(spectrax.unwrap(model, state, lazy=True), lane.factor)
        return loss(u, inner, edge)

    value, gradient = value_and_gradient(model)
    updates, opt_state = optimizer(lane.rate, steps).update(gradient, opt_state)
    after = Run(eqx.apply_updates(model, updates), state, opt_state)
    return after, (value, learned_bound(model))


@eqx.filter_jit(donate="all-except-first")
def train_steps(lanes: Lanes, runs: Run, keys: PRNGKeyArray, steps: int) -> Any:
    """An update with each key of all runs, which see the same points."""
    arrays, static = eqx.partition(runs, eqx.is_array)

    def step(arrays: Any, key: PRNGKeyArray) -> Any:
        runs = eqx.combine(arrays, static)
        each = eqx.filter_vmap(train_step, in_axes=(eqx.if_array(0), 0, None, None))
        runs, shown = each(runs, lanes, key, steps)
        return eqx.filter(runs, eqx.is_array), shown

    arrays, shown = jax.lax.scan(step, arrays, keys)
    return eqx.combine(arrays, static), shown


@eqx.filter_jit
@eqx.filter_vmap
def judge(run: Run, lane: Lanes) -> tuple[eqx.nn.MLP, Scalar, Scalar]:
    """The plain network of a run, its relative error and its largest slope."""
    model, state, _ = run
    state = spectrax.advance(model, state)  # for the last update of the weights
    network = spectrax.unwrap(model, state)
    u = solution(network, lane.factor)
    side = jnp.linspace(-1, 1, 51)
    grid = jnp.stack(jnp.meshgrid(side, side), axis=-1).reshape(-1, 2)
    truth = jax.vmap(exact)(grid)
    error = jnp.linalg.norm(jax.vmap(u)(grid) - truth) / jnp.linalg.norm(truth)
    slope = jnp.linalg.norm(jax.vmap(jax.grad(u))(grid), axis=1).max()
    return network, error, slope


def proven_slope(network: eqx.nn.MLP, factor: float) -> float:
    """No slope is larger: the factor times the upper bounds of the layers' norms."""
    weights = [layer.weight for layer in network.layers]
    if not all(jnp.all(jnp.isfinite(weight)) for weight in weights):
        return math.inf
    return factor * math.prod(
        float(spectrax.enclose_norm(weight).upper) for weight in weights
    )


def lane_of(tree: PyTree, index: int) -> PyTree:
    return jax.tree.map(lambda x: x[index] if eqx.is_array(x) else x, tree)


def train(
    constraint: spectrax.AbstractConstraint | None,
    lanes: Lanes,
    *,
    size: tuple[int, int],
    steps: int,
    seed: int,
    title: str,
) -> Result:
    """All runs with one constraint, side by side."""
    make = eqx.filter_vmap(start, in_axes=(0, None, None, None))
    runs = eqx.filter_jit(make)(lanes, constraint, size, steps)
    history = []
    with tqdm(total=steps, desc=title, unit="step", disable=None) as bar:
        for keys in jr.split(jr.key(seed), (steps // CHUNK, CHUNK)):
            runs, shown = train_steps(lanes, runs, keys, steps)
            history.append(jax.block_until_ready(shown))
            bar.update(CHUNK)
    networks, error, slope = judge(runs, lanes)
    losses, bounds = (np.concatenate(parts).T for parts in zip(*history, strict=True))
    limit = [
        proven_slope(lane_of(networks, i), float(factor))
        for i, factor in enumerate(lanes.factor)
    ]
    return Result(
        losses, bounds, np.asarray(error), np.asarray(slope), np.asarray(limit)
    )


# --- What is shown -----------------------------------------------------------------


def print_errors(results: dict[str, Result]) -> None:
    print("relative L2 error: mean (worst) over the starts, and how many failed")
    head = "".join(f"{f'rate {rate:g}':>24}" for rate in RATES)
    print(f"{'norms':<9}{'factor':<8}{head}")
    print("-" * (17 + 24 * len(RATES)))
    for (name, result), (k, factor) in itertools.product(
        results.items(), enumerate(FACTORS)
    ):
        cells = ""
        for error in result.error[k]:
            failed = np.sum(~(error < FAILED))
            shown = f"{error.mean():.4f} ({error.max():.4f}) {failed}/{len(error)}"
            cells += f"{shown:>24}"
        print(f"{name:<9}{factor:<8.3g}{cells}")


def print_slopes(results: dict[str, Result]) -> None:
    print(f"\nslope of the solution found (needed: {SLOPE:.3f}), and what it is proven")
    print("not to exceed anywhere; the largest over the starts")
    head = "".join(f"{f'rate {rate:g}':>24}" for rate in RATES)
    print(f"{'norms':<9}{'factor':<8}{head}")
    print("-" * (17 + 24 * len(RATES)))
    for (name, result), (k, factor) in itertools.product(
        results.items(), enumerate(FACTORS)
    ):
        cells = ""
        for slope, limit in zip(result.slope[k], result.limit[k], strict=True):
            cells += f"{f'{slope.max():.3f} <= {limit.max():.3f}':>24}"
        print(f"{name:<9}{factor:<8.3g}{cells}")


def draw(results: dict[str, Result], path: Path) -> None:
    figure = Figure(figsize=(12, 6.5), layout="constrained")
    axes = figure.subplots(2, 3)
    colors = {"none": "tab:orange", "fixed": "tab:blue", "learned": "tab:green"}
    panels = zip(axes.flat, enumerate(RATES), strict=False)
    for ax, (i, rate) in panels:
        for name, result in results.items():
            for seed, losses in enumerate(result.losses[-1, i]):
                label = name if seed == 0 else None
                ax.plot(losses, color=colors[name], lw=0.8, alpha=0.8, label=label)
        ax.set_title(f"loss, with the factor, learning rate {rate:g}", fontsize=9)
        ax.set_yscale("log")
        ax.set_ylim(1e-4, 1e8)
        ax.set_xlabel("step")
    draw_errors(axes[1, 1], results, colors)
    if "learned" in results:
        draw_bounds(axes[1, 2], results["learned"])
    for ax in axes.flat:
        ax.grid(alpha=0.3)
        if ax.has_data():
            ax.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def draw_errors(ax: Any, results: dict[str, Result], colors: Mapping[str, str]) -> None:
    for (name, result), (k, style) in itertools.product(
        results.items(), enumerate(("o:", "o-"))
    ):
        label = f"{name}, {'with' if k else 'without'} factor"
        ax.plot(RATES, result.error[k].mean(-1), style, color=colors[name], label=label)
        if k == 1:
            worst, best = result.error[k].max(-1), result.error[k].min(-1)
            ax.fill_between(RATES, best, worst, color=colors[name], alpha=0.15, lw=0)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_ylim(1e-4, 2)
    ax.set_title("relative error, mean and range over the starts", fontsize=9)
    ax.set_xlabel("learning rate")


def draw_bounds(ax: Any, result: Result) -> None:
    styles = ("-", "--", "-.", ":")
    for i, (rate, style) in enumerate(zip(RATES, styles, strict=True)):
        for seed, bounds in enumerate(FACTORS[-1] * result.bounds[-1, i]):
            label = f"rate {rate:g}" if seed == 0 else None
            ax.plot(bounds, color="tab:green", ls=style, lw=1, label=label)
    ax.axhline(SLOPE, color="black", ls="--", lw=1, label="needed")
    ax.set_yscale("log")
    ax.set_ylim(0.1, 100)
    ax.set_title("factor times the learned bounds", fontsize=9)
    ax.set_xlabel("step")


# --- The promise -------------------------------------------------------------------


def verify(results: dict[str, Result]) -> None:
    """Exits with code 1 and a message if a solution is steeper than allowed."""
    broken = [
        f"{name}: slope {slope:.6f} exceeds {limit:.6f}"
        for name, result in results.items()
        for slope, limit in zip(result.slope.flat, result.limit.flat, strict=True)
        if not (slope <= limit * (1 + ROUNDING) or limit == math.inf)
    ]
    limits = results["fixed"].limit / np.array(FACTORS)[:, None, None]
    if not np.all(limits <= 1 + LARGEST_EXCESS):
        broken.append(f"fixed: a proven bound is {limits.max():.6f} times the factor")
    if broken:
        sys.exit("The promise does not hold.\n" + "\n".join(broken))
    print("\nNo solution is steeper than its network may be.")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("examples/output"))
    parser.add_argument("--seed", type=int, default=0, help="of the first start")
    parser.add_argument("--steps", type=int, help=f"updates, a multiple of {CHUNK}")
    parser.add_argument("--smoke", action="store_true", help="little of everything")
    args = parser.parse_args(argv)
    if args.steps is None:
        args.steps = CHUNK if args.smoke else 500
    if args.steps < CHUNK or args.steps % CHUNK:
        parser.error(f"--steps: expected a multiple of {CHUNK}, got {args.steps}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    num_seeds, size = (1, (8, 1)) if args.smoke else (3, (32, 3))
    seeds = range(args.seed, args.seed + num_seeds)
    shape = len(FACTORS), len(RATES), num_seeds
    lanes = Lanes(
        *map(jnp.array, zip(*itertools.product(FACTORS, RATES, seeds), strict=True))
    )
    results = {}
    names = ["none", "fixed"] if args.smoke else list(CONSTRAINTS)
    for name in names:
        result = train(
            CONSTRAINTS[name],
            lanes,
            size=size,
            steps=args.steps,
            seed=args.seed,
            title=name,
        )
        results[name] = Result(*(x.reshape(*shape, *x.shape[1:]) for x in result))
    print_errors(results)
    print_slopes(results)
    draw(results, args.out / "pinn_stability.png")
    print(f"\nThe paths are drawn in {args.out / 'pinn_stability.png'}")
    verify(results)


if __name__ == "__main__":
    main()
