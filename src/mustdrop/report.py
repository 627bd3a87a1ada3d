"""A trace as a table for the terminal and as a picture."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mustdrop.errors import ConfigError
from mustdrop.extras import need

if TYPE_CHECKING:
    from mustdrop.runtime.state import Medium
    from mustdrop.trace import Trace


def quantity(value: float, unit: str) -> str:
    """A number with a metric prefix: 1.23 GFLOPs."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if abs(value) < 1000 or prefix == "P":
            break
        value /= 1000
    return f"{value:.3g} {prefix}{unit}"


def groups(trace: Trace) -> Iterator[tuple[int, int]]:
    """Runs of decoder layers (first, last) with the same tokens and cache lengths."""
    layers = trace.tokens.shape[0]
    first = 0
    for i in range(1, layers + 1):
        same = i < layers and bool(
            (trace.tokens[i] == trace.tokens[first]).all() and (trace.kv_lengths[i] == trace.kv_lengths[first]).all()
        )
        if not same:
            yield first, i - 1
            first = i


def table(trace: Trace) -> str:
    """The trace as text: tokens and cache per layer and sample, then costs."""
    from rich.console import Console
    from rich.table import Table

    batch = trace.tokens.shape[1]
    shown = range(min(batch, 4))
    rich = Table(title=f"mustdrop trace: {trace.method}", title_justify="left")
    rich.add_column("decoder layers")
    for b in shown:
        name = f"sample {b}\n" if batch > 1 else ""
        rich.add_column(f"{name}vision tokens", justify="right")
        rich.add_column("cache entries", justify="right")
    rich.add_row("prompt", *[cell for b in shown for cell in (str(int(trace.total[b])), "")], end_section=True)
    for first, last in groups(trace):
        name = f"{first}" if first == last else f"{first}-{last}"
        rich.add_row(
            name,
            *[cell for b in shown for cell in (str(int(trace.tokens[first, b])), str(int(trace.kv_lengths[first, b])))],
        )
    rich.add_section()
    rich.add_row("equal tokens", *[cell for b in shown for cell in (f"{float(trace.equal_tokens[b]):.2f}", "")])
    rich.add_row("equal entries", *[cell for b in shown for cell in ("", f"{float(trace.equal_entries[b]):.2f}")])
    console = Console(width=40 + 34 * len(shown), color_system=None)
    with console.capture() as capture:
        console.print(rich)
        if batch > len(shown):
            console.print(f"(and {batch - len(shown)} more samples)")
        console.print(
            f"FLOPs of the prompt  {quantity(trace.flops.actual, 'FLOPs')} of "
            f"{quantity(trace.flops.unpruned, 'FLOPs')} ({trace.flops.ratio:.1%})\n"
            f"FLOPs a decode step  {trace.flops.parts['decode_step'].ratio:.1%} of the unpruned step\n"
            f"KV cache             {quantity(trace.kv_bytes.actual, 'B')} of "
            f"{quantity(trace.kv_bytes.unpruned, 'B')} ({trace.kv_bytes.ratio:.1%})\n"
            f"backend              {trace.backend}\n"
            f"kernels              {trace.kernels}",
            highlight=False,
        )
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def draw(trace: Trace, image: Any, path: str | Path | None, sample: int) -> Any:
    """See `Trace.draw`."""
    need("matplotlib", "viz", "drawing")
    from matplotlib.figure import Figure

    media = trace.media[sample] if trace.media else []
    images = _per_medium(image, media)
    if len(images) != len(media):
        raise ConfigError(
            f"sample {sample} has {len(media)} images or videos, got {len(images)} to draw on."
            + (
                ""
                if media
                else " The images were not encoded in this call (features were given, or the prompt has none)."
            )
        )
    layers = trace.tokens.shape[0]
    changes = [0, *[f + 1 for f in trace.filters if f + 1 < layers]]
    titles = [
        "image",
        *[f"into layer {at}: {len(trace.kept(at, sample))} of {int(trace.total[sample])}" for at in changes],
    ]
    titles[1] = f"after the vision stage: {len(trace.kept(0, sample))} of {int(trace.total[sample])}"
    rows = [row for medium, pictures in zip(media, images, strict=True) for row in _views(medium, pictures)]
    figure = Figure(figsize=(2.6 * len(titles), 2.9 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(titles), squeeze=False)
    for row, (picture, index) in enumerate(rows):
        pixels = _fitted(picture.convert("RGB"), trace.fit, *index.shape)
        for column, title in enumerate(titles):
            ax = axes[row][column]
            ax.set_axis_off()
            if row == 0:
                ax.set_title(title, fontsize=9)
            if column == 0:
                ax.imshow(pixels)
                continue
            ax.imshow(_shaded(pixels, _coverage(trace, changes[column - 1], sample)[index]))
    figure.supxlabel("in colour: kept  |  blue: merged into the patch at its centre  |  grey: gone", fontsize=9)
    if path is not None:
        figure.savefig(path, dpi=110)
    return figure


def _opened(image: Any) -> Any:
    """A PIL image from one, from an array (rows, columns, 3) or from a path."""
    from PIL import Image

    if isinstance(image, Image.Image):
        return image
    return Image.fromarray(image) if hasattr(image, "__array_interface__") else Image.open(image)


def _per_medium(image: Any, media: list[Medium]) -> list[list[Any]]:
    """The pictures of each medium, opened: one for an image, several frames for a video."""
    given = list(image) if isinstance(image, list | tuple) else [image]
    if len(media) == 1 and media[0].kind == "video" and not (len(given) == 1 and _is_frames(given[0])):
        given = [given]
    return [[_opened(im) for im in (one if _is_frames(one) else [one])] for one in given]


def _is_frames(one: Any) -> bool:
    return isinstance(one, list | tuple) or getattr(one, "ndim", 3) == 4


def _views(medium: Medium, pictures: list[Any]) -> list[tuple[Any, Any]]:
    """Each frame of each grid of a medium: the picture, and (rows, columns) long, the vision token of each cell."""
    import torch

    layout, views = medium.layout, []
    token = torch.empty(layout.offsets[-1], dtype=torch.long, device="cpu")
    token[layout.cells[~layout.structural]] = medium.index[~layout.structural]
    for (frames, height, width), first in zip(layout.grids, layout.offsets, strict=False):
        for t in range(frames):
            start = first + t * height * width
            picture = pictures[t * len(pictures) // frames]
            views.append((picture, token[start : start + height * width].view(height, width)))
    return views


def _coverage(trace: Trace, layer: int, sample: int) -> Any:
    """(N,) float: 1 where a vision token is alive itself, 0.5 where it lives on inside a merged window, else 0."""
    import torch

    n = int(trace.total[sample])
    alive = torch.zeros(n, dtype=torch.float32, device="cpu")
    kept = trace.kept(layer, sample)
    slots = trace.assignment(sample)
    owner = torch.full((n + 1,), -1, dtype=torch.long, device="cpu")
    entered = trace.kept(0, sample)
    owner[slots[entered]] = entered  # slot -> the patch that names it
    living = torch.isin(owner[slots.clamp(min=0)], kept) & (slots >= 0)
    alive[living] = 0.5
    alive[kept] = 1.0
    return alive


def _fitted(picture: Any, fit: str, height: int, width: int) -> Any:
    """The part of the image that the model saw, at 16 pixels per patch."""
    from PIL import ImageOps

    size = (width * 16, height * 16)
    return ImageOps.fit(picture, size) if fit == "crop" else picture.resize(size)


def _shaded(pixels: Any, coverage: Any) -> Any:
    """The image with dropped patches greyed out and merged ones lightly tinted."""
    import numpy as np

    array = np.asarray(pixels, dtype=np.float32) / 255
    mask = np.kron(coverage.numpy(), np.ones((16, 16), dtype=np.float32))[..., None]
    grey = array.mean(2, keepdims=True) * 0.25 + 0.7
    tinted = array * 0.6 + np.array([0.25, 0.55, 0.95], dtype=np.float32) * 0.4
    return np.where(mask >= 1, array, np.where(mask > 0, tinted, grey))
