"""The commands, one file each: asking and looking, measuring, serving a page, listing, and a check of the installation.

Exit codes, of every command: 0, it did what it was asked; 1, it ran and found a failure (a failed self-test, too many
questions that could not be asked), or an error that nobody foresaw, with its traceback; 2, it could not run as it was
called (unknown option, method or budget, missing file or package, too little memory), with one line that says what to
do; 130, interrupted.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated

import typer

from mustdrop.cli import application, bench, demo, doctor, explain, listing, report, suite
from mustdrop.cli.common import FAILED, WRONG, errors
from mustdrop.errors import MustDropError
from mustdrop.eval.cli import eval_command
from mustdrop.fitting.cli import command as fit_command
from mustdrop.tuning.cli import command as tune_command

__all__ = ["FAILED", "WRONG", "app", "main"]

app = typer.Typer(
    help="Vision-language models that drop the vision tokens that do not matter.",
    epilog=(
        "Exit codes: 0 done; 1 it ran and found a failure; 2 it could not run as it was called; 130 interrupted. "
        "`mustdrop COMMAND --help` shows examples."
    ),
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        from mustdrop import __version__

        typer.echo(f"mustdrop {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Vision-language models that drop the vision tokens that do not matter."""


def add(command: Callable[..., None], name: str | None = None) -> None:
    """Make a function a command.

    Args:
        command: its docstring is the help, and the lines of its section `Examples:` are printed as they stand.
        name: of the command; by default that of the function.
    """
    text, _, examples = (inspect.getdoc(command) or "").partition("\nExamples:\n")
    lines = [line for line in examples.splitlines() if line.strip()]
    epilog = "\n".join(["\b", "Examples:", *lines]) if lines else None
    app.command(name, help=text, epilog=epilog)(command)


add(demo.demo)
add(explain.explain)
add(application.app)
add(eval_command, "eval")
add(suite.suite, "eval-suite")
add(report.report)
add(tune_command, "tune")
add(fit_command, "fit")
add(bench.bench)
add(listing.methods)
add(listing.adapters)
add(doctor.doctor)


def main() -> None:
    """Run the command line.

    An error of mustdrop, of a file, or of too little memory ends with its message and exit code 2; see the module for
    the others.
    """
    try:
        app(prog_name="mustdrop")
    except (MustDropError, OSError) as error:  # OSError: files, disks, and models that no hub or folder has
        _end(str(error))
    except (MemoryError, RuntimeError) as error:
        if type(error).__name__ not in ("MemoryError", "OutOfMemoryError"):  # torch need not be imported to tell
            raise
        what = str(error).partition(". ")[0] or "the machine has no more"
        _end(f"out of memory ({what}): a smaller picture, batch, model or --dtype needs less.")


def _end(message: str) -> None:
    errors.print(f"error: {message}", style="red", markup=False, highlight=False, soft_wrap=True)
    raise SystemExit(WRONG) from None
