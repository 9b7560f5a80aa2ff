"""The example of transfer learning: it runs, and its checks can fail."""

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from .scripts import example_script


@pytest.fixture(scope="module")
def example() -> Iterator[ModuleType]:
    """The example as a module, under the settings of a user who has set none."""
    with example_script("transfer") as module:
        yield module


def test_smoke(example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "made" / "by the example"
    example.main(["--smoke", "--out", str(out)])
    image = (out / "transfer.png").read_bytes()
    assert image.startswith(b"\x89PNG")
    assert len(image) > 10_000
    printed = capsys.readouterr().out
    assert printed.count("\nClipToInitial ") == len(example.RATES)
    assert "starts unchanged to the last bit" in printed
    assert printed.count("Linear") == 3  # a row for each layer
    assert "Every norm stayed in its interval." in printed


@pytest.mark.parametrize("steps", ["0", "15"])
def test_steps_are_whole_chunks(
    example: ModuleType, steps: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit, match="2"):
        example.arguments(["--steps", steps])
    assert "multiple of 10" in capsys.readouterr().err


def test_digits_lie_on_their_side(example: ModuleType):
    image = np.zeros((1, 8, 8))
    image[0, 0, 2] = 1  # in the upper row
    turned = example.on_its_side(image.reshape(1, 64)).reshape(8, 8)
    assert np.argwhere(turned).tolist() == [[5, 0]]  # in the left column


def test_few_images_of_each_class(example: ModuleType):
    data = example.load_data([3, 4])
    x, y = data.new_train
    assert x.shape == (2, 100, 64)
    assert [jnp.sum(y[1] == label) for label in range(10)] == [10] * 10
    assert not jnp.array_equal(x[0], x[1])
    assert data.new_test[0].shape == data.old_test[0].shape == (2, 540, 64)


def grown(example: ModuleType, factor: float):
    """A run that starts from a network, with bounds that are `factor` times its
    norms, and whose weights then were doubled."""

    @eqx.filter_vmap
    def make(seed):
        return eqx.nn.MLP(4, 4, 4, depth=1, key=jr.key(seed))

    networks = make(jnp.arange(1))
    constraint = example.spectrax.ClipToInitial(factor)
    start = eqx.filter_vmap(example.start, in_axes=(eqx.if_array(0), 0, None))
    run = start(networks, jnp.ones(1), constraint)
    weights, static = eqx.partition(run.model, eqx.is_inexact_array)
    model = eqx.combine(jax.tree.map(lambda x: 2 * x, weights), static)
    return networks, run, run._replace(model=model)


def verify(example: ModuleType, factor: float) -> None:
    networks, _, run = grown(example, factor)
    lanes = example.Lanes(jnp.zeros(1, int), jnp.ones(1))
    result = example.Result(*[np.zeros(1)] * 5, run)
    example.verify({"ClipToInitial": result}, networks, lanes)


def test_norms_that_cannot_grow(
    example: ModuleType, capsys: pytest.CaptureFixture[str]
):
    verify(example, 1.0)
    assert "Every norm stayed in its interval." in capsys.readouterr().out


def test_reports_norms_that_have_grown(example: ModuleType):
    with pytest.raises(SystemExit, match="a norm exceeds its bound by 5.0e-01"):
        verify(example, 1.5)


def test_reports_a_start_that_is_not_the_same(example: ModuleType):
    networks, first, later = grown(example, 1.0)
    example.check_start(first, networks)
    with pytest.raises(SystemExit, match="does not start unchanged"):
        example.check_start(later, networks)
