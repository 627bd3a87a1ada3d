"""The models: where each has its encoder, and how its features lie."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import nn
from vllm.model_executor.models.gemma3_mm import Gemma3ForConditionalGeneration
from vllm.model_executor.models.idefics3 import Idefics3ForConditionalGeneration
from vllm.model_executor.models.interns1 import InternS1ForConditionalGeneration
from vllm.model_executor.models.llava import LlavaForConditionalGeneration
from vllm.model_executor.models.llava_next import LlavaNextForConditionalGeneration
from vllm.model_executor.models.llava_onevision import LlavaOnevisionForConditionalGeneration
from vllm.model_executor.models.mistral3 import Mistral3ForConditionalGeneration
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from vllm.model_executor.models.qwen2_vl import Qwen2VLForConditionalGeneration
from vllm.model_executor.models.qwen3_vl import Qwen3VLForConditionalGeneration
from vllm.model_executor.models.qwen3_vl_moe import Qwen3VLMoeForConditionalGeneration
from vllm.model_executor.models.smolvlm import SmolVLMForConditionalGeneration
from vllm.multimodal import MULTIMODAL_REGISTRY

from mustdrop.adapters.base import Tower
from mustdrop.adapters.llava_next import LlavaNext as LlavaNextAdapter
from mustdrop.adapters.llava_onevision import LlavaOnevision as LlavaOnevisionAdapter
from mustdrop.adapters.qwen2_vl import Qwen2VL as Qwen2VLAdapter
from mustdrop.adapters.qwen2_vl import Qwen25VL as Qwen25VLAdapter
from mustdrop.errors import UnsupportedModelError
from mustdrop.integrations.vllm.model import OneAxis, PrunedModel
from mustdrop.integrations.vllm.mrope import ThreeAxes
from mustdrop.integrations.vllm.processor import pruned
from mustdrop.layout import Layout

C = TypeVar("C", bound=type[PrunedModel])


def served(cls: C) -> C:
    """Give a class the processor of the vLLM model that it derives from, pruned."""
    parent: Any = cls._processor_factory  # type: ignore[attr-defined]
    processor = pruned(parent.processor, apart=cls.mustdrop_axes > 1)
    return MULTIMODAL_REGISTRY.register_processor(  # type: ignore[no-any-return]
        processor, info=parent.info, dummy_inputs=parent.dummy_inputs
    )(cls)


def squares(sizes: Sequence[int], side: int, pool: int = 1) -> list[Layout]:
    """Images (or videos) of `sizes` features that are tiles (or frames) of side x side features each.

    Args:
        sizes: features of each.
        side: of a tile.
        pool: patches per side of a feature.
    """
    found, first = [], 0
    for size in sizes:
        count = size // side**2
        tiles = [
            Layout.of_frames((1, side, side), (side * pool, side * pool), first + i, pool=pool) for i in range(count)
        ]
        found.append(Layout.join(tiles))
        first += count
    return found


def frames(sizes: Sequence[int], side: int, pool: int = 1) -> list[Layout]:
    """As `squares`, of videos: tiles are frames of one grid."""
    found, first = [], 0
    for size in sizes:
        count = size // side**2
        found.append(Layout.of_frames((count, side, side), (side * pool, side * pool), first, pool=pool))
        first += count
    return found


class ClipOrSiglip(OneAxis):
    """Models with a CLIP or SigLIP tower called `vision_tower`."""

    def mustdrop_tower(self, kind: str) -> Tower:
        """Its layers."""
        tower: Any = self.vision_tower  # type: ignore[attr-defined]
        name = self.config.vision_config.model_type  # type: ignore[attr-defined]
        if name not in ("clip_vision_model", "siglip_vision_model"):
            raise UnsupportedModelError(
                f"mustdrop prunes {type(self).__name__} with a CLIP or SigLIP tower in vLLM; this model has {name}."
            )
        cls = name == "clip_vision_model"
        return Tower(tower, tower.vision_model.encoder.layers, int(cls), cls)

    def mustdrop_projector(self) -> nn.Module | None:
        """It maps patches one by one."""
        return self.multi_modal_projector  # type: ignore[attr-defined, no-any-return]

    def _mustdrop_side(self) -> int:
        vision = self.config.vision_config  # type: ignore[attr-defined]
        return int(vision.image_size // vision.patch_size)


def pixtral_tower(tower: Any) -> Tower:
    """Pixtral: all images in one sequence."""
    return Tower(tower, tower.transformer.layers, packed=True)


def pixtral_layouts(images: Sequence[Any], patch: int, merge: int) -> list[Layout]:
    """A grid per image of any size.

    Args:
        images: pixels (C, H, W) of each.
        patch: side of a patch in pixels.
        merge: patches per side of a feature.
    """
    found, start = [], 0
    for image in images:
        rows, columns = image.shape[-2] // patch, image.shape[-1] // patch
        one = Layout.of_frames((1, rows // merge, columns // merge), (rows, columns), pool=merge)
        found.append(Layout(one.grids, one.cells, one.patches + start))
        start += rows * columns
    return found


@served
class Llava(ClipOrSiglip, LlavaForConditionalGeneration):
    """LLaVA-1.5, and Pixtral in the format of transformers."""

    @property
    def _mustdrop_pixtral(self) -> bool:
        return bool(self.config.vision_config.model_type == "pixtral")

    def mustdrop_tower(self, kind: str) -> Tower:
        """CLIP, SigLIP or Pixtral."""
        return pixtral_tower(self.vision_tower) if self._mustdrop_pixtral else super().mustdrop_tower(kind)

    def mustdrop_layouts(self, kind: str, arguments: Mapping[str, Any], sizes: Sequence[int]) -> list[Layout]:
        """A square; strategy "full" leaves the CLS row in front of it. Pixtral's images have their own sizes."""
        if self._mustdrop_pixtral:
            return pixtral_layouts(arguments["pixel_values"], self.config.vision_config.patch_size, 1)
        side = self._mustdrop_side()
        prefix = sizes[0] - side**2
        return [Layout.of_frames((1, side, side), (side, side), i, prefix=prefix) for i, _ in enumerate(sizes)]


