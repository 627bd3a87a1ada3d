"""Draw docs/images/demo.png from one call of the bundled model: `python tools/docs/figures/demo.py`.

The picture and the question are the first ones of `mustdrop demo`, at its smallest budget. It is what `trace.draw`
draws, with letters that can be read where the picture is as wide as a column of text, or a phone.
"""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.figure import Figure

import mustdrop
from lines import DPI
from mustdrop.demo import run

TARGET = Path(__file__).parents[3] / "docs" / "images" / "demo.png"
KEEP = 32
LEGEND = "in colour: kept   |   blue: merged into the patch at its centre   |   grey: dropped"


def main() -> None:
    """Write the picture."""
    subject = run.bundled_subject(None, [])
    with mustdrop.patched(subject.model, "mustdrop", keep=KEEP), torch.inference_mode():
        subject.answer(subject.items[0])
        trace = mustdrop.last_trace(subject.model)
    given, *stages = trace.draw(subject.items[0].image).axes
    titles = ["the picture\n", *(ax.get_title().removeprefix("after the ") for ax in stages)]
    made = Figure(figsize=(6.2, 1.75), layout="constrained", facecolor="white")
    for ax, title, panel in zip(made.subplots(1, len(titles)), titles, [given, *stages], strict=True):
        ax.imshow(panel.images[0].get_array())
        ax.set_title(title, fontsize=8.5)
        ax.set_axis_off()
    made.supxlabel(LEGEND, fontsize=8)
    made.savefig(TARGET, dpi=DPI)
    print(f"wrote {TARGET}")


if __name__ == "__main__":
    main()
