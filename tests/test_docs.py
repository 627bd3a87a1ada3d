"""The code that the documents and the docstrings show runs, and their links lead somewhere.

The examples of one document share their names and run in order, in an empty folder.
`<!-- skip: next "reason" -->` above a block leaves it out.
"""

from __future__ import annotations

import re
import unittest
from pathlib import Path
from types import SimpleNamespace

import pytest
from sybil import Sybil
from sybil.document import Document
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser
from sybil.parsers.rest import DocTestParser

import check_links
import mustdrop
import mustdrop.kernels
import mustdrop.pruners
import site_pages

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


def test_pages_and_the_scripts_that_write_them_lie_apart():
    assert [path.name for path in (ROOT / "docs").rglob("*.py")] == []  # they belong to tools/docs


def test_every_page_is_in_the_navigation_and_every_public_name_has_a_page():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    listed = set(re.findall(r": (\S+\.md)$", navigation, re.MULTILINE))
    generated = site_pages.reference()
    assert listed == pages | set(site_pages.ELSEWHERE.values()) | set(generated)
    text = "\n".join(generated.values())
    apart = {"DecodeCachePruner", "PrefillPruner", "VisionStagePruner", "Trace", "errors"}
    assert all(
        re.search(rf"^::: mustdrop\.[\w.]+\.{name}$", text, re.MULTILINE) for name in {*mustdrop.__all__} - apart
    )
    assert all(f".{name}\n" in text for name in [*mustdrop.pruners.__all__, *mustdrop.kernels.__all__])
    for command in ("demo", "explain", "doctor"):
        assert f"## `mustdrop {command}`" in generated["reference/commands.md"]


@pytest.mark.parametrize(
    ("link", "there", "here"),
    [
        ("[a](docs/quality.md#x)", "README.md", "[a](quality.md#x)"),
        ("![a](docs/images/a.png)", "README.md", "![a](images/a.png)"),
        ("[a](LICENSE)", "README.md", "a"),
        ("[a](../README.md#models)", "docs/methods.md", "[a](index.md#models)"),
        ("[a](../tune.md)", "docs/tutorials/video.md", "[a](../tune.md)"),
        ("[a](../docs/speed.md)", "benchmarks/README.md", "[a](../speed.md)"),
        ("[a](https://example.org) `[b](docs/quality.md)` [c](#d)", "README.md", None),
    ],
)
def test_links_between_files_become_links_between_pages(link, there, here):
    page = SimpleNamespace(file=SimpleNamespace(src_uri=site_pages.ELSEWHERE.get(there, there.removeprefix("docs/"))))
    assert site_pages.on_page_markdown(link, page, None, None) == (here or link)
