"""The extras of this package: what belongs to them, and what to say where a part is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import dataclass

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mustdrop.errors import MissingPackageError

_PACKAGE = "mustdrop"
# Whether the package index has this package. Until it does, messages and documents say how to install from a checkout.
PUBLISHED = False


def install(extra: str | None = None) -> str:
    """How to install this package, or it with an extra, as the rest of a sentence.

    Args:
        extra: name of the extra; None for the package alone.
    """
    part = "" if extra is None else f"[{extra}]"
    if PUBLISHED:
        return f"pip install '{_PACKAGE}{part}'"
    return f"pip install '.{part}' in a checkout of {_PACKAGE} (or pip install 'FILE.whl{part}')"


@dataclass(frozen=True)
class Needed:
    """A package that an extra needs.

    Attributes:
        name: as the package index has it.
        wanted: the versions that will do, "" for any.
        found: the version that is installed, None if none is.
    """

    name: str
    wanted: str
    found: str | None

    @property
    def fits(self) -> bool:
        """Whether a version that will do is installed."""
        return self.found is not None and Requirement(f"{self.name}{self.wanted}").specifier.contains(
            self.found, prereleases=True
        )


def need(module: str, extra: str, what: str) -> None:
    """Raise `MissingPackageError` if a module of an extra is not installed; it is not imported.

    Args:
        module: name of the module.
        extra: the extra that brings it.
        what: what needs it, as the start of a sentence.
    """
    if importlib.util.find_spec(module) is None:
        raise MissingPackageError(f"{what} needs {module}, which is not installed: {install(extra)}.")


def version(name: str) -> str | None:
    """The installed version of a package, None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def requirements(extra: str | None = None) -> list[Needed]:
    """What this package needs on this system, or what one of its extras needs on top; empty if it is not installed.

    Args:
        extra: name of the extra; None for the package itself.
    """
    if version(_PACKAGE) is None:  # run from a source tree
        return []
    found = []
    for line in importlib.metadata.requires(_PACKAGE) or []:
        wanted = Requirement(line)
        always = wanted.marker is None or wanted.marker.evaluate({"extra": ""})
        here = always if extra is None else not always and wanted.marker.evaluate({"extra": extra})  # type: ignore[union-attr]
        if here and canonicalize_name(wanted.name) != _PACKAGE:
            found.append(Needed(wanted.name, str(wanted.specifier), version(wanted.name)))
    return found


def names() -> list[str]:
    """The extras of the installed package, without those for its developers."""
    if version(_PACKAGE) is None:
        return []
    listed = importlib.metadata.metadata(_PACKAGE).get_all("Provides-Extra") or []
    return sorted(name for name in listed if name not in ("dev", "docs", "tutorials"))
