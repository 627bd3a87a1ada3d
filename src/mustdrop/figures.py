"""Writes matplotlib figures: `trace.draw`, `report --plot`, `tune`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mustdrop.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def save(figure: Figure, path: str | Path, dpi: int = 120) -> None:
    """Write a figure; its folder is made where it is missing.

    Args:
        figure: what to write.
        path: where to; the ending says the format.
        dpi: dots per inch.

    Raises:
        ConfigError: an ending that matplotlib does not know, or a folder of that name.
    """
    file = Path(path)
    known = figure.canvas.get_supported_filetypes()
    if file.suffix.lstrip(".").lower() not in known or file.is_dir():
        raise ConfigError(f"cannot draw into {file}: expected a file ending in one of {', '.join(sorted(known))}.")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=dpi)
