"""Every tensor that mustdrop makes names its type and its device: no default of the process decides."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "mustdrop"
#: What makes a tensor out of nothing -> how many of its first positional arguments may be other than sizes.
CONSTRUCTORS = {
    *("tensor", "as_tensor", "zeros", "ones", "empty", "full", "arange", "linspace", "logspace", "eye", "rand"),
    *("randn", "randint", "randperm", "tril_indices", "triu_indices", "normal", "hann_window", "empty_strided"),
}
#: Made on the host by what they are made of, with the type of that.
TYPED = {"from_numpy", "frombuffer"}
#: Constructors that take their type from their arguments: they need a device alone.
INTEGRAL = {"randint", "randperm", "tril_indices", "triu_indices"}


def found(tree):
    """(line, what is missing) of every constructor without a type or a device."""
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        owner = node.func.value
        if not (isinstance(owner, ast.Name) and owner.id == "torch" and node.func.attr in CONSTRUCTORS):
            continue
        given = {keyword.arg for keyword in node.keywords}
        wanted = {"device"} if node.func.attr in INTEGRAL else {"dtype", "device"}
        if missing := wanted - given:
            yield node.lineno, f"torch.{node.func.attr} without {' and '.join(sorted(missing))}"


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_constructors_name_dtype_and_device(path):
    wrong = [f"{path.name}:{line}: {what}" for line, what in found(ast.parse(path.read_text(encoding="utf-8")))]
    assert not wrong, "\n".join(wrong)
