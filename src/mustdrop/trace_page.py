"""A trace as a page: follow the patches layer by layer, in any browser and without a network.

The page is one file: the template `pages/trace.html`, which holds the code, with the facts of the traces put into it as
JSON. The facts are those of `Trace.draw`, by `mustdrop.trace_view`.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mustdrop.errors import ConfigError
from mustdrop.trace import Trace
from mustdrop.trace_table import quantity
from mustdrop.trace_view import Row, fitted, media_of, owners, per_medium, picture_of, rows_of, sample_of

_MARK = '"the facts"'  # what the facts take the place of in the template
_LONGEST = 640  # pixels of the longer side of a picture
_SIDES = (4, 96)  # pixels of a patch, least and most


@dataclass(frozen=True)
class MethodRun:
    """One call under one method, with what the page says of it.

    Attributes:
        trace: of the call.
        answer: of the model; empty for none.
        sample: batch row.
        name: heading; by default the name of the method.
    """

    trace: Trace
    answer: str = ""
    sample: int = 0
    name: str = ""


def write(path: str | Path, image: Any, runs: Sequence[MethodRun], *, question: str = "") -> Path:
    """Write the page.

    Args:
        path: where to.
        image: what the prompt's pictures are, as `Trace.draw` takes it.
        runs: the calls to show side by side, of the same prompt.
        question: what was asked; empty for none.

    Returns:
        The path.

    Raises:
        ConfigError: as `Trace.draw` raises it, the calls are of different prompts, or the path is a folder.
        PictureError: a picture that cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        raise ConfigError(f"{path} is a folder: give the name of a file to write, e.g. {path / 'kept.html'}.")
    text = page(facts(image, runs, question))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def page(shown: dict[str, Any]) -> str:
    """The page of some facts. What they say cannot end the script that holds them."""
    template = resources.files("mustdrop").joinpath("pages", "trace.html").read_text(encoding="utf-8")
    text = json.dumps(shown, separators=(",", ":"), allow_nan=False)
    return template.replace(_MARK, text.replace("&", r"\u0026").replace("<", r"\u003c").replace(">", r"\u003e"))


def facts(image: Any, runs: Sequence[MethodRun], question: str = "") -> dict[str, Any]:
    """The content of the page, as plain lists and numbers; see `write`."""
    if not runs:
        raise ConfigError("there is no trace to show: give at least one.")
    rows = [_rows(one, image) for one in runs]
    for one, other in zip(runs, rows, strict=True):
        same = len(other) == len(rows[0]) and all(
            a.label == b.label and torch.equal(a.tokens, b.tokens) for a, b in zip(rows[0], other, strict=True)
        )
        if not same:
            raise ConfigError(
                f"the calls of {runs[0].trace.method} and {one.trace.method} are not of the same prompt: their images "
                "lie differently among the vision tokens."
            )
    return {
        "question": question,
        "rows": [_picture(row, runs[0].trace.fit) for row in rows[0]],
        "methods": [_method(one) for one in runs],
    }


def _rows(run: MethodRun, image: Any) -> list[Row]:
    sample = sample_of(run.trace, run.sample)
    media = media_of(run.trace, sample)
    return list(rows_of(media, per_medium(image, run.trace.media, sample)))


def _picture(row: Row, fit: str) -> dict[str, Any]:
    height, width = row.tokens.shape
    side = min(max(_LONGEST // max(height, width), _SIDES[0]), _SIDES[1])
    stream = io.BytesIO()
    fitted(picture_of(row), fit, height, width, side).save(stream, "JPEG", quality=88)
    data = base64.b64encode(stream.getvalue()).decode()
    return {
        "label": row.label,
        "height": height,
        "width": width,
        "tokens": row.tokens.flatten().tolist(),
        "picture": f"data:image/jpeg;base64,{data}",
    }


def _method(run: MethodRun) -> dict[str, Any]:
    trace, sample = run.trace, run.sample
    layers = trace.tokens.shape[0]
    alive: list[list[int]] = []
    at: list[int] = []  # per layer, and once more for the end, its place in `alive`
    for layer in range(layers + 1):
        kept = trace.kept(layer, sample).tolist()
        if not alive or alive[-1] != kept:
            alive.append(kept)
        at.append(len(alive) - 1)
    importance = trace.importance(sample)
    heard = [(f"attention of the words in layer {layer}", given) for layer, given in trace.attention(sample).items()]
    ranked = [] if importance is None else [("attention in the vision encoder", importance)]
    return {
        "name": run.name or trace.method,
        "answer": run.answer,
        "total": int(trace.total[sample]),
        "layers": layers,
        "alive": alive,
        "at": at,
        "owner": owners(trace, sample).tolist(),
        "protected": trace.protected(sample).tolist(),
        "heat": [{"name": name, "values": _scaled(values)} for name, values in [*ranked, *heard]],
        "tokens": trace.tokens[:, sample].tolist(),
        "entries": trace.kv_lengths[:, sample].tolist(),
        "costs": _costs(trace, sample),
    }


def _scaled(values: Tensor) -> list[float | None]:
    """Shares of the largest value, None where there is none."""
    finite = torch.where(values.isfinite(), values, torch.zeros_like(values)).double()
    most = float(finite.max()) if finite.numel() else 0.0
    shares = (finite / most if most > 0 else finite).clamp(min=0)
    return [
        round(share, 4) if known else None
        for share, known in zip(shares.tolist(), values.isfinite().tolist(), strict=True)
    ]


def _costs(trace: Trace, sample: int) -> list[list[str]]:
    """Name and value of each line of the table. FLOPs and bytes are those of the whole batch."""
    whole = " (whole batch)" if trace.tokens.shape[1] > 1 else ""
    flops, kv, step = trace.flops, trace.kv_bytes, trace.flops.parts["decode_step"]
    stored = f"{quantity(kv.actual, 'B')} of {quantity(kv.unpruned, 'B')} ({kv.ratio:.1%})"
    return [
        ["vision tokens of the prompt", str(int(trace.total[sample]))],
        ["into the language model", str(len(trace.kept(0, sample)))],
        ["average retained tokens per layer", f"{float(trace.equal_tokens[sample]):.1f}"],
        [
            f"FLOPs of the prompt{whole}",
            f"{quantity(flops.actual, 'FLOPs')} of {quantity(flops.unpruned, 'FLOPs')} ({flops.ratio:.1%})",
        ],
        [f"FLOPs of a decode step{whole}", f"{step.ratio:.1%} of the unpruned step"],
        [f"KV cache{whole}", stored if kv.unpruned else "no cache"],
    ]
