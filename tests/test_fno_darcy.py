"""The example of Darcy flow: its data are solutions, it runs, its check can fail."""

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from .scripts import example_script


@pytest.fixture
def darcy() -> Iterator[ModuleType]:
    """The example as a module, under the settings of a user who has set none."""
    with example_script("fno_darcy") as module:
        yield module


def test_solver_on_a_constant_coefficient(darcy: ModuleType):
    """Against the Fourier series of the solution; the error is of second order."""
    k = np.arange(1, 400, 2)
    m, n = np.meshgrid(k, k)
    signs = np.sin(m * np.pi / 2) * np.sin(n * np.pi / 2)
    center = np.sum(16 * signs / (np.pi**4 * m * n * (m**2 + n**2)))
    errors = [
        3 * darcy.solve(np.full((n, n), 3.0))[n // 2, n // 2] - center for n in (9, 17)
    ]
    assert abs(errors[1]) < 4e-4
    np.testing.assert_allclose(errors[0] / errors[1], 4, rtol=0.1)


def test_solver_on_layers(darcy: ModuleType):
    """Flow is conserved: what enters a jump of the coefficient leaves it."""
    size = 33
    a = np.full((size, size), darcy.LOW)
    a[size // 2 + 1 :] = darcy.HIGH
    u = darcy.solve(a)
    assert np.all(u[[0, -1]] == 0)
    assert np.all(u[:, [0, -1]] == 0)
    assert np.all(u[1:-1, 1:-1] > 0)
    # The source is 1 everywhere: so much flows out through the sides.
    h = 1 / (size - 1)
    sides = [
        a[0] * u[1],
        a[-1] * u[-2],
        2 / (1 / a[:, 0] + 1 / a[:, 1]) * u[:, 1],
        2 / (1 / a[:, -1] + 1 / a[:, -2]) * u[:, -2],
    ]
    outflow = sum(side[1:-1].sum() for side in sides)
    np.testing.assert_allclose(outflow, ((size - 2) * h) ** 2, rtol=1e-12)


def test_smoke(darcy: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "made" / "by the example"
    assert darcy.main(["--smoke", "--out", str(out), "--steps", "2"]) == 0
    image = (out / "fno_darcy.png").read_bytes()
    assert image.startswith(b"\x89PNG")
    assert len(image) > 10_000
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if line.startswith("norm 1")]
    found, proven = map(float, rows[0].split()[-3:-1])
    assert 0 < found <= proven
    np.testing.assert_allclose(proven, darcy.OUTPUT_SCALES[0], rtol=2e-3)
    assert "No network stretched" in printed
    # The data are kept.
    (file,) = out.glob("*.npz")
    data = darcy.load_data(file, 32, 8, 17, 0)
    assert data.train[0].shape == data.train[1].shape == (24, 1, 17, 17)
    assert data.test[0].shape == data.test[1].shape == (8, 1, 17, 17)
    assert set(np.unique(data.test[0])) == {-1.0, 1.0}


def test_reports_a_broken_bound(darcy: ModuleType):
    def row(found: float) -> object:
        return darcy.Row("model", 0.1, 0.1, [0.1], found, 2.0, 0.1)

    darcy.verify([row(2.0), row(1.0)])
    for found in (2.001, float("nan")):
        with pytest.raises(SystemExit, match="model: stretches .* proven was 2.000000"):
            darcy.verify([row(1.0), row(found)])
