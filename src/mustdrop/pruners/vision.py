"""Vision stage.

Merge similar neighbours inside the encoder, protect what the encoder finds critical, select to a budget.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from mustdrop.budget import tokens_of
from mustdrop.errors import ConfigError
from mustdrop.pruners.base import Budget, Compat
from mustdrop.pruners.importance import Importance
from mustdrop.pruners.vision_rules import Comparing, Read, VisionRule
from mustdrop.pruners.weighing import ImportanceKnob, importance_of
from mustdrop.rules.baselines import random_scores, uniform_scores
from mustdrop.rules.geometry import around_mean
from mustdrop.rules.ranking import keep_best
from mustdrop.rules.windows import (
    check_window,
    merge_most,
    merge_windows,
    window_count,
    window_index,
    window_similarity,
    window_size,
)
from mustdrop.selection import Selection

Share = Annotated[float, Field(gt=0, le=1)]
Taper = Share | Annotated[tuple[tuple[Share, Share], ...], Field(min_length=1)]


class VisionStagePruner(Comparing):
    """Local spatial merging, a protected key set, and selection inside the vision encoder.

    Source: MustDrop (arXiv 2411.10803), vision encoding stage; defaults are those of the released code.

    Attributes:
        window: side of the merging windows in patches; None merges nothing. Where a feature is made of several patches
            (a 2x2 merger), the side counts features.
        temporal_window: adjacent frames of a video that a merging window spans; 1 merges within frames. Windows over
            several frames merge after the encoder, which sees frames one by one. An image is one frame.
        merge_count: how many windows merge. "budget": the most similar ones, as many as the budget allows, a share of
            them (`merge_share`) at most, which follows from the prompt's shape. "threshold": all whose similarity
            reaches `threshold`, as the paper has it, as far as the budget allows; so it is also without a budget, and
            with compat="released".
        merge_share: share of the windows that merge_count="budget" merges at most, in (0, 1].
        threshold: mean pairwise cosine similarity in [-1, 1] from which a window becomes its mean.
        geometry: how the tokens of a window are compared: "raw" as they are, "centered" around the mean of what the
            encoder sees at once (a picture, a tile, a frame; after the encoder the whole video), "standardized" around
            it and with channels of equal variance. `threshold` is then one of these cosines.
        layer: encoder layer (0-based) after which windows merge; later encoder layers run on fewer tokens.
        inside: whether windows merge inside the encoder, where it can run on fewer tokens; False merges the features
            that it gives, by how similar these are, and the encoder saves nothing.
        select_layer: encoder layer (0-based, negative counts from the end) after which the tokens that are not selected
            leave an encoder of packed patches; what selects is read up to there. None: selected is after the encoder.
        key_share: share of the tokens that is protected (the paper's key set), in [0, 1].
        key_layer: encoder layer whose attention scores the tokens (negative counts from the end): the attention
            that the
            CLS token gives or, in an encoder without CLS, the mean attention that a token receives.
        key_importance: what protects, and what score="attention" selects by: "attention", that of `key_layer`; or in
            its place the likeness with the "question", what is "distinct" from the mean, the folder of a scorer, a
            module, or an `Importance`, each of the features after the encoder.
        keep: tokens that enter the language model at most: int, share of the prompt's vision tokens, "auto" (as many as
            the prefill budget can use; no limit where the prefill stage has no budget), or "rule" (`score` decides).
        taper: with keep="auto", share of the tokens that enter which the last filter of the prefill leaves, in (0, 1];
            or points (budget as a share of the prompt's vision tokens, that share) with straight lines between them;
            None lets in as many as leave a quarter of the budget after it.
        score: what selects when `keep` asks for fewer: "attention", the baselines "random" and "uniform" (a grid), or a
            `VisionRule`, which may also merge.
        seed: seed of score="random".
        compat: "released" reproduces the authors' code: windows per batch, merged windows first; with a `VisionRule`,
            the features in the rule's order. See docs/fidelity.md.

    Raises:
        ConfigError, BudgetError, UnknownKnobError: on construction, see the message.
    """

    window: int | None = Field(3, ge=2)
    temporal_window: int = Field(1, ge=1)
    merge_count: Literal["budget", "threshold"] = "threshold"
    merge_share: Share = 1.0
    threshold: float = Field(0.8, ge=-1, le=1)
    layer: int = Field(0, ge=0)
    inside: bool = True
    select_layer: int | None = None
    key_share: float = Field(0.08, ge=0, le=1)
    key_layer: int = -1
    key_importance: ImportanceKnob = "attention"
    keep: Literal["auto", "rule"] | Budget = "auto"
    taper: Taper | None = None
    score: Literal["attention", "random", "uniform"] | VisionRule = "attention"
    seed: int = 0
    compat: Compat = "paper"

    @model_validator(mode="after")
    def _complete(self) -> VisionStagePruner:
        if self.keep == "rule" and self.rule is None:
            raise ConfigError(
                f'VisionStagePruner(keep="rule") needs a VisionRule that decides, got score={self.score!r}.'
            )
        if self.taper is not None and self.keep != "auto":
            raise ConfigError(
                f'VisionStagePruner.taper={self.taper} splits the budget of the prefill stage: it needs keep="auto", '
                f"got keep={self.keep}: leave one out."
            )
        if self.geometry != "raw" and self.window is None:
            raise ConfigError(
                f'VisionStagePruner.geometry="{self.geometry}" is how the tokens of windows are compared, but '
                "window=None has none: give geometry= to the rule in score=, or leave it out."
            )
        if self.select_layer is not None and self.window is not None and not self.inside:
            raise ConfigError(
                f"VisionStagePruner.select_layer={self.select_layer} selects inside the encoder, and inside=False "
                "merges after it: leave one out, or set window=None."
            )
        if self.key_importance != "attention" and (self.select_layer is not None or self.compat == "released"):
            raise ConfigError(
                f"VisionStagePruner.key_importance={self.key_importance!r} reads features after the encoder: leave "
                f"out select_layer={self.select_layer}, which selects inside, and "
                f'compat="released", which protects by attention.'
            )
        if self.compat == "released" and self.keep != "auto" and self.rule is None:
            raise ConfigError(
                'VisionStagePruner(compat="released") has no budget, because the authors\' code does not select; '
                f"got keep={self.keep}. Leave keep out."
            )
        return self

    @field_validator("taper")
    @classmethod
    def _ascending(cls, taper: Taper | None) -> Taper | None:
        if isinstance(taper, tuple) and any(b[0] <= a[0] for a, b in itertools.pairwise(taper)):
            raise ConfigError(f"VisionStagePruner.taper={taper}: the budgets of its points must ascend.")
        return taper

    def taper_at(self, share: float) -> float | None:
        """`taper` at a budget of `share` of the prompt's vision tokens; beyond its points it stays what it is there."""
        if not isinstance(self.taper, tuple):
            return self.taper
        for (before, low), (after, high) in itertools.pairwise(self.taper):
            if before <= share <= after:
                return low + (high - low) * (share - before) / (after - before)
        return self.taper[0][1] if share < self.taper[0][0] else self.taper[-1][1]

    @property
    def rule(self) -> VisionRule | None:
        """The rule that selects, if `score` is one."""
        return self.score if isinstance(self.score, VisionRule) else None

    @property
    def needs_attention(self) -> bool:
        """Whether encoder attention has to be read: for protecting or for selecting by it."""
        return self._ranks and self.key_importance == "attention"

    @property
    def weighs(self) -> Importance | None:
        """What protects and selects in place of the encoder's attention; None: nothing does."""
        return importance_of(self.key_importance) if self._ranks and self.key_importance != "attention" else None

    @property
    def _ranks(self) -> bool:
        return self.key_share > 0 or (self.score == "attention" and self.selects)

    @property
    def asks(self) -> bool:
        """Whether the words of the question are read."""
        asking = (self.rule, self.weighs)
        return any(one is not None and one.asks for one in asking)

    def bound(self, model: torch.nn.Module) -> VisionStagePruner:
        """The pruner for one model: what comes with a model, such as its scorer, is in it, and folders are loaded."""
        changes: dict[str, object] = {}
        if self.rule is not None and (rule := self.rule.bound(model)) is not self.rule:
            changes["score"] = rule
        if self.weighs is not None and (weighs := self.weighs.bound(model)) is not self.key_importance:
            changes["key_importance"] = weighs
        return self.model_copy(update=changes) if changes else self

    @property
    def importance(self) -> Read:
        """The encoder attention that protects, and that score="attention" selects by."""
        return Read(layer=self.key_layer)

    @property
    def reads(self) -> tuple[Read, ...]:
        """All that is read from the encoder."""
        own: tuple[Read, ...] = (self.importance,) if self.needs_attention else ()
        own += () if self.weighs is None else self.weighs.reads
        return own if self.rule is None else tuple(dict.fromkeys((*own, *self.rule.reads)))

    @property
    def counts_windows(self) -> bool:
        """Whether the number of windows that merge follows from shapes alone, once there is a budget."""
        return self.window is not None and self.merge_count != "threshold" and self.selects

    @property
    def selects(self) -> bool:
        """Whether `keep` can ask for fewer tokens than merging leaves."""
        return self.compat == "paper" or self.rule is not None

    def merge(
        self, features: Tensor, grid: tuple[int, ...], at_least: Tensor | None = None, scale: int = 1
    ) -> Selection:
        """Merge similar windows of one encoder layer's output.

        Args:
            features: (B, N, C), patches in raster order, without CLS.
            grid: (rows, columns) of the patches, or (frames, rows, columns), N in all.
            at_least: (B,) long, tokens that must remain.
            scale: patches per side of what the window counts.

        Returns:
            `Selection` with `merge_into`; `selection.apply(features)` are the M remaining tokens: all of them where the
            grid is smaller than one window (`check` says so).

        Raises:
            ConfigError: the grid does not fit the features.
        """
        if self.window is None:
            return Selection.from_mask(torch.ones(features.shape[:2], dtype=torch.bool, device=features.device))
        return self.merge_by(self.similarity(features, grid, scale), grid, at_least, scale)

    def similarity(self, features: Tensor, grid: tuple[int, ...], scale: int = 1, gone: Tensor | None = None) -> Tensor:
        """(B, windows) float32, how alike the tokens of each window are; arguments as for `merge`.

        Windows in which a token is `gone` (N,) merge under no threshold.
        """
        real = None if gone is None or self.geometry == "raw" else ~gone[None].to(features.device)
        found = window_similarity(around_mean(features, self.geometry, real), grid, self._window(scale))
        if gone is None:
            return found
        windows = window_index(grid, self._window(scale), gone.device)
        return found.masked_fill(gone[windows].any(1).to(found.device), -torch.inf)

    def merge_by(
        self, similarity: Tensor, grid: tuple[int, ...], at_least: Tensor | None = None, scale: int = 1
    ) -> Selection:
        """The second half of `merge`, from what `similarity` found; on the device where that lies."""
        released = self.compat == "released"
        threshold = self.threshold
        if self.counts_windows and at_least is not None:  # the most similar ones merge, however similar they are
            threshold = -math.inf
            lost = self.most_windows(grid, scale) * (self.window_tokens(grid, scale) - 1)
            at_least = at_least.clamp(min=math.prod(grid) - lost)
        return merge_windows(similarity, grid, self._window(scale), threshold, at_least, released=released)

    def merge_most(
        self, similarity: Tensor, grid: tuple[int, ...], counts: Sequence[int], scale: int = 1
    ) -> tuple[Selection, Tensor, Tensor]:
        """As `merge_by`, the most similar windows of each row, as many as `counts` says: see `rules.windows`."""
        return merge_most(similarity, grid, self._window(scale), counts)

    def most_windows(self, grid: tuple[int, ...], scale: int = 1) -> int:
        """How many windows of a grid may merge."""
        return int(window_count(grid, self._window(scale)) * self.merge_share + 1e-9)

    def window_tokens(self, grid: tuple[int, ...], scale: int = 1) -> int:
        """Tokens of each of them."""
        return window_size(grid, self._window(scale))

    def _window(self, scale: int) -> tuple[int, int, int]:
        assert self.window is not None  # asked only where windows merge
        return self.temporal_window, self.window * scale, self.window * scale

    def merges(self, grid: tuple[int, ...]) -> bool:
        """Whether a grid holds a window."""
        return self.window is not None and len(window_index(grid, self._window(1))) > 0

    def check(self, grid: tuple[int, ...], scale: int = 1) -> None:
        """Raise `ConfigError` for a grid that is smaller than one window."""
        if self.window is not None:
            check_window(grid, self._window(scale))

    def select(
        self,
        importance: Tensor,
        alive: Tensor,
        count: Tensor | None = None,
        structural: Tensor | None = None,
        ends: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Select to a budget and protect the key set.

        Args:
            importance: (B, N) encoder attention per token.
            alive: (B, N) bool, tokens that exist (not padding, not merged away).
            count: (B,) long, tokens to keep; None keeps all.
            structural: (B, N) bool, tokens that stand for no part of the picture (line breaks): they stay before all
                others, and are never protected.
            ends: (B, N) bool, tokens that end a prompt and predict what follows: they stay before the structural ones.

        Returns:
            (keep, protected), both (B, N) bool; protected is a subset of keep.
        """
        keep, first = alive, torch.zeros_like(alive) if structural is None else structural
        if count is not None:
            rank = torch.zeros_like(alive, dtype=torch.float32) if ends is None else ends.float()
            keep = keep_best(self.scores(importance), count, alive, first | (rank > 0), rank)
        return keep, self.protect(importance, keep & ~first)

    def protect(self, importance: Tensor, picture: Tensor) -> Tensor:
        """(B, N) bool, the key set among the features `picture` (B, N) that stay and are part of the picture."""
        # a hair below the product: 0.08 * 450 is 36.000000000000004 in floating point and must protect 36
        share = torch.ceil(picture.sum(1) * self.key_share - 1e-9).long()
        return keep_best(importance, share, picture)

    def protected_count(self, picture: int) -> int:
        """How many of so many features of a picture are the key set."""
        return math.ceil(picture * self.key_share - 1e-9)

    def scores(self, importance: Tensor) -> Tensor:
        """(B, N) scores that `select` ranks by, higher stays: `importance` itself, or the random / uniform baseline."""
        if not isinstance(self.score, str):
            raise ConfigError(f"{type(self.score).__name__} is a rule and not a ranking: call it with Features.")
        if self.score == "attention":
            return importance
        n, device = importance.shape[1], importance.device
        row = uniform_scores(n, device) if self.score == "uniform" else random_scores(n, self.seed, device)
        return row.expand_as(importance)

    def __call__(
        self, features: Tensor, importance: Tensor, grid: tuple[int, ...], count: Tensor | None = None
    ) -> tuple[Selection, Tensor]:
        """Merge, select and protect in one step, for a stack of your own that does all at one point.

        Args:
            features: (B, N, C) patches in raster order.
            importance: (B, N) attention that each patch gets from CLS, or receives on average.
            grid: (rows, columns) of the patches, or (frames, rows, columns).
            count: (B,) long, tokens to keep; None keeps what merging leaves. `self.keep` is used if it is a number.

        Returns:
            (selection, protected): the survivors of the N patches, and (B, M) bool, True on the protected ones.
        """
        total = features.shape[1]
        if self.rule is not None:
            raise ConfigError(
                f"{type(self.rule).__name__} reads more than an importance: call it with "
                "Features.of_grid(features, grid, read={...}), or merge() and then the rule."
            )
        if count is None and not isinstance(self.keep, str):
            tokens = math.floor(tokens_of(self.keep, total, "VisionStagePruner.keep", strict=False) + 1e-6)
            count = torch.full((features.shape[0],), tokens, dtype=torch.long, device=features.device)
        merged = self.merge(features, grid, at_least=count)
        alive = merged.mask(total)
        keep, protected = self.select(importance, alive, count)
        slots = Selection.from_mask(keep) if self.compat == "paper" else Selection(merged.keep, merged.valid)
        inherited = slots.assignment(total)
        if merged.merge_into is not None:
            owner = merged.keep.gather(1, merged.merge_into.clamp(min=0))
            inherited = inherited.gather(1, owner)
        return Selection(slots.keep, slots.valid, inherited), protected.gather(1, slots.keep) & slots.valid
