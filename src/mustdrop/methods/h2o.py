"""H2O: highest accumulated attention stays (arXiv 2306.14048)."""

from __future__ import annotations

from pydantic import Field

from mustdrop.method import DEFAULT_KEEP, Method, Recipe
from mustdrop.pruners import AllRows, DecodeCachePruner
from mustdrop.pruners.base import Budget


class H2O(Recipe):
    """Each layer's cache keeps its heavy hitters among the vision entries: accumulated attention of all queries.

    All layers process all tokens of the prompt: the prefill costs what it costs without pruning (and the scores, which
    are as much as its attention), and decode steps and the cache become cheaper.

    Attributes:
        keep: vision entries that stay in the cache of each layer: int, or share of the prompt's vision tokens. The
            layers still process all of them.
        interval: decode steps after which entries leave, so that the attention of generated tokens adds to that of the
            prompt; None: at the end of the prefill.
    """

    keep: Budget = DEFAULT_KEEP
    interval: int | None = Field(None, ge=1)

    def build(self) -> Method:
        """Only the decode socket is filled."""
        if self.interval is None:
            return Method(decode=DecodeCachePruner(keep=self.keep, score=AllRows(), after_prefill=True))
        return Method(decode=DecodeCachePruner(keep=self.keep, score=AllRows(), interval=self.interval))
