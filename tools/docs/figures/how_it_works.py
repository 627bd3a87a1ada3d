"""Draw docs/images/how-it-works.png from one run of the bundled model: `python tools/docs/figures/how_it_works.py`.

Every length in the picture is read off the trace of that run, and the kept patches are those that it kept.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

import mustdrop
from lines import DPI
from mustdrop.demo import model as bundled
from mustdrop.demo.scenes import GRID, SceneMaker

TARGET = Path(__file__).parents[3] / "docs" / "images" / "how-it-works.png"
KEEP, SEED = 64, 7
VISION, TEXT, GONE, EDGE = "#2f6fb5", "#8a8f98", "#eef1f5", "#aab2bd"
FULL, SIDE = 60.0, 6.0  # drawing units: all vision tokens, and the text on either side (drawn wider than it is)


def run() -> tuple[Any, Image.Image, int]:
    """The trace of one generate at `KEEP` equal tokens, the picture asked about, and the length of the sequence."""
    torch.manual_seed(0)
    model, processor = bundled.load()
    image = Image.fromarray(SceneMaker("heldout", seed=SEED).scene().image)
    text = bundled.prompt(processor, "where is the magenta one ?")
    inputs = processor(text=text, images=image, return_tensors="pt")
    mustdrop.patch(model, keep=KEEP)
    with torch.inference_mode():
        out = model.generate(**inputs, do_sample=False)
    return mustdrop.trace(model), image, out.shape[1] - 1


def strip(ax: Axes, y: float, here: int, total: int, height: float = 0.56) -> None:
    """One layer: the logical sequence as an outline, the rows that exist inside it, packed to the left."""
    ax.add_patch(Rectangle((0, y), FULL + 2 * SIDE, height, facecolor=GONE, edgecolor=EDGE, linestyle=":", linewidth=1))
    width = FULL * here / total
    ax.add_patch(Rectangle((0, y), SIDE, height, facecolor=TEXT))
    ax.add_patch(Rectangle((SIDE, y), width, height, facecolor=VISION))
    ax.add_patch(Rectangle((SIDE + width, y), SIDE, height, facecolor=TEXT))


def whole(ax: Axes, y: float, alive: np.ndarray, gone: str, height: float = 0.56) -> None:
    """The logical sequence: every vision token in its place, those that are gone in another colour."""
    ax.add_patch(Rectangle((0, y), SIDE, height, facecolor=TEXT))
    ax.add_patch(Rectangle((FULL + SIDE, y), SIDE, height, facecolor=TEXT))
    ax.add_patch(Rectangle((SIDE, y), FULL, height, facecolor=gone, edgecolor=EDGE, linewidth=0.5))
    step = FULL / len(alive)
    for i in alive.nonzero()[0]:
        ax.add_patch(Rectangle((SIDE + i * step, y), step, height, facecolor=VISION, linewidth=0))


def left(ax: Axes, y: float, text: str, **style: Any) -> None:
    """A label beside a strip."""
    ax.text(-1.5, y + 0.28, text, ha="right", va="center", fontsize=9, **style)


def right(ax: Axes, y: float, text: str, **style: Any) -> None:
    """A note beside a strip."""
    ax.text(FULL + 2 * SIDE + 1.5, y + 0.28, text, ha="left", va="center", fontsize=9, **style)


def mask(trace: Any, layer: int) -> np.ndarray:
    """(N,) bool, vision tokens alive at the input of a layer."""
    alive = np.zeros(int(trace.total[0]), dtype=bool)
    alive[trace.kept(layer).numpy()] = True
    return alive


def encoder(ax: Axes, trace: Any, image: Image.Image) -> None:
    """The picture with what the vision stage let through."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    side = pixels.shape[0] // GRID
    large = np.ones((side, side))
    alive = np.kron(mask(trace, 0).reshape(GRID, GRID), large)[..., None]
    merged = np.kron(trace.assignment().numpy().reshape(GRID, GRID) >= 0, large)[..., None]
    tint = 0.6 * pixels + 0.4 * np.array([0.25, 0.55, 0.95], dtype=np.float32)
    grey = 0.75 + 0.2 * pixels.mean(2, keepdims=True)
    ax.imshow(np.where(alive > 0, pixels, np.where(merged > 0, tint, grey)))
    ax.set_axis_off()
    ax.set_anchor("NW")
    entered, total = int(trace.tokens[0, 0]), int(trace.total[0])
    ax.set_title("1  vision encoder", fontsize=11, loc="left", fontweight="bold")
    ax.text(
        pixels.shape[1] * 1.08,
        pixels.shape[0] * 0.5,
        "Similar windows (tinted) merge after an early layer, so later\n"
        "encoder layers run on fewer tokens.\n\n"
        f"At the exit all {total} patches have a value again. {entered} tokens\n"
        "are selected; the rows of the others become NaN.",
        va="center",
        fontsize=9,
    )


