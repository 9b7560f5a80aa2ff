"""The certificate of a checkpoint: its readers, its table, and that it can fail."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import ml_dtypes
import numpy as np
import pytest

from .scripts import example_script, EXAMPLES, load


OPTIMIZED = True  # see conftest.py


@pytest.fixture
def certify() -> Iterator[ModuleType]:
    """The example as a module, under the settings of a user who has set none."""
    with example_script("certify_checkpoint") as module:
        yield module


@pytest.fixture
def training() -> ModuleType:
    return load(EXAMPLES / "train_checkpoint.py")


# --- The whole ---------------------------------------------------------------------


def test_smoke(certify: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "made" / "by the example"
    certify.main(["--smoke", "--out", str(out)])
    image = (out / "certify_checkpoint.png").read_bytes()
    assert image.startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "3 norms enclosed, all within " in printed
    assert "below the true one for 1 of 1 convolutions" in printed
    assert "Lipschitz bound" not in printed  # weights have been left out
    with np.load(EXAMPLES / "data" / "digits.npz") as archive:
        arrays = {name: archive[name] for name in archive.files if name != "config"}
    rows = [line.split() for line in printed.splitlines()[2:5]]
    matrices = [row for row in rows if row[1] == "matrix"]
    assert len(matrices) == 1
    for name, _, _, _, lower, upper, *_ in matrices:
        truth = np.linalg.norm(arrays[name].astype(np.float64), 2)
        assert float(lower) <= truth <= float(upper) <= 1.001 * truth
    # The convolution: by numpy, on a grid of frequencies and as a matrix.
    kernel = arrays["layers.0.weight"].astype(np.float64)
    symbols = np.fft.fft2(kernel, (64, 64)).transpose(2, 3, 0, 1)
    at_every_size = np.linalg.norm(symbols, 2, axis=(-2, -1)).max()
    at_its_size = np.linalg.norm(written_out(kernel, (8, 8)), 2)
    for row, truth in zip(rows, (at_its_size, at_every_size), strict=False):
        assert row[1] == "Conv2d"
        lower, upper = float(row[4]), float(row[5])
        assert lower * (1 - 1e-3) <= truth <= upper
        assert upper <= 1.002 * truth


def written_out(kernel: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The matrix of a 3x3 convolution with zero padding 1, tap by tap."""
    height, width = size
    matrix = np.zeros((len(kernel), height, width, kernel.shape[1], height, width))
    for i in range(height):
        for j in range(width):
            for a in range(3):
                for b in range(3):
                    y, x = i + a - 1, j + b - 1
                    if 0 <= y < height and 0 <= x < width:
                        matrix[:, i, j, :, y, x] = kernel[:, :, a, b]
    return matrix.reshape(len(kernel) * height * width, -1)


def test_writer_and_reader_agree(
    certify: ModuleType, training: ModuleType, tmp_path: Path
):
    # Compiled as a whole, which takes less time than one operation after another.
    net = eqx.filter_jit(lambda key: training.Net(channels=4, hidden=6, key=key))(
        jr.key(0)
    )
    training.save(net, tmp_path / "small.npz")
    checkpoint = certify.read_checkpoint(tmp_path / "small.npz")
    weights = certify.described(checkpoint, None)
    assert [weight.name for weight in weights] == [
        f"layers.{i}.weight" for i in range(5)
    ]
    assert set(checkpoint.arrays) == {
        f"layers.{i}.{part}" for i in range(5) for part in ("weight", "bias")
    }
    assert [weight.input_size for weight in weights[:3]] == [(8, 8), (8, 8), (4, 4)]

    @eqx.filter_jit
    def both(found: eqx.nn.Conv, layer: eqx.nn.Conv, size: tuple[int, ...]) -> Any:
        x = jr.normal(jr.key(1), (layer.in_channels, *size))
        return found(x), layer(x) - jnp.asarray(layer.bias)

    for weight, layer in zip(weights, net.layers, strict=True):
        np.testing.assert_array_equal(weight.array, layer.weight)
        if weight.layer is None:
            assert isinstance(layer, eqx.nn.Linear)
            continue
        found, truth = both(weight.layer, layer, weight.input_size)
        np.testing.assert_allclose(found, truth, rtol=1e-5, atol=1e-5)
    shipped = certify.read_checkpoint(certify.SHIPPED)
    assert checkpoint.config == shipped.config  # which says nothing of channels
    kinds = [certify.kind_of(weight.layer) for weight in weights]
    assert kinds[1:4] == ["Conv2d, stride 2", "Conv2d, 4 groups, circular", "matrix"]


def test_shipped_checkpoint_is_small(certify: ModuleType):
    checkpoint = certify.read_checkpoint(certify.SHIPPED)
    assert certify.SHIPPED.stat().st_size < 200_000
    assert {array.dtype for array in checkpoint.arrays.values()} == {
        np.dtype(np.float32)
    }


