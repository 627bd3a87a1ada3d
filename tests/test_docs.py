"""The code that the documents and the docstrings show runs, and their links lead somewhere.

The examples of one document share their names and run in order, in an empty folder.
`<!-- skip: next "reason" -->` above a block leaves it out.
"""

from __future__ import annotations

import unittest
from pathlib import Path

import pytest
from sybil import Sybil
from sybil.document import Document
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser
from sybil.parsers.rest import DocTestParser

import check_links
import mustdrop

ROOT = Path(__file__).parents[1]
PAGES = Sybil([PythonCodeBlockParser(), SkipParser()])
DOCSTRINGS = Sybil([DocTestParser(), PythonCodeBlockParser()])


def documents() -> list[Document]:
    pages = [PAGES.parse(path) for path in check_links.documents(ROOT)]
    modules = [DOCSTRINGS.parse(path) for path in sorted(ROOT.glob("src/**/*.py"))]
    return [document for document in pages + modules if document.regions]


@pytest.mark.parametrize("document", documents(), ids=lambda document: str(Path(document.path).relative_to(ROOT)))
def test_examples_run(document, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for example in document:
        try:
            example.evaluate()
        except unittest.SkipTest:  # sybil's way to leave one example out
            continue


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "[a](other.md) ![b](picture.png) [c](other.md#two-words) [d](#here-it-is)\n\n# `Here` it, is!",
            None,
        ),
        ("[web](https://example.org/nothing) `[code](nowhere.md)`", None),
        ("<img src='picture.png'>", None),
        ("# Same\n# Same\n[second](#same-1)", None),
        ("text\n\n[a](gone.md)", "page.md:3: 'gone.md' names no file"),
        ("![b](gone.png)", "names no file"),
        ("<img alt='x' src='gone.png'>", "names no file"),
        ("[c](other.md#three-words)", "names no heading"),
        ("[d](../secret.md)", "points outside the project"),
    ],
)
def test_links_are_checked(text, problem, tmp_path):
    (tmp_path / "other.md").write_text("# Two words\n")
    (tmp_path / "picture.png").touch()
    (tmp_path / "page.md").write_text(text)
    found = list(check_links.problems(tmp_path / "page.md", tmp_path))
    assert len(found) == (problem is not None)
    assert problem is None or problem in found[0]


def test_every_method_has_a_card():
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    for name in mustdrop.methods():
        assert f"\n### {name}\n" in page
        assert f"<!-- begin: method-{name.replace('+', '_plus')} -->" in page
