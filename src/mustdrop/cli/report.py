"""`mustdrop report`: results of evaluations side by side."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from mustdrop.cli.common import console, print_json


def report(
    results: Annotated[list[Path], typer.Argument(help="Result files of `mustdrop eval`, or folders of them.")],
    plot: Annotated[Path | None, typer.Option(help="Draw accuracy against tokens per layer into this file.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, for other programs.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
) -> None:
    """Print the results of `mustdrop eval` side by side: the share of the unpruned score, and the published number.

    Only runs of one set-up are compared: the same questions, put to the same model in the same way. Runs of other
    set-ups get tables of their own, and where two of them differ only in a few settings, the report names these.

    Where the folders have the answers, a second table compares each run with the unpruned one question by question
    (the exact McNemar test, same answers, the groups of VTC-Bench), and a third splits the score by ability.

    Examples:
        python -m mustdrop report runs/unpruned runs/mustdrop-64

        python -m mustdrop report runs --plot accuracy.png

        python -m mustdrop report runs --markdown > table.md
    """
    from mustdrop.eval.report import averages, collect, group_files, render

    if json and markdown:
        raise typer.BadParameter("--json and --markdown exclude each other.")
    groups = group_files(collect(results))
    means = averages(groups)
    if plot is not None:
        from mustdrop.eval.report.plot import draw

        draw(groups, plot)
    if json:
        print_json({"groups": [group.to_dict() for group in groups], "averages": [asdict(mean) for mean in means]})
        return
    if markdown:
        typer.echo(render.markdown(groups, means), nl=False)
        return
    render.show(groups, console)
    if means:
        table = Table(*render.AVERAGES, title="Mean over benchmarks", title_justify="left")
        for mean in means:
            table.add_row(*render.average_cells(mean))
        console.print(table, markup=False)
    if plot is not None:
        console.print(f"Wrote {plot}.", markup=False)
