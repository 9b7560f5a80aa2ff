"""Spectral normalization step by step: layers, attention, adaptive bounds, power
iteration, stability, complete operators.

Prints a table and draws a figure for each of six steps. Ends with exit code 1 if a norm
or a slope is above its bound. The same as a notebook with its results is
`docs/examples/spectral_normalization.ipynb`, which is made of the cells of this file.

    python examples/spectral_normalization.py [--out DIR] [--seed N] [--smoke]
"""

# %% [markdown]
# # Spectral normalization, step by step
#
# A linear map `W` moves two points at most `sigma(W)` times further apart, where
# `sigma(W)` is its largest singular value. Spectral normalization divides a weight by
# that number. The six steps below show what this does to layers, to attention and to
# whole networks, and compare every number with a decomposition (SVD).
#
# First the imports, the sizes of everything, and two things that all steps use.

# %%
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
from jaxtyping import Array, Float, PyTree
from matplotlib.figure import Figure
from tqdm import tqdm

import spectrax


class Settings(NamedTuple):
    """Sizes, and how norms are found and proven: less of all for a quick run."""

    seed: int = 0
    estimator: spectrax.AbstractEstimator = spectrax.PowerIteration()
    image_size: tuple[int, int] = (12, 12)
    width: int = 64
    train_steps: int = 1500
    draws: int = 100
    certified: bool = True
    matrices: Sequence[str] = (
        "identity",
        "diagonal",
        "random 6x4",
        "random 128x64",
    )
    operators: Sequence[tuple[str, int, int, tuple[int, ...], int]] = (
        ("small", 32, 32, (64, 64), 4),
        ("medium", 64, 64, (128, 128, 64), 8),
        ("large", 128, 64, (256, 192, 128, 96), 16),
    )


# How far an estimated norm may be below the true one, relatively.
TOLERANCE = 2e-3


def expect_at_most(name: str, value: float, bound: float) -> None:
    """Ends the program if a promise is broken."""
    if not value <= bound * (1 + TOLERANCE):
        sys.exit(f"{name}: {value:.6f} is above its bound {bound:.6f}.")


def singular_values(function: Callable[..., Array], shape: tuple[int, ...]) -> Any:
    """Those of a layer's matrix on inputs of the given shape, in float64: the matrix is
    the layer's Jacobian, as it is everywhere the same.
    """
    jacobian = jax.jacobian(function)(jnp.zeros(shape))
    matrix = np.asarray(jacobian, np.float64).reshape(-1, math.prod(shape))
    return np.linalg.svd(matrix, compute_uv=False)


# %% [markdown]
# ## 1. Linear layers and convolutions
#
# `SpectralLinear` and `SpectralConv2d` take the arguments of `equinox.nn.Linear` and
# `equinox.nn.Conv2d`. The layer with the raw weight is `.raw`; `unwrap` gives
# it with the normalized one.
#
# The norm of a convolution depends on the size of its input. By default the bound holds
# at every size, and at one size the norm stays a little below it; with `input_size` it
# is the norm at that size. Dividing by the norm of the *reshaped kernel* instead, a
# matrix `[out, in * height * width]`, is what many libraries do. That number is not the
# norm of the convolution, as the last row shows.


