"""Makes a notebook of an example, runs it, and writes the page that shows it.

The example has cells, each opened by a line `# %%`, or `# %% [markdown]` for text in
comments. A function `step_...` gets a cell that calls it. What stands before the first
cell, and cells opened by `# %% [script]`, are of no use in a notebook. If only the text
has changed since the last time nothing is run, unless with `--again`.

    pip install ".[notebook]"
    python docs/_extensions/notebook.py examples/spectral_normalization.py
"""

import argparse
import base64
import json
import re
from pathlib import Path
from typing import Any


ROOT = Path(__file__).parents[2]
_CELL = re.compile(r"^# %%(?: \[(\w+)\])?\n", re.MULTILINE)


def cells(script: str) -> list[tuple[str, str]]:
    """The notebook's cells: kind and source."""
    _, *parts = _CELL.split(script)
    found = [("code", "%matplotlib inline")]
    for kind, source in zip(parts[::2], parts[1::2], strict=True):
        source = source.strip("\n")
        if kind == "markdown":
            text = re.sub("^# ?", "", source, flags=re.MULTILINE)
            found.append(("markdown", text))
        elif kind is None:
            found.append(("code", source))
            calls = re.findall(r"^def (step_\w+)", source, flags=re.MULTILINE)
            found += [("code", f"{name}(Settings())") for name in calls]
    return found


def notebook(script: str) -> dict[str, Any]:
    """The notebook before it has run."""
    made = []
    for i, (kind, source) in enumerate(cells(script)):
        cell = {"cell_type": kind, "id": f"cell-{i}", "metadata": {}, "source": source}
        if kind == "code":
            cell |= {"execution_count": None, "outputs": []}
        made.append(cell)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel}
    return {"cells": made, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def run(unrun: dict[str, Any]) -> dict[str, Any]:
    """The notebook after it has run, with its outputs."""
    import nbclient
    import nbformat

    made = nbformat.from_dict(unrun)
    options = {"timeout": None, "record_timing": False, "coalesce_streams": True}
    nbclient.NotebookClient(made, **options).execute()
    nbformat.validate(made)
    return json.loads(nbformat.writes(made))


def same_code(made: dict[str, Any], other: dict[str, Any]) -> bool:
    codes = [
        # A file has a list of lines where a notebook that was just made has one string.
        ["".join(cell["source"]) for cell in each["cells"] if "outputs" in cell]
        for each in (made, other)
    ]
    return codes[0] == codes[1]


def with_outputs(unrun: dict[str, Any], made: dict[str, Any]) -> dict[str, Any]:
    """A notebook with the outputs of one that has run, of the same code."""
    done = iter([cell for cell in made["cells"] if cell["cell_type"] == "code"])
    cells = [
        {**next(done), "id": cell["id"]} if cell["cell_type"] == "code" else cell
        for cell in unrun["cells"]
    ]
    return {**made, "cells": cells}


def page(made: dict[str, Any], name: str) -> tuple[str, dict[str, bytes]]:
    """The notebook as Markdown, and its pictures by their file names."""
    blocks, pictures = [], {}
    for cell in made["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            blocks.append(source)
            continue
        if not source.startswith("%"):
            blocks.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            if output["output_type"] == "stream":
                text = "".join(output["text"]).strip("\n")
                blocks.append(f"```text\n{text}\n```")
            else:
                picture = f"{name}_{len(pictures) + 1}.png"
                data = "".join(output["data"]["image/png"])
                pictures[picture] = base64.b64decode(data)
                blocks.append(f"![Figure of this step](../assets/{picture})")
    title, *rest = blocks
    about = (
        f"This page is [a notebook]({name}.ipynb) as it ran. It has the code of "
        f"`examples/{name}.py`, which does the same as a script:\n\n"
        f"```bash\npython examples/{name}.py\n```"
    )
    heading, _, introduction = title.partition("\n\n")
    return "\n\n".join([heading, about, introduction, *rest]) + "\n", pictures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("script", type=Path)
    parser.add_argument("--again", action="store_true", help="run even the same code")
    args = parser.parse_args()
    script, again = args.script, args.again
    docs = ROOT / "docs"
    file = docs / "examples" / f"{script.stem}.ipynb"
    file.parent.mkdir(exist_ok=True)
    unrun = notebook(script.read_text())
    before = json.loads(file.read_text()) if file.exists() else None
    if before is not None and same_code(before, unrun) and not again:
        made = with_outputs(unrun, before)
    else:
        made = run(unrun)
    text, pictures = page(made, script.stem)
    file.write_text(json.dumps(made, indent=1) + "\n")
    file.with_suffix(".md").write_text(text)
    for name, picture in pictures.items():
        (docs / "assets" / name).write_bytes(picture)


if __name__ == "__main__":
    main()
