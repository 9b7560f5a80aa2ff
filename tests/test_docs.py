"""What users read is true: every code block runs, every name is documented."""

import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

import spectrax
import spectrax.internal

from .scripts import ordinary_settings


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
API_PAGES = sorted((ROOT / "docs" / "api").glob("*.md"))

_BLOCK = re.compile(r"^( *)```python\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_DIRECTIVE = re.compile(r"^::: spectrax\.([\w.]+)$", re.MULTILINE)
_SHARED = re.compile(r"\*\*Arguments:\*\* those of \[`spectrax\.([\w.]+)`\]")


def public(package: ModuleType, prefix: str = "") -> dict[str, Any]:
    """What a package has to offer, by the names that follow `spectrax.`."""
    return {
        prefix + name: value
        for name, value in sorted(vars(package).items())
        if not name.startswith("_") and not inspect.ismodule(value)
    }


PUBLIC = (
    public(spectrax)
    | public(spectrax.nn, "nn.")
    | public(spectrax.internal, "internal.")
)
NAMES = list(PUBLIC)
FUNCTIONS = [name for name in NAMES if inspect.isfunction(PUBLIC[name])]
CLASSES = [name for name in NAMES if inspect.isclass(PUBLIC[name])]


class Text(NamedTuple):
    """A page or a docstring with code in it."""

    name: str
    file: str
    text: str


def docstrings() -> Iterator[tuple[str, str]]:
    """Those of all public names and of the public methods of public classes."""
    for name, item in PUBLIC.items():
        yield name, item.__doc__ or ""
        if inspect.isclass(item):
            for method, value in vars(item).items():
                # Equinox wraps methods, which hides their kind but not their docstring.
                if callable(value) and not method.startswith("_"):
                    yield f"{name}.{method}", value.__doc__ or ""


def blocks(text: str) -> list[str]:
    """The Python blocks, each at its own line of an otherwise empty file."""
    return [
        "\n" * text.count("\n", 0, match.start(2)) + textwrap.dedent(match[2])
        for match in _BLOCK.finditer(text)
    ]


def texts() -> list[Text]:
    pages = [
        Text(str(page.relative_to(ROOT)), str(page), page.read_text())
        for page in PAGES
        # A notebook has the code of an example, which has a test of its own.
        if not page.with_suffix(".ipynb").exists()
    ]
    documented = [
        Text(f"spectrax.{name}", f"<docstring of spectrax.{name}>", text)
        for name, text in docstrings()
    ]
    return [text for text in [*pages, *documented] if blocks(text.text)]


@pytest.mark.parametrize("text", texts(), ids=lambda text: text.name)
def test_code_runs(text: Text):
    namespace: dict[str, Any] = {"__name__": "snippet"}
    with ordinary_settings():
        for block in blocks(text.text):
            exec(compile(block, text.file, "exec"), namespace)


def test_fences_are_recognised():
    """No code block escapes the test above, for its language or its indentation."""
    for page in PAGES:
        text = page.read_text()
        fences = re.findall(r"^ *```(\w*)", text, re.MULTILINE)
        opening = [language for language in fences if language]
        assert len(fences) == 2 * len(opening), page.name
        assert set(opening) <= {"python", "bash", "text"}, page.name
        assert opening.count("python") == len(blocks(text)), page.name


@pytest.mark.parametrize("name", NAMES)
def test_on_one_api_page(name: str):
    found = [
        page.name
        for page in API_PAGES
        for directive in _DIRECTIVE.findall(page.read_text())
        if directive == name
    ]
    assert len(found) == 1, f"spectrax.{name} stands on {found}"


def test_api_pages_name_nothing_else():
    for page in API_PAGES:
        named = set(_DIRECTIVE.findall(page.read_text()))
        assert named
        assert named <= set(NAMES), f"{page.name} names {named - set(NAMES)}"


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in PAGES[1:]:
        assert f": {page.relative_to(ROOT / 'docs')}\n" in navigation


@pytest.mark.parametrize(("name", "docstring"), list(docstrings()))
def test_docstring_exists(name: str, docstring: str):
    assert docstring.strip(), f"spectrax.{name} has no docstring"
    # What a dataclass is given if it has none.
    assert not docstring.startswith(name.split(".")[-1] + "("), (
        f"spectrax.{name} has no docstring"
    )


def heads(docstring: str) -> set[str]:
    return set(re.findall(r"\*\*(\w+):\*\*", docstring))


def with_shared(name: str) -> str:
    """A docstring and, if it says that it has the arguments of another, that one."""
    docstring = inspect.getdoc(PUBLIC[name]) or ""
    shared = _SHARED.search(docstring)
    return docstring + with_shared(shared[1]) if shared else docstring


@pytest.mark.parametrize("name", FUNCTIONS)
def test_sections_of_functions(name: str):
    function = PUBLIC[name]
    docstring = inspect.getdoc(function) or ""
    signature = inspect.signature(function)
    expected = {"Arguments", "Raises"}
    if signature.return_annotation is not None:
        expected.add("Returns")
    assert expected <= heads(docstring)
    explained = with_shared(name)
    for argument in signature.parameters:
        assert f"- `{argument}`:" in explained, f"`{argument}` is not documented"


@pytest.mark.parametrize("name", CLASSES)
def test_fields_of_classes(name: str):
    """What is given to a class, or found in it, is explained in its docstring."""
    docstring = with_shared(name)
    missing = {
        (name, argument)
        for argument in inspect.signature(PUBLIC[name]).parameters
        if f"`{argument}`" not in docstring
    }
    assert not missing


@pytest.mark.parametrize(
    "command",
    [
        'pip install ".[examples]" && python examples/quickstart.py',
        'pip install ".[test]" && pytest -n 2',
    ],
)
def test_readme_has_the_commands(command: str):
    assert f"\n```bash\n{command}\n```\n" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize(
    "path",
    [*PAGES, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "examples").glob("*.py"))],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_no_paths_of_a_machine(path: Path):
    machine = r"(?<![\w.])/(?:home|Users|work|opt|tmp|root|mnt)/"
    assert re.findall(machine, path.read_text()) == []


def test_links_of_the_readme_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    local = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert local
    assert [link for link in local if not (ROOT / link).exists()] == []
