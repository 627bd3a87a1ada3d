"""`mustdrop doctor`: what is installed, what will run here, and a self-test."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from mustdrop.cli.common import FAILED, console, print_json

_TITLES = {
    "versions": "Versions",
    "devices": "Devices",
    "attention": "Attention of the text model",
    "kernels": "Kernels (scoring, merging, gathering, cutting)",
    "extras": "Packages",
    "serving": "Serving with vLLM",
    "hub": "Hugging Face hub",
}
_COLOURS = {"passed": "green", "failed": "red", "skipped": "yellow"}


def doctor(
    self_test: Annotated[
        bool, typer.Option(help="Run the self-test (half a minute on a CPU, one more with vLLM).")
    ] = True,
    device: Annotated[str | None, typer.Option(help="Where it runs: cpu, cuda, cuda:1. Default: a GPU if any.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, for other programs.")] = False,
) -> None:
    """Print versions, devices, attention backends and which kernels will run here, and test the installation.

    The self-test asks the bundled model a question: nothing is downloaded. It ends with exit code 1 if a check fails
    or a required package is missing or too old. Put its output into a report of a problem.

    Examples:
        python -m mustdrop doctor

        python -m mustdrop doctor --no-self-test --json

        python -m mustdrop doctor --device cuda:1
    """
    from transformers.utils import logging

    from mustdrop import doctor as examination
    from mustdrop.loading import place

    logging.disable_progress_bar()
    target = str(place(device))
    found = examination.facts()
    if not json:
        _print(found)
    outcomes = []
    for outcome in examination.self_test(target) if self_test else ():
        outcomes.append(outcome)
        if not json:
            line = f"[{_COLOURS[outcome.state]}]{outcome.state:7}[/] {escape(f'{outcome.name}: {outcome.detail}')}"
            console.print(f"{line} ({outcome.seconds:.1f} s)", highlight=False, soft_wrap=True)
    failed = bool(found["extras"]["required"]) or any(outcome.state == "failed" for outcome in outcomes)
    if json:
        print_json(found | {"device": target, "self_test": [asdict(o) for o in outcomes], "failed": failed})
    elif self_test:
        console.print("[red]Something is wrong, see above.[/]" if failed else "[green]All is well.[/]")
    if failed:
        raise typer.Exit(FAILED)


def _print(found: dict[str, Any]) -> None:
    rows = found | {"extras": {name: ", ".join(lacking) or "complete" for name, lacking in found["extras"].items()}}
    for key, title in _TITLES.items():
        if not rows[key]:
            continue
        table = Table(title=title, title_justify="left", show_header=False, box=None, title_style="bold")
        for name, value in rows[key].items():
            table.add_row(escape(str(name)), escape(str(value)))
        console.print(table)
        console.print()
