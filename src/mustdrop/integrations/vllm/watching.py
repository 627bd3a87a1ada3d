"""Watches one pass of images or videos through vLLM's encoder, for what a rule reads of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mustdrop.layout import Layout
from mustdrop.plain import PlainStage
from mustdrop.runtime.vision.encoder_run import EncoderRun
from mustdrop.runtime.vision.feature_tables import stacked
from mustdrop.runtime.vision.selection import PlacedSelections


def gathered(x: Tensor, dim: int) -> Tensor:
    """What the processes of a tensor-parallel group have, side by side."""
    from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_gather

    return x if get_tensor_model_parallel_world_size() == 1 else tensor_model_parallel_all_gather(x.contiguous(), dim)


def of_first(x: Tensor) -> Tensor:
    """What the first process of a tensor-parallel group has, in all of them."""
    from vllm.distributed import get_tensor_model_parallel_world_size, get_tp_group

    if get_tensor_model_parallel_world_size() == 1:
        return x
    kind = x.dtype
    sent = x.to(torch.uint8) if kind == torch.bool else x.clone()  # it is written to
    return get_tp_group().broadcast(sent.contiguous(), src=0).to(kind)  # type: ignore[no-any-return]


def attention_of(block: nn.Module) -> nn.Module:
    """The module of an encoder layer that is given its queries and keys."""
    from vllm.model_executor.layers.attention import MMEncoderAttention

    found: list[nn.Module] = [module for module in block.modules() if isinstance(module, MMEncoderAttention)]
    assert len(found) == 1, f"expected one attention in an encoder layer, found {len(found)}"
    return found[0]


@dataclass
class Watch:
    """Hooks for the length of a `with` block.

    Attributes:
        stage: what is read, and who chooses.
        layouts: one per image or video of the pass.
        counts: tokens of each that stay.
        projector: the module that maps the encoder's features, one by one, for rules that work before it; or None.
        run: what was read.
        choice: what was decided before the projector.
    """

    stage: PlainStage
    layouts: Sequence[Layout]
    counts: Sequence[int]
    projector: nn.Module | None = None
    run: EncoderRun = field(init=False)
    choice: PlacedSelections | None = None
    _handles: list[Any] = field(default_factory=list)

    def __enter__(self) -> Watch:
        self.run = self.stage.start()
        for layer in self.stage.reads:
            hook = _AttentionHook(self, layer)
            module = attention_of(self.stage.tower.blocks[layer])
            self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        if self.projector is not None and self.stage.early:
            self._handles.append(self.projector.register_forward_pre_hook(self._before_projector))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _before_projector(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Let the rule choose from what leaves the encoder, and write the values of what merges."""
        features = args[0]
        flat = features.flatten(0, -2)
        patches = torch.from_numpy(stacked(self.layouts))
        if patches.shape[1] > 1 or int(patches.max()) >= len(flat):  # resampled features: the rule is asked afterwards
            return None
        places = patches[:, 0].to(flat.device)
        rows = flat[places.clamp(min=0)]
        self.choice = self.stage.choose_early(self.run, self.layouts, rows, self.counts)
        made = self.choice.blend(rows)
        if made is rows:
            return None
        changed = self.choice.keep & (places >= 0)
        out = flat.clone()
        out[places[changed]] = made[changed]
        return (of_first(out).view(features.shape), *args[1:])


@dataclass
class _AttentionHook:
    """Pre-hook of the attention of one encoder layer."""

    watch: Watch
    layer: int

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = ("query", "key", "value", "cu_seqlens")
        given = dict(zip(names, args, strict=False)) | kwargs
        q, k = (self._heads(module, given[name]) for name in ("query", "key"))
        stage, run = self.watch.stage, self.watch.run
        if not stage.tower.packed:
            run.item = q.shape[2] - stage.tower.prefix - stage.tower.suffix
        stage.read(run, self.layer, q, k, module.scale or module.head_size**-0.5, given.get("cu_seqlens"))

    @staticmethod
    def _heads(module: Any, x: Tensor) -> Tensor:
        """(items, H, S, D), all heads of all processes."""
        return gathered(x.view(*x.shape[:2], -1, module.head_size), 2).transpose(1, 2)
