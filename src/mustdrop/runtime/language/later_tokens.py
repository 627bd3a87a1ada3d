"""What tokens after the prompt can still see: the entries that a policy may choose from."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mustdrop import kv
from mustdrop.compat import Span
from mustdrop.indices import on
from mustdrop.runtime.state import Call, Forward


@dataclass(frozen=True)
class LaterTokens:
    """What tokens after the prompt, or from a decode step on, can still see.

    Attributes:
        spans: per decoder layer, its window or chunks, or None.
        end: logical position of the next token.
        padding: (B, 1) long, tokens of padding on the left.
    """

    spans: list[Span | None]
    end: int
    padding: Tensor | int = 0

    @classmethod
    def of(cls, spans: list[Span | None], forward: Forward, call: Call | None) -> LaterTokens:
        """After the prompt of a pass; in a pass without media, its own tokens count. Found once per pass.

        Drafts may be taken back, so the prompt ends before them.
        """
        if forward.later is None:
            end, mask = forward.start, forward.mask
            if forward.media is not None:
                length = None if call is None else call.length
                end += forward.length if length is None else min(length, forward.length)
            padding: Tensor | int = 0
            if isinstance(mask, Tensor) and mask.ndim == 2 and any(span and span.chunked for span in spans):
                padding = (mask.cumsum(1) == 0).sum(1, keepdim=True)
            forward.later = cls(spans, end, padding)
        return forward.later

    def candidates(self, i: int, layer: kv.Slots) -> Tensor:
        """(B, slots) bool, the vision entries of decoder layer `i` that such a token sees; the others are lost."""
        vision, positions = layer.slot_vision(), layer.slot_positions()
        assert vision is not None, "a layer without entries"
        assert positions is not None, "a layer without entries"
        return self.seen_of(i, vision, positions)

    def seen_of(self, i: int, vision: Tensor, positions: Tensor) -> Tensor:
        """As `candidates`, of the entries (B, slots) that are vision tokens, and their positions."""
        span = self.spans[i]
        if span is None:
            return vision
        first = span.reach(self.end, self.padding)
        return vision & (positions >= (on(first, positions.device) if isinstance(first, Tensor) else first))
