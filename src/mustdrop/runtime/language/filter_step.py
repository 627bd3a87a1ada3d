"""What a prefill scorer may read at a filter layer, and rows whose clusters become one."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mustdrop import kernels
from mustdrop.constants import numbers
from mustdrop.errors import ConfigError
from mustdrop.indices import HOST, Sent, on, pack, take
from mustdrop.pruners import PrefillPruner, Seen
from mustdrop.pruners.recycling import groups
from mustdrop.runtime import tensor_parallel
from mustdrop.runtime.language.fixed_rows import FixedRows
from mustdrop.runtime.language.vision_tokens import VisionTokens
from mustdrop.runtime.state import Forward
from mustdrop.selection import Selection

if TYPE_CHECKING:
    from mustdrop.runtime.language.attention_call import AttentionCall
    from mustdrop.runtime.session import Runtime


def rows(prefill: PrefillPruner | None, forward: Forward, media: VisionTokens, asked: AttentionCall) -> Tensor:
    """(B, R) query rows whose attention is read, left-padded with PAD; the keys are kept where the scorer wants them.

    Args:
        prefill: the prefill stage.
        forward: the pass.
        media: its vision tokens.
        asked: the layer's attention; the rows of this pass are the last of its keys.
    """
    if media.fixed is not None:
        text = media.fixed.scorers(asked.q.device)
    else:
        text = pack(forward.current(media.raters & media.valid))
    scorer = None if prefill is None else prefill.score
    if scorer is None:
        return text
    if "keys" in scorer.reads:
        own = tensor_parallel.side_by_side(asked.k[:, :, -asked.q.shape[2] :], asked.group)
        forward.keys = own.transpose(1, 2).flatten(2).float()
    return {"text": text, "last": text[:, -1:], "none": text[:, :0]}[scorer.rows]


def seen(
    runtime: Runtime, prefill: PrefillPruner, forward: Forward, media: VisionTokens, hidden: Tensor, attention: Tensor
) -> Seen:
    """What the filter layer that has just run knows.

    Args:
        runtime: of the patched model.
        prefill: the prefill stage.
        forward: the pass.
        media: its vision tokens.
        hidden: (B, n, C) output of the layer.
        attention: (B, R, n) of the rows that score.
    """
    keys, forward.keys = forward.keys, None
    if media.fixed is not None:
        vision, text = media.fixed.vision, media.fixed.scoring_flags(hidden.device)
    else:
        vision, text = forward.current(media.vision), forward.current(media.raters & media.valid)
    features: Tensor | None = None
    if prefill.score is not None and "hidden" in prefill.score.reads:
        norm = getattr(runtime.text, "norm", None)
        features = (hidden if norm is None else norm(hidden)).detach().float()
    elif prefill.recycle is not None:
        features = hidden.detach()
    here = attention.device
    return Seen(
        attention,
        on(vision, here),
        on(text, here),
        None if keys is None else keys.to(here),
        None if features is None else features.to(here),
    )


def choose(
    runtime: Runtime,
    prefill: PrefillPruner,
    forward: Forward,
    media: VisionTokens,
    hidden: Tensor,
    attention: Tensor | Sent,
    k: int,
) -> Selection:
    """What the prefill stage keeps at its k-th filter.

    Args:
        runtime: of the patched model.
        prefill: the prefill stage.
        forward: the pass.
        media: its vision tokens.
        hidden: (B, n, C) output of the layer.
        attention: (B, R, n) of the rows that score, or (B, 2, n), their sum and maximum on the way to the host, where
            that is enough.
        k: number of the filter.

    Returns:
        The selection, where its rule worked: on the host where sums and maxima decide, else on the device.
    """
    selection = _chosen(runtime, prefill, forward, media, hidden, attention, k)
    return (
        selection if media.ends is None else with_ends(selection, forward.current(media.ends), media.counts is not None)
    )


def kept(
    runtime: Runtime,
    prefill: PrefillPruner,
    forward: Forward,
    media: VisionTokens,
    rows: FixedRows,
    hidden: Tensor,
    attention: Tensor | Sent,
    wanted: list[int],
) -> tuple[Tensor, list[int], Tensor]:
    """What stays after a filter layer where at most `wanted` vision tokens of each prompt do.

    Arguments as for `choose`; on the device, and nothing waits for it.

    Returns:
        (B, M) long, the rows that stay; how many vision tokens of each prompt are among them; (B, n, C) `hidden`, with
        each cluster's mean in the row of the token that stands for it.
    """
    if isinstance(attention, Sent):
        gamma, alpha = prefill.global_threshold or 1.0, prefill.individual_threshold or 1.0
        return rows.select(attention.tensor, wanted, gamma, alpha), wanted, hidden
    here = attention.device
    known = seen(runtime, prefill, forward, media, hidden, attention)
    first: dict[str, Any] = {
        name: None if x is None else on(x, here)
        for name, x in (("protected", rows.protected), ("importance", rows.importance))
    }
    if prefill.recycle is None:
        return rows.among(prefill.stays(known, numbers(wanted, here), **first), wanted), wanted, hidden
    plans = [prefill.recycle.plan(*pair) for pair in zip(rows.left, wanted, strict=True)]
    left = [n + clusters for n, _, clusters in plans]
    some = groups([plan[1:] for plan in plans], here)
    stays, into = prefill.joined(known, numbers([n for n, _, _ in plans], here), some, **first)
    return rows.among(stays, left), left, clustered(on(into, hidden.device), hidden)


def clustered(into: Tensor, hidden: Tensor) -> Tensor:
    """Hidden states (B, n, C) with the mean of each cluster in the row that `into` (see `Recycling.join`) names."""
    own = into == torch.arange(into.shape[1], dtype=torch.long, device=into.device)
    return torch.where(own[..., None], kernels.merge_tokens(hidden, into, into.shape[1]), hidden)


def with_ends(selection: Selection, ends: Tensor, counted: bool) -> Selection:
    """The selection with the tokens that end a prompt, which rules of somebody's own may not know of.

    Args:
        selection: over the n tokens.
        ends: (B, n) bool, on the host.
        counted: whether there is a budget: then the token takes the place of the last other one.
    """
    keep = selection.mask(ends.shape[1])
    ends = on(ends, keep.device)
    lost = (ends & ~keep).any(1, keepdim=True)
    if not bool(lost.any()):
        return selection
    if counted:
        keep = keep & ~(lost & (keep.flip(1).cumsum(1).flip(1) == 1) & keep)
    return Selection.from_mask(keep | ends)


def _chosen(
    runtime: Runtime,
    prefill: PrefillPruner,
    forward: Forward,
    media: VisionTokens,
    hidden: Tensor,
    attention: Tensor | Sent,
    k: int,
) -> Selection:
    vision = forward.current(media.vision)
    options: dict[str, Any] = {
        "count": None if media.counts is None else torch.tensor(media.counts[k], dtype=torch.long, device=HOST),
        "protected": None if media.protected is None else forward.current(media.protected),
        "importance": None if media.importance is None else take(media.importance, forward.index, 1),
    }
    if isinstance(attention, Sent):
        return prefill.from_statistics(attention.received(), vision, **options)
    options = {name: None if value is None else on(value, attention.device) for name, value in options.items()}
    if type(prefill).__call__ is not PrefillPruner.__call__:  # a rule of somebody's own
        chosen: object = prefill(attention, on(vision, attention.device), **options)
        if not isinstance(chosen, Selection):
            raise ConfigError(
                f"{type(prefill).__name__} returned a {type(chosen).__name__}, expected a Selection: "
                "Selection.from_mask(keep) for a mask (B, N) of what stays."
            )
        return chosen
    what = seen(runtime, prefill, forward, media, hidden, attention)
    if media.counts is not None:
        what = replace(what, most=max(media.counts[k]))
    return prefill.filter(what, **options)


def merged(selection: Selection, hidden: Tensor) -> Tensor:
    """Hidden states (B, n, C) with each cluster's mean in the row of the token that stands for it."""
    selection = selection.to(hidden.device)
    index = selection.keep[..., None].expand(-1, -1, hidden.shape[2])
    several = (selection.sizes() > 1) & selection.valid
    values = torch.where(several[..., None], selection.apply(hidden), hidden.gather(1, index))
    place = torch.where(selection.valid, selection.keep, hidden.shape[1])  # padding goes to one row too many
    out = torch.cat([hidden, hidden[:, :1]], 1)
    return out.scatter(1, place[..., None].expand_as(index), values)[:, :-1]


def released_order(selection: Selection, n: int) -> Tensor:
    """(B, n) long sort key of the rows: survivors stand, in the order of the selection, where survivors stood."""
    order = torch.arange(n, dtype=torch.long, device=selection.keep.device).repeat(len(selection.keep), 1)
    for b, valid in enumerate(selection.valid):
        slots = selection.keep[b, valid]
        order[b, slots] = slots.sort().values
    return order


def skips(media: VisionTokens, k: int) -> bool:
    """Whether the k-th filter keeps everything in every row, as its counts say."""
    return media.counts is not None and not media.counts[k]
