"""Tutorials as notebooks: `python tools/docs/notebooks.py` writes docs/notebooks from the pages, `--run` executes them.

A page is the source, so that the site and the tests read it as it is. Each Python block becomes a cell, and what stands
between two of them a cell of text; a block that the tests leave out (`<!-- skip: next -->`) stays text. The notebooks
hold no outputs: they run in seconds, on the bundled model.
"""

from __future__ import annotations

import argparse
import json
import posixpath
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import site_pages

ROOT = Path(__file__).parents[2]
FOLDER = "docs/notebooks"
# name of the notebook -> its page
PAGES = {
    "first-steps": "docs/tutorials/first-steps.md",
    "compare-methods": "docs/tutorials/compare-methods.md",
    "video": "docs/tutorials/video.md",
    "write-a-method": "docs/add-a-method.md",
    "write-an-adapter": "docs/add-a-model.md",
    "serve": "docs/tutorials/serve.md",
}
BLOCK = re.compile(r"^(?P<skip><!-- skip: next[^\n]*-->\n)?```python\n(?P<code>.*?)^```\n", re.MULTILINE | re.DOTALL)
COMMENT = re.compile(r"^<!-- begin.*?<!-- end[^\n]*\n|^<!--[^\n]*-->\n", re.MULTILINE | re.DOTALL)
INSTALL = "# On a machine without mustdrop, such as Colab's, install it first: take the sign from the next line.\n"
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"


def notebook(page: str) -> dict[str, Any]:
    """The notebook of a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    cells = [cell for cell in _cells(text, posixpath.dirname(page)) if cell["source"]]
    address = site_pages.repository()
    source = f"mustdrop[viz] @ git+{address}" if address else "../..[viz]"  # until then, a checkout
    cells.insert(1, _cell("code", f'{INSTALL}# %pip install --quiet "{source}"'))
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {
        "cells": cells,
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def _cells(text: str, folder: str) -> Iterator[dict[str, Any]]:
    head, _, rest = text.partition("\n\n")
    yield _cell("markdown", head)
    words = ""
    start = 0
    for match in BLOCK.finditer(rest):
        words += rest[start : match.start()]
        start = match.end()
        if match["skip"]:
            words += match[0].removeprefix(match["skip"])
            continue
        yield _cell("markdown", _words(words, folder))
        yield _cell("code", match["code"])
        words = ""
    yield _cell("markdown", _words(words + rest[start:], folder))


def _words(text: str, folder: str) -> str:
    """Text without comments, its links as seen from the folder of the notebooks."""

    def moved(match: re.Match[str]) -> str:
        path, sign, anchor = match["target"].partition("#")
        if not path or re.match(r"[a-z]+:", path):
            return match[0]
        to = posixpath.relpath(posixpath.normpath(posixpath.join(folder, path)), FOLDER)
        return f"{match['mark']}[{match['text']}]({to}{sign}{anchor})"

    return site_pages.LINK.sub(moved, COMMENT.sub("", text))


def _cell(kind: str, source: str) -> dict[str, Any]:
    made: dict[str, Any] = {"cell_type": kind, "metadata": {}, "source": source.strip("\n").splitlines(keepends=True)}
    return made | ({"execution_count": None, "outputs": []} if kind == "code" else {})


def links(name: str) -> str:
    """What a page says of its notebook: a badge that opens it in Colab, where the project has an address."""
    file = f"{FOLDER}/{name}.ipynb"
    here = posixpath.relpath(file, posixpath.dirname(PAGES[name]))
    address = site_pages.repository().removeprefix("https://github.com/")
    opened = f"https://colab.research.google.com/github/{address}/blob/main/{file}"
    badge = f"[![Open in Colab]({BADGE})]({opened}) " if address else ""
    return f"{badge}[This page as a notebook]({here})"


def text_of(page: str) -> str:
    """The file of a notebook."""
    return json.dumps(notebook(page), indent=1, ensure_ascii=False) + "\n"


def execute(name: str, folder: Path) -> float:
    """Run a notebook in a folder; the seconds that it took."""
    import nbformat
    from nbclient import NotebookClient

    book = nbformat.read(ROOT / FOLDER / f"{name}.ipynb", as_version=4)
    nbformat.validate(book)
    start = time.perf_counter()
    NotebookClient(book, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
    return time.perf_counter() - start


def main(arguments: Sequence[str] | None = None) -> int:
    """Write, check or run; the exit status."""
    parser = argparse.ArgumentParser(description="Notebooks of the tutorials.")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a notebook is out of date")
    parser.add_argument("--run", type=Path, metavar="FOLDER", help="execute all of them in a folder")
    options = parser.parse_args(arguments)
    if options.run is not None:
        options.run.mkdir(parents=True, exist_ok=True)
        for name in PAGES:
            print(f"{name}: {execute(name, options.run):.0f} s", flush=True)
        return 0
    stale = []
    for name, page in PAGES.items():
        path = ROOT / FOLDER / f"{name}.ipynb"
        text = text_of(page)
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(name)
        if not options.check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    print(*(f"{name} is out of date" if options.check else f"wrote {name}" for name in stale), sep="\n")
    return int(options.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