@served
class LlavaNext(ClipOrSiglip, LlavaNextForConditionalGeneration):
    """LLaVA-NeXT: line breaks are structural, so that they stay first."""

    def mustdrop_layouts(self, kind: str, arguments: Mapping[str, Any], sizes: Sequence[int]) -> list[Layout]:
        """The whole image and its tiles."""
        model = SimpleNamespace(config=self.config)
        sizes_of = {"image_sizes": torch.as_tensor(arguments["image_sizes"], dtype=torch.long, device="cpu")}
        return LlavaNextAdapter().layouts(model, "image", sizes_of)


@served
class LlavaOnevision(ClipOrSiglip, LlavaOnevisionForConditionalGeneration):
    """LLaVA-OneVision, images and videos."""

    def mustdrop_layouts(self, kind: str, arguments: Mapping[str, Any], sizes: Sequence[int]) -> list[Layout]:
        """As LLaVA-NeXT; resampled where there are many tiles; videos are frames of half the side."""
        model = SimpleNamespace(config=self.config)
        if kind == "image":
            sizes_of = {"image_sizes": torch.as_tensor(arguments["image_sizes"], dtype=torch.long, device="cpu")}
            return LlavaOnevisionAdapter().layouts(model, "image", sizes_of)
        side = self._mustdrop_side()
        found, first = [], 0
        for size in sizes:
            count = (size - 1) // math.ceil(side / 2) ** 2
            layout = LlavaOnevisionAdapter.resampled_frames(count, side, first)
            found.append(layout)
            first += count
        return found

    def mustdrop_projector(self) -> nn.Module | None:
        """Images with many tiles are projected one by one: rules work after it."""
        return None


