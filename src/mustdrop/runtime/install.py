"""Everything that patching puts into a model, and how it leaves again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from mustdrop.errors import UnsupportedModelError
from mustdrop.pruners import PictureRule
from mustdrop.runtime import attention_capture
from mustdrop.runtime.calls import BASE, MODEL, TEXT, DirectForward, PrepareWrapper
from mustdrop.runtime.generate import GenerateWrapper
from mustdrop.runtime.language.decoder_layers import LayerHook
from mustdrop.runtime.language.recurrent import RowByRow
from mustdrop.runtime.vision.encoder import EncoderStage
from mustdrop.runtime.vision.encoder_hooks import (
    LengthHook,
    MaskHook,
    PackedHooks,
    takes_mask,
)
from mustdrop.runtime.vision.features import FeaturesWrapper, MarksHook

if TYPE_CHECKING:
    from mustdrop.runtime.session import Runtime

_PREPARE = "prepare_inputs_for_generation"


class Installation:
    """Hooks, capture points and replaced methods of one patched model."""

    def __init__(self) -> None:
        self.handles: list[Any] = []
        self.tapped: list[nn.Module] = []
        self.overridden: list[tuple[nn.Module, str, Any, Any]] = []  # what stands where, and what stood there

    def install(self, runtime: Runtime) -> None:
        """Put everything in. After an exception `undo` takes out what was put in until then.

        Raises:
            UnsupportedModelError: a layer that must be read has no attention module.
        """
        self._models(runtime)
        self._decoder(runtime)
        for stage in dict.fromkeys(runtime.encoders.values()):
            self._encoder(runtime, stage)
        self._methods(runtime)

    def undo(self) -> None:
        """Take everything out: hooks, capture points, methods."""
        for handle in self.handles:
            handle.remove()
        for module in self.tapped:
            attention_capture.remove(module)
        for module, name, mine, before in reversed(self.overridden):
            mine.active = False
            if vars(module).get(name) is not mine and isinstance(mine, DirectForward):
                continue  # somebody has wrapped it since: that stays, and calls what now does nothing
            if before is None:
                object.__delattr__(module, name)
            else:
                object.__setattr__(module, name, before)
        self.handles, self.tapped, self.overridden = [], [], []

    def _models(self, runtime: Runtime) -> None:
        """Around the whole model, the base model and the text model, whichever is called."""
        stage, levels = runtime.stage, dict[nn.Module, tuple[int, ...]]()
        for level, module, before, after in (
            (MODEL, runtime.model, runtime.before_model, runtime.after_model),
            (BASE, runtime.base, runtime.before_base, runtime.after_base),
            (TEXT, runtime.text, stage.before_text, stage.after_text),
        ):
            inner = module in levels  # a model may be its own base model: who comes last goes first
            self.handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            self.handles.append(module.register_forward_hook(after, with_kwargs=True, always_call=True, prepend=inner))
            levels[module] = (level, *levels.get(module, ()))
        for module, own in levels.items():
            self._override(module, "forward", DirectForward(runtime.calls, own, module, module.forward))

    def _decoder(self, runtime: Runtime) -> None:
        """Before each decoder layer, and inside the attention of those that are read."""
        layers, decode = runtime.stage.layers, runtime.method.decode
        for i, layer in enumerate(runtime.layers):
            self.handles.append(layer.register_forward_pre_hook(LayerHook.of(layers, i, layer), with_kwargs=True))
            if i in runtime.recurrent:
                self._override(layer, "forward", RowByRow(runtime.local, i, layer.forward))
        for i in range(runtime.depth) if decode is not None and decode.reads_layers else runtime.filters:
            self._hook_attention(
                runtime, runtime.layers[i], ("text", i), functools.partial(layers.capture, i), f"decoder layer {i}"
            )

    def _encoder(self, runtime: Runtime, stage: EncoderStage) -> None:
        """Before each encoder layer; where a vision stage is set, also what it reads, masks and gives back."""
        tower = stage.tower
        for block in tower.before:
            self.handles.append(block.register_forward_pre_hook(LengthHook(stage), with_kwargs=True))
        for hook in stage.hooks():
            self.handles.append(tower.blocks[hook.index].register_forward_pre_hook(hook, with_kwargs=True))
        if stage.shortens:
            self.handles += PackedHooks(runtime.local).install(tower)
            self.handles.append(tower.module.register_forward_hook(stage.after_tower, prepend=True))
        if stage.pruner is None:
            return
        if not tower.packed:
            for attention in (attention_capture.attention_of(block) for block in tower.blocks if not takes_mask(block)):
                if attention is not None:
                    self.handles.append(attention.register_forward_pre_hook(MaskHook(stage), with_kwargs=True))
            self.handles.append(tower.module.register_forward_hook(stage.after_tower, prepend=True))
        if stage.inner is not None and tower.halves is not None:
            from mustdrop.runtime.vision.block_merging import BlockMergingHooks

            for i in range(stage.last + 1):
                self.handles += BlockMergingHooks(runtime.local, i).install(tower.blocks[i], tower.halves)
        if isinstance(stage.pruner.rule, PictureRule):
            from mustdrop.runtime.vision.picture_sizes import PicturesHook

            self.handles.append(tower.module.register_forward_pre_hook(PicturesHook(runtime.local), with_kwargs=True))
        for i in stage.stated:
            self.handles.append(tower.blocks[i].register_forward_hook(functools.partial(stage.after_block, i)))
        for i in stage.tapped:
            self._hook_attention(
                runtime, tower.blocks[i], (stage.key, i), functools.partial(stage.capture, i), f"encoder layer {i}"
            )

    def _methods(self, runtime: Runtime) -> None:
        """In place of what encodes media, of what is done to its features, and of `generate`."""
        base, local = runtime.base, runtime.local
        for modality in runtime.modalities:
            function = getattr(base, modality.method)
            self._override(base, modality.method, FeaturesWrapper(runtime, modality, function))
        for module in map(base.get_submodule, runtime.adapter.after_features):
            marks = MarksHook(local)
            self.handles += module.register_forward_pre_hook(marks.before), module.register_forward_hook(marks.after)
        if runtime.adapter.additions:
            from mustdrop.runtime.language.deepstack import AdditionWrapper

            for name in runtime.adapter.additions:
                self._override(runtime.text, name, AdditionWrapper(local, getattr(runtime.text, name)))
        for module in dict.fromkeys((runtime.model, runtime.base)):
            if hasattr(module, _PREPARE):
                self._override(module, _PREPARE, PrepareWrapper(runtime.calls, getattr(module, _PREPARE)))
        if hasattr(runtime.model, "generate"):
            self._override(runtime.model, "generate", GenerateWrapper(runtime, cast(Any, runtime.model).generate))

    def _hook_attention(self, runtime: Runtime, block: nn.Module, key: object, capture: Any, what: str) -> None:
        attention = attention_capture.attention_of(block)
        if attention is None:
            raise UnsupportedModelError(
                f"{what} ({type(block).__name__}) has no attention module whose queries and keys could be read."
            )
        attention_capture.install(attention, key, runtime.local, capture)
        self.tapped.append(attention)

    def _override(self, module: nn.Module, name: str, function: Callable[..., Any]) -> None:
        before = vars(module).get(name)
        object.__setattr__(module, name, function)
        self.overridden.append((module, name, function, before))
