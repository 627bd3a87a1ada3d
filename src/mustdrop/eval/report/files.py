"""The result files that the user named."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from mustdrop.errors import ConfigError
from mustdrop.eval import questions
from mustdrop.eval.report.groups import Group, group
from mustdrop.eval.result import EvalResult

NAME = "result.json"


def collect(paths: Iterable[Path]) -> dict[Path, EvalResult]:
    """Read every result file, each once.

    Args:
        paths: result files, or folders that hold them at any depth.

    Returns:
        File -> result, in the order given; files of one folder in the order of their names.

    Raises:
        ConfigError: no such file, a folder without results, or a file of another kind.
    """
    files = [file for path in paths for file in _files(path)]
    unique = {file.resolve(): file for file in files}
    return {file: EvalResult.read(file) for file in unique.values()}


def group_files(results: Mapping[Path, EvalResult]) -> list[Group]:
    """Sort runs into set-ups, each with what was said to every question where its folder has that.

    Args:
        results: result file -> result, as `collect` returns them.

    Raises:
        DataFileError: a file of questions is broken.
    """
    return group(results.values(), [questions.read(file.parent) for file in results])


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = sorted(path.rglob(NAME))
    if not found:
        raise ConfigError(
            f"there is no {NAME} in {path} or in a folder below it. `mustdrop eval` writes one for every run; give "
            "the folder that it named."
        )
    return found
