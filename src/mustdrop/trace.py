"""`Trace`: what one call kept, where, and what it cost. It tells the truth or raises; it never guesses."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from mustdrop.cost import Compared, encoder_flops, linear_flops, total
from mustdrop.errors import ConfigError, UnsupportedModelError
from mustdrop.runtime.rows import PAD, take
from mustdrop.runtime.state import Call, ImageMarks, Prefill

if TYPE_CHECKING:
    from mustdrop.runtime.core import Runtime


@dataclass(frozen=True, repr=False)
class Trace:
    """The last generate or forward of a patched model. L decoder layers, B batch rows of the prompt's pass.

    Attributes:
        method: name of the method.
        total: (B,) long, vision tokens of each prompt.
        tokens: (L, B) long, vision tokens that each decoder layer processed in the prefill.
        kv_lengths: (L, B) long, cache entries per layer at the end of the call (text and vision, without padding);
            zeros if no cache was used.
        flops: FLOPs of the prompt (vision, projector, scoring, prefill), beside the unpruned call; `parts` has these
            and the decode step. See `mustdrop.cost` for the formulas.
        kv_bytes: bytes of keys and values stored at the end, beside the unpruned call.
        backend: attention implementation of the text model.
        filters: decoder layers after which tokens left.
        fit: how the image processor fits an image to the grid.
        grids: per sample, (rows, columns, feature rows before the patches) of each image; empty if the encoder
            did not run.
    """

    method: str
    total: Tensor
    tokens: Tensor
    kv_lengths: Tensor
    flops: Compared
    kv_bytes: Compared
    backend: str
    filters: tuple[int, ...]
    fit: Literal["crop", "stretch"]
    grids: list[list[tuple[int, int, int]]]
    _alive: list[list[Tensor]] = field(default_factory=list)
    _marks: list[list[ImageMarks]] = field(default_factory=list)

    @property
    def equal_tokens(self) -> Tensor:
        """(B,) float, mean over the decoder layers of the vision tokens that a layer processed."""
        return self.tokens.float().mean(0)

    @property
    def dropped_anything(self) -> bool:
        """Whether any vision token was dropped, merged or evicted, at any stage."""
        fewer = any(len(left) < n for left, n in zip(self._alive[-1], self.total.tolist(), strict=True))
        return fewer or bool((self.tokens < self.total).any()) or self.kv_bytes.actual < self.kv_bytes.unpruned

    def kept(self, layer: int, sample: int = 0) -> Tensor:
        """Original indices of the vision tokens alive at the input of a decoder layer.

        Args:
            layer: 0 to L - 1, or L for what is left after the last layer.
            sample: batch row.

        Returns:
            (n,) long, ascending, counted over the prompt's vision tokens. A merged window is named by its centre patch.

        Raises:
            ConfigError: no such layer or sample.
        """
        self._check(layer, sample)
        return self._alive[layer][sample]

    def assignment(self, sample: int = 0) -> Tensor:
        """Where each original vision token went at the vision stage.

        Returns:
            (N,) long: slot among the vision tokens that entered the language model, in their order; -1 where it is
            gone.
        """
        self._check(0, sample)
        n = int(self.total[sample])
        if not self._marks:
            return torch.arange(n)
        out, base, slots = [], 0, 0
        for mark in self._marks[sample]:
            places = (
                mark.order.masked_fill(~mark.alive, torch.iinfo(torch.long).max)
                .argsort(stable=True)
                .argsort(stable=True)
            )
            out.append(torch.where(mark.assignment < 0, -1, places[mark.assignment.clamp(min=0)] + slots))
            base, slots = base + len(mark.alive), slots + int(mark.alive.sum())
        return torch.cat(out) if out else torch.zeros(0, dtype=torch.long)

    def pinned(self, sample: int = 0) -> Tensor:
        """(k,) long, original indices of the key set, ascending."""
        self._check(0, sample)
        marks = self._marks[sample] if self._marks else []
        return torch.cat([mark.pinned for mark in marks]).nonzero()[:, 0] if marks else torch.zeros(0, dtype=torch.long)

    def _check(self, layer: int, sample: int) -> None:
        layers, batch = self.tokens.shape
        if not 0 <= layer <= layers:
            raise ConfigError(
                f"layer={layer}: this trace has decoder layers 0 to {layers - 1}, and {layers} for "
                f"what is left at the end."
            )
        if not 0 <= sample < batch:
            raise ConfigError(f"sample={sample}: this trace has {batch} batch rows, 0 to {batch - 1}.")

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain lists and numbers."""
        batch = range(self.tokens.shape[1])
        return {
            "method": self.method,
            "backend": self.backend,
            "filters": list(self.filters),
            "total": self.total.tolist(),
            "equal_tokens": self.equal_tokens.tolist(),
            "tokens": self.tokens.tolist(),
            "kv_lengths": self.kv_lengths.tolist(),
            "kept": [[self.kept(layer, b).tolist() for b in batch] for layer in range(len(self._alive))],
            "assignment": [self.assignment(b).tolist() for b in batch],
            "pinned": [self.pinned(b).tolist() for b in batch],
            "flops": self.flops.to_dict(),
            "kv_bytes": self.kv_bytes.to_dict(),
        }

    def to_json(self, path: str | Path | None = None) -> str:
        """The dictionary as JSON text; also written to `path` if given."""
        text = json.dumps(self.to_dict(), indent=1)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text

    def __str__(self) -> str:
        from mustdrop.report import table

        return table(self)

    __repr__ = __str__

    def draw(self, image: Any, path: str | Path | None = None, sample: int = 0) -> Any:
        """Draw which patches survived each stage, over the image.

        Args:
            image: PIL image, array (rows, columns, 3) or path; a list of them for a prompt with several images.
            path: where to write the picture (format by its ending), or None.
            sample: batch row.

        Returns:
            The matplotlib figure.

        Raises:
            ConfigError: the number of images is not the prompt's, or the encoder did not run in this call.
            ImportError: the extra `mustdrop[viz]` is not installed.
        """
        from mustdrop.report import draw

        return draw(self, image, path, sample)


