"""PyramidDrop: several filters by last-word attention (arXiv 2410.17247)."""

from __future__ import annotations

from mustdrop.errors import ConfigError
from mustdrop.method import DEFAULT_KEEP, Method, Recipe
from mustdrop.pruners import LastRow, PrefillPruner
from mustdrop.pruners.base import Budget

# The last layers of the first three of the paper's four stages, for 32 layers.
LAYERS = (7, 15, 23)


class PyramidDrop(Recipe):
    """Rank vision tokens by the attention of the last prompt token at the end of each stage.

    Attributes:
        keep: average retained tokens per layer, int or share; one third if `ratios` is not given.
        ratios: share of the vision tokens that is left after each stage, in place of `keep`; the paper's are
            (0.5, 0.25, 0.125).
        layers: filter layers; None is (7, 15, 23) of 32, scaled to the model.
    """

    keep: Budget | None = None
    ratios: tuple[float, ...] | None = None
    layers: tuple[int, ...] | None = None

    def build(self) -> Method:
        """Only the prefill socket is filled."""
        if self.ratios is not None and self.keep is not None:
            raise ConfigError(
                f"pyramiddrop takes keep= or ratios=, got keep={self.keep} and ratios={self.ratios}: leave one out."
            )
        return Method(
            prefill=PrefillPruner(
                layers=self.layers,
                paper_layers=LAYERS,
                keep=(DEFAULT_KEEP if self.keep is None else self.keep) if self.ratios is None else None,
                survivors=self.ratios,
                score=LastRow(),
            )
        )
