"""`mustdrop methods` and `mustdrop adapters`: what `patch` knows."""

from __future__ import annotations

import inspect
from json import dumps
from typing import Annotated, Any

import typer
from rich.table import Table

from mustdrop.cli.common import console, print_json


def methods(
    json: Annotated[bool, typer.Option("--json", help="Print JSON, for other programs.")] = False,
) -> None:
    """List the methods that patch() knows, with their knobs and defaults.

    Examples:
        python -m mustdrop methods

        python -m mustdrop methods --json
    """
    from mustdrop.registry import registry

    found = {name: _recipe(kind) for name, kind in sorted(registry().items())}
    if json:
        print_json(found)
        return
    table = Table("method", "what it does", "knobs and defaults")
    table.columns[0].no_wrap = True
    for name, row in found.items():
        table.add_row(name, row["what"], " ".join(f"{knob}={value}" for knob, value in row["knobs"].items()))
    console.print(table, markup=False, highlight=False)


def _recipe(kind: Any) -> dict[str, Any]:
    return {
        "what": inspect.cleandoc(kind.__doc__ or "").partition("\n")[0],
        "knobs": {name: _default(field) for name, field in kind.model_fields.items()},
    }


def _default(field: Any) -> Any:
    """What JSON can hold of a knob's default; own recipes may have others."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    try:
        dumps(value)
    except TypeError:
        return repr(value)
    return value


def adapters(
    json: Annotated[bool, typer.Option("--json", help="Print JSON, for other programs.")] = False,
) -> None:
    """List the model families that patch() knows, with their Hugging Face classes.

    Examples:
        python -m mustdrop adapters

        python -m mustdrop adapters --json
    """
    from mustdrop.adapters import registry

    found: dict[str, dict[str, Any]] = {
        name: {
            "classes": list(adapter.classes),
            "media": list(adapter.media),
            "transformers": f">={adapter.since}",
            "available": adapter.available(),
            "lacks": dict(adapter.lacks),
        }
        for name, adapter in sorted(registry().items())
    }
    if json:
        print_json(found)
        return
    table = Table("family", "classes", "media", "transformers", "lacks")
    for column in table.columns:
        column.overflow = "fold"
    for name, row in found.items():
        needs = row["transformers"] if row["available"] else f"{row['transformers']} (not in the installed one)"
        table.add_row(name, "\n".join(row["classes"]), ", ".join(row["media"]), needs, ", ".join(row["lacks"]))
    console.print(table, markup=False, highlight=False)
