"""What is worked out before a prompt's pass that may be run straight: whether it may, which rows leave and when."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mustdrop.compat import attention_function
from mustdrop.constants import numbers
from mustdrop.pruners import PrefillPruner
from mustdrop.pruners.prefill import needs_rows
from mustdrop.pruners.recycling import groups
from mustdrop.runtime import attention_capture
from mustdrop.runtime.language import filter_step
from mustdrop.runtime.language.fixed_rows import FixedRows, ScoringRows, leaves_a_number, names_raters
from mustdrop.runtime.language.straight_pass import FilterPlan, Straight
from mustdrop.runtime.masks_flex import FLEX

if TYPE_CHECKING:
    from mustdrop.runtime.language.vision_tokens import VisionTokens
    from mustdrop.runtime.session import Runtime
    from mustdrop.runtime.state import Forward


def why_not(runtime: Runtime, forward: Forward, media: VisionTokens | None) -> str | None:
    """Why a pass cannot be run straight, None where it can."""
    method = runtime.method
    if media is None:
        return "it has no media"
    counted = method.prefill is None or leaves_a_number(method.prefill, media.ends is not None)
    if media.fixed is None and (method.renumber or not counted):
        return "how many tokens stay where is not known before it runs"
    if forward.start or (forward.cache is not None and any(layer.slots for layer in forward.cache.layers)):
        return "the prompt continues a cache"
    if method.decode is not None and (method.decode.reads_prompt or method.decode.reads_steps or forward.shrinks):
        return "the cache is cut by what each layer has read"
    if runtime.implementation == FLEX:
        return "flex attention makes its masks anew for every length"
    if runtime.flash and media.padded:
        return "flash attention cuts padding away as the data say"
    if (getattr(runtime.model, "_tp_size", None) or 1) > 1:
        return "processes share its attention heads"
    if len({next(layer.parameters()).device for layer in runtime.layers}) > 1:
        return "its layers lie on several devices"
    return None


def straight_of(runtime: Runtime, forward: Forward, media: VisionTokens, device: torch.device) -> Straight:
    """What a pass needs, on `device`; `why_not` has found no obstacle."""
    fixed = FixedRows.looked(media, device) if media.fixed is None else media.fixed
    decode, prefill = runtime.method.decode, runtime.method.prefill
    choices, text, ragged, n = list[FilterPlan](), fixed.text, fixed.padding is not None, forward.length
    before, reads = [-1] * runtime.depth, [-1] * runtime.depth
    functions: dict[int, Any] = {}
    left = fixed.left

    def choice(layer: int, wanted: list[int], tables: dict[str, Any]) -> None:
        nonlocal ragged, n, left
        sizes = [own + seen for own, seen in zip(text, wanted, strict=True)]
        padded = len(set(sizes)) > 1
        count = numbers(wanted, device)
        choices.append(FilterPlan(layer, count, max(wanted), max(sizes), ragged, padded, **tables))
        ragged, n, left = padded, max(sizes), wanted
        before[layer] = len(choices) - 1

    if not media.whole:
        choice(0, fixed.left, {})
    for k, layer in enumerate(runtime.filters):
        if prefill is None or filter_step.skips(media, k) or layer + 1 == runtime.depth:
            continue
        assert media.counts is not None, "counts that are not known"
        reads[layer] = len(choices)
        functions[layer] = _function(runtime, layer)
        tables = _tables(prefill, fixed.scoring, n, device, not choices)
        wanted, clusters = _clusters(prefill, left, media.counts[k], device)
        choice(layer + 1, wanted, {**tables, **clusters})
    cascade = decode is not None and decode.cascade
    given = places = None
    if media.fixed is not None and names_raters(prefill) is not None:
        given, places = (make(forward.length, device, True) for make in (fixed.scoring.flags, fixed.scoring.rows))
    return Straight(
        runtime, fixed, forward.length, runtime.depth, decode.full_layers if decode is not None and cascade else
        runtime.depth, choices, before, reads, functions, fixed.vision, None if media.whole else fixed.alive,
        fixed.protected, fixed.importance, fixed.is_text, fixed.padding, given, places,
    )  # fmt: skip


def _function(runtime: Runtime, layer: int) -> Any:
    """The attention function of a decoder layer, as its config names it now."""
    attention_capture.register()
    module = attention_capture.attention_of(runtime.layers[layer])
    assert module is not None, "patching would have failed"
    return attention_function(module, attention_capture.implementation_of(runtime.layers[layer]))


def _tables(
    prefill: PrefillPruner, scoring: ScoringRows, n: int, device: torch.device, whole: bool
) -> dict[str, Tensor | None]:
    """What a filter reads of `n` rows; `whole`: none has left yet."""
    scorer, rows, visible = prefill.score, scoring.rows(n, device, whole), scoring.visible(n, device, whole)
    wanted = "text" if scorer is None else scorer.rows
    part = {"text": slice(None), "last": slice(-1, None), "none": slice(0)}[wanted]
    flags = scoring.flags(n, device, whole) if needs_rows(prefill) else None
    return {"rows": rows[:, part], "visible": None if visible is None else visible[:, part], "text": flags}


def _clusters(
    prefill: PrefillPruner, present: list[int], wanted: list[int], device: torch.device
) -> tuple[list[int], dict[str, Any]]:
    """How many vision tokens of each prompt are left, and, where a part of them stands for clusters, how many do."""
    if prefill.recycle is None:
        return wanted, {}
    plans = [prefill.recycle.plan(*pair) for pair in zip(present, wanted, strict=True)]
    kept, some = numbers([n for n, _, _ in plans], device), groups([plan[1:] for plan in plans], device)
    return [n + clusters for n, _, clusters in plans], {"kept": kept, "groups": tuple(some)}
