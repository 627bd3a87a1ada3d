"""What the figures share: a few lines in colour with their names beside them, the rest grey, and a message on top."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

GREY, LIGHT = "#757575", "#d2d2d2"
COLOURS = ("#3949ab", "#d81b60", "#00897b", "#f57c00", "#6d4c41")  # told apart by most eyes, and in print
GAP = 0.05  # between two names, as a share of the height
DPI = 200  # a phone shows a figure at its width in inches, on a fine screen
HALO = (withStroke(linewidth=3, foreground="white"),)  # letters stay readable where a line crosses them


def figure(width: float = 5.6, height: float = 4.3) -> tuple[Figure, Axes]:
    """An empty figure with one pair of axes, no wider than what a phone can show in readable letters."""
    made = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    axes = made.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return made, axes


def message(axes: Axes, text: str, under: str = "") -> None:
    """One message, and below it the conditions, both broken into lines that fit."""
    small, large = textwrap.wrap(under, 80), textwrap.wrap(text, 54)
    axes.set_title("\n".join(large), loc="left", x=-0.1, fontsize=11.5, fontweight="bold", pad=8 + 12 * len(small))
    axes.text(-0.1, 1.02, "\n".join(small), transform=axes.transAxes, fontsize=8.5, color=GREY, va="bottom")


def level(axes: Axes, y: float, text: str, side: str = "left") -> None:
    """A dotted line at a height, and what it stands for."""
    axes.axhline(y, color="black", linestyle=":", lw=1)
    place, shift = (0, 4) if side == "left" else (1, -4)
    axes.annotate(
        text, (place, y), (shift, 4), ("axes fraction", "data"), "offset points", fontsize=9, ha=side,
        path_effects=HALO,
    )  # fmt: skip


def names(axes: Axes, ends: Mapping[str, tuple[float, float]], colours: Mapping[str, str], side: str = "right") -> None:
    """Names beside the ends of lines, apart from each other.

    Args:
        axes: with their limits set.
        ends: name -> (x, y) of an end of its line.
        colours: name -> colour.
        side: "right" or "left" of the end.
    """
    transform = axes.transData
    places = {name: transform.transform(end) for name, end in ends.items()}
    height = axes.bbox.height
    spread = _apart([float(place[1]) for place in places.values()], GAP * height)
    for (name, place), y in zip(places.items(), spread, strict=True):
        x, moved = transform.inverted().transform((place[0], y))
        sign, align = (1, "left") if side == "right" else (-1, "right")
        axes.annotate(
            name, (x, moved), (6 * sign, 0), textcoords="offset points", color=colours[name], fontsize=9.5, ha=align,
            va="center", annotation_clip=False, path_effects=HALO,
        )  # fmt: skip


def _apart(values: Sequence[float], gap: float) -> list[float]:
    """The values, moved as little as it takes to have gaps between them."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    out = list(values)
    for _ in range(200):
        for low, high in pairwise(order):
            lack = gap - (out[high] - out[low])
            if lack > 1e-3:
                out[low] -= lack / 2
                out[high] += lack / 2
    return out