# %%
def step_1_layers(settings: Settings) -> Figure:
    """The norms of a linear layer and of a convolution, regular and normalized."""
    linear_key, conv_key = jr.split(jr.key(settings.seed))
    estimator = settings.estimator
    size = settings.image_size

    make = eqx.nn.make_with_state(spectrax.nn.SpectralLinear)
    linear, state = make(10, 5, estimator=estimator, key=linear_key)
    layers = {
        "Linear 10 to 5, regular": (linear.raw, (10,)),
        "Linear, normalized": (spectrax.unwrap(linear, state), (10,)),
    }

    make = eqx.nn.make_with_state(spectrax.nn.SpectralConv2d)
    options = {"padding": 1, "estimator": estimator, "key": conv_key}
    conv, state = make(3, 16, 3, **options)
    layers["Conv2d 3 to 16, regular"] = conv.raw, (3, *size)
    layers["Conv2d, at every size"] = spectrax.unwrap(conv, state), (3, *size)
    conv, state = make(3, 16, 3, input_size=size, **options)
    name = f"Conv2d, at {size[0]}x{size[1]}"
    layers[name] = spectrax.unwrap(conv, state), (3, *size)
    reshaped, state = spectrax.constrain(
        conv.raw,
        where=lambda conv: conv.weight,
        view=spectrax.flattened_kernel,
        estimator=estimator,
    )
    layers["Conv2d, reshaped kernel"] = spectrax.unwrap(reshaped, state), (3, *size)

    values = {name: singular_values(*layer) for name, layer in layers.items()}
    print(f"{'layer':<26}{'input':>12}{'norm by SVD':>14}")
    for name, (_, shape) in layers.items():
        text = "x".join(map(str, shape))
        print(f"{name:<26}{text:>12}{values[name][0]:>14.5f}")
        if "regular" not in name and "reshaped" not in name:
            expect_at_most(name, values[name][0], 1.0)

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for ax, kind in zip(figure.subplots(1, 2), ("Linear", "Conv2d"), strict=True):
        for name in filter(lambda name: name.startswith(kind), values):
            ax.plot(values[name], label=name.split(", ")[1], lw=1.5)
        ax.axhline(1.0, color="black", ls="--", lw=1)
        ax.set(title=kind, xlabel="index", ylabel="singular value")
        ax.legend()
    return figure


# %% [markdown]
# The normalized layers have norm 1, no more and no less. The bound at every size leaves
# a little unused at this one. Divided by the norm of its reshaped kernel, the
# convolution still stretches some images to twice their length.

# %% [markdown]
# ## 2. Attention
#
# `SpectralMultiheadAttention` constrains all four projections, each as a whole or, with
# `per_head=True`, each head's block of each projection. Masks work as in Equinox.
#
# This does not make dot-product attention Lipschitz. Take one token at zero, which
# attends to all others alike, and move the others away from it: the norm of the
# Jacobian grows with the square of their distance, although every projection has norm
# 1. `L2MultiheadAttention` takes its weights from distances, and its bound
# depends on the number of tokens alone.


# %%
def step_2_attention(settings: Settings) -> Figure:
    """The projections' norms, a mask, and the Jacobian of tokens far apart."""
    key, x_key, other_key = jr.split(jr.key(settings.seed), 3)
    heads, size, tokens = 8, settings.width, 8
    make = eqx.nn.make_with_state(spectrax.nn.SpectralMultiheadAttention)
    options = {"estimator": settings.estimator, "key": key}
    whole, state = make(heads, size, **options)
    cut, cut_state = make(heads, size, per_head=True, **options)
    plain, plain_cut = spectrax.unwrap(whole, state), spectrax.unwrap(cut, cut_state)

    x = jr.normal(x_key, (tokens, size))
    causal = jnp.tril(jnp.ones((tokens, tokens), bool))
    y, other = (plain(x, x, x, causal) for x in (x, x.at[-1].set(1.0)))
    print(f"{heads} heads of size {size // heads}: {x.shape} to {y.shape}")
    changed = np.flatnonzero(np.any(np.asarray(y != other), axis=1)).tolist()
    print(f"causal mask: a new last token changes the outputs {changed} only\n")
    if changed != [tokens - 1]:
        sys.exit(f"The mask lets the last token change {changed}.")

    print(
        f"{'norm by SVD':<14}{'regular':>10}{'normalized':>12}{'heads, per_head':>22}"
    )
    for name in ("query_proj", "key_proj", "value_proj", "output_proj"):
        weights = [getattr(m, name).weight for m in (whole.raw, plain, plain_cut)]
        regular, normalized, blocks = (
            np.linalg.norm(np.asarray(w, np.float64), 2, axis=(-2, -1)) for w in weights
        )
        span = f"{blocks.min():.5f} to {blocks.max():.5f}"
        print(f"{name:<14}{regular:>10.5f}{normalized:>12.5f}{span:>22}")
        expect_at_most(name, max(normalized, *blocks), 1.0)

    l2, state = spectrax.constrain(
        spectrax.nn.L2MultiheadAttention(heads, size, key=other_key),
        estimator=settings.estimator,
    )
    l2 = spectrax.unwrap(l2, state)
    bound = float(l2.lipschitz_bound(tokens))

    @jax.jit
    def slopes(distance: Array) -> tuple[Array, Array]:
        far = (distance * unit(x)).at[0].set(0.0)

        def slope(attention: Callable[[Array], Array]) -> Array:
            jacobian = jax.jacobian(attention)(far)
            return jnp.linalg.norm(jacobian.reshape(far.size, far.size), 2)

        return slope(lambda x: plain(x, x, x)), slope(l2)

    distances = 2.0 ** np.arange(0, 9)
    found = np.array([slopes(jnp.asarray(d)) for d in distances])
    print(f"\n{'distance of tokens':<22}{'dot product':>14}{'L2':>14}")
    for distance, (dot, distance_based) in zip(distances, found, strict=True):
        print(f"{distance:<22g}{dot:>14.4f}{distance_based:>14.4f}")
        expect_at_most("L2 attention", distance_based, bound)
    print(f"{'Lipschitz bound':<22}{'none':>14}{bound:>14.4f}")

    figure = Figure(figsize=(6, 3.4), layout="constrained")
    ax = figure.subplots()
    labels = ("dot product, projections of norm 1", "L2, weights of norm 1")
    ax.loglog(distances, found, marker=".", label=labels)
    ax.axhline(bound, color="tab:orange", ls="--", label="bound of L2")
    ax.set(xlabel="distance of the tokens from 0", ylabel="norm of the Jacobian")
    ax.legend()
    return figure