# --- Readers -----------------------------------------------------------------------


def pack(header: Any, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def entry(dtype: Any, shape: Any, offsets: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_safetensors_round_trip(certify: ModuleType, tmp_path: Path):
    rng = np.random.default_rng(0)
    arrays = {
        "a.weight": rng.normal(size=(2, 3)).astype("<f4"),
        "b.weight": rng.normal(size=(4,)).astype("<f2"),
        "c.weight": rng.normal(size=(3, 1, 2, 2)).astype(ml_dtypes.bfloat16),
        "d.weight": rng.normal(size=(2, 2)).astype("<f8"),
        "empty": np.zeros((0, 5), "<f4"),
        "step": np.asarray(7, "<i8"),
    }
    names = ["F32", "F16", "BF16", "F64", "F32", "I64"]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    body = b""
    for (name, array), dtype in zip(arrays.items(), names, strict=True):
        end = len(body) + array.nbytes
        header[name] = entry(dtype, list(array.shape), [len(body), end])
        body += array.tobytes()
    path = tmp_path / "model.safetensors"
    path.write_bytes(pack(header, body))
    checkpoint = certify.read_checkpoint(path)
    assert checkpoint.config is None
    assert list(checkpoint.arrays) == list(arrays)
    for name, array in arrays.items():
        found = checkpoint.arrays[name]
        assert found.dtype == array.dtype
        np.testing.assert_array_equal(found, array)
    # Matrices and kernels, in dtypes that hold all their numbers.
    matrix, kernel, wide = certify.guessed(checkpoint, [8], 1, "SAME")
    assert (matrix.name, matrix.layer) == ("a.weight", None)
    assert (kernel.name, kernel.input_size) == ("c.weight", (8, 8))
    assert kernel.array.dtype == np.float32
    np.testing.assert_array_equal(kernel.array, arrays["c.weight"].astype(np.float32))
    assert kernel.layer.padding == "SAME"
    assert (wide.name, wide.array.dtype) == ("d.weight", np.float64)


def test_config_in_the_metadata(certify: ModuleType, tmp_path: Path):
    config = {"weights": {"w": {"type": "ConvTranspose1d", "stride": [2]}}}
    header = {
        "__metadata__": {"config": json.dumps(config)},
        "w": entry("F32", [2, 3, 2], [0, 48]),
    }
    path = tmp_path / "model.safetensors"
    path.write_bytes(pack(header, np.arange(12, dtype="<f4").tobytes()))
    (weight,) = certify.described(certify.read_checkpoint(path), None)
    assert isinstance(weight.layer, eqx.nn.ConvTranspose)
    assert weight.layer(jnp.ones((3, 5))).shape == (2, 10)
    assert certify.kind_of(weight.layer) == "ConvTranspose1d, stride 2"


F32 = entry("F32", [2], [0, 8])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"abc", "at least 8 bytes .* got 3"),
        ((100).to_bytes(8, "little") + b"{}", "header of 100 bytes .* cut off"),
        (pack(b"{"), "JSON header"),
        (pack(b'"\xff"'), "UTF-8"),
        (pack([]), "an object, got list"),
        (pack({"__metadata__": 1}), "`__metadata__` .* an object"),
        (pack(b'{"a": 1, "a": 1}'), "every name once"),
        (pack({"a": 1}), "a to have .*dtype.* got 1"),
        (pack({"a": {"dtype": "F32"}}), "a to have .*shape"),
        (pack({"a": entry("F8_E4M3", [2], [0, 2])}, b"12"), "dtype of a .* 'F8_E4M3'"),
        (pack({"a": entry("F32", [-2], [0, 8])}), r"a to have a shape, got \[-2\]"),
        (pack({"a": entry("F32", [2], [0])}), "two offsets for a"),
        (pack({"a": entry("F32", [2], [0, 4])}, bytes(4)), "8 bytes for a.* hold 4"),
        (pack({"a": entry("F32", [2], [8, 16])}, bytes(16)), "begin at byte 0, not 8"),
        (pack({"a": F32, "b": F32}, bytes(8)), "b to begin at byte 8, not 0"),
        (pack({"a": F32}, bytes(4)), "expected 8 bytes of arrays .* got 4"),
        (pack({"a": F32}, bytes(9)), "expected 8 bytes of arrays .* got 9"),
    ],
)
def test_malformed_safetensors(
    certify: ModuleType, tmp_path: Path, content: bytes, message: str
):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        certify.read_safetensors(path)


def test_malformed_archives(certify: ModuleType, tmp_path: Path):
    with pytest.raises(ValueError, match=r"to end in \.npz or \.safetensors"):
        certify.read_checkpoint(tmp_path / "model.pt")
    path = tmp_path / "model.npz"
    path.write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"archive of `numpy\.savez`"):
        certify.read_checkpoint(path)
    np.savez(path, a=np.zeros((2, 2), ml_dtypes.bfloat16))
    with pytest.raises(ValueError, match="raw bytes for a"):
        certify.read_checkpoint(path)
    np.savez(path, a=np.zeros((2, 2)), config="[]")
    with pytest.raises(ValueError, match="an object `weights`"):
        certify.read_checkpoint(path)
    np.savez(path, a=np.zeros((2, 2)), config=json.dumps({"weights": {"b": {}}}))
    with pytest.raises(ValueError, match="expected b in"):
        certify.read_checkpoint(path)


