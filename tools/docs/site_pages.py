"""What the site has beside docs/: pages from elsewhere in the repository, the reference, and links that fit.

A hook of mkdocs (see mkdocs.yml). Documents are written to be read in the repository as well, so their links name files
of the repository: here they become links between pages. A link to a file that is no page leads to the repository where
pyproject.toml names one, and is plain text where it does not.
"""

from __future__ import annotations

import ast
import os
import posixpath
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "mustdrop"
# Documents outside of docs/ -> their pages.
ELSEWHERE = {
    "README.md": "index.md",
    "CHANGELOG.md": "project/changelog.md",
    "CODE_OF_CONDUCT.md": "project/conduct.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "SECURITY.md": "project/security.md",
    "benchmarks/README.md": "benchmarks/index.md",
    "benchmarks/demo_model/README.md": "benchmarks/demo_model.md",
    "benchmarks/page_model/README.md": "benchmarks/page_model.md",
}
LINK = re.compile(r"(?P<mark>!?)\[(?P<text>(?:[^\[\]]|\[[^\]]*\](?:\([^)]*\))?)*)\]\((?P<target>[^)\s]+)\)")
# A picture of another site, alone or as a link: badges. They say on the site what the site itself says.
COLAB = re.compile(r"\[!\[(Open in Colab)\]\([^)]*\)\]")
BADGE = re.compile(r"\[!\[[^\]]*\]\(https?:[^)]*\)\]\([^)]*\)[ \n]?|!\[[^\]]*\]\(https?:[^)]*\)")
PICTURE = re.compile(r"^!\[[^\]]*\]\((?P<target>[^)\s]+\.png)\)$", re.MULTILINE)
WIDE = 1200  # pixels of a figure whose letters a phone would show too small: there it can be moved sideways
CODE = re.compile(r"(^```.*?^```|`[^`\n]+`)", re.MULTILINE | re.DOTALL)


class SiteError(Exception):
    """A page that cannot be made: what is missing, and where."""


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that do not lie in docs/."""
    from mkdocs.structure.files import File

    for source, page in ELSEWHERE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for page, content in reference().items():
        files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn links between files into links between pages."""
    here = page.file.src_uri
    if here.startswith("reference/"):
        return markdown
    markdown = BADGE.sub("", COLAB.sub(r"[\1]", markdown))
    source = next((source for source, to in ELSEWHERE.items() if to == here), f"docs/{here}")
    parts = CODE.split(markdown)  # every other part is code
    words = (part if i % 2 else LINK.sub(lambda m: _link(m, source, here), part) for i, part in enumerate(parts))
    return PICTURE.sub(lambda m: _picture(m, here), "".join(words))


def _picture(match: re.Match[str], here: str) -> str:
    """A picture that opens in its full size when it is clicked."""
    from PIL import Image

    path = ROOT / "docs" / posixpath.normpath(posixpath.join(posixpath.dirname(here), match["target"]))
    with Image.open(path) as picture:
        wide = " .wide" if picture.width > WIDE else ""
    return f"[{match[0]}]({match['target']}){{ .picture{wide} }}"


def _link(match: re.Match[str], source: str, here: str) -> str:
    path, hash_, anchor = match["target"].partition("#")
    if not path or re.match(r"[a-z]+:", path):
        return match[0]
    inside = match["text"] if "](" not in match["text"] else LINK.sub(lambda m: _link(m, source, here), match["text"])
    file = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    to = ELSEWHERE.get(file) or (file.removeprefix("docs/") if file.startswith("docs/") else None)
    if to is None or file.endswith(".py"):
        address = repository()
        if not (ROOT / file).exists():
            raise SiteError(f"{source}: {match['target']!r} names no file")
        return f"[{inside}]({address}/blob/main/{file})" if address else match["text"]
    to = posixpath.relpath(to, posixpath.dirname(here) or ".")
    return f"{match['mark']}[{inside}]({to}{hash_}{anchor})"


