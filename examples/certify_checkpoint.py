"""The norms of all weights of a checkpoint, enclosed by proven bounds.

Reads a `.npz` or `.safetensors` file and prints a table: for each weight a lower and an
upper bound on its spectral norm, and what the reshaped kernel says instead. Draws both,
and ends with exit code 1 if an enclosure fails.

    python examples/certify_checkpoint.py [--checkpoint PATH] [--input-size N [N ...]]
        [--stride N] [--padding N] [--rtol X] [--out DIR] [--smoke]
"""

import argparse
import functools as ft
import json
import math
import sys
import zipfile
from collections.abc import Sequence
from decimal import Context, Decimal, ROUND_CEILING, ROUND_FLOOR
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import ml_dtypes  # a dependency of JAX
import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

import spectrax


SHIPPED = Path(__file__).parent / "data" / "digits.npz"

# No slope of these exceeds 1. Those of GELU and SiLU do.
ONE_LIPSCHITZ = ("identity", "relu", "tanh")

MATRICES = ("Linear", "Embedding")
CONVOLUTIONS = tuple(
    f"{name}{dim}" for name in ("Conv", "ConvTranspose") for dim in ("1d", "2d", "3d")
)

Layer = eqx.nn.Conv | eqx.nn.ConvTranspose


class Checkpoint(NamedTuple):
    arrays: dict[str, np.ndarray]
    config: dict[str, Any] | None  # as `train_checkpoint.py` writes it


class Weight(NamedTuple):
    name: str
    array: np.ndarray
    layer: Layer | None  # None: a matrix
    input_size: tuple[int, ...] | None


class Row(NamedTuple):
    """One enclosure. A convolution has one at its input size and one at every size."""

    name: str
    kind: str
    shape: tuple[int, ...]
    input_size: tuple[int, ...] | None
    lower: float
    upper: float
    in_size: int | None  # entries of an input and an output, if they are known
    out_size: int | None
    reshaped: float | None  # None: a matrix, to which nothing has been done

    @property
    def width(self) -> float:
        return 0.0 if self.upper == 0 else (self.upper - self.lower) / self.upper


# --- Reading -----------------------------------------------------------------------


_DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
}