@pytest.mark.parametrize(
    ("kind", "message"),
    [("GRUCell", "type of w .* got 'GRUCell'"), ("Conv1d", "w, .* to have 3 axes")],
)
def test_types_that_do_not_fit(certify: ModuleType, kind: str, message: str):
    config = {"weights": {"w": {"type": kind}}}
    checkpoint = certify.Checkpoint({"w": np.zeros((2, 2), np.float32)}, config)
    with pytest.raises(ValueError, match=message):
        certify.described(checkpoint, None)


def test_plain_checkpoint(certify: ModuleType):
    """What is taken for a weight, and the options for all of them."""
    arrays = {
        "conv.weight": np.ones((4, 3, 3, 3), np.float32),
        "conv.bias": np.ones((4, 1, 1), np.float32),
        "norm.weight": np.ones(4, np.float32),
        "kernel": np.ones((2, 3), np.float16),
        "index": np.ones((2, 3), np.int32),
    }
    checkpoint = certify.Checkpoint(arrays, None)
    conv, dense = certify.guessed(checkpoint, [6, 8], 2, 1)
    assert (conv.name, dense.name) == ("conv.weight", "kernel")
    assert conv.input_size == (6, 8)
    assert conv.layer(jnp.ones((3, 6, 8))).shape == (4, 3, 4)
    assert dense.array.dtype == np.float32


# --- What is promised --------------------------------------------------------------


def row(
    certify: ModuleType, name: str, lower: float, upper: float, **sizes: int
) -> Any:
    ends = {"in_size": 4, "out_size": 4} | sizes
    return certify.Row(
        name, "matrix", (4, 4), None, lower, upper, **ends, reshaped=None
    )


def test_product_is_rounded_up(certify: ModuleType):
    rows = [row(certify, "a", 0.1, 0.1), row(certify, "b", 0.3, 0.3)]
    chain = {"weights": ["a", "b"], "activation": "relu"}
    bound = certify.lipschitz_bound(chain, rows)
    assert bound == math.nextafter(0.1 * 0.3, math.inf) or bound == 0.1 * 0.3
    exact = int(0.1 * 2**60) * int(0.3 * 2**60)  # both are whole
    assert exact <= int(bound * 2**120)


def test_chains_that_prove_nothing(certify: ModuleType):
    rows = [row(certify, "a", 1.0, 1.0, out_size=5), row(certify, "b", 1.0, 1.0)]
    chain = {"weights": ["a", "b"], "activation": "relu"}
    with pytest.raises(ValueError, match="b to take the 5 numbers .* it takes 4"):
        certify.lipschitz_bound(chain, rows)
    with pytest.raises(ValueError, match="1-Lipschitz; got 'gelu'"):
        certify.lipschitz_bound({**chain, "activation": "gelu"}, rows)
    with pytest.raises(ValueError, match="expected c, of the chain"):
        certify.lipschitz_bound({**chain, "weights": ["c"]}, rows)


@pytest.mark.parametrize(
    "ends", [(2.0, 1.0), (0.0, math.inf), (math.nan, math.nan)], ids=str
)
def test_reports_what_is_no_enclosure(certify: ModuleType, ends: tuple[float, float]):
    with pytest.raises(SystemExit, match="not enclosures.\nbad: lower end"):
        certify.verify([row(certify, "good", 1.0, 1.0), row(certify, "bad", *ends)])


def test_nonfinite_weights_fail(
    certify: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    arrays: dict[str, Any] = {"w.weight": np.full((2, 2), np.nan)}
    np.savez(tmp_path / "model.npz", **arrays)
    argv = ["--checkpoint", str(tmp_path / "model.npz"), "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match=r"w\.weight: lower end nan"):
        certify.main(argv)
    assert "NaN" in capsys.readouterr().out


def test_nothing_to_enclose(certify: ModuleType, tmp_path: Path):
    np.savez(tmp_path / "model.npz", scale=np.ones(3))
    argv = ["--checkpoint", str(tmp_path / "model.npz"), "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match="no weights with two axes"):
        certify.main(argv)


def test_prints_bounds(certify: ModuleType):
    """What is rounded for the table is rounded outwards."""
    assert certify.lower_text(2 / 3) == "0.666666"
    assert certify.upper_text(1 / 3) == "0.333334"
    assert certify.upper_text(0.5) == "0.5"
    assert certify.width_text(1.01e-3) == "1.1e-03"
    assert certify.upper_text(math.inf) == "Infinity"