def unit(x: Float[Array, "*batch size"]) -> Float[Array, "*batch size"]:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


# %% [markdown]
# While the tokens are near each other nothing of this is seen. Farther away the
# Jacobian of dot-product attention grows, in the end fourfold when the distance
# doubles. L2 attention stays below its bound, and far below it: a bound for all inputs
# has to hold for worse ones than these.

# %% [markdown]
# ## 3. Adaptive bounds
#
# A network whose layers have norm 1 cannot be steeper than 1. `AdaptiveSpectralNorm`
# gives the layers of any model another bound, or one that is trained with the weights.
#
# The target here is `sin(4 x) cos(3 y)`, with slopes up to 4. Networks of three layers
# with a fixed bound `b` have slopes up to `b^3`. Learned bounds start at 1, so that the
# network starts as the first one, and grow as the error asks for it; a `maximum` stops
# them. For the test the weights are certified: each norm is proven to be within its
# bound, which an estimate while training is not.


# %%
OPTIMIZER = optax.adam(3e-3)


@eqx.filter_jit
def train_step(
    model: PyTree, state: Any, opt_state: optax.OptState, x: Array, y: Array
) -> tuple[PyTree, Any, optax.OptState, Array]:
    """One update, also of a plain model, which has no state."""
    state = spectrax.advance(model, state)

    @eqx.filter_value_and_grad
    def loss(model: PyTree) -> Array:
        network = spectrax.unwrap(model, state, lazy=True)
        return jnp.mean((jax.vmap(network)(x) - y) ** 2)

    value, gradient = loss(model)
    updates, opt_state = OPTIMIZER.update(gradient, opt_state)
    return eqx.apply_updates(model, updates), state, opt_state, value


def train(
    model: PyTree, state: Any, x: Array, y: Array, *, num_steps: int, title: str
) -> tuple[PyTree, Any, np.ndarray, np.ndarray]:
    """The trained model and its state, with the errors and the learned bounds on the
    way.
    """
    opt_state = OPTIMIZER.init(eqx.filter(model, eqx.is_inexact_array))
    losses, bounds = [], []
    for _ in tqdm(range(num_steps), desc=title, unit="step", disable=None):
        if isinstance(model, spectrax.Wrapped):
            bounds.append([c.target() for c in model.constraints if c is not None])
        model, state, opt_state, loss = train_step(model, state, opt_state, x, y)
        losses.append(loss)
    state = spectrax.advance(model, state)
    return model, state, np.array(losses), np.array(bounds)