def record(runtime: Runtime, call: Call) -> Trace:
    """The trace of a finished call."""
    prefill = call.prefill
    depth = runtime.depth
    if prefill is None:  # nothing went through the text model
        empty = torch.zeros(1, 1, dtype=torch.bool)
        prefill = Prefill(empty, 0, empty)
    rows: list[Tensor | None] = prefill.rows or [None] * (depth + 1)
    alive = _alive(prefill, rows)
    tokens = torch.tensor([[len(a) for a in layer] for layer in alive[:depth]])
    cache = call.cache
    valid = prefill.valid
    lengths = [layer.lengths(prefill.start, valid).cpu() for layer in cache.layers[:depth]] if cache is not None else []
    kv_lengths = torch.stack(lengths) if lengths else torch.zeros(depth, len(alive[0]), dtype=torch.long)
    marks = [[_on_cpu(mark) for mark in row] for row in prefill.marks]
    return Trace(
        method=runtime.method.name,
        total=prefill.vision.sum(1).cpu(),
        tokens=tokens,
        kv_lengths=kv_lengths,
        flops=_flops(runtime, call, prefill, rows, kv_lengths),
        kv_bytes=_kv_bytes(cache, depth),
        backend=runtime.implementation,
        filters=runtime.filters,
        fit=runtime.adapter.fit(runtime.model),
        grids=_grids(call, prefill),
        _alive=alive,
        _marks=marks,
    )


