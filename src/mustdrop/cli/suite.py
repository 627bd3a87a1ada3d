"""`mustdrop eval-suite`: a published table as commands of its harness."""

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
    """Print the commands of a published table, each with the value that the table has for it.

    They run what the table was measured with, lmms-eval mostly. Nothing is run here. Take the shares from runs of one
    harness alone: the unpruned command stands first. Numbers of one method differ by a point or two between re-runs in
    papers, and tables of different harnesses must not be mixed.

    Examples:
        python -m mustdrop eval-suite

        python -m mustdrop eval-suite cen --method divprune --method cdpruner

        python -m mustdrop eval-suite vtc --method dart
    """
    if name is None:
        if json:
            print_json({one.name: _about(one) for one in suites().values()})
            return
        table = Table("name", "what it is", "source", "harness", title="Published tables", title_justify="left")
        for one in suites().values():
            table.add_row(one.name, one.about, one.source, one.harness)
        console.print(table, markup=False)
        return
    found = find(name)
    steps = found.steps(method or [])
    if json:
        print_json([step.plain for step in steps])
        return
    about = [found.about, found.source, f"Harness: {found.harness}.", *([found.note] if found.note else [])]
    typer.echo("\n".join([*(f"# {line}" for line in about), *(step.text for step in steps)]))


def _about(one: Suite) -> dict[str, str]:
    return {"about": one.about, "source": one.source, "harness": one.harness}
