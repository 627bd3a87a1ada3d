"""SnapKV: highest attention of the last words (arXiv 2404.14469)."""

from __future__ import annotations

from pydantic import Field

from mustdrop.method import DEFAULT_KEEP, Method, Recipe
from mustdrop.pruners import DecodeCachePruner, ObservationWindow
from mustdrop.pruners.base import Budget


class SnapKV(Recipe):
    """At the end of the prefill each layer's cache keeps the vision entries that an observation window attends to.

    All layers process all tokens of the prompt: the prefill costs what it costs without pruning (and the scores), and
    decode steps and the cache become cheaper.

    Attributes:
        keep: vision entries that stay in the cache of each layer: int, or share of the prompt's vision tokens. The
            layers still process all of them.
        window: rows of text that score, from the last one on; None is all text after the last image.
        kernel: entries over which scores are averaged.
    """

    keep: Budget = DEFAULT_KEEP
    window: int | None = Field(None, ge=1)
    kernel: int = Field(5, ge=1)

    def build(self) -> Method:
        """Only the decode socket is filled."""
        score = ObservationWindow(window=self.window, kernel=self.kernel)
        return Method(decode=DecodeCachePruner(keep=self.keep, score=score, after_prefill=True))
