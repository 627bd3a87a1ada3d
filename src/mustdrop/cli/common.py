"""What the commands share: consoles, exit codes, budgets, JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from mustdrop.budget import Keep
from mustdrop.errors import ConfigError

console = Console()
errors = Console(stderr=True)

FAILED = 1  # the command ran, and what it found is a failure
WRONG = 2  # the command could not run as it was called


def budget(text: str) -> Keep:
    """`--keep` as a number: "64" is tokens, "0.25" and "25%" are shares.

    Raises:
        BudgetError: it is neither, or no budget.
    """
    from mustdrop.budget import check_keep, parse_keep

    return check_keep(parse_keep(text, "--keep "), "--keep")


def check_folder(path: Path) -> None:
    """Refuse a folder to write to that is a file, before hours of work.

    Raises:
        ConfigError: it is a file.
    """
    if path.exists() and not path.is_dir():
        raise ConfigError(f"--out {path} is a file: give the name of a folder.")


def check_run(methods: Sequence[str], budgets: Sequence[Keep], device: str | None, dtype: str) -> None:
    """Refuse methods, budgets, a device and a type of weights that there are not, before a model is loaded.

    Args:
        methods: names.
        budgets: each is tried with each method; none where a method may lack a budget.
        device: name of a device, None for any.
        dtype: name of a type.

    Raises:
        UnknownMethodError, UnknownKnobError, BudgetError, ConfigError: see `mustdrop.patch` and `mustdrop.loading`.
    """
    from mustdrop.loading import check_dtype, place
    from mustdrop.registry import find

    for name in methods:
        for settings in [{"keep": keep} for keep in budgets] or [{}]:
            find(name, **settings)
    place(device)
    check_dtype(dtype)


def load_subject(model: str | None, device: str | None, dtype: str) -> tuple[Any, Any]:
    """The model of `--model` and its processor; without it the bundled one, whose weights are float32.

    Raises:
        ConfigError: a device or a type of weights that there is not.
    """
    from mustdrop.demo.model import load
    from mustdrop.loading import load_model, place

    if model is not None:
        return load_model(model, device=device, dtype=dtype)
    bundled, processor = load()
    return bundled.to(place(device)), processor


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file; its folder is made where it is missing.

    Raises:
        ConfigError: there is a folder of that name.
    """
    if path.is_dir():
        raise ConfigError(f"{path} is a folder: give the name of a file to write, e.g. {path / 'result.json'}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def print_json(content: Any) -> None:
    """Print as JSON to standard output, for other programs: no colours, no line breaks inside of values."""
    typer.echo(json.dumps(content, indent=1))
