"""The decode socket at work: attention is read for the cache layers, and the entries of least score leave them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mustdrop import kernels, kv
from mustdrop.errors import MustDropError
from mustdrop.pruners import CacheScorer, DecodeCachePruner, Received, answers
from mustdrop.runtime import parallel
from mustdrop.runtime.block_masks import Mask
from mustdrop.runtime.masks import visible_keys
from mustdrop.runtime.rows import PAD, on, pack
from mustdrop.runtime.state import Forward

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from mustdrop.runtime.entry import Media

#: Rows x keys of a mask that may exist at once, in elements, where all rows of a prompt are read.
AT_ONCE = 1 << 25


@dataclass(frozen=True)
class Asked:
    """One call of an attention function.

    Attributes:
        q: (B, H, n, D) queries.
        k: (B, G, K, D) keys of the filled slots.
        mask: what the function got, cut to these slots.
        scaling: factor on the logits.
        softcap: see `mustdrop.kernels.row_probabilities`.
        group: processes that share the heads in tensor parallel, else None.
    """

    q: Tensor
    k: Tensor
    mask: Mask
    scaling: float
    softcap: float | None
    group: ProcessGroup | None = None

    @classmethod
    def of(
        cls, module: nn.Module, q: Tensor, k: Tensor, mask: Mask, kwargs: dict[str, Any], stored: int | None
    ) -> Asked:
        """From the arguments of the function; `stored` slots of `k` are filled (None: all)."""
        if stored is not None:  # a static cache hands out room for later tokens too
            k, mask = k[:, :, :stored], mask[..., :stored] if isinstance(mask, Tensor) else mask
        scaling = kwargs.get("scaling") or getattr(module, "scaling", None) or q.shape[-1] ** -0.5
        return cls(q, k, mask, scaling, kwargs.get("softcap"), parallel.group_of(module))

    def arguments(self, rows: Tensor, first: int = 0) -> tuple[Any, ...]:
        """Arguments of the kernels that read query rows (B, R), -1 on padding; keys before `first` give no result."""
        visible, bias = visible_keys(rows, self.mask, self.q.shape[2], self.k.shape[2])
        return self.q, self.k, rows, visible, self.scaling, bias, self.softcap, first

    def over_heads(self, x: Tensor) -> Tensor:
        """A mean over the heads that are here as the mean over all heads."""
        return parallel.mean_over_heads(x, self.group)

    def probabilities(self, rows: Tensor, first: int) -> Tensor:
        """(B, R, K - first) head-mean attention of query rows (B, R)."""
        return self.over_heads(kernels.row_probabilities(*self.arguments(rows, first)))

    def statistics(self, rows: Tensor, first: int) -> Tensor:
        """(B, 2, K - first) sum and maximum of it over the rows."""
        if self.group is None:
            return kernels.text_statistics(*self.arguments(rows, first))
        # the maximum is one of the mean over all heads, so the rows must be there when the processes meet
        total = self.q.new_zeros(rows.shape[0], self.k.shape[2] - first, dtype=torch.float32)
        peak = total
        for part in torch.split(rows, self.at_once(rows), dim=1) if rows.shape[1] else ():
            given = self.probabilities(part, first)
            total, peak = total + given.sum(1), torch.maximum(peak, given.amax(1))
        return torch.stack([total, peak], 1)

    def at_once(self, rows: Tensor) -> int:
        """How many of the rows (B, R) may meet the keys at once."""
        return max(1, AT_ONCE // max(1, rows.shape[0] * self.k.shape[2]))


def read_prompt(scorer: CacheScorer, layer: kv.Slots, forward: Forward, media: Media, asked: Asked) -> Tensor:
    """Note what the prompt's rows give to the entries of a layer, those of earlier turns included.

    Args:
        scorer: which rows, and what of them.
        layer: cache layer that has just received the rows of this pass.
        forward: the pass.
        media: its vision tokens.
        asked: the layer's attention.

    Returns:
        (B, R) rows that were read, -1 on padding.
    """
    prompt = forward.current(media.prompt)
    rows = on(pack(answers.rows(scorer, forward.current(media.text) & prompt, prompt)), asked.q.device)
    if scorer.by_row:
        arguments = asked.arguments(rows)
        attention = asked.over_heads(kernels.row_probabilities(*arguments))
        own = (rows + asked.k.shape[2] - asked.q.shape[2]).masked_fill(rows == PAD, PAD)
        read = Received(answers.gathered(scorer, attention, own), _seeing(rows, arguments[3]))
        mass = attention.sum(1)
    else:
        parts = [_sums(asked, part) for part in torch.split(rows, asked.at_once(rows), dim=1)]
        read = sum(parts[1:], start=parts[0])
        mass = read.given
    layer.attended, layer.queries = read.given, read.queries
    if scorer.by_layer:
        vision = layer.slot_vision()
        assert vision is not None  # the rows of this pass are there
        forward.masses.append((mass * on(vision, mass.device)).sum(1))
    return rows


def read_step(scorer: CacheScorer, layer: Any, asked: Asked) -> None:
    """Add what the newest tokens give to what is known of a layer."""
    if layer.positions is None:
        return
    rows = torch.arange(asked.q.shape[2], device=asked.q.device).expand(asked.q.shape[0], -1)
    step = _sums(asked, rows)
    n = layer.positions.shape[1]
    step = Received(step.given[:, :n], step.queries[:, :n])
    known = None if layer.attended is None or layer.queries is None else Received(layer.attended, layer.queries)
    read = step if known is None else answers.added(scorer, known, step)
    layer.attended, layer.queries = read.given, read.queries


def before_step(decode: DecodeCachePruner | None, cache: Any) -> None:
    """Before a decode step: the vision entries of least score leave if it is time."""
    if decode is None or not decode.reads_steps or cache is None:
        return
    for layer in cache.layers:
        if layer.attended is not None and decode.due(layer.steps + 1):
            _evict(decode, layer, decode.counts(layer.totals))


def after_prompt(decode: DecodeCachePruner | None, forward: Forward, depth: int) -> None:
    """At the end of the prefill: the vision entries of least score leave, where the pruner says so."""
    if decode is None or not decode.after_prefill or forward.cache is None:
        return
    layers = forward.cache.layers[:depth]
    unread = [i for i, layer in enumerate(layers) if layer.attended is None]
    if unread:
        raise MustDropError(
            f"decoder layers {unread} ran without their attention being read: their attention modules do not ask their "
            "config which function to use."
        )
    count = decode.counts(layers[0].totals)
    budgets = [count] * depth
    if decode.scorer.by_layer:
        entries = torch.stack([layer.slot_vision().sum(1).cpu() for layer in layers])
        mass = torch.stack([own.cpu() for own in forward.masses])
        budgets = list(answers.budgets(decode.scorer, mass, count.cpu(), entries))
    for layer, own in zip(layers, budgets, strict=True):
        _evict(decode, layer, own)
        layer.attended = layer.queries = None  # nothing is read any more


def _evict(decode: DecodeCachePruner, layer: Any, count: Tensor) -> None:
    vision, pad = layer.slot_vision(), (0, layer.slots - layer.attended.shape[1])
    read = Received(nn.functional.pad(layer.attended, pad), nn.functional.pad(layer.queries, pad))
    vision = on(vision, read.given.device)
    score = answers.entries(decode.scorer, read, vision)
    layer.evict(decode(score, vision, on(count, score.device)).mask(layer.slots))


def _sums(asked: Asked, rows: Tensor) -> Received:
    """Sum over query rows (B, R), without making the rows where there are several."""
    arguments = asked.arguments(rows)
    one = rows.shape[1] == 1
    given = (kernels.row_probabilities if one else kernels.text_statistics)(*arguments)[:, 0]
    return Received(asked.over_heads(given), _seeing(rows, arguments[3]))


def _seeing(rows: Tensor, visible: Tensor) -> Tensor:
    """(B, K) float32, how many of the rows see each key."""
    return (visible & (rows != PAD)[..., None]).sum(1).float()
