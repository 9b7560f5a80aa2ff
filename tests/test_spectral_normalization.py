"""The six steps: they run, their promises can be broken, and the notebook is theirs."""

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import equinox as eqx
import jax
import numpy as np
import pytest

from .scripts import example_script, EXAMPLES, load


ROOT = Path(__file__).parents[1]
EXAMPLE = EXAMPLES / "spectral_normalization.py"
NOTEBOOK = ROOT / "docs" / "examples" / "spectral_normalization.ipynb"


@pytest.fixture
def example() -> Iterator[ModuleType]:
    """The example as a module, under the settings of a user who has set none."""
    with example_script("spectral_normalization") as module:
        yield module


@pytest.fixture
def maker() -> ModuleType:
    return load(ROOT / "docs" / "_extensions" / "notebook.py")


def test_smoke(example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "made" / "by the example"
    example.main(["--smoke", "--out", str(out)])
    printed = capsys.readouterr().out
    for number in range(1, 7):
        assert f"--- {number}. " in printed
        image = (out / f"spectral_normalization_{number}.png").read_bytes()
        assert image.startswith(b"\x89PNG")

    def row(start: str) -> list[float]:
        (line,) = re.findall(f"^{re.escape(start)}  +(.*)$", printed, re.MULTILINE)
        return [float(x) for x in re.findall(r"-?\d+\.\d+(?:e[+-]\d+)?", line)]

    assert row("Linear, normalized") == pytest.approx([1.0], abs=1e-4)
    assert row("Conv2d, at every size")[0] < row("Conv2d, at 6x6")[0] < 1.0001
    # The reshaped kernel's norm is not the convolution's.
    assert row("Conv2d, reshaped kernel")[0] > 1.2
    # The Jacobian of dot-product attention grows with the square of the distance.
    assert row("256")[0] / row("128")[0] == pytest.approx(4, rel=0.05)
    assert max(row(f"{2**i}")[1] for i in range(9)) < row("Lipschitz bound")[-1]
    assert row("diagonal       one vector")[0] > row("diagonal       block of 8")[0]
    assert row("fixed at 2")[2] == pytest.approx(8, rel=1e-3)


def test_a_value_above_its_bound_ends_the_program(example: ModuleType):
    example.expect_at_most("norm", 1.001, 1.0)
    for broken in (1.003, float("nan")):
        with pytest.raises(SystemExit, match=r"norm: .* is above its bound 1\.0"):
            example.expect_at_most("norm", broken, 1.0)


def test_certified_bound_is_the_product_of_the_norms(example: ModuleType):
    mlp = eqx.nn.MLP(3, 2, 5, depth=2, key=jax.random.key(0))
    norms = [np.linalg.norm(np.asarray(w.weight, np.float64), 2) for w in mlp.layers]
    bound = example.certified_bound(mlp)
    assert np.prod(norms) <= bound <= np.prod(norms) * 1.001


def test_the_notebook_has_the_code_of_the_script(maker: ModuleType):
    made = json.loads(NOTEBOOK.read_text())
    committed = [(c["cell_type"], "".join(c["source"])) for c in made["cells"]]
    script = EXAMPLE.read_text()
    assert committed == maker.cells(script)
    # And all of it: what is left out does not compute anything.
    code = "\n".join(source for kind, source in committed if kind == "code")
    for name in re.findall(r"^(?:def|class) (\w+)", script, re.MULTILINE):
        assert (f" {name}" in code) == (name not in ("arguments", "main"))


def test_the_notebook_has_run():
    made = json.loads(NOTEBOOK.read_text())
    cells = [cell for cell in made["cells"] if cell["cell_type"] == "code"]
    assert [c["execution_count"] for c in cells] == list(range(1, len(cells) + 1))
    kinds = {output["output_type"] for cell in cells for output in cell["outputs"]}
    assert kinds == {"stream", "execute_result"}
    called = [cell for cell in cells if cell["outputs"]]
    assert len(called) == 6
    for cell in called:
        stream, figure = cell["outputs"]
        assert stream["name"] == "stdout"
        png = base64.b64decode("".join(figure["data"]["image/png"]))
        assert png.startswith(b"\x89PNG")


def test_the_page_shows_the_notebook(maker: ModuleType):
    text, pictures = maker.page(json.loads(NOTEBOOK.read_text()), NOTEBOOK.stem)
    assert NOTEBOOK.with_suffix(".md").read_text() == text
    assert len(pictures) == 6
    for name, picture in pictures.items():
        assert (ROOT / "docs" / "assets" / name).read_bytes() == picture
        assert len(picture) < 200_000


def test_cells(maker: ModuleType):
    script = (
        '"""Doc."""\n\n# %% [markdown]\n# # Title\n#\n# Text.\n\n\n# %%\n'
        "def step_1_a(settings):\n    return settings\n\n\n# %% [script]\nmain()\n"
    )
    assert maker.cells(script) == [
        ("code", "%matplotlib inline"),
        ("markdown", "# Title\n\nText."),
        ("code", "def step_1_a(settings):\n    return settings"),
        ("code", "step_1_a(Settings())"),
    ]


def test_new_text_keeps_the_outputs(maker: ModuleType):
    old, new, other = (
        maker.notebook(f"# %% [markdown]\n# {text}\n\n# %%\n{code}\n")
        for text, code in [("Old.", "x = 1"), ("New.", "x = 1"), ("New.", "x = 2")]
    )
    old["cells"][2]["outputs"] = ["something"]
    assert maker.same_code(old, new)
    assert not maker.same_code(old, other)
    made = maker.with_outputs(new, old)
    assert made["cells"][1]["source"] == "New."
    assert made["cells"][2]["outputs"] == ["something"]
