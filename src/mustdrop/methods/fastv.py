"""FastV: one filter by last-token attention (arXiv 2403.06764)."""

from __future__ import annotations

from pydantic import Field

from mustdrop.errors import ConfigError
from mustdrop.method import DEFAULT_KEEP, Method, Recipe
from mustdrop.pruners import LastRow, PrefillPruner
from mustdrop.pruners.base import Budget, Compat


class FastV(Recipe):
    """Rank vision tokens by the attention of the last prompt token in layer K - 1, and drop before layer K.

    Attributes:
        keep: average retained tokens per layer, int or share; one third if `ratio` is not given.
        layer: K, the first layer that runs on fewer tokens (the paper's headline is 2).
        ratio: R, the share of vision tokens that is dropped (the paper's is 0.5), in place of `keep`.
        compat: "released" sets the number by `ratio` alone, as the authors' code does.
    """

    keep: Budget | None = None
    layer: int = Field(2, ge=1)
    ratio: float | None = Field(None, ge=0, lt=1)
    compat: Compat = "paper"

    def build(self) -> Method:
        """Only the prefill socket is filled."""
        ratio = 0.5 if self.ratio is None and self.compat == "released" else self.ratio
        if ratio is not None and self.keep is not None:
            raise ConfigError(
                f'fastv takes keep= or ratio= (compat="released" means ratio=0.5), got keep={self.keep} and '
                f"ratio={ratio}: leave one out."
            )
        # positions stay in the released code too, so nothing is renumbered
        return Method(
            prefill=PrefillPruner(
                layers=(self.layer - 1,),
                keep=(DEFAULT_KEEP if self.keep is None else self.keep) if ratio is None else None,
                survivors=None if ratio is None else (float(1 - ratio),),
                score=LastRow(),
            )
        )
