"""How a public name or argument goes: it warns for one minor version, and is gone in the next.

See `docs/stability.md`. A name of the package itself is a line in `RENAMED`; anything else calls `warn`.
"""

from __future__ import annotations

import warnings

# Old public name of the package -> (new name, first version that warns).
RENAMED: dict[str, tuple[str, str]] = {}


def gone_in(since: str) -> str:
    """The minor version in which something that is deprecated since `since` is gone: the next one."""
    major, minor = since.split(".")[:2]
    return f"{major}.{int(minor) + 1}"


def warn(old: str, new: str, since: str, stacklevel: int = 3) -> None:
    """Say that something has another name now.

    Args:
        old: what was called or given, as the caller wrote it.
        new: what to write now.
        since: the first version that warns.
        stacklevel: frames up to the caller's own line, as `warnings.warn` counts them.
    """
    warnings.warn(
        f"{old} is deprecated since mustdrop {since} and is gone in {gone_in(since)}: use {new}.",
        DeprecationWarning,
        stacklevel,
    )