def certified_bound(network: eqx.nn.MLP) -> float:
    """Proven: the product of the upper ends of the layers' enclosures and of the
    activations' constants.
    """
    norms = [spectrax.enclose_norm(layer.weight).upper for layer in network.layers]
    between = float(spectrax.nn.lipschitz_constant(jax.nn.relu)) ** (len(norms) - 1)
    return math.prod(map(float, norms)) * between * (1 + 1e-12)  # its own rounding


def slopes(network: eqx.nn.MLP, x: Float[Array, "batch in"]) -> Float[Array, " batch"]:
    """The norm of the Jacobian at each point."""
    jacobians = jax.vmap(jax.jacobian(network))(x)
    return jnp.linalg.norm(jacobians, 2, axis=(-2, -1))


def step_3_adaptive_bounds(settings: Settings) -> Figure:
    """Fixed bounds, and learned ones with their path."""
    key, x_key, test_key = jr.split(jr.key(settings.seed), 3)
    mlp = eqx.nn.MLP(2, 1, settings.width, depth=2, activation=jax.nn.relu, key=key)

    def data(key: Array) -> tuple[Array, Array]:
        x = jr.uniform(key, (512, 2), minval=-1.0)
        return x, jnp.sin(4 * x[:, :1]) * jnp.cos(3 * x[:, 1:])

    x_test, y_test = data(test_key)
    variants = {
        "fixed at 1": {},
        "fixed at 2": {"initial_bound": 2.0},
        "learned from 1": {"learnable_bound": True},
        "learned, below 1.5": {"learnable_bound": True, "maximum": 1.5},
    }
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes = figure.subplots(1, 2)
    print(f"{'bounds':<20}{'test error':>12}{'steepest':>10}{'certified':>11}  bounds")
    for color, (name, options) in enumerate(variants.items()):
        model, state = eqx.nn.make_with_state(spectrax.nn.AdaptiveSpectralNorm)(
            mlp, **options, estimator=settings.estimator
        )
        fit = ft.partial(train, num_steps=settings.train_steps, title=name)
        model, state, losses, bounds = fit(model, state, *data(x_key))
        network = spectrax.unwrap(model, state, certified=settings.certified)
        error = jnp.mean((jax.vmap(network)(x_test) - y_test) ** 2)
        steepest = float(jnp.max(slopes(network, x_test)))
        certified = certified_bound(network)
        table = spectrax.summary(model, state)
        at_end = ", ".join(f"{row.bound:.3f}" for row in table)
        print(
            f"{name:<20}{error:>12.5f}{steepest:>10.4f}{certified:>11.4f}  {at_end}",
            flush=True,
        )
        expect_at_most(name, certified, math.prod(row.bound for row in table))
        expect_at_most(name, steepest, certified)
        axes[0].semilogy(losses, label=name, color=f"C{color}", lw=1)
        for path, style in zip(bounds.T, ("-", "--", ":"), strict=False):
            axes[1].plot(path, color=f"C{color}", ls=style, lw=1.5)
    axes[0].set(xlabel="step", ylabel="error on the training data")
    axes[0].legend()
    axes[1].set(xlabel="step", ylabel="learned bound")
    axes[1].set_title("layers 1 (solid), 2 (dashed), 3 (dotted)", fontsize=9)
    return figure


# %% [markdown]
# A bound of 1 does not help here: the target is steeper than the network may be, and
# the error hardly falls. A bound of 2 allows slopes of 8, more than needed; yet the
# error is larger than with learned bounds, which find what the target asks for. The
# steepest slope found is then that of the target, and the certified bound five times as
# large: it multiplies norms that no single point meets in all layers. The steeper a
# network may be, the more its error jumps on the way at this learning rate.

# %% [markdown]
# ## 4. Power iteration against SVD
#
# A norm is found by power iteration, from random vectors or from better ones. The error
# is relative, a mean over draws of the starting vectors and, for the two random
# matrices, of the matrix. It is never negative but for rounding: the estimate comes
# from below.
#
# - *one vector*, random start: the algorithm of Miyato et al. (2018). How fast it is
#   depends on the gap between the two largest singular values, which is a few percent
#   in the large random matrix.
# - *block of 8*, random start: the block step that is the default while training (of 4
#   vectors for the small matrices, which have no more). One step costs more.
# - *default start*: what `wrap` and `init_power_state` do before the first step, 32
#   steps of Golub-Kahan bidiagonalisation; then block steps.
#
# Times are those of one matrix, the start included, each step a call of a compiled
# function; on small matrices they are mostly the cost of a call.


