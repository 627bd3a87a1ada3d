"""Write the generated blocks of README.md and docs/*.md from the result files in benchmarks/results.

A block stands between two comments, each alone on its line:

    <!-- begin: versions -->
    whatever stands here is replaced
    <!-- end: versions -->

Run `python docs/generate.py` to rewrite the blocks, and with `--check` to fail where one is out of date. A
new kind of block is one function here, decorated with `@renderer("its name")`: result files in, Markdown out.
A result file is a JSON object; beside its own numbers it records `versions` (a mapping), `hardware`, `seed`,
`commit` and `dirty`.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(
    r"^(?P<begin><!-- begin: (?P<name>\S+) -->\n)(?P<body>.*?)^(?P<end><!-- end: (?P=name) -->)$",
    flags=re.MULTILINE | re.DOTALL,
)
MARKER = re.compile(r"^<!-- (?:begin|end): \S+ -->$", flags=re.MULTILINE)

Results = Mapping[str, Mapping[str, Any]]
Renderer = Callable[[Results], str]
RENDERERS: dict[str, Renderer] = {}


class GenerateError(Exception):
    """A block or a result file that cannot be rendered: what was expected, what was found, where."""


def renderer(name: str) -> Callable[[Renderer], Renderer]:
    """Register a function as what writes the blocks called `name`."""

    def register(function: Renderer) -> Renderer:
        RENDERERS[name] = function
        return function

    return register


@renderer("versions")
def versions(results: Results) -> str:
    """Where each result file comes from, one row per file."""
    rows = []
    for name, record in sorted(results.items()):
        software = ", ".join(f"{package} {version}" for package, version in record["versions"].items())
        commit = str(record["commit"])[:10] + (" (dirty tree)" if record["dirty"] else "")
        rows.append((f"`{name}`", software, record["hardware"], record["seed"], commit))
    return table(("results", "versions", "hardware", "seed", "commit"), rows)


def table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def load_results(folder: Path) -> dict[str, Mapping[str, Any]]:
    """Every result file of a folder, by its name without the suffix."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def render(text: str, results: Results, where: str = "text") -> str:
    """`text` with the body of every block replaced by what its renderer returns."""

    def replace(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in RENDERERS:
            known = ", ".join(sorted(RENDERERS))
            raise GenerateError(f"{where}: no renderer is called {name!r}; known: {known}")
        try:
            body = RENDERERS[name](results)
        except KeyError as missing:
            raise GenerateError(f"{where}: {name!r} needs {missing}, which a result file lacks") from missing
        return f"{match['begin']}{body.strip()}\n{match['end']}"

    stray = MARKER.search(BLOCK.sub("", text))
    if stray:
        raise GenerateError(f"{where}: {stray[0]!r} stands alone; expected a begin and an end of one name")
    return BLOCK.sub(replace, text)


def documents(root: Path) -> list[Path]:
    """The files whose blocks are generated."""
    return [path for path in (root / "README.md", *sorted((root / "docs").rglob("*.md"))) if path.exists()]


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Rewrite or check the documents; the exit status."""
    parser = argparse.ArgumentParser(description="Write the generated blocks of the documents.")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a block is out of date")
    check = parser.parse_args(arguments).check
    results = load_results(root / "benchmarks" / "results")
    stale = 0
    for path in documents(root):
        name = str(path.relative_to(root))
        old = path.read_text(encoding="utf-8")
        try:
            new = render(old, results, where=name)
        except GenerateError as error:
            print(error, file=sys.stderr)
            return 2
        if new == old:
            continue
        stale += 1
        if check:
            diff = difflib.unified_diff(old.splitlines(), new.splitlines(), name, "generated", lineterm="")
            print(*diff, sep="\n")
        else:
            path.write_text(new, encoding="utf-8")
            print(f"wrote {name}")
    if check and stale:
        print(f"{stale} out of date: run `python docs/generate.py`", file=sys.stderr)
    return int(check and stale > 0)


if __name__ == "__main__":
    sys.exit(main())
