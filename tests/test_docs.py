"""The code that the documents and the docstrings show runs, and their links lead somewhere.

The examples of one document share their names and run in order, in an empty folder.
`<!-- skip: next "reason" -->` above a block leaves it out.
"""

from __future__ import annotations

import importlib.util
import re
import unittest
from pathlib import Path
from types import SimpleNamespace

import nox
import pytest
import transformers
from PIL import Image
from sybil import Sybil
from sybil.document import Document
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser
from sybil.parsers.rest import DocTestParser
from transformers.image_utils import load_image

import check_links
import front
import generate
import mustdrop
import mustdrop.kernels
import mustdrop.pruners
import notebooks
import site_pages
from mustdrop.demo.model import CHECKPOINT, PAGE_CHECKPOINT
from mustdrop.demo.page_processor import PageProcessor
from mustdrop.demo.scenes import SceneMaker
from mustdrop.demo.tasks import TaskMaker

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


def test_an_idea_is_a_handful_of_words():
    rows = re.findall(r"^\| `[^|]*` \| ([^|]*) \|", front.methods({}, generate.table), re.MULTILINE)
    assert len(rows) > 30
    assert [idea for idea in rows if len(idea.partition(";")[0].split()) > 6] == []


def test_every_method_has_a_card():
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    for name in mustdrop.methods():
        assert f"\n### {name}\n" in page
        assert f"<!-- begin: method-{name.replace('+', '_plus')} -->" in page


def test_cards_show_the_defaults_of_knobs_as_values():
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `\w+` \| `([A-Z_]{2,})` \|", page, re.MULTILINE) == []


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
    assert "...\n" not in generated["reference/commands.md"].partition("**Commands**")[2].partition("\n## ")[0]


def test_the_questions_of_users_have_answers():
    page = (ROOT / "docs" / "faq.md").read_text(encoding="utf-8")
    asked = re.findall(r"^## (.*)$", page, re.MULTILINE)
    for words in ("faster for me", "192 tokens", "speed-up smaller", "attention backend", "Which method", "positions"):
        assert any(words in question for question in asked), words


def test_every_tutorial_is_a_page_of_the_site_and_a_notebook():
    tutorials = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("- Tutorials:")[2].partition("- How-to:")[0]
    pages = {f"docs/{page}" for page in re.findall(r": (\S+\.md)$", tutorials, re.MULTILINE)}
    assert pages == set(notebooks.PAGES.values())
    for words in ("First steps", "Compare methods", "video", "Write a method", "Write an adapter", "Serve"):
        assert words in tutorials


@pytest.mark.parametrize(
    ("link", "there", "here"),
    [
        ("[a](docs/quality.md#x)", "README.md", "[a](quality.md#x)"),
        ("![a](docs/images/a.png) b", "README.md", "![a](images/a.png) b"),
        ("![a](docs/images/speed.png)", "README.md", "[![a](images/speed.png)](images/speed.png){ .picture }"),
        (
            "![a](images/how-it-works.png)",
            "docs/x.md",
            "[![a](images/how-it-works.png)](images/how-it-works.png){ .picture .wide }",
        ),
        ("[a](LICENSE)", "README.md", "a"),
        ("[a](../README.md#methods)", "docs/methods.md", "[a](index.md#methods)"),
        ("[![a](https://b.org/c.svg)](LICENSE) [d](docs/faq.md)", "README.md", "[d](faq.md)"),
        ("[a](../tune.md)", "docs/tutorials/video.md", "[a](../tune.md)"),
        ("[a](../docs/speed.md)", "benchmarks/README.md", "[a](../speed.md)"),
        ("[a](https://example.org) `[b](docs/quality.md)` [c](#d)", "README.md", None),
    ],
)
def test_links_between_files_become_links_between_pages(link, there, here):
    page = SimpleNamespace(file=SimpleNamespace(src_uri=site_pages.ELSEWHERE.get(there, there.removeprefix("docs/"))))
    assert site_pages.on_page_markdown(link, page, None, None) == (here or link)


def test_on_a_package_index_the_first_page_leads_to_the_repository():
    text = "[![a](https://b.org/c.svg)](LICENSE) ![d](docs/e.png) [f](#g) [h](docs/i.md#j) `[k](l)` [m](https://n.org)"
    at = "https://example.org/mustdrop"
    assert site_pages.elsewhere(text, at, "v1.2.0") == (
        f"[![a](https://b.org/c.svg)]({at}/blob/v1.2.0/LICENSE) ![d]({at}/raw/v1.2.0/docs/e.png) "
        f"[f]({at}/blob/v1.2.0/README.md#g) [h]({at}/blob/v1.2.0/docs/i.md#j) `[k](l)` [m](https://n.org)"
    )
    assert site_pages.elsewhere(text, "", "v1.2.0") == text
    shown = site_pages.elsewhere(FRONT, at, "v1.2.0")
    shown = re.sub(r"```.*?```|`[^`\n]+`", "", shown, flags=re.DOTALL)
    assert [target for target in re.findall(r"\]\(([^)]+)\)", shown) if not target.startswith("https://")] == []


# -- the first page ----------------------------------------------------------------------------------------------------

