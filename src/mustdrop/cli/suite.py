"""`mustdrop eval-suite`: a published table as commands of lmms-eval."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from mustdrop.cli.common import console, print_json
from mustdrop.eval.suites import Suite, find, suites


def suite(
    name: Annotated[str | None, typer.Argument(help="A table; without one they are listed.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="Only these methods; may be given several times.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, for other programs.")] = False,
) -> None:
    """Print the lmms-eval commands of a published table, each with the value that the table has for it.

    Nothing is run. Take the shares from runs of one harness alone: the unpruned command stands first. Numbers of one
    method differ by a point or two between re-runs in papers, and tables of different harnesses must not be mixed.

    Examples:
        python -m mustdrop eval-suite

        python -m mustdrop eval-suite cen --method divprune --method cdpruner
    """
    if name is None:
        table = Table("name", "what it is", "source", title="Published tables", title_justify="left")
        for one in suites().values():
            table.add_row(one.name, one.about, one.source)
        if json:
            print_json({one.name: {"about": one.about, "source": one.source} for one in suites().values()})
        else:
            console.print(table, markup=False)
        return
    found = find(name)
    cells = [cell for cell in found.cells if not method or cell.method in ("none", *method)]
    if json:
        print_json([{"command": found.command(cell), "method": cell.method, "value": cell.value} for cell in cells])
        return
    typer.echo("\n".join(_lines(found, method)))


def _lines(found: Suite, methods: list[str] | None) -> list[str]:
    lines = [f"# {found.about}", f"# {found.source}", *([f"# {found.note}"] if found.note else [])]
    for cell in found.cells:
        if not methods or cell.method in ("none", *methods):
            lines += [f"# {'unpruned' if cell.keep is None else cell.value}", found.command(cell)]
    return lines