@served
class Gemma3(ClipOrSiglip, Gemma3ForConditionalGeneration):
    """Gemma 3, with crops (pan and scan)."""

    def mustdrop_layouts(self, kind: str, arguments: Mapping[str, Any], sizes: Sequence[int]) -> list[Layout]:
        """A square per crop."""
        side = math.isqrt(self.config.mm_tokens_per_image)
        return squares(sizes, side, self._mustdrop_side() // side)

    def mustdrop_projector(self) -> nn.Module | None:
        """It averages."""
        return None


@served
class InternVL(OneAxis, InternS1ForConditionalGeneration):
    """InternVL in the format of transformers, images and videos."""

    def mustdrop_tower(self, kind: str) -> Tower:
        """InternViT has a CLS token."""
        tower: Any = self.vision_tower
        return Tower(tower, tower.encoder.layer, 1, True)

    def mustdrop_layouts(self, kind: str, arguments: Mapping[str, Any], sizes: Sequence[int]) -> list[Layout]:
        """A square per tile or frame."""
        vision = self.config.vision_config
        pool = round(1 / self.config.downsample_ratio)
        side = vision.image_size[0] // vision.patch_size[0] // pool
        return (squares if kind == "image" else frames)(sizes, side, pool)


class PixelShuffle(OneAxis):
    """Idefics3 and families of that kind."""

    def mustdrop_tower(self, kind: str) -> Tower:
        """A SigLIP."""
        tower: Any = self.model.vision_model  # type: ignore[attr-defined]
        return Tower(tower, tower.encoder.layers)

    def mustdrop_layouts(self, kind: str, arguments: Mapping[str, Any], sizes: Sequence[int]) -> list[Layout]:
        """A square per tile."""
        vision, pool = self.config.vision_config, self.config.scale_factor  # type: ignore[attr-defined]
        return squares(sizes, vision.image_size // vision.patch_size // pool, pool)


@served
class Idefics3(PixelShuffle, Idefics3ForConditionalGeneration):
    """Idefics3."""


@served
class SmolVLM(PixelShuffle, SmolVLMForConditionalGeneration):
    """SmolVLM."""


@served
class Mistral3(OneAxis, Mistral3ForConditionalGeneration):
    """Mistral 3 with its Pixtral tower: all images in one sequence."""

    def mustdrop_tower(self, kind: str) -> Tower:
        """Pixtral."""
        return pixtral_tower(self.vision_tower)

    def mustdrop_layouts(self, kind: str, arguments: Mapping[str, Any], sizes: Sequence[int]) -> list[Layout]:
        """A grid per image."""
        merge, patch = self.config.spatial_merge_size, self.config.vision_config.patch_size
        return pixtral_layouts(arguments["pixel_values"], patch, merge)


class QwenVL(ThreeAxes):
    """Qwen-VL: images of any size and videos, packed into one sequence."""

    mustdrop_adapter: type[Qwen2VLAdapter] = Qwen2VLAdapter

    def mustdrop_tower(self, kind: str) -> Tower:
        """One tower for images and videos; some layers of Qwen2.5-VL see windows only."""
        tower: Any = self.visual  # type: ignore[attr-defined]
        return Tower(tower, tower.blocks, packed=True, whole=tuple(getattr(tower, "fullatt_block_indexes", ())))

    def mustdrop_layouts(self, kind: str, arguments: Mapping[str, Any], sizes: Sequence[int]) -> list[Layout]:
        """(frames, rows, columns) of each."""
        model = SimpleNamespace(config=self.config)  # type: ignore[attr-defined]
        name = f"{kind}_grid_thw"
        return self.mustdrop_adapter().layouts(
            model, kind, {name: torch.as_tensor(arguments[name], dtype=torch.long, device="cpu")}
        )


@served
class Qwen2VL(QwenVL, Qwen2VLForConditionalGeneration):
    """Qwen2-VL."""


@served
class Qwen25VL(QwenVL, Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL."""

    mustdrop_adapter = Qwen25VLAdapter


@served
class Qwen3VL(QwenVL, Qwen3VLForConditionalGeneration):
    """Qwen3-VL: the rows of DeepStack are kept and merged with those that they belong to."""


@served
class Qwen3VLMoe(QwenVL, Qwen3VLMoeForConditionalGeneration):
    """Its mixture of experts."""
