"""Config files: a method with its knobs as JSON, written by `mustdrop tune` or by hand, read by `load_config`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mustdrop.errors import ConfigError, UnknownMethodError
from mustdrop.method import Method
from mustdrop.registry import MethodLike, look_up, resolve, written

FORMAT = 1


def load_config(path: str | Path) -> Method:
    """The method that a config file describes: `mustdrop.patch(model, mustdrop.load_config("config.json"))`.

    Args:
        path: a JSON file with `format` (1), `method` and `knobs` (its settings, `keep` among them); `mustdrop tune`
            writes more, which tells where the choice comes from and is not read. `method` is a name, or says where the
            `Recipe` class is: `package.module:Class`, or `file.py:Class` with a path from the folder of the config
            file. That module is run. The folder of a scorer (`importance`) is looked for from there as well.

    Returns:
        A method for `patch`.

    Raises:
        ConfigError: no such file, not JSON, another format, or an entry that is missing or of the wrong type.
        UnknownMethodError, UnknownKnobError: names that this version does not know.
        BudgetError: a budget out of range.
    """
    where = Path(path)
    try:
        content = json.loads(where.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"the config file {where} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise ConfigError(f"the config file {where} is not JSON: {error}.") from error
    expected = '{"format": 1, "method": "NAME", "knobs": {"keep": 0.25}}'
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else content
        raise ConfigError(f"{where}: expected {expected}, got format {found!r}. Write it again with this version.")
    method, knobs = content.get("method"), content.get("knobs")
    if not isinstance(method, str) or not isinstance(knobs, dict):
        raise ConfigError(f"{where}: expected {expected}, got method {method!r} and knobs {knobs!r}.")
    try:
        named: MethodLike = look_up(method, where.parent) if ":" in method else method
        return resolve(named, **_located(knobs, where.parent))
    except UnknownMethodError as error:
        hint = "" if ":" in method else " A method of your own: register it first, or write module:Class in the file."
        raise UnknownMethodError(f"{where}: {error}{hint}") from error


def _located(knobs: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The knobs, with the folder of a scorer where it is if its path starts at the config file."""
    given = knobs.get("importance")
    if isinstance(given, str) and (folder / given).is_dir():
        return {**knobs, "importance": str(folder / given)}
    return dict(knobs)


def save_config(path: str | Path, method: MethodLike, knobs: Mapping[str, Any], **about: Any) -> None:
    """Write a config file.

    Args:
        path: where to.
        method: a name, or a recipe class that another process can import.
        knobs: its settings, as JSON can hold them.
        **about: what else the file tells its reader.

    Raises:
        UnknownMethodError, UnknownKnobError, BudgetError, ConfigError: `load_config` could not read it back.
    """
    resolve(method, **knobs)
    given = knobs.get("importance")
    if isinstance(given, str) and Path(given).is_dir():  # a path from where this runs, and not from the file
        knobs = {**knobs, "importance": str(Path(given).resolve())}
    content = {"format": FORMAT, "method": written(method), "knobs": dict(knobs), **about}
    try:
        text = json.dumps(content, indent=1)
    except TypeError as error:
        raise ConfigError(f"the knobs {dict(knobs)!r} cannot be written to a config file: {error}.") from error
    Path(path).write_text(text + "\n", encoding="utf-8")
