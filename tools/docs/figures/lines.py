"""What the figures share: a few lines in colour with their names beside them, the rest grey, and a message on top."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.figure import Figure

GREY, LIGHT = "#8a8a8a", "#d2d2d2"
COLOURS = ("#3949ab", "#d81b60", "#00897b", "#f57c00", "#6d4c41")  # told apart by most eyes, and in print
GAP = 0.045  # between two names, as a share of the height


def figure(width: float = 7.2, height: float = 4.4) -> tuple[Figure, Axes]:
    """An empty figure with one pair of axes."""
    made = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    axes = made.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return made, axes


def message(axes: Axes, text: str, under: str = "") -> None:
    """One message, and below it the conditions."""
    axes.set_title(f"{text}\n", loc="left", fontsize=11, fontweight="bold")
    if under:
        axes.text(0, 1.02, under, transform=axes.transAxes, fontsize=8.5, color=GREY, va="bottom")


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
            va="center", annotation_clip=False,
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
