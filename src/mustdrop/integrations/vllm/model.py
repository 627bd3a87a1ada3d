"""The back half of a pruned model: it hands over the rows that stay, and says at which positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mustdrop.adapters.base import Tower
from mustdrop.errors import MustDropError
from mustdrop.integrations.vllm import engine, settings
from mustdrop.integrations.vllm.processor import FIELD, KINDS, Announced
from mustdrop.integrations.vllm.versions import Version
from mustdrop.integrations.vllm.watching import Watch, of_first
from mustdrop.layout import Layout
from mustdrop.plain import PlainStage

# A position rides in two columns, since bfloat16 counts to 256 only.
BASE = 256


class PrunedModel:
    """Mixed into a model class of vLLM (first); the subclasses here know the positions, those in `models` the tower.

    A row carries its place after its features: the offset from the first token of its image or video, in each axis of
    positions. vLLM strips these columns and writes the positions before the language model runs.

    Attributes:
        mustdrop_axes: axes of positions.
    """

    supports_multimodal_pruning: ClassVar[bool] = True
    supports_mrope: ClassVar[bool] = True
    supported_video_pruning_methods: ClassVar[tuple[str, ...]] = ()
    mustdrop_axes: ClassVar[int]

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        model_config = vllm_config.model_config
        Version.repair_runner()
        if not Version.took_effect(model_config):
            raise MustDropError(
                f"vLLM did not ask mustdrop about the configuration of {type(self).__name__}, so positions would be "
                "wrong: name the architecture in --hf-overrides, or set MUSTDROP_VLLM, and leave VLLM_PLUGINS out."
            )
        with _rotary_room(model_config, self.mustdrop_axes):
            super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.is_multimodal_pruning_enabled = False  # of vLLM's own code in the model: we do what it would do
        self.mustdrop = settings.of(model_config.hf_config)
        self._mustdrop_stages: dict[str, PlainStage] = {}
        multimodal = model_config.multimodal_config
        for kind in KINDS:  # a tower that cannot be served, or a layer that it lacks, is an error of the start
            if multimodal.get_limit_per_prompt(kind):
                _ = self._mustdrop_stage(kind).reads

    # -- what a model says of its tower ---------------------------------------------------------------------------

    def mustdrop_tower(self, kind: str) -> Tower:
        """The vision encoder that sees the images or videos."""
        raise NotImplementedError

    def mustdrop_last(self, kind: str) -> int:
        """The encoder layer that features are read from: vLLM loads no layer after it."""
        return len(self.mustdrop_tower(kind).blocks) - 1

    def mustdrop_projector(self) -> nn.Module | None:
        """What maps the encoder's features one by one; None where several become one."""
        return None

    def mustdrop_layouts(self, kind: str, arguments: Mapping[str, Any], sizes: Sequence[int]) -> list[Layout]:
        """How the features of each image or video lie.

        Args:
            kind: "image" or "video".
            arguments: of `embed_multimodal`.
            sizes: features of each.
        """
        raise NotImplementedError

    def mustdrop_offsets(self, kind: str, i: int, arguments: Mapping[str, Any], announced: Announced) -> Tensor:
        """(axes, rows) long, the places of all rows of one image or video if nothing were dropped."""
        raise NotImplementedError

    # -- what the runner calls ------------------------------------------------------------------------------------

    def embed_multimodal(self, **kwargs: Any) -> list[Tensor]:
        """Rows of each image or video: features that stay, text between them, and after each its place."""
        announced = [Announced.of(data) for data in kwargs.pop(FIELD)]
        kind = announced[0].kind
        stage = self._mustdrop_stage(kind)
        layouts = self.mustdrop_layouts(kind, kwargs, [one.total for one in announced])
        counts = [one.kept for one in announced]
        with Watch(stage, layouts, counts, self.mustdrop_projector()) as watch:
            made = list(super().embed_multimodal(**kwargs))  # type: ignore[misc]
        rows = torch.cat([part.flatten(0, -2) for part in made])
        expected = sum(layout.size for layout in layouts)
        if len(rows) != expected:
            raise MustDropError(f"{type(self).__name__}: expected {expected} features of {kind}s, got {len(rows)}.")
        width = self.config.get_text_config().hidden_size  # type: ignore[attr-defined]
        kept = stage.choose(watch.run, layouts, rows[:, :width], counts, watch.choice, rows)
        out = []
        for i, (one, part) in enumerate(zip(announced, kept, strict=True)):
            place = self.mustdrop_offsets(kind, i, kwargs, one).to(rows.device)
            values, index = self._mustdrop_woven(one, of_first(part.index), of_first(part.rows))
            place = place[:, index]
            columns = torch.stack([place // BASE, place % BASE], 1).flatten(0, 1).T
            out.append(torch.cat([values, columns.to(values.dtype)], 1))
        return out

    def _mustdrop_stage(self, kind: str) -> PlainStage:
        if kind not in self._mustdrop_stages:
            tower = self.mustdrop_tower(kind)
            self._mustdrop_stages[kind] = PlainStage(self.mustdrop.pruner, tower, self.mustdrop_last(kind))
        return self._mustdrop_stages[kind]

    def _mustdrop_woven(self, one: Announced, index: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Rows with the text between them, and the place of each among all rows."""
        if not len(one.woven):
            return rows, index
        vision = one.vision.to(rows.device)
        stays = ~vision
        stays[vision.nonzero()[:, 0][index]] = True
        out = rows.new_zeros(int(stays.sum()), rows.shape[1])
        text = ~vision[stays]
        ids = one.woven.to(rows.device)[~vision]
        embedded = self.get_language_model().embed_input_ids(ids)  # type: ignore[attr-defined]
        out[text, : embedded.shape[1]] = embedded.to(rows.dtype)
        out[~text] = rows
        return out, stays.nonzero()[:, 0]

    def _mustdrop_strip(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Rows without their places, and the places (axes, rows)."""
        count = 2 * self.mustdrop_axes
        place = rows[:, -count:].long().T.reshape(self.mustdrop_axes, 2, -1)
        return rows[:, :-count], place[:, 0] * BASE + place[:, 1]


class OneAxis(PrunedModel):
    """Models whose tokens have one position each, in the order of the prompt.

    The runner keeps three rows of positions, of which the text model sees the first. For a row of an image or video the
    second has the position of its first token, and the third is -1 less the one after its last token.
    """

    mustdrop_axes = 1

    def mustdrop_offsets(self, kind: str, i: int, arguments: Mapping[str, Any], announced: Announced) -> Tensor:
        """One after the other."""
        return torch.arange(announced.whole, dtype=torch.long, device="cpu")[None]

    def get_mrope_input_positions(self, input_tokens: Sequence[int], mm_features: Sequence[Any]) -> tuple[Tensor, int]:
        """Positions as if nothing were dropped, known before the encoder runs; and how far the answer's lie ahead."""
        step = torch.ones(len(input_tokens) + 1, dtype=torch.long, device="cpu")
        spans = []
        for feature in mm_features:
            announced = Announced.of(feature.data[FIELD].data)
            where = places(feature.mm_position)
            step[where[-1] + 1] += announced.whole - announced.rows
            spans.append((where, announced.whole))
        step[0] = 0
        position = step.cumsum(0)
        rows = position[:-1].repeat(3, 1)
        for where, whole in spans:
            first = int(rows[0, where[0]])
            rows[1, where], rows[2, where] = first, -1 - first - whole
        return rows, int(position[-1]) - len(input_tokens)

    def recompute_mrope_positions(
        self,
        input_ids: Any,
        multimodal_embeddings: Sequence[Tensor],
        mrope_positions: Tensor,
        num_computed_tokens: int,
    ) -> tuple[list[Tensor], Tensor, int]:
        """Write the positions of the rows that are about to run, which are the next ones that are not computed yet."""
        if not multimodal_embeddings:  # as in all steps of an answer
            return [], mrope_positions, self._ahead(mrope_positions)
        positions = mrope_positions.clone()
        where = (positions[2] < 0).nonzero()[:, 0]
        where = where[where >= num_computed_tokens]
        out, done = [], 0
        for rows in multimodal_embeddings:
            values, place = self._mustdrop_strip(rows)
            here = where[done : done + len(rows)]
            positions[0, here] = positions[1, here] + place[0].to(positions)
            done += len(rows)
            out.append(values)
        return out, positions, self._ahead(positions)

    @staticmethod
    def _ahead(positions: Tensor) -> int:
        """How much further the positions of the answer are than its places."""
        last, end = int(positions[0, -1]), -1 - int(positions[2, -1])
        return (end if end >= 0 else last + 1) - positions.shape[1]

    def forward(self, input_ids: Any, positions: Tensor, *args: Any, **kwargs: Any) -> Any:
        """With the one row of positions that the text model knows."""
        return super().forward(input_ids, positions[0] if positions.ndim == 2 else positions, *args, **kwargs)  # type: ignore[misc]


def places(position: Any) -> Tensor:
    """Where in the prompt the rows of an image or video stand."""
    index = torch.arange(position.length, dtype=torch.long, device="cpu")
    return index[slice(None) if position.is_embed is None else position.is_embed] + int(position.offset)


class _rotary_room:  # noqa: N801 (a context manager that reads like a function)
    """While a model is made, its configuration allows for more positions, so that its rotary tables have them."""

    def __init__(self, model_config: Any, axes: int) -> None:
        text = model_config.hf_text_config
        known = getattr(text, "max_position_embeddings", None) is not None
        # vLLM makes those of models with three axes four times as long by itself
        self.text = text if known and axes == 1 and engine.rotary_room(text) else None

    def __enter__(self) -> None:
        if self.text is not None:
            self.before = self.text.max_position_embeddings
            self.text.max_position_embeddings = engine.ROOM * self.before

    def __exit__(self, *_: object) -> None:
        if self.text is not None:
            self.text.max_position_embeddings = self.before