# %%
ITERATIONS = (1, 3, 5, 10)


START = jax.jit(spectrax.init_power_state, static_argnames=("block_size", "num_steps"))
STEP = jax.jit(spectrax.power_iterate)
SIGMA = jax.jit(spectrax.singular_value)


def matrix(name: str, key: Array) -> Float[Array, "rows columns"]:
    """Of the random ones, one for each key."""
    if name == "identity":
        return jnp.eye(4)
    if name == "diagonal":
        return jnp.diag(jnp.array([3.0, 2.0, 1.0, 0.5]))
    return jr.normal(key, (6, 4) if name == "random 6x4" else (128, 64))


def seconds(function: Callable[[], Any]) -> float:
    """The time of a call."""
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def milliseconds(function: Callable[[], Any], repeats: int = 20) -> float:
    """The median time of a call, the first one apart."""
    times = [seconds(function) for _ in range(repeats + 1)]
    return 1e3 * float(np.median(times[1:]))


def errors_and_times(
    weights: Sequence[Array], start: Callable[..., Any], keys: Array, num_steps: int
) -> tuple[np.ndarray, list[float]]:
    """The mean relative error after 0, 1, ... steps, and the time until then."""
    errors = np.zeros((len(weights), num_steps + 1))
    for i, (weight, key) in enumerate(zip(weights, keys, strict=True)):
        norm = np.linalg.norm(np.asarray(weight, np.float64), 2)
        state = start(weight, key=key)
        for count in range(num_steps + 1):
            errors[i, count] = 1 - SIGMA(weight, state) / norm
            state = STEP(weight, state)

    def estimate(count: int) -> Array:
        state = start(weights[0], key=keys[0])
        for _ in range(count):
            state = STEP(weights[0], state)
        return SIGMA(weights[0], state)

    counts = range(num_steps + 1)
    times = [milliseconds(ft.partial(estimate, count)) for count in counts]
    return errors.mean(axis=0), times


def step_4_power_iteration(settings: Settings) -> Figure:
    """Errors and times after 1, 3, 5 and 10 iterations."""
    methods = {
        "one vector": {"block_size": 1, "num_steps": 0},
        "block of 8": {"num_steps": 0},
        "default start": {},
    }
    figure = Figure(figsize=(9, 3), layout="constrained")
    axes = figure.subplots(1, len(settings.matrices), sharey=True)
    heads = "".join(f"{f'{count} it.':>16}" for count in ITERATIONS)
    print(f"{'relative error, ms':<29}{heads}")
    matrix_key, start_key = jr.split(jr.key(settings.seed))
    for ax, name in zip(axes, settings.matrices, strict=True):
        weights = [matrix(name, key) for key in jr.split(matrix_key, settings.draws)]
        keys = jr.split(start_key, settings.draws)
        for method, options in methods.items():
            start = ft.partial(START, **options)
            errors, times = errors_and_times(weights, start, keys, max(ITERATIONS))
            cells = "".join(f"{errors[i]:>10.1e}{times[i]:>6.2f}" for i in ITERATIONS)
            print(f"{name:<15}{method:<14}{cells}", flush=True)
            expect_at_most(f"{name}: estimate over norm", 1 - errors.min(), 1.0)
            ax.semilogy(np.maximum(errors, 1e-8), marker=".", label=method)
        one = np.asarray(weights[0])
        time_ = milliseconds(lambda one=one: np.linalg.norm(one, 2))
        print(f"{name:<15}{'SVD (LAPACK)':<14}{time_:>16.2f}")
        ax.set(title=name, xlabel="iterations", xticks=(0, *ITERATIONS))
    axes[0].set_ylabel("mean relative error")
    axes[-1].legend(fontsize=8)
    return figure


# %% [markdown]
# With one vector the large matrix takes far more than ten iterations in the mean;
# single draws with a wider gap are faster. A block needs a few. The default start has
# converged before the first step. One decomposition of a matrix as small as these costs
# no more than that: power iteration is for large ones, and for training, where one step
# per update is enough to follow the weights.