def _alive(prefill: Prefill, rows: list[Tensor | None]) -> list[list[Tensor]]:
    """Per layer and sample, ascending ordinals among the sample's vision tokens.

    Layers that share rows share the result.
    """
    vision = prefill.vision.cpu()
    ordinal = vision.long().cumsum(1) - 1
    everything = [torch.arange(int(n)) for n in vision.sum(1)]
    done: dict[int, list[Tensor]] = {}
    out = []
    for row in rows:
        if row is None:
            out.append(everything)
            continue
        if id(row) not in done:
            index = row.cpu()
            real = (index != PAD) & take(vision, index, 1)
            names = take(ordinal, index, 1)
            done[id(row)] = [names[b][real[b]].sort().values for b in range(len(names))]
        out.append(done[id(row)])
    return out


def _on_cpu(mark: ImageMarks) -> ImageMarks:
    return ImageMarks(
        mark.alive.cpu(),
        mark.pinned.cpu(),
        mark.importance.cpu(),
        mark.order.cpu(),
        mark.assignment.cpu(),
        mark.passed,
        mark.grid,
    )


def _grids(call: Call, prefill: Prefill) -> list[list[tuple[int, int, int]]]:
    times = prefill.vision.shape[0] // max(1, len(call.grids))
    return [row for row in call.grids for _ in range(times)]


def _kv_bytes(cache: Any, depth: int) -> Compared:
    if cache is None:
        return Compared(0, 0)
    actual = sum(layer.storage_bytes() for layer in cache.layers[:depth])
    unpruned = sum(
        layer.storage_bytes() // layer.slots * layer.logical for layer in cache.layers[:depth] if layer.slots
    )
    return Compared(actual, unpruned)


def _flops(runtime: Runtime, call: Call, prefill: Prefill, rows: list[Tensor | None], kv_lengths: Tensor) -> Compared:
    depth, batch = runtime.depth, prefill.vision.shape[0]
    text = runtime.text_cost
    whole = prefill.valid.sum(1).tolist()
    counts: dict[int, list[int]] = {}
    for row in rows:
        if row is not None and id(row) not in counts:
            counts[id(row)] = (row != PAD).sum(1).tolist()
    new = [[counts[id(row)][b] if row is not None else whole[b] for row in rows[:depth]] for b in range(batch)]
    past = prefill.past[:depth] or [0] * depth
    start = [prefill.start] * depth
    scoring = sum(text.scoring(prefill.raters, new[b][i] + past[i]) for b in range(batch) for i in prefill.scored)
    logical = [int(n) for n in (torch.tensor(whole) + prefill.start + call.steps)]
    parts = {
        "vision": _encoder_cost(runtime, call),
        "projector": _projector_cost(runtime, call),
        "scoring": Compared(scoring, 0),
        "prefill": Compared(
            sum(text.prefill(new[b], past) for b in range(batch)),
            sum(text.prefill([whole[b]] * depth, start) for b in range(batch)),
        ),
        "decode_step": Compared(
            sum(text.step(kv_lengths[:, b].tolist()) for b in range(kv_lengths.shape[1])),
            sum(text.step([n] * depth) for n in logical),
        ),
    }
    return total(parts, ("vision", "projector", "scoring", "prefill"))


def _encoder_cost(runtime: Runtime, call: Call) -> Compared:
    images = [grid for row in call.grids for grid in row]
    if not images:
        return Compared(0, 0)
    try:
        tower = runtime.adapter.tower(runtime.model)
    except UnsupportedModelError:
        return Compared(0, 0)
    config: Any = tower.module.config
    passed = [mark.passed for row in call.marks for mark in row]
    actual = unpruned = 0
    for i, (height, width, _) in enumerate(images):
        full = [height * width + tower.prefix] * len(tower.blocks)
        unpruned += encoder_flops(tower.blocks, config, full, height * width)
        actual += encoder_flops(tower.blocks, config, passed[i] if passed else full, height * width)
    return Compared(actual, unpruned)


def _projector_cost(runtime: Runtime, call: Call) -> Compared:
    module = runtime.adapter.projector(runtime.model)
    features = sum(h * w + extra for row in call.grids for h, w, extra in row)
    flops = linear_flops(module) * features if module is not None else 0
    return Compared(flops, flops)
