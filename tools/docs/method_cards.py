"""The head of each method's card in docs/methods.md: stages, knobs with their defaults, and what was measured.

Read from the source text of the recipes, so that the page can be written without installing the package.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[2] / "src" / "mustdrop"
METHODS = PACKAGE / "methods"
SHARED = {"Comparing": PACKAGE / "pruners" / "vision_rules.py"}  # bases that give several recipes a knob
RUNS = ("quality", "quality_fixed", "quality_earlier")  # runs of the quality benchmark, the newest first
STAGES = {"input": "before the encoder", "vision": "vision encoder", "prefill": "prefill", "decode": "KV cache"}

Table = Callable[..., str]


def names() -> list[str]:
    """Names of all methods, as their files have it."""
    return sorted(path.stem for path in METHODS.glob("*.py") if path.stem != "__init__")


def card(name: str, results: Mapping[str, Mapping[str, Any]], table: Table) -> str:
    """Paper, stages, knobs and the measured row of one method."""
    tree = ast.parse((METHODS / f"{name}.py").read_text(encoding="utf-8"))
    (recipe,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and _bases(node) & {"Recipe"}]
    facts = [_paper(ast.get_docstring(tree) or ""), f"Stages: {', '.join(_stages(recipe))}."]
    constants = dict(_constants(tree))
    shared = [_class(SHARED[base], base) for base in sorted(_bases(recipe) & SHARED.keys())]
    meanings = {k: v for node in (*shared, recipe) for k, v in _attributes(ast.get_docstring(node) or "").items()}
    knobs = [
        (f"`{_named(node)}`", f"`{_default(node, constants)}`", meanings.get(_named(node), ""))
        for owner in (recipe, *shared)
        for node in owner.body
        if isinstance(node, ast.AnnAssign) and "ClassVar" not in ast.unparse(node.annotation)
    ]
    called = next(
        (_default(n, constants) for n in recipe.body if isinstance(n, ast.AnnAssign) and _named(n) == "called"), name
    )
    parts = [" ".join(fact for fact in facts if fact)]
    if knobs:
        parts.append(table(("knob", "default", "meaning"), knobs))
    measured = _measured(called.strip("'"), [results.get(name) for name in RUNS], table)
    return "\n\n".join([*parts, *([measured] if measured else [])])


def _constants(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """What a file gives names to: `A = 1`, and `A, B = 1, 2`."""
    for node in tree.body:
        if isinstance(node, ast.Assign):
            (target,) = node.targets
            several = isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple)
            pairs = zip(target.elts, node.value.elts, strict=True) if several else [(target, node.value)]
            yield from ((name.id, ast.unparse(value)) for name, value in pairs if isinstance(name, ast.Name))


def _class(path: Path, name: str) -> ast.ClassDef:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)


def _bases(node: ast.ClassDef) -> set[str]:
    return {base.id for base in node.bases if isinstance(base, ast.Name)}


def _named(node: ast.AnnAssign) -> str:
    return node.target.id if isinstance(node.target, ast.Name) else ""


def _paper(docstring: str) -> str:
    found = re.search(r"\b(\d{4}\.\d{5})\b", docstring)
    return f"Paper: [arXiv {found[1]}](https://arxiv.org/abs/{found[1]})." if found else ""


def _stages(recipe: ast.ClassDef) -> list[str]:
    """The sockets that `build` fills, from the keywords of its call of `Method`."""
    calls = [node for node in ast.walk(recipe) if isinstance(node, ast.Call)]
    made = [node for node in calls if isinstance(node.func, ast.Name) and node.func.id == "Method"]
    filled = {keyword.arg for node in made for keyword in node.keywords}
    return [words for socket, words in STAGES.items() if socket in filled] or ["none"]


def _attributes(docstring: str) -> dict[str, str]:
    """The `Attributes:` section of a docstring: name -> meaning, on one line."""
    section = docstring.partition("Attributes:\n")[2].partition("\n\n")[0]
    entries = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", section, flags=re.MULTILINE)
    return {name: " ".join(text.split()).replace("|", "\\|") for name, text in entries}


def _default(node: ast.AnnAssign, constants: Mapping[str, str]) -> str:
    """The default of a knob as it is written; a constant of the method's file by its value."""
    value = node.value
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "Field" and value.args:
        value = value.args[0]
    text = "" if value is None else ast.unparse(value)
    return {"DEFAULT_KEEP": "1/3"}.get(text, constants.get(text, text))


def _measured(name: str, records: Sequence[Mapping[str, Any] | None], table: Table) -> str:
    """Accuracy at each budget, as the first run that has rows of the method says; empty where none has."""
    found = ([row for row in (record or {}).get("rows", ()) if row["method"] == name] for record in records)
    rows = next((rows for rows in found if rows), [])
    if not rows:
        return ""
    header = ["" if row["keep"] is None else f"{row['keep']:.0%}" for row in rows]
    cells = ["cannot" if "cannot" in row else f"{row['correct']['mean']:.3f}" for row in rows]
    return table(["kept", *(head or "all" for head in header)], [["accuracy", *cells]])
