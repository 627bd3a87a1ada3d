"""The names of methods: which there are, what each stands for, and how own ones get one.

Wherever a method is named (`patch`, `tune`, an evaluation, a benchmark, a config file), `resolve` says what is meant.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import replace as changed
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar, overload

from mustdrop.discovery import (
    Found,
    address,
    announced,
    entry_name,
    entry_points,
    importable,
    imported,
    in_package,
    own_name,
    snake_case,
)
from mustdrop.errors import (
    BrokenMethodWarning,
    ConfigError,
    UnknownKnobError,
    UnknownMethodError,
    did_you_mean,
    warn,
)
from mustdrop.method import Method, Recipe
from mustdrop.pruners import DecodeCachePruner, PrefillPruner, VisionStagePruner

R = TypeVar("R", bound=Recipe)

#: What is taken wherever a method is named: a name, `module:Class`, a `Recipe` class or object, or a `Method`.
MethodLike = str | Method | Recipe | type[Recipe]

_SHOWN = 80  # characters of what messages print as it is

_registered: dict[str, type[Recipe]] = {}


@cache
def _built_in() -> Found:
    """The recipes of `mustdrop.methods`."""
    return in_package(importlib.import_module("mustdrop.methods"), Recipe)  # the attribute of that name is the function


def built_in() -> tuple[str, ...]:
    """Names of the methods that come with mustdrop."""
    return tuple(_built_in().recipes)


def _here() -> dict[str, type[Recipe]]:
    """Name -> recipe class, of those that need no other package."""
    return {**_built_in().recipes, **_registered}


def registry() -> dict[str, type[Recipe]]:
    """Name -> recipe class: of `mustdrop.methods`, of entry points, and what was registered.

    Warns (`BrokenMethodWarning`) of each file and entry point that cannot be loaded; the others are there.
    """
    found = announced(Recipe, _built_in().recipes)
    for why in (*_built_in().broken.values(), *found.broken.values()):
        warn(f"{why.rstrip('. ')}. It is left out.", BrokenMethodWarning)
    return found.recipes | _registered


def list_methods() -> tuple[str, ...]:
    """Names that `patch(model, name)` knows, sorted: those of mustdrop, of installed packages, and registered ones."""
    return tuple(sorted(registry()))


methods = list_methods


@overload
def register(recipe: type[R], name: str | None = None, *, replace: bool = False) -> type[R]: ...
@overload
def register(
    recipe: str | None = None, name: str | None = None, *, replace: bool = False
) -> Callable[[type[R]], type[R]]: ...
def register(recipe: Any = None, name: str | None = None, *, replace: bool = False) -> Any:
    """Give a recipe a name, for this process: `patch(model, name)`, `tune`, `eval`, config files and tables know it.

    Also a decorator: `@mustdrop.register` or `@mustdrop.register("name")`. A package announces its recipes in the
    entry-point group `mustdrop.methods`, and registers nothing.

    Args:
        recipe: the class; as a decorator, nothing or the name.
        name: what it is to be called; default: its `called`, else the name of the class in snake case.
        replace: whether it may take a name that another recipe has; `unregister` gives that one its name back, if it
            came with mustdrop or with a package.

    Returns:
        The class.

    Raises:
        ConfigError: not a recipe class, a name that cannot be one, or one that is taken. The same class, defined again
            (a cell of a notebook that was run twice, a reload), takes the place of its former self.
    """
    if isinstance(recipe, str):  # the name came first, of a decorator or before the class
        recipe, name = name, recipe
    if recipe is None:
        return partial(register, name=name, replace=replace)
    if not isinstance(recipe, type) or not issubclass(recipe, Recipe) or recipe.build is Recipe.build:
        raise ConfigError(
            f"register takes a class derived from mustdrop.Recipe that has a build(), got {recipe!r}. A Method or a "
            "recipe with its knobs needs no name: pass it to patch as it is."
        )
    given: Any = name  # whatever a caller wrote
    name = given or own_name(recipe) or snake_case(recipe.__name__)
    if not isinstance(name, str) or ":" in name or name.split() != [name]:
        raise ConfigError(f"{name!r} cannot be the name of a method: expected one word without a colon.")
    taken: Any = _here().get(name)
    taken = taken or next((str(point.value) for point in entry_points() if point.name == name), None)
    if taken is not None and not replace and not _same(taken, recipe):
        owner = taken if isinstance(taken, str) else address(taken)
        raise ConfigError(f"the name {name!r} is taken by {owner}: give another name=, or replace=True.")
    _registered[name] = recipe
    return recipe


def unregister(recipe: str | type[Recipe]) -> None:
    """Take back what `register` did.

    Args:
        recipe: the name, or the class: then all its names.

    Raises:
        UnknownMethodError: nothing was registered so.
    """
    names = [name for name, kind in _registered.items() if recipe in (name, kind)]
    if not names:
        raise UnknownMethodError(
            f"{recipe!r} was not registered. Registered: {', '.join(sorted(_registered)) or 'none'}."
        )
    for name in names:
        del _registered[name]


def _same(taken: Any, recipe: type[Recipe]) -> bool:
    """Whether the name belongs to this class already, or to what it was before it was defined again."""
    if isinstance(taken, str):
        return taken == address(recipe)
    return taken is recipe or ("<locals>" not in recipe.__qualname__ and address(taken) == address(recipe))


def find(name: str, /, **knobs: Any) -> Method:
    """The method `name` with its knobs.

    Raises:
        UnknownMethodError: no such method; the message lists the known ones and the nearest.
        UnknownKnobError: the method has no such knob.
        BudgetError, ConfigError: a knob out of range.
    """
    return resolve(name, **knobs)


def look_up(name: str, folder: Path | None = None) -> MethodLike:
    """What a name stands for: a recipe class, or whatever lies at `module:Class` or `path/to/file.py:Class`.

    Args:
        name: of a method, or an address, whose module is run.
        folder: where relative paths to files start.

    Raises:
        UnknownMethodError: there is none; the message lists the known ones and the nearest, or why it is broken.
    """
    if name in _here():
        return _here()[name]
    if ":" in name:
        found: MethodLike = imported(name, folder)
        return found
    known = registry()
    if name in known:
        return known[name]
    broken = _built_in().broken | announced(Recipe, {}).broken
    if name in broken:
        raise UnknownMethodError(f"the method {name!r} is there and cannot be used: {broken[name]}")
    if name.endswith(".json"):
        raise UnknownMethodError(f"{name!r} is no method. A config file is read first: mustdrop.load_config({name!r}).")
    raise UnknownMethodError(f"there is no method {name!r}. {did_you_mean(name, known)}")


def resolve(given: MethodLike, /, **knobs: Any) -> Method:
    """The method that is meant.

    Args:
        given: a name, an address `module:Class`, a `Recipe` class or object, or a `Method`.
        **knobs: settings, where it is a name or a class; an object has its own.

    Raises:
        UnknownMethodError, UnknownKnobError: names that do not exist.
        BudgetError, ConfigError: a knob out of range, or something that is no method.
    """
    named_by = given if isinstance(given, str) and ":" not in given else None
    if isinstance(given, str):
        given = look_up(given)
    if isinstance(given, type) and issubclass(given, Recipe):
        name = named_by or name_of(given)
        for knob in knobs:
            if knob not in given.model_fields:
                known = given.model_fields
                raise UnknownKnobError(f"method {name!r} has no knob {knob!r}. {did_you_mean(knob, known)}")
        return _build(given(**knobs), name)
    if knobs and isinstance(given, Method | Recipe):
        kind = type(given).__name__
        how = "its pruners" if isinstance(given, Method) else f"{kind}({', '.join(f'{k}={knobs[k]!r}' for k in knobs)})"
        raise ConfigError(
            f"a {kind} object is complete: give {' and '.join(knobs)} to {how}, or pass the class or a name."
        )
    if isinstance(given, Recipe):
        return _build(given, name_of(type(given)))
    if isinstance(given, Method):
        return given
    raise ConfigError(f"expected a method: a name, a Recipe or a Method; got {_shown(given)}.")


def _build(recipe: Recipe, name: str) -> Method:
    if type(recipe).build is Recipe.build:
        raise ConfigError(f"{type(recipe).__name__} has no build(): define it, it makes the Method.")
    built: Any = recipe.build()
    if not isinstance(built, Method):
        raise ConfigError(f"{type(recipe).__name__}.build returned {_shown(built)}, expected a mustdrop.Method.")
    positions = built.positions if recipe.positions == "kept" else recipe.positions
    return changed(built, name=name, strict=built.strict or recipe.strict, positions=positions)


def _shown(thing: Any) -> str:
    for kind, socket in (
        (VisionStagePruner, "vision"),
        (PrefillPruner, "prefill"),
        (DecodeCachePruner, "decode"),
    ):
        if isinstance(thing, kind):
            return f"a {kind.__name__}: write {socket}={kind.__name__}(...)"
    if isinstance(thing, Path):
        return f"a path: a config file is read first, mustdrop.load_config({str(thing)!r})"
    if isinstance(thing, dict):
        return f"a dict: write patch(model, {', '.join(f'{k}=...' for k in thing) or 'keep=...'}), or **settings"
    if isinstance(thing, type):
        return f"the class {thing.__name__}"
    text = repr(thing)
    name = type(thing).__name__
    return f"{text} ({name})" if len(text) <= _SHOWN and "\n" not in text else f"a {name}"


def name_of(kind: type[Recipe]) -> str:
    """What a recipe class is called: as it is registered or announced, else its `called`, or its name in snake case."""
    known = next((name for name, other in _here().items() if other is kind), None)
    return known or entry_name(kind) or own_name(kind) or snake_case(kind.__name__)


def written(given: MethodLike) -> str:
    """How a file names a method, so that another process finds it.

    Raises:
        ConfigError: it cannot: the recipe is defined in a function, a notebook or a script, or it is a `Method`.
    """
    kind = look_up(given) if isinstance(given, str) else given
    if isinstance(kind, type):
        if kind not in _registered.values():
            name = next((name for name, other in _here().items() if other is kind), None) or entry_name(kind)
            if name is not None:
                return name
        if importable(kind):
            return address(kind)
        if kind in _registered.values():
            return name_of(kind)
    raise ConfigError(
        f"a file cannot name {_shown(kind)}: put its Recipe class into a module or a .py file (module:Class, "
        "path/to/file.py:Class), or register it, here and wherever the file is read."
    )


def described(given: MethodLike, knobs: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name and settings, as tables and result files show them; the settings can be written as JSON.

    Args:
        given: what `resolve` takes.
        knobs: the settings that were given with it.
    """
    if isinstance(given, str):
        return given, dict(knobs)
    if isinstance(given, type):
        return name_of(given), dict(knobs)
    if isinstance(given, Recipe):
        return name_of(type(given)), given.model_dump(mode="json", exclude_unset=True, fallback=repr)
    sockets = {name: getattr(given, name) for name in ("input", "vision", "prefill", "decode")}
    return given.name, {name: repr(pruner) for name, pruner in sockets.items() if pruner is not None}
