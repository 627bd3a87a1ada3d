"""VisPruner: what the encoder looks at, and of the rest what is no duplicate (arXiv 2412.01818, final version)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field

from mustdrop.method import DEFAULT_KEEP, Method, Recipe
from mustdrop.pruners import Chosen, Features, Read, VisionRule, VisionStagePruner
from mustdrop.pruners.base import Budget
from mustdrop.rules.diversity import without_duplicates


class ImportantAndDiverse(VisionRule):
    """The most attended features stay; of the others, duplicates leave until the count is met.

    Attributes:
        important: share of what stays that is chosen by attention, in [0, 1].
    """

    space: ClassVar[Literal["encoder", "language"]] = "encoder"
    important: float = Field(0.5, ge=0, le=1)

    @property
    def reads(self) -> tuple[Read, ...]:
        """Attention of the layer that features are read from: in LLaVA, layer 22."""
        return (Read(what="attention", layer=22, of=23),)

    def choose(self, seen: Features, count: int | None) -> Chosen:
        """See `VisionRule.choose`."""
        assert count is not None
        attention = seen.of(self.reads[0])
        ranked = attention.argsort(dim=1, descending=True, stable=True)
        # a hair above the product: 0.29 * 100 is 28.999999999999996 in floating point and must be 29
        top = int(count * self.important + 1e-9)
        diverse = without_duplicates(seen.values, ranked[:, top:], count - top)
        return Chosen(torch.cat([ranked[:, :top], diverse], 1).sort(1).values)


class VisPruner(Recipe):
    """Important tokens by encoder attention, diverse ones by removing duplicates; before the first decoder layer.

    Attributes:
        keep: tokens (int) or share of the prompt's vision tokens, important and diverse together.
        important: share of `keep` that is important.
    """

    keep: Budget = DEFAULT_KEEP
    important: float = Field(0.5, ge=0, le=1)

    def build(self) -> Method:
        """Only the vision socket is filled."""
        rule = ImportantAndDiverse(important=self.important)
        return Method(vision=VisionStagePruner(window=None, key_share=0, keep=self.keep, score=rule))
