"""The notebooks are those of their pages, hold no outputs, and lead where these lead; `nox -s tutorials` runs them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

import notebooks
import site_pages

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / notebooks.FOLDER


def test_notebooks_are_those_of_their_pages():
    assert notebooks.main(["--check"]) == 0
    assert {path.stem for path in FOLDER.glob("*")} == set(notebooks.PAGES)


@pytest.mark.parametrize("name", notebooks.PAGES)
def test_a_notebook_has_the_code_of_its_page_and_no_outputs(name):
    book = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))
    code = ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "code"]
    assert all(cell.get("outputs", []) == [] for cell in book["cells"])
    assert '\n# %pip install --quiet "' in code[0]
    assert not any("from_pretrained" in text for text in code)  # what downloads a model stays text
    for text in code[1:]:
        compile(text, name, "exec")
    words = "".join("".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "markdown")
    assert "<!--" not in words
    for match in site_pages.LINK.finditer(words):
        path = match["target"].partition("#")[0]
        if path and ":" not in path:
            assert (FOLDER / path).exists(), match[0]


def test_blocks_that_are_skipped_stay_text(tmp_path, monkeypatch):
    block = "```python\ny = 2\n```\n"
    page = f'# Title\n\nFirst [a](b.md).\n\n```python\nx = 1\n```\n\n<!-- skip: next "why" -->\n{block}End\n'
    (tmp_path / "page.md").write_text(page)
    monkeypatch.setattr(notebooks, "ROOT", tmp_path)
    cells = notebooks.notebook("page.md")["cells"]
    assert [cell["cell_type"] for cell in cells] == ["markdown", "code", "markdown", "code", "markdown"]
    assert cells[2]["source"] == ["First [a](../../b.md)."]
    assert cells[3]["source"] == ["x = 1"]
    assert "".join(cells[4]["source"]) == "```python\ny = 2\n```\nEnd"
    assert [cell["id"] for cell in cells] == [f"cell-{number}" for number in range(5)]


def test_a_badge_opens_the_notebook_where_the_project_has_an_address(monkeypatch):
    monkeypatch.setattr(site_pages, "repository", lambda: "")
    assert notebooks.links("video") == "[This page as a notebook](../notebooks/video.ipynb)"
    monkeypatch.setattr(site_pages, "repository", lambda: "https://github.com/somebody/mustdrop")
    assert notebooks.links("write-a-method") == (
        f"[![Open in Colab]({notebooks.BADGE})](https://colab.research.google.com/github/somebody/mustdrop/blob/main/"
        "docs/notebooks/write-a-method.ipynb) [This page as a notebook](notebooks/write-a-method.ipynb)"
    )


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("nbclient", "ipykernel"))),
    reason="nbclient is not installed: nox -s tutorials",
)
def test_a_notebook_runs(tmp_path):
    assert notebooks.execute("write-a-method", tmp_path) < 600
