"""Spectral normalization in one line, and an attack on its promise.

Trains a multilayer perceptron on scikit-learn's handwritten digits twice from the same
start, plain and wrapped by `spectrax.wrap`. Then it prints the norm of every layer,
searches for two inputs whose outputs differ by more than the layers' bounds allow, and
draws the singular values. Ends with exit code 1 if a promise was broken.

    python examples/quickstart.py [--out DIR] [--seed N] [--steps N] [--smoke]
"""

import argparse
import functools as ft
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import spectrax


# A network with Lipschitz constant 1 cannot move its logits far apart: two digits lie a
# few units from each other, and so do their logits. The loss therefore sees the logits
# times a fixed number. The network's own bound is not touched.
TEMPERATURE = 20.0

OPTIMIZER = optax.adam(1e-3)
BATCH_SIZE = 64

# A norm is estimated from below while training, so a true norm may be above its bound.
LARGEST_EXCESS = 2e-3
# Rounding of the attack's float32 ratios, relative.
ROUNDING = 1e-4

Network = Callable[[Float[Array, " pixels"]], Float[Array, " classes"]]
Images = Float[Array, "batch pixels"]
Labels = Int[Array, " batch"]
Ratios = Float[Array, " batch"]


class Data(NamedTuple):
    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]


def load_data(seed: int) -> Data:
    """1,797 images of 8x8 pixels in [0, 1], a fifth of them for testing."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    parts = train_test_split(
        images, labels, test_size=0.2, stratify=labels, random_state=seed
    )
    x_train, x_test, y_train, y_test = map(np.asarray, parts)
    return Data((x_train, y_train), (x_test, y_test))


# --- Training ----------------------------------------------------------------------


def loss(network: Network, x: Images, y: Labels) -> Float[Array, ""]:
    logits = TEMPERATURE * jax.vmap(network)(x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


@eqx.filter_jit
def train_step(
    model: PyTree,
    state: eqx.nn.State | None,
    opt_state: optax.OptState,
    x: Images,
    y: Labels,
) -> tuple[PyTree, eqx.nn.State | None, optax.OptState]:
    """One update. Two lines are new, and do nothing to a plain model."""
    state = spectrax.advance(model, state)

    @eqx.filter_grad
    def gradient(model: PyTree) -> Float[Array, ""]:
        network = spectrax.unwrap(model, state, lazy=True)
        return loss(network, x, y)

    updates, opt_state = OPTIMIZER.update(gradient(model), opt_state)
    return eqx.apply_updates(model, updates), state, opt_state


def train(
    model: PyTree,
    state: eqx.nn.State | None,
    data: Data,
    *,
    num_steps: int,
    seed: int,
    title: str,
) -> tuple[PyTree, Any]:
    images, labels = data.train
    opt_state = OPTIMIZER.init(eqx.filter(model, eqx.is_inexact_array))
    rng = np.random.default_rng(seed)
    for _ in tqdm(range(num_steps), desc=title, unit="step"):
        batch = rng.choice(len(images), BATCH_SIZE, replace=False)
        x, y = jnp.asarray(images[batch]), jnp.asarray(labels[batch])
        model, state, opt_state = train_step(model, state, opt_state, x, y)
    state = spectrax.advance(model, state)  # for the last update of the weights
    return model, state


@eqx.filter_jit
def accuracy(network: Network, x: Images, y: Labels) -> Float[Array, ""]:
    return jnp.mean(jnp.argmax(jax.vmap(network)(x), axis=-1) == y)


# --- The attack --------------------------------------------------------------------


def unit(d: Float[Array, "*batch pixels"]) -> Float[Array, "*batch pixels"]:
    return d / jnp.maximum(jnp.linalg.norm(d, axis=-1, keepdims=True), 1e-30)


def ratio(network: Network, x: Images, d: Images) -> Ratios:
    """`|f(x + d) - f(x)| / |d|` for each pair: never above a Lipschitz constant."""
    change = jax.vmap(network)(x + d) - jax.vmap(network)(x)
    return jnp.linalg.norm(change, axis=-1) / jnp.linalg.norm(d, axis=-1)


@eqx.filter_jit
def random_attack(network: Network, x: Images, radius: Array, key: Array) -> Ratios:
    """Perturbations of length `radius` in random directions."""
    return ratio(network, x, radius * unit(jr.normal(key, x.shape)))


@eqx.filter_jit
def jacobian_attack(network: Network, x: Images, key: Array, steps: int) -> Ratios:
    """The norm of the Jacobian at each point, by power iteration: the ratio as the
    radius goes to zero."""

    def norm_at(x: Float[Array, " pixels"], d: Float[Array, " pixels"]) -> Array:
        def step(_: Array, d: Array) -> Array:
            _, change = jax.jvp(network, (x,), (d,))
            _, pullback = jax.vjp(network, x)
            return unit(pullback(change)[0])

        d = jax.lax.fori_loop(0, steps, step, d)
        return jnp.linalg.norm(jax.jvp(network, (x,), (d,))[1])

    return jax.vmap(norm_at)(x, unit(jr.normal(key, x.shape)))


@eqx.filter_jit
def ascent_attack(
    network: Network, x: Images, radius: Array, key: Array, steps: int
) -> Ratios:
    """Gradient ascent on the ratio, which moves both ends and so the radius too."""
    optimizer = optax.adam(0.03 * radius)
    ends = x, radius * unit(jr.normal(key, x.shape))

    @jax.grad
    def gradient(ends: tuple[Images, Images]) -> Array:
        return -jnp.log(ratio(network, *ends)).sum()

    def step(_: Array, carry: Any) -> Any:
        ends, opt_state, best = carry
        updates, opt_state = optimizer.update(gradient(ends), opt_state)
        ends = eqx.apply_updates(ends, updates)
        return ends, opt_state, jnp.fmax(best, ratio(network, *ends))

    start = ends, optimizer.init(ends), ratio(network, *ends)
    return jax.lax.fori_loop(0, steps, step, start)[-1]


def attack(network: Network, x: Images, *, steps: int, seed: int) -> dict[str, float]:
    """The largest ratio that each kind of attack finds, starting at the rows of `x`."""
    keys = iter(jr.split(jr.key(seed), 7))
    found = {"power method on Jacobians": jacobian_attack(network, x, next(keys), 50)}
    for length in (0.1, 1.0, 10.0):
        radius = jnp.asarray(length)
        name = f"random directions, |d| = {length:g}"
        found[name] = random_attack(network, x, radius, next(keys))
        name = f"gradient ascent from |d| = {length:g}"
        found[name] = ascent_attack(network, x, radius, next(keys), steps)
    return {name: float(jnp.nanmax(ratios)) for name, ratios in found.items()}


# --- What is shown -----------------------------------------------------------------


def singular_values(network: eqx.nn.MLP) -> list[np.ndarray]:
    """Those of each layer, in float64."""
    weights = [np.asarray(layer.weight, np.float64) for layer in network.layers]
    return [np.linalg.svd(weight, compute_uv=False) for weight in weights]


def print_attack(
    wrapped: dict[str, float],
    plain: dict[str, float],
    *,
    wrapped_bound: float,
    plain_bound: float,
) -> None:
    print(f"{'largest |f(x+d) - f(x)| / |d| found by':<40}{'wrapped':>10}{'plain':>12}")
    print("-" * 62)
    for name in wrapped:
        print(f"{name:<40}{wrapped[name]:>10.4f}{plain[name]:>12.4f}")
    print("-" * 62)
    name = "product of the layers' bounds (norms)"
    print(f"{name:<40}{wrapped_bound:>10.4f}{plain_bound:>12.4f}")


def draw(
    before: list[np.ndarray],
    after: list[np.ndarray],
    table: Sequence[spectrax.SummaryRow],
    path: Path,
) -> None:
    """The singular values of each layer of the plain and of the wrapped network."""
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    axes = figure.subplots(1, len(table), sharey=True)
    for ax, row, plain, wrapped in zip(axes, table, before, after, strict=True):
        for values, color, label in (
            (plain, "tab:orange", "plain, trained"),
            (wrapped, "tab:blue", "wrapped, trained: the constrained weights"),
        ):
            index = np.arange(1, len(values) + 1)
            ax.plot(index, values, color=color, label=label, marker=".", markersize=3)
        ax.axhline(row.bound, color="black", ls="--", lw=1, label="bound")
        out_size, in_size = row.shape
        ax.set_title(
            f"{row.path}: {in_size} to {out_size}\n"
            f"norm {plain[0]:.2f} plain, {wrapped[0]:.2f} wrapped",
            fontsize=9,
        )
        ax.set_xlabel("index")
        ax.grid(alpha=0.3)
    axes[0].set_yscale("log")
    axes[0].set_ylim(bottom=1e-2)  # the top of the spectrum is what matters here
    axes[0].set_ylabel("singular value (above 0.01)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3)
    figure.savefig(path, dpi=150)


# --- The promise -------------------------------------------------------------------


def verify(table: Sequence[spectrax.SummaryRow], found: dict[str, float]) -> None:
    """Exits with code 1 and a message if a norm or the attack exceeds its bound."""
    norms = [row.true_norm for row in table if row.true_norm is not None]
    if len(norms) < len(table):
        raise ValueError("expected the norms of `summary(..., true_norm=True)`.")
    broken = [
        f"{row.path}: norm {norm:.6f} exceeds the bound {row.bound:g} by more than "
        f"{LARGEST_EXCESS:g}"
        for row, norm in zip(table, norms, strict=True)
        if not norm <= row.bound * (1 + LARGEST_EXCESS)
    ]
    # ReLU is 1-Lipschitz, so the network is as Lipschitz as the product of its layers.
    limit = max(math.prod(norms), math.prod(row.bound for row in table))
    broken += [
        f"{name}: ratio {largest:.6f} exceeds the network's {limit:.6f}"
        for name, largest in found.items()
        if not largest <= limit * (1 + ROUNDING)
    ]
    if broken:
        sys.exit("The promise does not hold.\n" + "\n".join(broken))
    print("\nEvery norm and every attack stayed within its bound.")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("examples/output"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="updates of the weights")
    parser.add_argument("--smoke", action="store_true", help="narrow nets, few steps")
    args = parser.parse_args(argv)
    if args.steps is None:
        args.steps = 50 if args.smoke else 1000
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    data = load_data(args.seed)
    fit = ft.partial(train, data=data, num_steps=args.steps, seed=args.seed)

    width = 32 if args.smoke else 512
    mlp = eqx.nn.MLP(64, 10, width_size=width, depth=3, key=jr.key(args.seed))
    plain, _ = fit(mlp, None, title="plain  ")

    model, state = spectrax.constrain(mlp)  # the one line
    model, state = fit(model, state, title="wrapped")
    constrained = spectrax.unwrap(model, state)  # an `eqx.nn.MLP` again

    x, y = map(jnp.asarray, data.test)
    print(f"test accuracy, plain:   {accuracy(plain, x, y):.1%}")
    print(f"test accuracy, wrapped: {accuracy(constrained, x, y):.1%}\n")

    table = spectrax.summary(model, state, true_norm=True)
    print(table, end="\n\n")

    fool = ft.partial(attack, x=x, steps=50 if args.smoke else 300, seed=args.seed)
    found = fool(constrained)
    before, after = singular_values(plain), singular_values(constrained)
    print_attack(
        found,
        fool(plain),
        wrapped_bound=math.prod(row.bound for row in table),
        plain_bound=math.prod(values[0] for values in before),
    )
    draw(before, after, table, args.out / "singular_values.png")
    print(f"\nThe singular values are drawn in {args.out / 'singular_values.png'}")
    verify(table, found)


if __name__ == "__main__":
    main()
