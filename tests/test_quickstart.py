"""The main example: it runs, shows its figure, and its checks can fail."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import jax
import pytest

from spectrax import SummaryRow

from .scripts import example_script


OPTIMIZED = True  # see conftest.py


@pytest.fixture
def quickstart() -> Iterator[ModuleType]:
    """The example as a module, under the settings of a user who has set none."""
    with example_script("quickstart") as module:
        yield module


def row(true_norm: float | None, bound: float = 1.0) -> SummaryRow:
    return SummaryRow(
        "weight", "Linear", (4, 8), 2.0, 1.0, bound, 1e-4, "estimate", true_norm
    )


def test_smoke(
    quickstart: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "made" / "by the example"
    quickstart.main(["--smoke", "--out", str(out), "--steps", "20"])
    image = (out / "singular_values.png").read_bytes()
    assert image.startswith(b"\x89PNG")
    assert len(image) > 10_000
    printed = capsys.readouterr().out
    assert "test accuracy, wrapped: " in printed
    assert printed.count("Linear") == 4  # a row for each layer
    assert "true norm" in printed
    assert "stayed within its bound" in printed


def test_accepts_what_keeps_the_promise(quickstart: ModuleType):
    quickstart.verify([row(1.0019), row(0.5)], {"attack": 1.0})
    quickstart.verify([row(2.0, bound=2.0)], {"attack": 2.0})


@pytest.mark.parametrize("true_norm", [1.0021, 2.0, math.nan, math.inf])
def test_reports_a_norm_above_its_bound(quickstart: ModuleType, true_norm: float):
    with pytest.raises(SystemExit, match="weight: norm .* exceeds the bound 1 by"):
        quickstart.verify([row(1.0), row(true_norm)], {"attack": 0.5})


@pytest.mark.parametrize("ratio", [1.01, math.nan])
def test_reports_a_successful_attack(quickstart: ModuleType, ratio: float):
    with pytest.raises(SystemExit, match="attack: ratio .* exceeds the network's"):
        quickstart.verify([row(1.0), row(1.001)], {"attack": ratio})


def test_excess_of_the_norms_is_granted_to_the_attack(quickstart: ModuleType):
    rows = [row(1.001), dataclasses.replace(row(1.001), path="other")]
    quickstart.verify(rows, {"attack": 1.002})
    with pytest.raises(SystemExit, match="ratio 1.0030"):
        quickstart.verify(rows, {"attack": 1.003})


def test_needs_true_norms(quickstart: ModuleType):
    with pytest.raises(ValueError, match="true_norm=True"):
        quickstart.verify([row(None)], {"attack": 0.5})


def test_attack_finds_the_norm_of_a_linear_map(quickstart: ModuleType):
    """Both ends: no attack exceeds the truth, and the strong ones reach it."""
    matrix = jax.numpy.diag(jax.numpy.array([3.0, 1.0, 0.5]))
    x = jax.random.normal(jax.random.key(0), (16, 3))
    found = quickstart.attack(lambda x: matrix @ x, x, steps=200, seed=0)
    assert max(found.values()) <= 3 * (1 + quickstart.ROUNDING)
    assert found["power method on Jacobians"] > 2.999
    assert found["gradient ascent from |d| = 1"] > 2.99
