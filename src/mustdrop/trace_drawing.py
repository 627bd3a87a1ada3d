"""A trace as a picture: which patches each stage left, over the images and frames of one prompt."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from torch import Tensor

from mustdrop import figures
from mustdrop.extras import need
from mustdrop.trace_view import coverage, fitted, media_of, per_medium, picture_of, rows_of, sample_of

if TYPE_CHECKING:
    from mustdrop.trace import Trace

SIDE = 16  # pixels of a patch
LEGEND = "in colour: kept  |  blue: merged into the patch at its centre  |  grey: dropped"


def draw(trace: Trace, image: Any, path: str | Path | None, sample: int) -> Any:
    """See `Trace.draw`."""
    need("matplotlib", "viz", "drawing")
    from matplotlib.figure import Figure

    row = sample_of(trace, sample)
    media = media_of(trace, row)
    rows = list(rows_of(media, per_medium(image, trace.media, row)))
    stages = _stages(trace)
    figure = Figure(figsize=(2.6 * (len(stages) + 1), 2.9 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(stages) + 1, squeeze=False)
    covered = [coverage(trace, layer, row) for layer in stages.values()]
    for line, (one, cells) in enumerate(zip(rows, axes, strict=True)):
        height, width = one.tokens.shape
        pixels = fitted(picture_of(one), trace.fit, height, width, SIDE)
        cells[0].imshow(pixels)
        cells[0].set_ylabel(one.label, fontsize=9)
        for ax, name, alive in zip(cells[1:], stages, covered, strict=True):
            ax.imshow(_shaded(pixels, alive[one.tokens]))
            ax.set_title("\n".join([name] * (line == 0) + [_count(alive, one.tokens)]), fontsize=9)
        for ax in cells:
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
    figure.supxlabel(LEGEND, fontsize=9)
    if path is not None:
        figures.save(figure, path, dpi=110)
    return figure


def _stages(trace: Trace) -> dict[str, int]:
    """Name of each column -> decoder layer at whose input it is drawn."""
    layers = trace.tokens.shape[0]
    later = [layer + 1 for layer in trace.filters if layer + 1 < layers]
    return {"after the vision stage": 0} | {f"into layer {layer}": layer for layer in later}


def _count(alive: Tensor, tokens: Tensor) -> str:
    """How many tokens of this row there are, and were."""
    own = tokens[tokens >= 0].unique()  # type: ignore[no-untyped-call]
    return f"{int((alive[own] == 1).sum())} of {len(own)}"


def _shaded(pixels: Image.Image, coverage: Tensor) -> Any:
    """The image with dropped patches greyed out and merged ones lightly tinted."""
    array = np.asarray(pixels, dtype=np.float32) / 255
    mask = np.kron(coverage.numpy(), np.ones((SIDE, SIDE), dtype=np.float32))[..., None]
    grey = array.mean(2, keepdims=True) * 0.25 + 0.7
    tinted = array * 0.6 + np.array([0.25, 0.55, 0.95], dtype=np.float32) * 0.4
    return np.where(mask >= 1, array, np.where(mask > 0, tinted, grey))
