"""What the commands share: consoles, exit codes, budgets, JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from mustdrop.budget import Keep
from mustdrop.errors import BudgetError, ConfigError

console = Console()
errors = Console(stderr=True)

FAILED = 1  # the command ran, and what it found is a failure
WRONG = 2  # the command could not run as it was called


def budget(text: str) -> Keep:
    """`--keep` as a number: "64" is tokens, "0.25" and "25%" are shares.

    Raises:
        typer.BadParameter: it is neither, or no budget.
    """
    from mustdrop.budget import check_keep, parse_keep

    try:
        return check_keep(parse_keep(text), "--keep")
    except BudgetError as error:
        raise typer.BadParameter(str(error)) from None


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
