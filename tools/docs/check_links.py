"""Check that the links and images in the Markdown documents lead to a file or a heading of this project.

Links to other places are left alone: nothing is downloaded.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
MARKDOWN = MarkdownIt("commonmark").enable("table")
HTML_TARGET = re.compile(r"""<(?:a|img|source)\b[^>]*?\b(?:href|src|srcset)=["']([^"']+)["']""", re.IGNORECASE)
HTML_ANCHOR = re.compile(r"""<[a-z]+\b[^>]*?\b(?:id|name)=["']([^"']+)["']""", re.IGNORECASE)


def tokens(text: str) -> Iterator[tuple[Token, int]]:
    """Every token, children included, and the line its block begins on."""
    line = 1
    for token in MARKDOWN.parse(text):
        line = token.map[0] + 1 if token.map else line
        yield token, line
        for child in token.children or []:
            yield child, line


def targets(text: str) -> Iterator[tuple[str, int]]:
    """Where the links and images of a document point to, and on which line."""
    for token, line in tokens(text):
        if token.type == "link_open":
            yield str(token.attrs["href"]), line
        elif token.type == "image":
            yield str(token.attrs["src"]), line
        elif token.type in ("html_block", "html_inline"):
            for target in HTML_TARGET.findall(token.content):
                yield target, line


def anchors(text: str) -> set[str]:
    """The names that `#name` can refer to, headings named as GitHub does."""
    found: set[str] = set()
    heading = False
    for token, _ in tokens(text):
        if token.type in ("html_block", "html_inline"):
            found.update(HTML_ANCHOR.findall(token.content))
        elif token.type == "inline" and heading:
            children = token.children or []
            words = "".join(child.content for child in children if child.type in ("text", "code_inline"))
            slug = re.sub(r"[^\w\- ]", "", words.strip().lower()).replace(" ", "-")
            twins = sum(re.fullmatch(rf"{re.escape(slug)}(-\d+)?", name) is not None for name in found)
            found.add(f"{slug}-{twins}" if twins else slug)
        heading = token.type == "heading_open"
    return found


def problems(path: Path, root: Path) -> Iterator[str]:
    """One line per link or image of the document at `path` that leads nowhere."""
    for target, line in targets(path.read_text("utf-8")):
        parts = urlsplit(target)
        if parts.scheme or parts.netloc:
            continue
        found = (path.parent / unquote(parts.path)).resolve() if parts.path else path
        where = f"{path.relative_to(root)}:{line}: {target!r}"
        if not found.is_relative_to(root):
            yield f"{where} points outside the project"
        elif not found.exists():
            yield f"{where} names no file"
        elif found.suffix == ".md" and parts.fragment not in {"", *anchors(found.read_text("utf-8"))}:
            yield f"{where} names no heading"


def documents(root: Path) -> list[Path]:
    """The documents whose links are checked."""
    return [*sorted(root.glob("*.md")), *sorted((root / "docs").rglob("*.md"))]


def main(root: Path = ROOT) -> int:
    """Print what is wrong; the exit status."""
    checked = documents(root)
    found = [problem for path in checked for problem in problems(path, root.resolve())]
    print(*found, f"{len(checked)} documents, {len(found)} dead links", sep="\n")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
