"""VisPruner: what the encoder looks at, and of the rest what is no duplicate (arXiv 2412.01818, final version)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field

from mustdrop.method import DEFAULT_KEEP, Method, Recipe
from mustdrop.pruners import Chosen, Features, Read, VisionRule, VisionStagePruner
from mustdrop.pruners.base import Budget
from mustdrop.pruners.compared_features import LAST, STATES, compared
from mustdrop.rules.diversity import without_duplicates
from mustdrop.rules.geometry import Geometry, around_mean, distinctiveness
from mustdrop.rules.scaling import min_max


class ImportantAndDiverse(VisionRule):
    """The most attended features stay; of the others, duplicates leave until the count is met.

    Attributes:
        important: share of what stays that is chosen by attention, in [0, 1].
        geometry: how features are compared. Except for "raw", attention is multiplied with how distinct a feature is,
            both from 0 to 1, as Cen-Prune (arXiv 2608.30263) has it for scores of saliency.
    """

    space: ClassVar[Literal["encoder", "language"]] = "encoder"
    important: float = Field(0.5, ge=0, le=1)
    geometry: Geometry = "raw"

    @property
    def reads(self) -> tuple[Read, ...]:
        """Attention of the layer that features are read from (in LLaVA, 22), and what leaves it if it is compared."""
        return Read(what="attention", **LAST), *(STATES if self.geometry == "standardized" else ())

    def choose(self, seen: Features, count: int | None) -> Chosen:
        """See `VisionRule.choose`."""
        assert count is not None
        attention, values = seen.of(self.reads[0]), compared(seen, self.geometry)
        if self.geometry != "raw":
            attention = min_max(attention) * distinctiveness(values, self.geometry)
        ranked = attention.argsort(dim=1, descending=True, stable=True)
        # a hair above the product: 0.29 * 100 is 28.999999999999996 in floating point and must be 29
        top = int(count * self.important + 1e-9)
        diverse = without_duplicates(around_mean(values, self.geometry), ranked[:, top:], count - top)
        return Chosen(torch.cat([ranked[:, :top], diverse], 1).sort(1).values)


class VisPruner(Recipe):
    """Important tokens by encoder attention, diverse ones by removing duplicates; before the first decoder layer.

    Attributes:
        keep: tokens (int) or share of the prompt's vision tokens, important and diverse together.
        important: share of `keep` that is important.
        geometry: "raw" compares features as they are; "centered" around their mean, and distinct ones count more;
            "standardized" likewise those of the encoder, with channels of equal variance.
    """

    keep: Budget = DEFAULT_KEEP
    important: float = Field(0.5, ge=0, le=1)
    geometry: Geometry = "raw"

    def build(self) -> Method:
        """Only the vision socket is filled."""
        rule = ImportantAndDiverse(important=self.important, geometry=self.geometry)
        return Method(vision=VisionStagePruner(window=None, key_share=0, keep=self.keep, score=rule))
