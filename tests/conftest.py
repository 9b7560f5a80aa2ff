import os
from collections.abc import Callable, Iterator

import hypothesis
import jax
import jax.random as jr
import pytest
from jaxtyping import PRNGKeyArray


jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Compilation takes longer than any deadline; shapes are few, so that drawn matrices
# share what was compiled.
hypothesis.settings.register_profile(
    "ordinary", deadline=None, max_examples=25, print_blob=True
)
hypothesis.settings.register_profile(
    "thorough", hypothesis.settings.get_profile("ordinary"), max_examples=2500
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--thorough",
        action="store_true",
        help="draw a hundred times as many examples in each test with hypothesis",
    )


def pytest_configure(config: pytest.Config) -> None:
    thorough = config.getoption("--thorough")
    hypothesis.settings.load_profile("thorough" if thorough else "ordinary")


@pytest.fixture(autouse=True, scope="module")
def _compiler(request: pytest.FixtureRequest) -> Iterator[None]:
    """Most modules are compiled without most of XLA's optimizations, which saves a
    quarter of the suite's time. Those that test rounding or the compiled program, and
    the main example, say `OPTIMIZED = True`.

    At the end, frees what a module compiled: each program holds maps of memory, of
    which a process may have only so many, and the compiler aborts when they run out.
    """
    optimized = getattr(request.module, "OPTIMIZED", False)
    jax.config.update("jax_disable_most_optimizations", not optimized)
    yield
    jax.clear_caches()


@pytest.fixture
def getkey() -> Callable[[], PRNGKeyArray]:
    """A fresh key at each call; `SPECTRAX_TEST_SEED` chooses other ones."""
    key = jr.key(int(os.environ.get("SPECTRAX_TEST_SEED", "5678")))

    def next_key() -> PRNGKeyArray:
        nonlocal key
        key, new = jr.split(key)
        return new

    return next_key
