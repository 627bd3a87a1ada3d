"""Models whose tokens have three positions: frame, row and column (M-RoPE)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from vllm.multimodal.inputs import MultiModalFeatureSpec, MultiModalKwargsItem, PlaceholderRange

from mustdrop.integrations.vllm.model import PrunedModel
from mustdrop.integrations.vllm.processor import FIELD, KINDS, Announced
from mustdrop.integrations.vllm.versions import Version


class ThreeAxes(PrunedModel):
    """Positions are those that vLLM's own code, which agrees with transformers, gives to the whole prompt.

    vLLM's repair of positions after its own video pruning is not used: it puts text after a portrait image too early.
    """

    mustdrop_axes = 3

    def mustdrop_offsets(self, kind: str, i: int, arguments: Mapping[str, Any], announced: Announced) -> Tensor:
        """As in a prompt of this image or video between the markers of its start and end."""
        names = [name for name in arguments if name in (f"{kind}_grid_thw", "second_per_grid_ts", "timestamps")]
        item = MultiModalKwargsItem({name: Version.element(kind, arguments[name][i]) for name in names})
        # where frames have times between them, vLLM looks for their markers, the first of which is before the rows
        first = 0 if len(announced.woven) else 1
        feature = MultiModalFeatureSpec(item, kind, "", PlaceholderRange(first, announced.whole + 2 - 2 * first))
        start, end = (getattr(self.config, f"vision_{side}_token_id") for side in ("start", "end"))  # type: ignore[attr-defined]
        tokens = [start, *self._ids(announced), end]
        rows: Tensor = super().get_mrope_input_positions(tokens, [feature])[0]  # type: ignore[misc]
        return rows[:, 1:-1] - 1

    def get_mrope_input_positions(self, input_tokens: Sequence[int], mm_features: Sequence[Any]) -> tuple[Tensor, int]:
        """Positions of the text as in the whole prompt; rows of an image or video have that of its first token."""
        tokens, whole, stays = list[int](), list[Any](), list[int]()
        at = 0
        for feature in sorted(mm_features, key=lambda one: one.mm_position.offset):
            announced = Announced.of(feature.data[FIELD].data)
            before = self._first(feature.mm_position)
            offset = feature.mm_position.offset + before
            stays += range(len(tokens), len(tokens) + offset - at)
            tokens += input_tokens[at:offset]
            length = feature.mm_position.length + announced.whole - announced.rows
            whole.append(replace(feature, mm_position=PlaceholderRange(len(tokens) - before, length)))
            stays += [len(tokens)] * announced.rows
            tokens += self._ids(announced)
            at = offset + announced.rows
        stays += range(len(tokens), len(tokens) + len(input_tokens) - at)
        tokens += input_tokens[at:]
        full, delta = super().get_mrope_input_positions(tokens, whole)  # type: ignore[misc]
        rows = full[:, torch.tensor(stays, dtype=torch.long, device="cpu")]
        return rows, len(tokens) + delta - len(input_tokens)

    def recompute_mrope_positions(
        self,
        input_ids: Any,
        multimodal_embeddings: Sequence[Tensor],
        mrope_positions: Tensor,
        num_computed_tokens: int,
    ) -> tuple[list[Tensor], Tensor, int]:
        """Write the positions of the rows that are about to run: those of the text before them, and their places.

        An image or video is a run of its token, with text before it. A run may have been begun in an earlier step.
        """
        ahead = mrope_positions.shape[1] - 1  # tokens before the last one
        if not multimodal_embeddings:  # as in all steps of an answer, and in prompts that are given as embeddings
            return [], mrope_positions, int(mrope_positions[:, -1].max()) - ahead
        positions = mrope_positions.clone()
        ids = torch.as_tensor(input_ids, dtype=torch.long, device=positions.device)
        media = torch.isin(ids, torch.tensor(self._tokens(), dtype=torch.long, device=ids.device))
        where = media.nonzero()[:, 0]
        where = where[where >= num_computed_tokens]
        text = torch.where(media, -1, torch.arange(len(ids), dtype=torch.long, device=ids.device)).cummax(0).values
        out, done = [], 0
        for rows in multimodal_embeddings:
            values, place = self._mustdrop_strip(rows)
            here = where[done : done + len(rows)]
            before = text[here]
            base = torch.where(before < 0, 0, positions[0, before.clamp(min=0)] + 1)
            positions[:, here] = base + place.to(positions)
            done += len(rows)
            out.append(values)
        return out, positions, int(positions[:, -1].max()) - ahead

    def _tokens(self) -> list[int]:
        """Ids of images and videos."""
        return [getattr(self.config, f"{kind}_token_id") for kind in KINDS]  # type: ignore[attr-defined]

    def _ids(self, announced: Announced) -> list[int]:
        """Tokens of an image or video of which nothing is dropped."""
        if len(announced.woven):
            return announced.woven.tolist()
        return [self._tokens()[KINDS.index(announced.kind)]] * announced.whole

    @staticmethod
    def _first(position: Any) -> int:
        return 0 if position.is_embed is None else int(position.is_embed.nonzero()[0])