def repository() -> str:
    """The address of the repository; empty while pyproject.toml names none."""
    found = re.search(r'^Repository = "([^"]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    return found[1].rstrip("/") if found else ""


def elsewhere(text: str, address: str, tag: str) -> str:
    """README.md for readers outside of the repository: its links are addresses of files at a tag.

    Args:
        text: the page.
        address: of the repository; "" leaves the page as it is.
        tag: of the version, such as `v0.1.0`.
    """

    def link(match: re.Match[str]) -> str:
        inside = LINK.sub(link, match["text"]) if "](" in match["text"] else match["text"]
        target = match["target"]
        if not re.match(r"[a-z]+:", target):
            path, hash_, anchor = target.partition("#")
            target = f"{address}/{'raw' if match['mark'] else 'blob'}/{tag}/{path or 'README.md'}{hash_}{anchor}"
        return f"{match['mark']}[{inside}]({target})"

    if not address:
        return text
    return "".join(part if i % 2 else LINK.sub(link, part) for i, part in enumerate(CODE.split(text)))


# -- reference --------------------------------------------------------------------------------------------------------


def reference() -> dict[str, str]:
    """The generated pages of the reference: every public name, from its docstring.

    Raises:
        SiteError: a public name without a docstring.
    """
    face = package()
    stages = [name for name in exported("pruners/__init__.py") if name not in face]  # a name has one page
    pages = {
        "package": _page("The package", "`from mustdrop import ...`", face),
        "pruners": _page("Pruners", "`from mustdrop.pruners import ...`", stages),
        "kernels": _page("Kernels", "`from mustdrop.kernels import ...`", exported("kernels/__init__.py")),
        "errors": _page("Errors and warnings", "`from mustdrop.errors import ...`", defined("errors.py")),
        "trace": _page("Trace", "What `mustdrop.last_trace(model)` returns.", ["mustdrop.trace.Trace"]),
        "fitting": _page("Training a scorer", "`from mustdrop.fitting import ...`", package("fitting/")),
        "rules": rules(),
        "commands": commands(),
    }
    return {f"reference/{name}.md": text for name, text in pages.items()}


def _page(title: str, start: str, names: list[str]) -> str:
    for name in names:
        check(name)
    return "\n\n".join([f"# {title}", start, *(f"::: {name}" for name in names)]) + "\n"


def package(folder: str = "") -> list[str]:
    """Where each public name of the package, or of a folder in it, lives; what has a page of its own is left out."""
    tree = ast.parse((SOURCE / folder / "__init__.py").read_text(encoding="utf-8"))
    (homes,) = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_HOMES"
    ]
    apart = {"errors", "trace", "pruners"}
    inside = folder.replace("/", ".")
    own = [(name, home) for name, home in homes.items() if home and home not in apart]
    return [f"mustdrop.{inside}{home}.{name}" for name, home in sorted(own, key=_first)]


def _first(own: tuple[str, str]) -> bool:
    """The name that everything begins with comes first; the others stay in the order of the table."""
    return own[0] != "patch"


def exported(path: str) -> list[str]:
    """What a package exports, at the places where it is defined."""
    tree = ast.parse((SOURCE / path).read_text(encoding="utf-8"))
    names = {
        alias.name: f"{node.module}.{alias.name}"
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("mustdrop")
        for alias in node.names
    }
    (listed,) = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    return [names[name] for name in listed]


def defined(path: str) -> list[str]:
    """The public classes of a module."""
    module = f"mustdrop.{path.removesuffix('.py').replace('/', '.')}"
    tree = ast.parse((SOURCE / path).read_text(encoding="utf-8"))
    return [f"{module}.{node.name}" for node in tree.body if isinstance(node, ast.ClassDef) and node.name[0] != "_"]


def check(name: str) -> None:
    """Refuse a public name that its docstring does not explain."""
    module, _, own = name.rpartition(".")
    path = SOURCE.parent / Path(*module.split("."))
    file = path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py"
    tree = ast.parse(file.read_text(encoding="utf-8"))
    kinds = (ast.ClassDef, ast.FunctionDef)
    found = [node for node in ast.walk(tree) if isinstance(node, kinds) and node.name == own]
    aliases = [node for node in tree.body if isinstance(node, ast.Assign | ast.AnnAssign) and own in ast.unparse(node)]
    if not any(map(ast.get_docstring, found)) and not aliases:
        raise SiteError(f"the public name {name} has no docstring")


def rules() -> str:
    """All functions and classes of `mustdrop.rules`, module by module."""
    head = ["# Rules", "Small pure functions, from scores or features to a choice: what methods are made of."]
    modules = [path.stem for path in sorted((SOURCE / "rules").glob("[!_]*.py"))]
    parts = [f"::: mustdrop.rules.{name}\n    options:\n      show_root_full_path: true" for name in modules]
    return "\n\n".join([*head, *parts]) + "\n"


def commands() -> str:
    """The commands with their options, as typer tells them."""
    ask = [sys.executable, "-m", "typer", "mustdrop.cli", "utils", "docs", "--name", "mustdrop"]
    paths = os.pathsep.join([str(SOURCE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(ask, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": paths})
    if done.returncode:
        raise SiteError(f"typer cannot tell the commands: {done.stderr[-2000:]}")
    text = done.stdout.replace("# `mustdrop`", "# Commands and options", 1).replace("\b\n", "")
    heads = re.findall(r"^## `mustdrop ([\w-]+)`\n\n((?:.+\n)+)", text, re.MULTILINE)  # the list cuts them short
    whole = {name: " ".join(words.split()) for name, words in heads}
    text = re.sub(r"^\* `([\w-]+)`: .*\.\.\.$", lambda m: f"* `{m[1]}`: {whole[m[1]]}", text, flags=re.MULTILINE)
    return re.sub(r"^    (python -m .*)$", r"\n    \1", text, flags=re.MULTILINE)
