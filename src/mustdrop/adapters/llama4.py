"""Llama 4: square tiles, CLS after the patches, decoder layers that see their own chunk of the prompt only.

The layers without rotary embeddings scale queries by their place in the rows that are there, once a prompt is longer
than `floor_scale` (8192). Rows that were dropped would shift these places, so such prompts are refused.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from mustdrop.adapters.base import Adapter, Tower
from mustdrop.cost import linear_flops
from mustdrop.errors import UnsupportedOptionError
from mustdrop.layout import Layout


class Llama4(Adapter):
    """`Llama4ForConditionalGeneration`."""

    name = "llama4"
    classes = ("Llama4ForConditionalGeneration",)
    refuses_flash = "transformers has no flash attention for Llama 4, whose chunks count positions"
    features = "last_hidden_state"  # the projection follows outside of `get_image_features`
    after_features = ("multi_modal_projector",)

    def base(self, model: Any) -> nn.Module:
        """The model itself."""
        return model  # type: ignore[no-any-return]

    def text(self, model: Any) -> nn.Module:
        """The text model inside the causal language model."""
        return model.language_model.model  # type: ignore[no-any-return]

    def tower(self, model: Any, modality: str = "image") -> Tower:
        """CLS is the last token. Rotary tables are one per model, so patches cannot merge inside."""
        return Tower(model.vision_model, model.vision_model.model.layers, suffix=1, has_cls=True)

    def layouts(self, model: Any, modality: str, arguments: dict[str, Any]) -> list[Layout]:
        """A grid per tile; the prompt counts every tile as an image."""
        _check_length(model.config.text_config, arguments)
        side = model.config.vision_config.image_size // model.config.vision_config.patch_size
        pool = round(1 / model.config.vision_config.pixel_shuffle_ratio)
        grid = (1, side // pool, side // pool)
        return [Layout.of_frames(grid, (side, side), i, pool=pool) for i in range(len(arguments["pixel_values"]))]

    def pool(self, model: Any, modality: str, arguments: dict[str, Any]) -> int | None:
        """None: tokens merge after the encoder."""
        return None

    def projector_flops(self, model: Any) -> int:
        """The pixel shuffle's layers and the projection."""
        return linear_flops(nn.ModuleList([model.vision_model.vision_adapter, model.multi_modal_projector]))


def _check_length(config: Any, arguments: dict[str, Any]) -> None:
    """Raise `UnsupportedOptionError` for a prompt whose queries are scaled by place."""
    tokens = max(
        (arguments[name].shape[1] for name in ("input_ids", "inputs_embeds") if arguments.get(name) is not None),
        default=0,
    )
    if config.attn_temperature_tuning and tokens >= config.floor_scale:
        raise UnsupportedOptionError(
            f"a Llama 4 prompt of {tokens} tokens cannot be pruned: from floor_scale={config.floor_scale} tokens on, "
            "some of its layers scale queries by their place among the rows, which dropping would shift. Shorten the "
            "prompt, or unpatch the model for it."
        )
