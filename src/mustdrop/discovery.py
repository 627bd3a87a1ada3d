"""Where recipes are looked for: the files of a package, entry points of other packages, and `module:Class`.

A file or an entry point that cannot be loaded never hides the others: it is left out, with its reason.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import re
import sys
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from mustdrop.errors import ConfigError, UnknownMethodError

#: Entry-point group in which other packages announce recipes: `name = "package.module:Class"`, or a module of several.
GROUP = "mustdrop.methods"

_files: dict[str, Path] = {}  # name of a module that was run from a file -> the file


@dataclass
class Found:
    """Recipes by name, and what had to be left out.

    Attributes:
        recipes: name -> class.
        broken: name -> what it is and why it cannot be loaded, a sentence.
    """

    recipes: dict[str, type[Any]] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)

    def add(self, source: str, what: str, recipes: dict[str, type[Any]]) -> None:
        """Take in the recipes of one file or entry point; a name that is taken already keeps what it has."""
        for name, kind in recipes.items():
            taken = self.recipes.setdefault(name, kind)
            if taken is not kind:
                self.broken[source] = (
                    f"{what} names a method {name!r}, and {taken.__module__}.{taken.__qualname__} has that name."
                )


def snake_case(name: str) -> str:
    """`TopCls` -> `top_cls`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def own_name(kind: type[Any]) -> str | None:
    """`called` as the class itself sets it; a base class's belongs to that one."""
    called = vars(kind).get("called")
    return called if isinstance(called, str) else None


def in_module(module: ModuleType, base: type[Any]) -> list[type[Any]]:
    """Public subclasses of `base` that a module (or what lies below it) defines; what it imports is not its own."""
    inside = (module.__name__, f"{module.__name__}.")
    kinds = [v for v in vars(module).values() if isinstance(v, type) and issubclass(v, base) and v is not base]
    return [
        kind
        for kind in dict.fromkeys(kinds)
        if not kind.__name__.startswith("_") and (kind.__module__ == inside[0] or kind.__module__.startswith(inside[1]))
    ]


def named(kinds: Iterable[type[Any]], file: str | None = None) -> dict[str, type[Any]]:
    """Name -> class: `called`, else the file's name if it holds but one recipe, else the class's name in snake case.

    Raises:
        ConfigError: two classes of one name.
    """
    kinds = list(kinds)
    out: dict[str, type[Any]] = {}
    for kind in kinds:
        alone = file if len(kinds) == 1 else None
        name = own_name(kind) or alone or snake_case(kind.__name__)
        if name in out:
            raise ConfigError(f"{out[name].__name__} and {kind.__name__} are both called {name!r}.")
        out[name] = kind
    return out


def in_package(package: ModuleType, base: type[Any]) -> Found:
    """The recipes of every file of a package."""
    found = Found()
    for file in pkgutil.iter_modules(package.__path__):
        what = f"the file {file.name}.py of {package.__name__}"
        try:
            module = importlib.import_module(f"{package.__name__}.{file.name}")
            found.add(file.name, what, named(in_module(module, base), file.name))
        except (Exception, SystemExit) as error:
            found.broken[file.name] = f"{what} cannot be loaded: {type(error).__name__}: {error}"
    return found


def entry_points() -> list[metadata.EntryPoint]:
    """The entry points of the group, by name; nothing is imported."""
    return sorted(metadata.entry_points(group=GROUP), key=lambda point: point.name)


def announced(base: type[Any], known: dict[str, type[Any]]) -> Found:
    """The recipes of all entry points.

    Args:
        base: class that recipes derive from.
        known: names that are taken.
    """
    found = Found(dict(known))
    for point in entry_points():
        what = f"the entry point {point.name} = {getattr(point, 'value', None)!r} of the group {GROUP}"
        try:
            found.add(point.name, what, _loaded(point, base))
        except (Exception, SystemExit) as error:
            found.broken[point.name] = f"{what} cannot be loaded: {type(error).__name__}: {error}"
    return found


def _loaded(point: metadata.EntryPoint, base: type[Any]) -> dict[str, type[Any]]:
    thing = point.load()
    if isinstance(thing, ModuleType):
        recipes = named(in_module(thing, base))
        if not recipes:
            raise ConfigError(f"the module {thing.__name__} defines no public {base.__name__}.")
        return recipes
    if isinstance(thing, type) and issubclass(thing, base):
        return {point.name: thing}
    raise ConfigError(f"expected a {base.__name__} class, or a module that defines some, got {thing!r}.")


def entry_name(kind: type[Any]) -> str | None:
    """The name under which an entry point announces this class, or None."""
    return next((point.name for point in entry_points() if getattr(point, "value", None) == address(kind)), None)


def address(kind: type[Any]) -> str:
    """`module:Class` or `file.py:Class`, as `imported` takes it."""
    return f"{_files.get(kind.__module__, kind.__module__)}:{kind.__qualname__}"


def importable(kind: type[Any]) -> bool:
    """Whether another process finds this class at its address."""
    return kind.__module__ != "__main__" and "<locals>" not in kind.__qualname__


def imported(where: str, folder: Path | None = None) -> Any:
    """What lies at `module:Class` or `path/to/file.py:Class`. The module is run.

    Args:
        where: the address.
        folder: relative paths start here; None is the working directory.

    Raises:
        UnknownMethodError: no such module or file, one that cannot be imported, or nothing of that name in it.
    """
    module, _, name = where.rpartition(":")
    try:
        found: Any = (
            _file(folder or Path(), Path(module)) if module.endswith(".py") else importlib.import_module(module)
        )
    except (Exception, SystemExit) as error:
        hint = "" if module.endswith(".py") else f" For a file that is not installed write {module}.py:{name}."
        raise UnknownMethodError(
            f"method {where!r}: {module!r} cannot be imported: {type(error).__name__}: {error}.{hint}"
        ) from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise UnknownMethodError(f"method {where!r}: there is no {name!r} in {module!r}.")
        found = getattr(found, part)
    return found


def _file(folder: Path, path: Path) -> ModuleType:
    """The module of a file, run once per process."""
    path = (folder / path.expanduser()).resolve()
    name = f"{path.stem}_{zlib.crc32(str(path).encode()):08x}"
    if name in sys.modules:
        return sys.modules[name]
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # the name ends in .py
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    _files[name] = path
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
