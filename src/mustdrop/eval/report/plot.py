"""Accuracy against average retained tokens per layer, one panel per set-up."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mustdrop import figures
from mustdrop.errors import ConfigError
from mustdrop.eval.report.groups import UNPRUNED, Group, Row
from mustdrop.extras import need

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.figure import Figure


def draw(groups: Sequence[Group], path: Path) -> Figure:
    """Draw scores over average retained tokens: measured ones filled, published ones hollow at their table's tokens.

    Args:
        groups: set-ups; those without any score and tokens are left out.
        path: where to write; the ending says the format.

    Returns:
        The matplotlib figure.

    Raises:
        ConfigError: nothing to draw, or an ending that matplotlib does not know.
        MissingPackageError: matplotlib is not installed.
    """
    need("matplotlib", "viz", "--plot")
    from matplotlib.figure import Figure

    shown = [group for group in groups if any(map(_drawable, group.rows))]
    if not shown:
        raise ConfigError("--plot has nothing to draw: none of these results has both a score and vision tokens.")
    figure = Figure(figsize=(6.4, 4.2 * len(shown)), layout="constrained")
    for axes, group in zip(figure.subplots(len(shown), squeeze=False)[:, 0], shown, strict=True):
        _panel(axes, group)
    figures.save(figure, path)
    return figure


def _drawable(row: Row) -> bool:
    return row.result.score is not None and row.result.tokens is not None


def _panel(axes: Any, group: Group) -> None:
    rows = [row for row in group.rows if _drawable(row)]
    for i, method in enumerate(dict.fromkeys(row.result.method for row in rows)):
        own = [row for row in rows if row.result.method == method]
        points = [(row.result.tokens.equal.mean, row.result.score) for row in own if row.result.tokens]
        name = "unpruned" if method == UNPRUNED else method
        axes.plot(*zip(*points, strict=True), "o-", color=f"C{i}", label=name)
        told = [(row.published.tokens, row.published.score) for row in own if row.published]
        if told:
            axes.plot(*zip(*told, strict=True), "o--", color=f"C{i}", fillstyle="none", label=f"{name}, published")
    if group.unpruned is not None and group.unpruned.score is not None:
        axes.axhline(group.unpruned.score, color="grey", linewidth=0.8, linestyle=":")
    axes.set_xlabel("average retained tokens per layer")
    axes.set_ylabel(group.first.metric)
    axes.set_title(f"{group.first.title}, {group.first.model.name}", fontsize=10)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
