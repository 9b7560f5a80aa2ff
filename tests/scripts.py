"""Scripts as modules, under the settings of a user who has set none."""

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import jax


EXAMPLES = Path(__file__).parents[1] / "examples"


@contextlib.contextmanager
def ordinary_settings() -> Iterator[None]:
    """Those of JAX; the tests have stricter ones."""
    strict = jax.config.jax_enable_x64  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_enable_x64", False)
    try:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            yield
    finally:
        jax.config.update("jax_enable_x64", strict)


def load(path: Path) -> ModuleType:
    """The script at `path` as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def example_script(name: str) -> Iterator[ModuleType]:
    """The example of that name, under those settings."""
    with ordinary_settings():
        yield load(EXAMPLES / f"{name}.py")