# %% [markdown]
# ## 5. Stability and the Lipschitz constant
#
# Two networks of four layers learn random numbers by heart, from the same start: a
# regular one, and one with all layers normalized. Then we look for the steepest place.
# *Pairs* are ratios `|f(x) - f(y)| / |x - y|` of points at a distance of 0.1, *local*
# is the norm of the Jacobian. Both only find what is there to be found: lower bounds on
# the Lipschitz constant. The certified bound is proven.
#
# **The proof for this architecture.** The network is `L_4 r L_3 r L_2 r L_1`, with
# `L_i(x) = W_i x + b_i` and `r` the ReLU of each entry.
#
# 1. `|L_i(x) - L_i(y)| = |W_i (x - y)| <= sigma(W_i) |x - y|`: the bias cancels, and
#    the largest singular value is the largest stretch.
# 2. `|r(s) - r(t)| <= |s - t|` for numbers, hence for vectors entry by entry: its
#    constant is 1.
# 3. One after another, the constants multiply: `|f(x) - f(y)| <= sigma(W_1) sigma(W_2)
#    sigma(W_3) sigma(W_4) |x - y|` for all `x` and `y`.
# 4. `enclose_norm` gives a number that each `sigma(W_i)` is proven not to exceed,
#    rounding included. The product of the four is the certified bound. With weights
#    from `unwrap(..., certified=True)` it is at most 1.
#
# It is a statement about the function of real numbers; rounding while evaluating it
# comes on top. And it is not tight: no point needs to be stretched the most by all
# layers.


# %%
def step_5_stability(settings: Settings) -> Figure:
    """Empirical Lipschitz constants beside the certified bound."""
    key, x_key, y_key, pair_key = jr.split(jr.key(settings.seed), 4)
    width = settings.width
    mlp = eqx.nn.MLP(16, 16, width, depth=3, activation=jax.nn.relu, key=key)
    x, y = jr.normal(x_key, (256, 16)), jr.normal(y_key, (256, 16))
    fit = ft.partial(train, x=x, y=y, num_steps=settings.train_steps)
    regular, *_ = fit(mlp, None, title="regular")
    model, state = spectrax.constrain(mlp, estimator=settings.estimator)
    model, state, *_ = fit(model, state, title="normalized")

    networks = {
        "regular, at the start": mlp,
        "regular, trained": regular,
        "normalized, trained": spectrax.unwrap(
            model, state, certified=settings.certified
        ),
    }
    d = 0.1 * unit(jr.normal(pair_key, x.shape))
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    ax = figure.subplots()
    print(f"{'Lipschitz constant':<24}{'pairs: mean':>12}{'max':>9}", end="")
    print(f"{'local: mean':>14}{'max':>9}{'certified':>12}")
    colors = ("tab:gray", "tab:orange", "tab:blue")
    for (name, network), color in zip(networks.items(), colors, strict=True):
        change = jax.vmap(network)(x + d) - jax.vmap(network)(x)
        pairs = np.linalg.norm(change, axis=1) / np.linalg.norm(d, axis=1)
        local = np.asarray(slopes(network, x))
        certified = certified_bound(network)
        print(f"{name:<24}{pairs.mean():>12.4f}{pairs.max():>9.4f}", end="")
        print(f"{local.mean():>14.4f}{local.max():>9.4f}{certified:>12.4f}")
        expect_at_most(name, max(pairs.max(), local.max()), certified)
        bins = np.geomspace(1e-2, 1e1, 60).tolist()
        ax.hist(local, bins, alpha=0.6, label=name, color=color)
        ax.axvline(certified, color=color, ls="--")

    print("\nfactors of the last bound:", end=" ")
    last = networks["normalized, trained"]
    expect_at_most("normalized network", certified_bound(last), 1.0)
    uppers = [float(spectrax.enclose_norm(w.weight).upper) for w in last.layers]
    print(" x ".join(f"{upper:.6f}" for upper in uppers), "and 1 for each ReLU")
    ax.set(xscale="log", xlabel="norm of the Jacobian; dashed: certified bound")
    ax.set_ylabel("points")
    ax.legend()
    return figure


