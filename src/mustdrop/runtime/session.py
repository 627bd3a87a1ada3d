"""`Runtime`: everything that one patched model carries. Its bound methods are the hooks, so a deep copy is complete."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from mustdrop.adapters.base import Adapter, Modality, Tower
from mustdrop.compat import cache_name, cache_of, require_supported_transformers
from mustdrop.cost import EncoderCost, TextCost, linear_flops
from mustdrop.errors import BudgetWarning, ConfigError, NothingDroppedWarning, UnsupportedModelError, warn
from mustdrop.indices import HOST
from mustdrop.method import Method
from mustdrop.runtime import guards
from mustdrop.runtime.calls import BASE, MODEL, Calls, raised
from mustdrop.runtime.compile.decode_steps import outside_steps
from mustdrop.runtime.compile.engine import Engine
from mustdrop.runtime.copied import Copied
from mustdrop.runtime.install import Installation
from mustdrop.runtime.language.stage import TextStage
from mustdrop.runtime.language.text_rows import last_token, valid_tokens, words
from mustdrop.runtime.ledger import Ledger, now
from mustdrop.runtime.plan import RowPlan, plan_row, plan_rows
from mustdrop.runtime.state import Call, Local, PromptOnHost
from mustdrop.runtime.vision import packed_steps
from mustdrop.runtime.vision.encoder import EncoderStage
from mustdrop.runtime.vision.encoder_run import EncoderRun

T = TypeVar("T")


class Runtime(Copied):
    """What one patched model carries: its layers, method, budgets and run state; its methods are the hooks."""

    def __init__(self, model: nn.Module, adapter: Adapter, method: Method) -> None:
        require_supported_transformers()
        self.model, self.adapter, self.method = model, adapter, method
        self.base = adapter.base(model)
        self.text: Any = adapter.text(model)
        self.cache_name = cache_name(self.text)
        self.layers = adapter.decoder_layers(model)
        self.depth = len(self.layers)
        self.recurrent = frozenset(adapter.recurrent(model))
        self.filters: tuple[int, ...] = () if method.prefill is None else method.prefill.filter_layers(self.depth)
        if method.renumber and not hasattr(self.text, "rotary_emb"):
            raise UnsupportedModelError(
                f"{method.renumbered_by} renumbers positions and needs rotary embeddings; "
                f"{type(self.text).__name__} has none."
            )
        if method.renumber and "layer_type" in inspect.signature(cast(Any, self.text).rotary_emb.forward).parameters:
            raise UnsupportedModelError(
                f"{method.renumbered_by} renumbers positions and needs the same rotary embeddings in all layers; those "
                f"of {type(self.text).__name__} have kinds. Leave it out: positions are then kept."
            )
        self.local = Local()
        self.modalities = adapter.modalities(model)
        self.encoders = self._encoders()
        if method.decode is not None and method.decode.full_layers > self.depth:
            raise ConfigError(
                f"DecodeCachePruner.full_layers={method.decode.full_layers}: this model has "
                f"{self.depth} decoder layers."
            )
        self.stage = TextStage(self)
        self.calls, self.ledger = Calls(self), Ledger()
        self.warned = self.exceeded = False
        self.sizes: dict[object, Any] = {}
        # per runtime: keep=1 and keep=1.0 are equal and mean different things
        self.plans: dict[tuple[int, bool], RowPlan] = {}
        self.installation = Installation()
        self.engine: Engine | None = None  # runs the passes that can be run straight
        guards.model(self)

    def _encoders(self) -> dict[str, EncoderStage]:
        """Kind of media -> its encoder. Kinds that share a tower share the stage.

        An encoder that the adapter cannot look into matters only to a vision stage.
        """
        pruner = self.method.vision
        found: dict[str, EncoderStage] = {}
        guards.pictures(None if pruner is None else pruner.rule, self.adapter)
        for modality in self.modalities:
            try:
                tower = self.adapter.tower(self.model, modality.name)
            except UnsupportedModelError:
                if pruner is not None:
                    raise
                packed_steps.check(self.method.input, self.adapter, None)
                continue
            known = [stage for stage in found.values() if stage.tower.module is tower.module]
            last = self.adapter.read_layer(self.model, modality.name, {})
            packed_steps.check(self.method.input, self.adapter, tower)
            stage = (
                known[0]
                if known
                else EncoderStage(
                    pruner, tower, self.local, ("encoder", modality.name), last, self.method.input is not None
                )
            )
            stage.check(last)
            found[modality.name] = stage
        return found

    @property
    def text_cost(self) -> TextCost:
        """Sizes of the text model, as it is now."""
        return self._sizes(
            "text",
            lambda: TextCost.of(self.layers, self.text.config, self.model, self.adapter.experts_of, self.recurrent),
        )

    def encoder_cost(self, tower: Tower) -> EncoderCost:
        """Sizes of an encoder, as it is now."""
        return self._sizes(id(tower.module), lambda: EncoderCost.of(tower.module, (*tower.before, *tower.blocks)))

    @property
    def projector_flops(self) -> int:
        """FLOPs per feature of what maps features into the language model, as it is now."""
        return self._sizes("projector", lambda: self.adapter.projector_flops(self.model))

    def skipped(self, run: EncoderRun) -> int:
        """FLOPs that the mergers of a packed encoder did not spend, since they ran on fewer cells."""
        parts = [] if run.packed is None else run.packed.skipped
        return sum(n * int(self._sizes(id(part), lambda part=part: linear_flops(part))) for part, n in parts)  # type: ignore[misc]

    def _sizes(self, key: object, read: Callable[[], T]) -> T:
        """What `read` finds in the modules: once, for it takes a while, unless adapters may be switched and merged."""
        if getattr(self.model, "peft_config", None):
            return read()
        if key not in self.sizes:
            self.sizes[key] = read()
        return cast(T, self.sizes[key])

    @property
    def implementation(self) -> str:
        """Attention implementation of the text model, as it is now."""
        return str(self.text.config._attn_implementation or "eager")

    @property
    def flash(self) -> bool:
        """Whether the text model runs a flash-attention kernel."""
        return "flash" in self.implementation

    def plan(self, total: int, spared: bool = False) -> RowPlan:
        """Numbers for a prompt with `total` vision tokens; a server sees the same few sizes all day."""
        if (total, spared) not in self.plans:
            made = self.plans[total, spared] = plan_row(self.method, total, self.depth, self.filters, spared)
            if made.exceeds and not self.exceeded:
                self.exceeded = True
                warn(made.exceeds, BudgetWarning)
        return self.plans[total, spared]

    def plan_batch(self, totals: list[int]) -> list[RowPlan]:
        """Numbers for each prompt of a batch, see `plan_rows`."""
        return plan_rows(totals, self.plan)

    def install(self) -> None:
        """Register hooks, capture points and wrappers."""
        self.installation.install(self)
        # sizes are read now, and not in the first call
        _ = self.text_cost
        for stage in self.encoders.values():
            self.encoder_cost(stage.tower)

    def uninstall(self) -> None:
        """Undo `install`; the model is as it was."""
        self.installation.undo()

    # -- one call -----------------------------------------------------------------------------------------------------

    def begin(self, ids: Tensor | None, kwargs: dict[str, Any]) -> Call:
        """The state of a call that begins; budgets are checked here, before any work.

        Args:
            ids: (B, S) prompt ids that the cache does not hold yet, or None.
            kwargs: the call's arguments: embeddings, attention mask and media are looked up here.
        """
        guards.call(self, kwargs)
        call = Call(began=now())
        call.media = {name: kwargs.get(name) for modality in self.modalities for name in modality.pixels}
        if not self._has_media(kwargs):
            return call
        given = kwargs.get("attention_mask")
        seen, mask = _together(ids, given)
        kinds = self.placeholders(seen, kwargs.get("inputs_embeds"), kwargs)
        if kinds is not None:
            cache = cache_of(kwargs)
            start = 0 if cache is None else int(cache.get_seq_length())
            valid = valid_tokens(kinds, mask, start)
            own, shown = kinds.numpy(), valid.numpy()
            whole = bool(shown.all())
            if ids is not None and not start and (given is None or getattr(given, "shape", None) == ids.shape):
                call.looked = PromptOnHost(ids, given, kinds, valid, whole, (own, shown))
            call.totals_of = {m.name: (own == i).sum(1).tolist() for i, m in enumerate(self.modalities)}
            if not whole and bool(((own >= 0) & ~shown).any()):  # each still stands for a feature, so the encoder's
                call.shown_of = {  # marks know them
                    m.name: [v[k == i] for k, v in zip(kinds, valid, strict=True)]
                    for i, m in enumerate(self.modalities)
                }
            own = own if whole else np.where(shown, own, -1)
            call.totals = (own >= 0).sum(1).tolist()
            guards.media(self, call.totals_of, kwargs if ids is None else {"input_ids": ids, **kwargs})
            call.plans = self.plan_batch(call.totals)
            ends = np.where(last_token(shown), own, -1).max(1).tolist()
            if self.method.vision is not None and self.method.vision.asks:
                embeds = kwargs.get("inputs_embeds")
                embeds = self.text.get_input_embeddings()(ids) if embeds is None else embeds
                call.words = words(embeds.detach(), own >= 0, shown)
            call.open_ended = [None if i < 0 else self.modalities[i].name for i in ends]
        return call

    def keep(self, call: Call) -> None:
        """A call has ended well: keep its trace."""
        if call.prefill is None and self.ledger.newest is not None:  # a compiled step ran inside
            return
        from mustdrop.runtime.trace_builder import EndedCall  # here: to patch a model takes no trace

        made = EndedCall.of(self, call)
        self.ledger.note(call.began, made)
        if self.method.waits or not self.method.drops:
            return
        if any(call.totals) and not self.warned and not made.dropped_anything:
            self.warned = True
            warn(
                f"method {self.method.name!r} kept every vision token of this prompt: {self.method.why_nothing}",
                NothingDroppedWarning,
            )

    def placeholders(self, ids: Tensor | None, embeds: Tensor | None, kwargs: dict[str, Any]) -> Tensor | None:
        """(B, S) long on the host, index of the modality that each position stands for, -1 for text."""
        if ids is None and embeds is None:
            return None
        tokens = [modality.token for modality in self.modalities]
        # of kinds that share a token, the one that came with the call
        kinds = [i for i, m in enumerate(self.modalities) if tokens.count(m.token) == 1 or _came(m, kwargs)]
        given = cast(Tensor, embeds if ids is None else ids)
        if ids is not None:
            there = given.to(HOST).numpy()
            same = [there == tokens[i] for i in kinds]
        else:
            wanted = torch.tensor([tokens[i] for i in kinds], dtype=torch.long, device=given.device)
            rows = self.text.get_input_embeddings()(wanted)
            same = list((given[:, :, None] == rows.to(given)).all(-1).to(HOST).permute(2, 0, 1).numpy())
        found = np.full(given.shape[:2], -1, dtype=np.int64)
        for i, own in zip(kinds, same, strict=True):
            found[own] = i
        return torch.from_numpy(found)

    def _text_is_compiled(self) -> bool:
        """Whether somebody has compiled the text model by itself: in place, or by a module around it."""
        return self.text._compiled_call_impl is not None or self.adapter.text(self.model) is not self.text

    def _has_media(self, kwargs: dict[str, Any]) -> bool:
        return any(_came(modality, kwargs) for modality in self.modalities)

    # -- hooks --------------------------------------------------------------------------------------------------------

    @outside_steps
    def before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Begin a call for a plain forward; take a copy of the labels so that dropped tokens can leave the loss."""
        kwargs = self.calls.enter(MODEL, module, args, kwargs)
        call = self.local.call
        for name in ("labels", "shift_labels"):
            if call is not None and isinstance(kwargs.get(name), Tensor):
                call.labels[name] = kwargs[name].clone()
                kwargs = {**kwargs, name: call.labels[name]}
        return (), kwargs

    @outside_steps
    def before_base(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Find the vision positions of this pass; begin a call if the base model is called by itself."""
        kwargs = self.calls.enter(BASE, module, args, kwargs)
        ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        call = self.local.call
        if ids is None and embeds is not None and call is not None and call.length and call.prefill is None:
            call.length = embeds.shape[1]  # peft's prompt tuning puts rows before the ids that generate was given
        # without media, a placeholder id is a token that somebody generated or guessed, not an image
        mask, looked = kwargs.get("attention_mask"), None if call is None else call.looked
        first = call is not None and call.prefill is None
        if not self._has_media(kwargs):
            self.local.kinds = None
        elif first and looked is not None and looked.knows(ids, mask):
            self.local.kinds = looked.kinds
        else:
            self.local.kinds = self.placeholders(ids, embeds, kwargs)
        self.local.mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        self.local.coming = kwargs if self.local.kinds is not None and self._text_is_compiled() else None
        self.stage.ahead()
        return (), kwargs

    @outside_steps
    def after_base(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """End the call that `before_base` began."""
        if output is not None:
            self.stage.behind(output)
        self.local.coming = None
        if self.calls.leave(BASE, kwargs, raised(output)):
            self.local.kinds = self.local.mask = None

    @outside_steps
    def after_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """End the call that `before_model` began."""
        self.calls.leave(MODEL, kwargs, raised(output))


def _together(ids: Tensor | None, mask: Any) -> tuple[Tensor | None, Any]:
    """Ids and mask of a prompt on the host, where both are (B, S): what lies on a device comes in one copy."""
    if ids is None or not isinstance(mask, Tensor) or mask.shape != ids.shape or mask.device != ids.device:
        return ids, mask
    if ids.device == HOST or mask.dtype.is_floating_point:
        return ids, mask
    both = torch.stack([ids, mask.to(ids.dtype)]).to(HOST)
    return both[0], both[1]


def _came(modality: Modality, kwargs: dict[str, Any]) -> bool:
    encoded = (kwargs.get("mm_encoder_outputs") or {}).get(modality.name)
    return encoded is not None or any(kwargs.get(name) is not None for name in modality.pixels)