def decoder(ax: Axes, trace: Any) -> None:
    """Strips from the embeddings down to the hidden states."""
    layers, total = trace.tokens.shape[0], int(trace.total[0])
    y = float(layers + 1)
    ax.set_title("2  text model: prefill", fontsize=11, loc="left", fontweight="bold")
    left(ax, y, "inputs_embeds")
    whole(ax, y, mask(trace, 0), "#f6d6c8")
    right(ax, y, "logical length; dropped features are NaN")
    notes = {0: "only rows that exist"}
    notes |= {f: notes.get(f, "") or "text rows score, then gather" for f in trace.filters}
    for i in range(layers):
        y -= 1
        strip(ax, y, int(trace.tokens[i, 0]), total)
        left(ax, y, f"decoder layer {i}")
        count = f"{int(trace.tokens[i, 0])} vision tokens"
        right(ax, y, f"{count}   {notes[i]}" if i in notes else count)
    y -= 1
    left(ax, y, "last_hidden_state")
    whole(ax, y, mask(trace, layers), GONE)
    right(ax, y, "scattered back to logical length (zeros)")
    ax.set_xlim(-26, FULL + 2 * SIDE + 64)
    ax.set_ylim(-0.2, layers + 1.8)
    ax.set_axis_off()


def cache(ax: Axes, trace: Any, length: int) -> None:
    """Stored entries of every layer inside the length that it reports."""
    layers = trace.tokens.shape[0]
    ax.set_title("3  KV cache: decoding", fontsize=11, loc="left", fontweight="bold")
    for i in range(layers):
        y = float(layers - i)
        stored = int(trace.kv_lengths[i, 0])
        ax.add_patch(Rectangle((0, y), 40, 0.56, facecolor=GONE, edgecolor=EDGE, linestyle=":", linewidth=1))
        ax.add_patch(Rectangle((0, y), 40 * stored / length, 0.56, facecolor=VISION))
        ax.text(41, y + 0.28, f"{stored} stored", va="center", fontsize=9)
        ax.text(-1, y + 0.28, f"decoder layer {i}", ha="right", va="center", fontsize=9)
    ax.text(
        0,
        0.7,
        f"Every layer reports {length} entries to transformers. After the prefill, what later layers dropped\n"
        "is dropped from the earlier caches too, except from the first two.",
        va="top",
        fontsize=9,
    )
    ax.set_xlim(-13, 60)
    ax.set_ylim(-2, layers + 1)
    ax.set_axis_off()


def main() -> None:
    """Write the picture."""
    trace, image, length = run()
    figure = Figure(figsize=(7.4, 9.4), layout="constrained", facecolor="white")  # no wider than a column of text
    rows = figure.subfigures(3, 1, height_ratios=[2.3, 4, 3.1])
    encoder(rows[0].subplots(), trace, image)
    decoder(rows[1].subplots(), trace)
    cache(rows[2].subplots(), trace, length)
    figure.savefig(TARGET, dpi=DPI)
    print(f"wrote {TARGET}")


if __name__ == "__main__":
    main()
