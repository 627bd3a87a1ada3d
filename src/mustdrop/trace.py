"""`Trace`: what one call kept, where, and what it cost. It tells the truth or raises; it never guesses."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mustdrop.cost import Compared
from mustdrop.errors import ConfigError
from mustdrop.runtime.records import FilterAttention, Marks, Medium


@dataclass(frozen=True, repr=False)
class Trace:
    """The last generate or forward of a patched model. L decoder layers, B batch rows of the prompt's pass.

    Attributes:
        method: name of the method.
        total: (B,) long, vision tokens of each prompt.
        tokens: (L, B) long, vision tokens that each decoder layer processed in the prefill.
        kv_lengths: (L, B) long, cache entries per layer at the end of the call (text and vision, without padding);
            zeros if no cache was used.
        kv_vision: (L, B) long, those of them that hold vision tokens of this prompt.
        flops: FLOPs of the prompt (vision, projector, scoring, prefill), beside the unpruned call; `parts` has these
            and the decode step. See `mustdrop.cost` for the formulas.
        kv_bytes: bytes of keys and values stored at the end, beside the unpruned call; in tensor parallel those of this
            process, which stores its own heads.
        backend: attention implementation of the text model.
        kernels: what the operations of `mustdrop.kernels` ran as: "triton", "reference", both, or "none" where nothing
            was scored, merged, gathered or cut.
        filters: decoder layers after which tokens left.
        fit: how the image processor fits an image to the grid.
        media: per sample, its images and videos in the order of the prompt: `kind`, `layout` (grids and cells of the
            features, see `mustdrop.layout`) and `index`, the place of each feature among the sample's vision tokens.
            Empty if the encoder did not run.
        kv_pictures: per sample, (L, pictures) long: cache entries per layer of each picture of the chat so far, in the
            order in which they came; empty unless old pictures shrink (`DecodeCachePruner.old_pictures`).
        recurrent: decoder layers that fold tokens into a state: their cache holds no entries.
    """

    method: str
    total: Tensor
    tokens: Tensor
    kv_lengths: Tensor
    kv_vision: Tensor
    flops: Compared
    kv_bytes: Compared
    backend: str
    kernels: str
    filters: tuple[int, ...]
    fit: Literal["crop", "stretch"]
    media: list[list[Medium]]
    kv_pictures: list[Tensor] = field(default_factory=list)
    recurrent: tuple[int, ...] = ()
    _alive: list[list[Tensor]] = field(default_factory=list)
    _marks: list[Marks] = field(default_factory=list)
    _heard: list[FilterAttention] = field(default_factory=list)
    _vision: Tensor | None = None

    @property
    def equal_tokens(self) -> Tensor:
        """(B,) float, mean over the decoder layers of the vision tokens that a layer processed."""
        return self.tokens.float().mean(0)

    @property
    def equal_entries(self) -> Tensor:
        """(B,) float, mean over the decoder layers of the vision entries in the cache at the end of the call.

        Recurrent layers, which hold none, do not count.
        """
        holding = [i for i in range(len(self.kv_vision)) if i not in self.recurrent]
        return self.kv_vision[holding].float().mean(0)

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
            return torch.arange(n, dtype=torch.long, device="cpu")
        mark = self._marks[sample]
        key = mark.order.masked_fill(~mark.alive, torch.iinfo(torch.long).max)
        place = key.argsort(stable=True).argsort(stable=True)
        return torch.where(mark.into < 0, -1, place[mark.into.clamp(min=0)])

    def protected(self, sample: int = 0) -> Tensor:
        """(k,) long, original indices of the key set, ascending."""
        self._check(0, sample)
        if not self._marks:
            return torch.zeros(0, dtype=torch.long, device="cpu")
        return self._marks[sample].protected.nonzero()[:, 0]

    def attention(self, sample: int = 0) -> dict[int, Tensor]:
        """Attention of the prompt's words to each vision token, where a filter read it.

        Args:
            sample: batch row.

        Returns:
            Filter layer -> (N,) float, the sum over the words that score (see "raters" in the glossary), mean over the
            heads; NaN where a token did not come that far. Empty if no filter reads attention.

        Raises:
            ConfigError: no such sample.
        """
        self._check(0, sample)
        return {} if self._vision is None else {one.layer: one.of(self._vision, sample) for one in self._heard}

    def importance(self, sample: int = 0) -> Tensor | None:
        """(N,) float, what the vision stage ranked the tokens by; None if it ranked none.

        It is the encoder's attention, or what takes its place (`VisionStagePruner.key_importance`).
        """
        self._check(0, sample)
        if not self._marks or not bool(self._marks[sample].importance.any()):
            return None
        return self._marks[sample].importance

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
            "kernels": self.kernels,
            "filters": list(self.filters),
            "total": self.total.tolist(),
            "equal_tokens": self.equal_tokens.tolist(),
            "equal_entries": self.equal_entries.tolist(),
            "tokens": self.tokens.tolist(),
            "kv_lengths": self.kv_lengths.tolist(),
            "kv_vision": self.kv_vision.tolist(),
            "kv_pictures": [own.tolist() for own in self.kv_pictures],
            "kept": [[self.kept(layer, b).tolist() for b in batch] for layer in range(len(self._alive))],
            "assignment": [self.assignment(b).tolist() for b in batch],
            "protected": [self.protected(b).tolist() for b in batch],
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
        from mustdrop.trace_table import table

        return table(self)

    __repr__ = __str__

    def draw(self, image: Any, path: str | Path | None = None, sample: int = 0) -> Any:
        """Draw which patches survived each stage, over the image.

        Args:
            image: what `mustdrop.pictures.read_picture` takes: a path, a Pillow image, an array or a tensor with the
                channels first or last. A list or a batch of them for a prompt with several images, or for all prompts
                of the batch. The frames of a video as a list, an array with one more dimension, or a folder.
            path: where to write the picture (format by its ending), or None.
            sample: batch row.

        Returns:
            The matplotlib figure: a row per image or frame, a column per stage.

        Raises:
            ConfigError: the number of images is not the prompt's, the prompt has none, the encoder did not run in this
                call, there is no such sample, or the ending says no format.
            PictureError: a picture that cannot be read.
            MissingPackageError: matplotlib, of the extra `viz`, is not installed.
        """
        from mustdrop.trace_drawing import draw

        return draw(self, image, path, sample)

    def html(self, path: str | Path, image: Any, sample: int = 0, *, question: str = "", answer: str = "") -> Path:
        """Write a page on which one can follow the patches layer by layer, in any browser, without a network.

        Several traces of one prompt side by side: `mustdrop.trace_page.write`, or `mustdrop explain`.

        Args:
            path: where to write it.
            image: as `draw` takes it.
            sample: batch row.
            question: what was asked, for the heading.
            answer: what came out, for the table.

        Returns:
            The path.

        Raises:
            ConfigError: as `draw` raises it, or the path is a folder.
            PictureError: a picture that cannot be read.
        """
        from mustdrop.trace_page import MethodRun, write

        return write(path, image, [MethodRun(self, answer, sample)], question=question)