FRONT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_first_page_is_short_and_says_when_it_does_not_help():
    assert len(FRONT.splitlines()) <= 150
    first_screen = FRONT.partition("## Install")[0]
    assert len(re.findall(r"\*\*[\d.]+( times|%)", first_screen)) == 2
    assert re.search(r"alone is slower \(0\.\d+ x\)", first_screen)


def test_the_first_page_has_all_that_it_needs():
    install = FRONT.partition("## Install")[2].partition("## Use")[0]
    assert "download.pytorch.org/whl/cpu" in install  # pip
    assert "uv pip install" in install
    assert "--torch-backend cpu" in install
    assert re.search(r"downloads \d+\.\d GB", install)
    facts = FRONT.partition("<!-- begin: front-facts -->")[2].partition("<!-- end")[0]
    assert len(facts.strip().splitlines()) == 2 + 5
    methods = FRONT.partition("<!-- begin: front-methods -->")[2].partition("<!-- end")[0]
    assert {name for name in mustdrop.list_methods() if f"`{name}`" not in methods} == set()
    for row in re.findall(r"^\| (`.*`) \| (.*) \| (.*) \| (.*) \|$", methods, re.MULTILINE):
        assert row[1] == "baselines" or row[2], row  # the stages
    for command in (
        "mustdrop demo",
        "mustdrop explain",
        "mustdrop app",
        "vllm serve",
        "mustdrop eval",
        "mustdrop tune",
    ):
        assert command in FRONT
    assert "masked reference" in FRONT
    assert "@article" in FRONT


def test_every_number_of_the_first_page_is_generated():
    """Outside of generated blocks stand versions, budgets of examples and the tolerance of the proof, and no result."""
    typed = re.sub(r"<!-- begin.*?<!-- end[^\n]*", "", FRONT, flags=re.DOTALL)
    typed = re.sub(r"```.*?```|\[!\[[^\n]*", "", typed, flags=re.DOTALL)
    assert re.findall(r"\d[\d.]* ?(?:%|x\b|MB|GB|times|seconds|ms)", typed) == ["2 x"]  # what `x` means


def test_the_badges_say_what_the_project_says():
    project = nox.project.load_toml(ROOT / "pyproject.toml")["project"]
    versions = [line.rpartition(" ")[2] for line in project["classifiers"] if re.search(r":: 3\.\d+$", line)]
    assert f"python-{versions[0]}_to_{versions[-1]}" in FRONT
    assert f"licence-{project['license'].replace('-', '_')}" in FRONT
    (transformers,) = [line for line in project["dependencies"] if line.startswith("transformers")]
    assert f"transformers-{transformers.partition('>=')[2]}%2B" in FRONT


class Prompts(transformers.ProcessorMixin):
    """The processor of the bundled Qwen3-VL as pipelines want it; transformers' own needs torchvision."""

    def __init__(self):
        self.inner = PageProcessor.from_pretrained(PAGE_CHECKPOINT)
        self.tokenizer = self.inner.tokenizer

    def apply_chat_template(self, chat, add_generation_prompt, tokenize, **_):
        assert tokenize
        images = [load_image(part["url"]) for turn in chat for part in turn["content"] if part["type"] == "image"]
        text = self.inner.apply_chat_template(chat, add_generation_prompt=add_generation_prompt)
        return self.inner(text=[text], images=images)

    def post_process_image_text_to_text(self, ids, skip_special_tokens=True, **_):
        return self.inner.batch_decode(ids, skip_special_tokens=skip_special_tokens)


@pytest.mark.parametrize(
    ("checkpoint", "tasks", "asked"),
    [
        (CHECKPOINT, SceneMaker("heldout", seed=7), "where is the magenta one ?"),
        (PAGE_CHECKPOINT, TaskMaker("pages", "heldout", seed=7), None),
    ],
    ids=["llava", "qwen3_vl"],
)
def test_the_lines_for_a_model_of_the_hub_run_as_they_stand(checkpoint, tasks, asked, tmp_path, monkeypatch, capsys):
    """On the bundled models, one of them a Qwen-VL, and a picture in a file: nothing else of them is changed."""
    monkeypatch.chdir(tmp_path)
    if asked is None:
        sample = tasks.sample()
        asked, picture = tasks.questions(sample)[0].text, sample.pictures[0]
        if importlib.util.find_spec("torchvision") is None:
            monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda *_, **__: Prompts())
    else:
        picture = tasks.scene().image
    Image.fromarray(picture).save("scene.png")
    (lines,) = re.findall(r'<!-- skip: next "downloads a model" -->\n```python\n(.*?)```', FRONT, re.DOTALL)
    assert len(lines.splitlines()) <= 8
    lines, models = re.subn(r'model="[^"]+"', f"model={str(checkpoint)!r}", lines)
    lines, pictures = re.subn(r'"https://[^"]+"', "'scene.png'", lines)
    lines, questions = re.subn(r'"What is in the picture\?"', repr(asked), lines)
    assert (models, pictures, questions) == (1, 1, 1)
    scope = {}
    exec(lines, scope)
    trace = mustdrop.last_trace(scope["ask"].model)
    assert trace.total[0] / 4 - 1 < trace.equal_tokens[0] <= trace.total[0] / 4
    assert capsys.readouterr().out.strip()