# %% [markdown]
# Training makes the regular network much steeper, and its certified bound grows even
# more. The normalized one stays below 1 wherever we look, and is proven to do so
# everywhere else. That no search finds more is not a proof: the certified bound of the
# regular network is several times the steepest place found, and the truth is between
# the two.

# %% [markdown]
# ## 6. Complete operators
#
# `create_spectral_neural_operator` makes a network for functions that are sampled at
# points: linear layers at each point, attention between the points, all constrained,
# with a bound that holds at every number of points. Here it sees a batch of 4 functions
# at 64 points.
#
# The first time, each new shape of a weight is compiled, which is most of the time of
# creation; the second column is the same again.


# %%
def step_6_operators(settings: Settings) -> Figure:
    """Sizes, times and bounds of three operators."""
    rows = []
    print(
        f"{'operator':<10}{'parameters':>12}{'created, s':>12}{'again, s':>10}", end=""
    )
    print(f"{'output':>14}{'forward, ms':>13}{'bound':>9}{'steepest':>10}")
    for name, in_size, out_size, hidden, heads in settings.operators:
        create = ft.partial(
            spectrax.nn.create_spectral_neural_operator,
            *(in_size, out_size, hidden, heads),
            estimator=settings.estimator,
            key=jr.key(settings.seed),
        )
        first, again = seconds(create), seconds(create)
        plain = spectrax.unwrap(*create())
        forward = eqx.filter_jit(lambda plain, x: jax.vmap(plain)(x))
        x, d = jr.normal(jr.key(settings.seed), (2, 4, 64, in_size))
        y = forward(plain, x)
        time_ = milliseconds(ft.partial(forward, plain, x))
        change = forward(plain, x + 1e-2 * d) - y
        steepest = np.linalg.norm(change, axis=(1, 2)) / np.linalg.norm(
            1e-2 * d, axis=(1, 2)
        )
        bound = float(plain.lipschitz_bound())
        leaves = jax.tree.leaves(eqx.filter(plain, eqx.is_inexact_array))
        count = sum(leaf.size for leaf in leaves)
        print(f"{name:<10}{count:>12,}{first:>12.2f}{again:>10.2f}", end="")
        print(f"{y.shape!s:>14}{time_:>13.2f}{bound:>9.4f}{steepest.max():>10.4f}")
        expect_at_most(name, steepest.max(), bound)
        rows.append((name, again, 1e-3 * time_))

    figure = Figure(figsize=(6, 3), layout="constrained")
    ax = figure.subplots()
    names, created, forwards = zip(*rows, strict=True)
    ax.bar(np.arange(len(names)) - 0.2, created, 0.4, label="creation, compiled")
    ax.bar(np.arange(len(names)) + 0.2, forwards, 0.4, label="forward, 4 x 64 points")
    ax.set(yscale="log", ylabel="seconds", xticks=range(len(names)), xticklabels=names)
    ax.legend()
    return figure


# %% [markdown]
# All bounds are below 1, and random directions find far less than that. Such a network
# changes its input little: layers with a larger `initial_bound`, or with trained bounds
# (`use_adaptive_bounds=True`), give it more room, and `lipschitz_bound` says how much.

# %% [script]
STEPS = (
    step_1_layers,
    step_2_attention,
    step_3_adaptive_bounds,
    step_4_power_iteration,
    step_5_stability,
    step_6_operators,
)


# Compiles in no time, but costs a decomposition at each call.
SMOKE = Settings(
    estimator=spectrax.ExactSVD(),
    image_size=(6, 6),
    width=16,
    train_steps=40,
    draws=5,
    certified=False,
    matrices=("identity", "diagonal"),
    operators=[("tiny", 16, 16, (16,), 8)],
)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("examples/output"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="small, in seconds")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    settings = (SMOKE if args.smoke else Settings())._replace(seed=args.seed)
    for step in STEPS:
        number, *words = step.__name__.removeprefix("step_").split("_")
        print(f"\n--- {number}. {' '.join(words)} ---\n")
        path = args.out / f"spectral_normalization_{number}.png"
        step(settings).savefig(path, dpi=100)
        print(f"\nDrawn in {path}")


if __name__ == "__main__":
    main()