def read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays and the metadata.

    The format: the length of the header in 8 bytes, little-endian; the header, a JSON
    object from names to `dtype`, `shape` and `data_offsets`; the bytes of the arrays,
    one after the other without gaps.
    """
    content = path.read_bytes()
    if len(content) < 8:
        raise ValueError(f"expected at least 8 bytes in {path}, got {len(content)}.")
    start = 8 + int.from_bytes(content[:8], "little")
    if start > len(content):
        raise ValueError(
            f"expected a header of {start - 8} bytes in {path}, but only "
            f"{len(content) - 8} bytes follow. The file is cut off, or of another kind."
        )
    try:
        header = json.loads(content[8:start], object_pairs_hook=_without_repeats)
    except UnicodeDecodeError as error:
        raise ValueError(f"expected a header in UTF-8 in {path}: {error}.") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"expected a JSON header in {path}: {error}.") from error
    if not isinstance(header, dict):
        raise ValueError(
            f"expected the header of {path} to be an object, got "
            f"{type(header).__name__}."
        )
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise ValueError(f"expected `__metadata__` of {path} to be an object.")
    spans = {name: _span(name, entry) for name, entry in header.items()}
    end = 0
    for name, (begin, stop) in sorted(spans.items(), key=lambda item: item[1]):
        if begin != end:
            raise ValueError(f"expected {name} to begin at byte {end}, not {begin}.")
        end = stop
    if end != len(content) - start:
        raise ValueError(
            f"expected {end} bytes of arrays in {path}, got {len(content) - start}."
        )
    arrays = {}
    for name, (begin, stop) in spans.items():
        entry = header[name]
        array = np.frombuffer(content[start + begin : start + stop], _dtype_of(entry))
        arrays[name] = array.reshape(entry["shape"])
    return arrays, metadata


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("expected every name once in the header, got one repeated.")
    return found


def _dtype_of(entry: dict[str, Any]) -> np.dtype[Any]:
    return _DTYPES[entry["dtype"]]


def _span(name: str, entry: object) -> tuple[int, int]:
    """Where the bytes of an array are, after checks that they are what it needs."""
    keys = {"dtype", "shape", "data_offsets"}
    if not isinstance(entry, dict) or set(entry) != keys:
        raise ValueError(f"expected {name} to have {sorted(keys)}, got {entry!r}.")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(
            f"expected the dtype of {name} to be one of {', '.join(_DTYPES)}; got "
            f"{dtype!r}."
        )
    if not _naturals(shape):
        raise ValueError(f"expected {name} to have a shape, got {shape!r}.")
    if not _naturals(offsets) or len(offsets) != 2:
        raise ValueError(f"expected two offsets for {name}, got {offsets!r}.")
    needed = math.prod(shape) * _dtype_of(entry).itemsize
    if offsets[1] - offsets[0] != needed:
        raise ValueError(
            f"expected {needed} bytes for {name}, of shape {tuple(shape)} and dtype "
            f"{dtype}; its offsets {offsets} hold {offsets[1] - offsets[0]}."
        )
    return offsets[0], offsets[1]


def _naturals(numbers: object) -> bool:
    return isinstance(numbers, list) and all(
        type(number) is int and number >= 0 for number in numbers
    )


def read_npz(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The same for numpy's archives; an entry `config` is metadata."""
    if not zipfile.is_zipfile(path):
        raise ValueError(f"expected {path} to be an archive of `numpy.savez`.")
    with np.load(path, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    config = arrays.pop("config", None)
    raw = [name for name, array in arrays.items() if array.dtype.kind == "V"]
    if raw:
        raise ValueError(
            f"expected numbers, got raw bytes for {', '.join(raw)}. bfloat16 has no "
            "name in .npz files: store float32, or use .safetensors."
        )
    return arrays, {} if config is None else {"config": str(config)}


def read_checkpoint(path: Path) -> Checkpoint:
    readers = {".npz": read_npz, ".safetensors": read_safetensors}
    if path.suffix not in readers:
        raise ValueError(f"expected {path} to end in {' or '.join(readers)}.")
    arrays, metadata = readers[path.suffix](path)
    if "config" not in metadata:
        return Checkpoint(arrays, None)
    config = json.loads(metadata["config"])
    if not isinstance(config, dict) or not isinstance(config.get("weights"), dict):
        raise ValueError(f"expected `config` of {path} to have an object `weights`.")
    missing = [name for name in config["weights"] if name not in arrays]
    if missing:
        raise ValueError(f"expected {', '.join(missing)} in {path}, as `config` says.")
    return Checkpoint(arrays, config)


# --- What the weights are ----------------------------------------------------------


def without_loss(array: np.ndarray) -> np.ndarray:
    """The same numbers in a dtype in which products are computed."""
    narrow = array.dtype in (np.dtype(np.float16), _DTYPES["BF16"])
    return array.astype(np.float32) if narrow else array


def convolution(array: np.ndarray, entry: dict[str, Any]) -> Layer:
    """The layer that an entry of `config` describes, with this weight and no bias."""
    out_channels, in_per_group, *taps = array.shape
    transposed = entry["type"].startswith("ConvTranspose")
    groups = entry.get("groups", 1)
    padding = entry.get("padding", 0)
    if isinstance(padding, list):
        padding = [tuple(p) if isinstance(p, list) else p for p in padding]
    make = eqx.nn.Conv
    if transposed:
        extra = entry.get("output_padding", 0)
        make = ft.partial(eqx.nn.ConvTranspose, output_padding=extra)
    layer = eqx.filter_eval_shape(
        ft.partial(
            make,
            num_spatial_dims=len(taps),
            in_channels=in_per_group * groups,
            out_channels=out_channels,
            kernel_size=taps,
            stride=entry.get("stride", 1),
            padding=padding,
            dilation=entry.get("dilation", 1),
            groups=groups,
            use_bias=False,
            padding_mode=entry.get("padding_mode", "ZEROS"),
        ),
        key=jr.key(0),
    )
    return eqx.tree_at(lambda layer: layer.weight, layer, jnp.asarray(array))


def described(checkpoint: Checkpoint, sizes: Sequence[int] | None) -> list[Weight]:
    """The weights that `config` names."""
    assert checkpoint.config is not None
    weights = []
    for name, entry in checkpoint.config["weights"].items():
        array = without_loss(checkpoint.arrays[name])
        kind = entry.get("type")
        if kind not in (*MATRICES, *CONVOLUTIONS):
            raise ValueError(
                f"expected the type of {name} to be one of "
                f"{', '.join((*MATRICES, *CONVOLUTIONS))}; got {kind!r}."
            )
        ndim = 2 if kind in MATRICES else 2 + int(kind[-2])
        if array.ndim != ndim:
            raise ValueError(
                f"expected {name}, of type {kind}, to have {ndim} axes; got shape "
                f"{array.shape}."
            )
        if kind in MATRICES:
            weights.append(Weight(name, array, None, None))
            continue
        own = entry.get("input_size")
        size = _size_for(array.ndim - 2, sizes) if own is None else tuple(own)
        weights.append(Weight(name, array, convolution(array, entry), size))
    return weights


def guessed(
    checkpoint: Checkpoint,
    sizes: Sequence[int] | None,
    stride: int,
    padding: int | str,
) -> list[Weight]:
    """Without a `config`: all arrays with two axes or more that are not biases."""
    weights = []
    for name, array in checkpoint.arrays.items():
        array = without_loss(array)
        number = np.issubdtype(array.dtype, np.inexact)
        if name.endswith("bias") or not number or array.ndim < 2 or array.size == 0:
            continue
        if array.ndim == 2:
            weights.append(Weight(name, array, None, None))
        elif array.ndim <= 5:
            entry = {"type": "Conv", "stride": stride, "padding": padding}
            size = _size_for(array.ndim - 2, sizes)
            weights.append(Weight(name, array, convolution(array, entry), size))
    return weights


def one_of_each(weights: Sequence[Weight]) -> list[Weight]:
    """The first weight of each type."""
    kinds = [type(weight.layer) for weight in weights]
    return [weight for i, weight in enumerate(weights) if kinds[i] not in kinds[:i]]


def _size_for(dim: int, sizes: Sequence[int] | None) -> tuple[int, ...] | None:
    """One number stands for all axes."""
    if sizes is None or len(sizes) not in (1, dim):
        return None
    return tuple(sizes) * (dim // len(sizes))


def kind_of(layer: Layer | None) -> str:
    """As in 'Conv2d, stride 2, 4 groups'."""
    if layer is None:
        return "matrix"
    name = type(layer).__name__ + f"{layer.num_spatial_dims}d"
    words = [name]
    for what, numbers in (("stride", layer.stride), ("dilation", layer.dilation)):
        if any(n != 1 for n in numbers):
            words.append(f"{what} {'x'.join(map(str, dict.fromkeys(numbers)))}")
    if layer.groups > 1:
        words.append(f"{layer.groups} groups")
    if layer.padding_mode != "ZEROS":
        words.append(layer.padding_mode.lower())
    return ", ".join(words)


# --- The enclosures ----------------------------------------------------------------


def reshaped_norm(array: np.ndarray) -> float:
    """Of the kernel as a matrix `[out, -1]`, by a decomposition in float64: no bound,
    and not the norm of the convolution."""
    wide = np.complex128 if np.iscomplexobj(array) else np.float64
    if not np.all(np.isfinite(array)):
        return math.nan
    return float(np.linalg.norm(array.reshape(len(array), -1).astype(wide), 2))


def enclosures(weight: Weight, rtol: float) -> list[Row]:
    if weight.layer is None:
        out_size, in_size = weight.array.shape
        box = spectrax.enclose_norm(jnp.asarray(weight.array), rtol=rtol)
        ends = float(box.lower), float(box.upper)
        shape = (out_size, in_size)
        name = weight.name
        return [Row(name, "matrix", shape, None, *ends, in_size, out_size, None)]
    rows = []
    reshaped = reshaped_norm(weight.array)
    sizes = [None] if weight.input_size is None else [weight.input_size, None]
    for size in sizes:
        operator = spectrax.layer_operator(weight.layer, input_size=size)
        box = spectrax.enclose_norm(operator, rtol=rtol)
        lattice = isinstance(operator, spectrax.LatticeConvolution)
        row = Row(
            weight.name,
            kind_of(weight.layer),
            weight.array.shape,
            size,
            float(box.lower),
            float(box.upper),
            None if lattice else operator.in_size(),
            None if lattice else operator.out_size(),
            reshaped,
        )
        rows.append(row)
    return rows


def lipschitz_bound(chain: dict[str, Any], rows: Sequence[Row]) -> float:
    """The product of the upper ends, rounded up, after checks that the layers of
    `config["chain"]` follow each other with only 1-Lipschitz functions between them."""
    if chain["activation"] not in ONE_LIPSCHITZ:
        raise ValueError(
            f"expected the activation to be one of {', '.join(ONE_LIPSCHITZ)}, which "
            f"are 1-Lipschitz; got {chain['activation']!r}."
        )
    at_size = {row.name: row for row in rows if row.in_size is not None}
    product, size = Fraction(1), None
    for name in chain["weights"]:
        if name not in at_size:
            raise ValueError(f"expected {name}, of the chain, to have an input size.")
        row = at_size[name]
        if size is not None and row.in_size != size:
            raise ValueError(
                f"expected {name} to take the {size} numbers that the layer before it "
                f"gives, but it takes {row.in_size}."
            )
        product, size = product * Fraction(row.upper), row.out_size
    nearest = float(product)
    above = math.nextafter(nearest, math.inf)
    return nearest if Fraction(nearest) >= product else above


# --- What is shown -----------------------------------------------------------------


def outwards(value: float, *, up: bool, precision: int) -> Decimal:
    """Rounded such that what is printed is a bound as well."""
    rounding = ROUND_CEILING if up else ROUND_FLOOR
    return Context(prec=precision, rounding=rounding).create_decimal_from_float(value)


def lower_text(value: float) -> str:
    return f"{outwards(value, up=False, precision=6):g}"


def upper_text(value: float) -> str:
    return f"{outwards(value, up=True, precision=6):g}"


def width_text(value: float) -> str:
    return f"{float(outwards(value, up=True, precision=2)):.1e}"


def size_text(row: Row) -> str:
    if row.kind == "matrix":
        return "-"
    return "every" if row.input_size is None else "x".join(map(str, row.input_size))


def table(rows: Sequence[Row]) -> str:
    heads = (
        "weight",
        "kind",
        "shape",
        "input",
        "lower",
        "upper",
        "width",
        "reshaped",
        "reshaped/upper",
    )
    lines: list[tuple[str, ...]] = [heads]
    for row in rows:
        reshaped = ratio = "-"
        if row.reshaped is not None:
            reshaped = f"{row.reshaped:.6g}"
            ratio = f"{row.reshaped / row.upper:.3f}" if row.upper > 0 else "-"
        line = (
            row.name,
            row.kind,
            "x".join(map(str, row.shape)),
            size_text(row),
            lower_text(row.lower),
            upper_text(row.upper),
            width_text(row.width),
            reshaped,
            ratio,
        )
        lines.append(line)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    left = 4  # columns of words
    texts = [
        "  ".join(
            text.ljust(width) if i < left else text.rjust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return "\n".join([texts[0], "-" * len(texts[0]), *texts[1:]])


def draw(rows: Sequence[Row], path: Path) -> None:
    names = list(dict.fromkeys(row.name for row in rows))
    figure = Figure(figsize=(8, 1.4 + 0.55 * len(names)), layout="constrained")
    ax = figure.subplots()
    styles = (
        ("at its input size", "tab:blue", lambda row: row.in_size is not None),
        ("at every input size", "tab:orange", lambda row: row.in_size is None),
    )
    for offset, (label, color, chosen) in zip((-0.12, 0.12), styles, strict=True):
        shown = [row for row in rows if chosen(row)]
        if not shown:
            continue
        y = [names.index(row.name) + offset for row in shown]
        middle = np.array([(row.lower + row.upper) / 2 for row in shown])
        half = np.array([(row.upper - row.lower) / 2 for row in shown])
        label = f"enclosure {label}"
        ax.errorbar(
            middle, y, xerr=half, fmt="none", capsize=6, color=color, label=label
        )
    kernels = {row.name: row.reshaped for row in rows if row.reshaped is not None}
    if kernels:
        y = [names.index(name) for name in kernels]
        ax.plot(list(kernels.values()), y, "kx", label="norm of the reshaped kernel")
    ax.set_yticks(range(len(names)), names)
    ax.set_xlim(left=0)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_xlabel("spectral norm")
    ax.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=3, fontsize=9)
    figure.savefig(path, dpi=110)


# --- The promise -------------------------------------------------------------------


def verify(rows: Sequence[Row]) -> None:
    """Exits with code 1 and a message unless `lower <= upper < infinity` everywhere."""
    broken = [
        f"{row.name}: lower end {row.lower}, upper end {row.upper}"
        for row in rows
        if not (row.lower <= row.upper and math.isfinite(row.upper))
    ]
    if broken:
        sys.exit("These are not enclosures.\n" + "\n".join(broken))
    widest = width_text(max(row.width for row in rows))
    print(f"{len(rows)} norms enclosed, all within {widest} of the upper end")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--checkpoint", type=Path, default=SHIPPED)
    parser.add_argument(
        "--input-size",
        type=int,
        nargs="+",
        metavar="N",
        help="spatial sizes of convolutions for which the checkpoint has none; one "
        "number stands for all axes",
    )
    guesses = "of convolutions, if the checkpoint has no `config`"
    parser.add_argument("--stride", type=int, default=1, help=guesses)
    parser.add_argument("--padding", default="SAME", help=guesses)
    parser.add_argument("--rtol", type=float, default=1e-3, help="width asked for")
    parser.add_argument("--out", type=Path, default=Path("examples/output"))
    parser.add_argument("--smoke", action="store_true", help="one weight of each type")
    args = parser.parse_args(argv)
    args.padding = int(args.padding) if args.padding.isdigit() else args.padding
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    jax.config.update("jax_enable_x64", True)  # narrower, and float64 is read as it is
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint = read_checkpoint(args.checkpoint)
    if checkpoint.config is None:
        weights = guessed(checkpoint, args.input_size, args.stride, args.padding)
    else:
        weights = described(checkpoint, args.input_size)
    if not weights:
        sys.exit(f"{args.checkpoint} has no weights with two axes or more.")
    left_out = checkpoint.arrays.keys() - {weight.name for weight in weights}
    if args.smoke:
        weights = one_of_each(weights)

    rows = []
    for weight in tqdm(weights, desc="enclosing", unit="weight"):
        rows += enclosures(weight, args.rtol)
    print(table(rows))
    if left_out:
        print(f"\nNo norms of: {', '.join(sorted(left_out))}")
    print()
    verify(rows)
    short = {
        row.name
        for row in rows
        if row.reshaped is not None and row.reshaped < row.lower
    }
    convolutions = sum(weight.layer is not None for weight in weights)
    if convolutions > 0:
        print(
            f"The reshaped norm is below the true one for {len(short)} of "
            f"{convolutions} convolutions."
        )
    chain = None if checkpoint.config is None else checkpoint.config.get("chain")
    if chain is not None and not args.smoke:
        bound = lipschitz_bound(chain, rows)
        print(
            f"Lipschitz bound of the network: {upper_text(bound)}, the product of the "
            f"upper ends at the\ninput sizes. Between the weights are only biases, "
            f"{chain['activation']} and reshapes, none of\nwhich moves two points "
            "further apart."
        )
    path = args.out / "certify_checkpoint.png"
    draw(rows, path)
    print(f"The enclosures are drawn in {path}")


if __name__ == "__main__":
    main()
