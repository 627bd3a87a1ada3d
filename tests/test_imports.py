"""Modules of the package do not import each other in circles when they are loaded; functions fit on a page."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import mustdrop

ROOT = Path(mustdrop.__file__).parent


def modules() -> dict[str, Path]:
    """Name -> file, of every module of the package."""
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def loaded(tree: ast.Module) -> Iterator[str]:
    """Names that a module imports as it is loaded: not in functions, and not for a type checker alone."""
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            waiting += node.orelse
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        waiting += ast.iter_child_nodes(node)


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules each of which can be reached from every other."""
    reach: dict[str, set[str]] = {}
    for name in graph:
        seen, waiting = set(), [name]
        while waiting:
            for other in graph[waiting.pop()] - seen:
                seen.add(other)
                waiting.append(other)
        reach[name] = seen
    groups = {tuple(sorted(other for other in reach[name] if name in reach[other])) for name in graph}
    return [list(group) for group in groups if group]


def test_no_module_imports_itself_by_way_of_others():
    files = modules()
    graph = {}
    for name, path in files.items():
        wanted = set(loaded(ast.parse(path.read_text(encoding="utf-8"))))
        # a package whose __init__ hands out names of its modules is no circle of theirs
        graph[name] = {other for other in wanted & set(files) if other != name and not name.startswith(f"{other}.")}
    assert circles(graph) == []


def body(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function after its arguments and its docstring."""
    documented = ast.get_docstring(function) is not None and len(function.body) > 1
    return (function.end_lineno or 0) - function.body[documented].lineno + 1


def test_no_function_is_longer_than_a_page():
    long = {
        f"{name}.{node.name}": body(node)
        for name, path in modules().items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and body(node) > 90
    }
    assert long == {}
