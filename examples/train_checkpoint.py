"""A small convolutional network, trained and written to a file.

Trains three convolutions and two linear layers on scikit-learn's handwritten digits,
prints the test accuracy, and writes the weights with what is needed to read them to
`DIR/digits.npz`: the checkpoint that `certify_checkpoint.py` reads.

    python examples/train_checkpoint.py [--out DIR] [--seed N] [--steps N] [--smoke]
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, Float, Int
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm


# `examples/data/digits.npz` was written by this very script with its default seed:
#     python examples/train_checkpoint.py --out examples/data
IMAGE = (1, 8, 8)
BATCH_SIZE = 64
OPTIMIZER = optax.adamw(1e-3, weight_decay=1e-2)

Images = Float[Array, "batch 1 8 8"]
Labels = Int[Array, " batch"]
Layer = eqx.nn.Conv | eqx.nn.Linear


class Net(eqx.Module):
    """Layers one after the other, with ReLU between them."""

    layers: list[Layer]

    def __init__(self, *, channels: int = 16, hidden: int = 64, key: Array):
        a, b, c, d, e = jr.split(key, 5)
        wide = 2 * channels
        dtype = jnp.float32
        self.layers = [
            eqx.nn.Conv2d(1, channels, 3, padding=1, dtype=dtype, key=a),
            eqx.nn.Conv2d(channels, wide, 3, stride=2, padding=1, dtype=dtype, key=b),
            eqx.nn.Conv2d(
                wide,
                wide,
                3,
                padding=1,
                groups=4,
                padding_mode="CIRCULAR",
                dtype=dtype,
                key=c,
            ),
            eqx.nn.Linear(wide * 4 * 4, hidden, dtype=dtype, key=d),
            eqx.nn.Linear(hidden, 10, dtype=dtype, key=e),
        ]

    def __call__(self, x: Float[Array, "1 8 8"]) -> Float[Array, " classes"]:
        for i, layer in enumerate(self.layers):
            x = jax.nn.relu(x) if i > 0 else x
            x = layer(x.ravel() if isinstance(layer, eqx.nn.Linear) else x)
        return x


# --- The checkpoint ----------------------------------------------------------------


def config(net: Net) -> dict[str, Any]:
    """How each weight acts, and how the layers follow each other, for JSON."""
    entries = {}
    shape = IMAGE
    for i, layer in enumerate(net.layers):
        entry: dict[str, Any] = {"type": type(layer).__name__}
        if isinstance(layer, eqx.nn.Conv):
            entry |= {
                "stride": layer.stride,
                "padding": layer.padding,
                "dilation": layer.dilation,
                "groups": layer.groups,
                "padding_mode": layer.padding_mode,
                "input_size": shape[1:],
            }
            image = jax.ShapeDtypeStruct(shape, jnp.float32)
            shape = eqx.filter_eval_shape(layer, image).shape
        entries[f"layers.{i}.weight"] = entry
    # All that is between two of these weights: a bias, this function, a reshape.
    chain = {"weights": list(entries), "activation": "relu"}
    return {"weights": entries, "chain": chain}


def save(net: Net, path: Path) -> None:
    arrays: dict[str, Any] = {}
    for i, layer in enumerate(net.layers):
        arrays[f"layers.{i}.weight"] = np.asarray(layer.weight)
        arrays[f"layers.{i}.bias"] = np.asarray(layer.bias)
    np.savez_compressed(path, config=json.dumps(config(net)), **arrays)


# --- Training ----------------------------------------------------------------------


def load_data(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """1,797 images of 8x8 pixels in [0, 1], a fifth of them for testing."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32).reshape(-1, *IMAGE)
    parts = train_test_split(
        images, labels, test_size=0.2, stratify=labels, random_state=seed
    )
    x_train, x_test, y_train, y_test = map(np.asarray, parts)
    return x_train, x_test, y_train, y_test


@eqx.filter_jit
def train_step(
    net: Net, opt_state: optax.OptState, x: Images, y: Labels
) -> tuple[Net, optax.OptState]:
    @eqx.filter_grad
    def gradient(net: Net) -> Float[Array, ""]:
        logits = jax.vmap(net)(x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    params = eqx.filter(net, eqx.is_inexact_array)
    updates, opt_state = OPTIMIZER.update(gradient(net), opt_state, params)
    return eqx.apply_updates(net, updates), opt_state


@eqx.filter_jit
def accuracy(net: Net, x: Images, y: Labels) -> Float[Array, ""]:
    return jnp.mean(jnp.argmax(jax.vmap(net)(x), axis=-1) == y)


def train(
    net: Net, images: np.ndarray, labels: np.ndarray, *, num_steps: int, seed: int
) -> Net:
    opt_state = OPTIMIZER.init(eqx.filter(net, eqx.is_inexact_array))
    rng = np.random.default_rng(seed)
    for _ in tqdm(range(num_steps), desc="training", unit="step"):
        batch = rng.choice(len(images), BATCH_SIZE, replace=False)
        x, y = jnp.asarray(images[batch]), jnp.asarray(labels[batch])
        net, opt_state = train_step(net, opt_state, x, y)
    return net


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("examples/output"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="updates of the weights")
    parser.add_argument("--smoke", action="store_true", help="few steps")
    args = parser.parse_args(argv)
    if args.steps is None:
        args.steps = 10 if args.smoke else 1500
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    x_train, x_test, y_train, y_test = load_data(args.seed)
    net = Net(key=jr.key(args.seed))
    net = train(net, x_train, y_train, num_steps=args.steps, seed=args.seed)
    found = accuracy(net, jnp.asarray(x_test), jnp.asarray(y_test))
    print(f"test accuracy: {found:.1%}")
    path = args.out / "digits.npz"
    save(net, path)
    print(f"The checkpoint is {path}, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
