"""What starting costs, counted in modules: the command line without torch, the package without the compiler."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import mustdrop

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "matplotlib", "datasets", "scipy")
COMMANDS = (
    "demo", "explain", "app", "eval", "eval-suite", "report", "tune", "fit", "bench", "methods", "adapters", "doctor",
)  # fmt: skip


def loaded(code, *names):
    """Which of these modules a fresh process has after running `code`; nothing else may be printed after it."""
    ask = f"import json, sys; print(json.dumps([name for name in {names!r} if name in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{ask}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_version_and_help_of_every_command_do_without_torch():
    calls = [["--version"], ["--help"], *([name, "--help"] for name in COMMANDS)]
    code = (
        "import sys, contextlib\n"
        "from mustdrop.cli import main\n"
        f"for arguments in {calls!r}:\n"
        "    sys.argv = ['mustdrop', *arguments]\n"
        "    with contextlib.suppress(SystemExit):\n"
        "        main()\n"
    )
    assert loaded(code, *HEAVY) == []


def test_the_package_alone_loads_nothing_and_patch_does_not_load_the_compiler():
    assert loaded("import mustdrop; dir(mustdrop)", *HEAVY, "numpy", "pydantic") == []
    code = "import mustdrop; mustdrop.patch; mustdrop.tune"
    assert loaded(code, "torch._dynamo", "transformers.models.llava.modeling_llava") == []


def test_a_function_that_was_decorated_before_the_compiler_came_is_kept_out_of_it():
    code = """
import torch
from mustdrop.compat import eager

seen = []

def kept_out(x):
    seen.append(torch.compiler.is_compiling())
    return x[x > 0].sum()

first, second = eager(kept_out), eager(kept_out)

def model(x):
    return first(x * 2) + second(x + 1) + x.sum()

x = torch.arange(4.0)
expected = model(x)
assert "torch._dynamo" not in __import__("sys").modules
from torch._dynamo.testing import CompileCounter
frames = CompileCounter()
compiled = torch.compile(model, backend=frames)
assert all(torch.equal(compiled(x), expected) for _ in range(3))
assert len(seen) == 8 and not any(seen)
assert frames.frame_count == 3, frames.frame_count  # one piece before, between and after the two
"""
    assert loaded(code, "torch._dynamo") == ["torch._dynamo"]


def test_public_names_are_those_that_type_checkers_see():
    tree = ast.parse((ROOT / "src" / "mustdrop" / "__init__.py").read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    typed = {
        alias.name: node.module.removeprefix("mustdrop").removeprefix(".")
        for node in block.body
        for alias in node.names
    }
    assert typed == mustdrop._HOMES
    assert sorted(typed) == sorted(mustdrop.__all__)


@pytest.mark.parametrize("order", [(), ("trace", "adapters", "methods"), ("patching", "tuning")], ids=str)
def test_names_are_what_they_were_whatever_is_imported_first(order):
    code = f"""
import importlib
for name in {order!r}:
    importlib.import_module("mustdrop." + name)
import mustdrop
from mustdrop import *
from mustdrop import trace as traced, adapters as families
import mustdrop.trace, mustdrop.adapters.base, mustdrop.methods.fastv
assert mustdrop.trace is traced and callable(traced) and callable(families) and callable(mustdrop.methods)
assert "llava" in adapters() and "fastv" in methods() and patch is mustdrop.patch
assert mustdrop.errors.BudgetError and mustdrop.pruners.PrefillPruner and mustdrop.kernels.dispatch
assert set(mustdrop.__all__) <= set(dir(mustdrop))
for name in ("no_such_name", "__no_such__"):
    try:
        getattr(mustdrop, name)
    except AttributeError as error:
        assert name in str(error)
    else:
        raise AssertionError(name)
"""
    assert loaded(code, "mustdrop.trace") == ["mustdrop.trace"]


def test_an_import_that_fails_inside_a_submodule_is_not_called_a_missing_name(monkeypatch):
    monkeypatch.delattr(mustdrop, "bench", raising=False)  # another test may have imported it
    monkeypatch.setattr(importlib, "import_module", lambda name: exec("import no_such_package_at_all"))
    with pytest.raises(ModuleNotFoundError, match="no_such_package_at_all"):
        mustdrop.bench  # noqa: B018
