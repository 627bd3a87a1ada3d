"""Prefill stage: at chosen decoder layers, drop the vision tokens that the text does not attend to."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import accumulate

import torch
from pydantic import Field, model_validator
from torch import Tensor

from mustdrop.budget import check_layers, scaled_layers, schedule
from mustdrop.errors import ConfigError
from mustdrop.pruners import answers
from mustdrop.pruners.base import Budget, Compat, Settings
from mustdrop.pruners.recycling import Group, Recycling
from mustdrop.pruners.text_scorers import Seen, TextScorer
from mustdrop.rules.dual_attention import dual_filter, dual_score, dual_statistics, rank_counts, shares
from mustdrop.rules.ranking import keep_best
from mustdrop.selection import Selection

# Filter layers of the released code, for the 32 layers of LLaVA-1.5-7B.
PAPER_LAYERS, PAPER_DEPTH = (2, 6, 10, 14), 32
_NO_HIDDEN = "PrefillPruner(recycle=...) clusters hidden states: call filter() with Seen(hidden=...)."


class PrefillPruner(Settings):
    """Dual-attention filtering between decoder layers.

    A vision token goes only if its global attention (sum over the text tokens) and its individual attention (maximum
    over them) are both low, and it is not protected. How many go is set in one of three ways: a budget (`keep`),
    thresholds,
    or the rank rule (`scale`, `bias`).

    Source: MustDrop (arXiv 2411.10803), prefilling stage; the rank rule is SparseVLM's (arXiv 2410.04417).

    Attributes:
        layers: decoder layers (0-based) whose attention scores and after which tokens leave. None is the paper's
            (2, 6, 10, 14) of 32 layers, scaled to the model's depth.
        keep: average retained tokens per layer: mean over all decoder layers of the vision tokens that a layer
            processes. int or share.
        global_threshold: gamma, in [0, 1]: share of the text's attention to all alive vision tokens.
        individual_threshold: alpha, in [0, 1]: attention probability. Given with `keep`, the two only weigh the ranking
            max(global / gamma, individual / alpha).
        scale: tokens kept per unit of the attention matrix' numerical rank.
        bias: tokens kept on top of scale * rank.
        survivors: tokens left after each filter layer, int or share of those that entered (rounded), in place of
            `keep`. A filter that finds fewer keeps them.
        paper_layers: layers published for a model of 32 layers; where `layers` is None they are scaled to the model.
        score: how tokens are ranked; None is the dual attention.
        recycle: what becomes of the tokens that go; None lets them go.
        compat: "released" renumbers positions after every filter, as the authors' code does. See docs/fidelity.md.

    Raises:
        ConfigError, BudgetError, UnknownKnobError: on construction, see the message.
    """

    layers: tuple[int, ...] | None = None
    keep: Budget | None = None
    global_threshold: float | None = Field(None, ge=0, le=1)
    individual_threshold: float | None = Field(None, ge=0, le=1)
    scale: float | None = Field(None, ge=0)
    bias: float | None = None
    survivors: tuple[Budget, ...] | None = None
    paper_layers: tuple[int, ...] = PAPER_LAYERS
    score: TextScorer | None = None
    recycle: Recycling | None = None
    compat: Compat = "paper"

    @model_validator(mode="after")
    def _complete(self) -> PrefillPruner:
        if (self.global_threshold is None) != (self.individual_threshold is None):
            raise ConfigError(
                "PrefillPruner needs global_threshold and individual_threshold together (a token goes only if both are "
                f"undercut); got global_threshold={self.global_threshold}, "
                f"individual_threshold={self.individual_threshold}."
            )
        if self.survivors is not None and (self.rank or self.keep is not None or self.global_threshold is not None):
            raise ConfigError(
                "PrefillPruner takes one way to set how many: keep, survivors, thresholds, or scale and bias. "
                "Got survivors and another."
            )
        if self.score is not None and self.global_threshold is not None:
            raise ConfigError(
                "thresholds belong to the dual attention: leave score out, or global_threshold and "
                "individual_threshold."
            )
        if self.rank and (self.keep is not None or self.global_threshold is not None):
            raise ConfigError(
                "PrefillPruner takes one way to set how many: keep, thresholds, or scale and bias. "
                "Got scale/bias and another."
            )
        if not self.rank and self.survivors is None and self.keep is None and self.global_threshold is None:
            raise ConfigError(
                "PrefillPruner needs one way to set how many tokens go: keep=..., global_threshold= and "
                "individual_threshold=, or scale= and bias=."
            )
        if self.compat == "released" and self.keep is not None:
            raise ConfigError(
                'compat="released" has no budget, because the authors\' code does not have one: give '
                f"global_threshold= and individual_threshold=, or scale= and bias=. Got keep={self.keep}."
            )
        if self.keep is not None and 0 in (self.global_threshold, self.individual_threshold):
            raise ConfigError(
                "thresholds given with keep weigh the ranking max(global/gamma, individual/alpha) and must be above 0."
            )
        if self.layers is not None and not self.layers:
            raise ConfigError("PrefillPruner.layers=() filters nowhere; leave the prefill pruner out instead.")
        return self

    @property
    def rank(self) -> bool:
        """Whether the rank rule sets how many tokens stay."""
        return self.scale is not None or self.bias is not None

    def filter_layers(self, n_layers: int) -> tuple[int, ...]:
        """The filter layers in a model of `n_layers` decoder layers.

        Raises:
            ConfigError: a layer outside the model.
        """
        layers = scaled_layers(self.paper_layers, PAPER_DEPTH, n_layers) if self.layers is None else self.layers
        check_layers(layers, n_layers, "PrefillPruner.layers")
        if self.survivors is not None and len(self.survivors) != len(layers):
            raise ConfigError(
                f"PrefillPruner.survivors has {len(self.survivors)} entries, and there are filters after layers "
                f"{layers}: give one entry per filter, or layers=."
            )
        return layers

    def left(self, entering: int) -> tuple[int, ...]:
        """Tokens after each filter by `survivors`, of `entering` tokens; never more than the filter before left."""
        asked = [round(s * entering) if isinstance(s, float) else s for s in self.survivors or ()]
        return tuple(max(1, n) for n in accumulate(asked, min, initial=entering))[1:]

    def counts(self, total: int, n_layers: int) -> tuple[int, ...]:
        """Survivors after each filter layer for `total` vision tokens under `keep` (see `mustdrop.budget.schedule`)."""
        if self.keep is None:
            raise ConfigError("PrefillPruner.counts needs keep=...: with thresholds or the rank rule the data decide.")
        return schedule(total, n_layers, self.filter_layers(n_layers), self.keep)

    def __call__(
        self,
        attention: Tensor,
        alive: Tensor | None = None,
        *,
        count: Tensor | int | None = None,
        protected: Tensor | None = None,
        importance: Tensor | None = None,
    ) -> Selection:
        """Choose the vision tokens that stay after one filter layer.

        Args:
            attention: (B, T, N) softmax probability, averaged over heads, that text token t gives to vision token n.
            alive: (B, N) bool, candidates; all if None.
            count: tokens to keep, (B,) long or one int for all rows: `counts(...)[k]` at the k-th filter. Needed
                with `keep`.
            protected: (B, N) bool, tokens that are not dropped (unless `count` is smaller than their number).
            importance: (B, N), orders protected tokens among themselves.

        Returns:
            `Selection` over the N tokens, ascending.

        Raises:
            ConfigError: `count` is missing in budget mode, or shapes do not fit.
        """
        if attention.ndim != 3:
            raise ConfigError(
                f"attention must be (batch, text tokens, vision tokens), got shape {tuple(attention.shape)}."
            )
        if alive is None:
            alive = attention.new_ones(attention.shape[0], attention.shape[2], dtype=torch.bool)
        return self.filter(Seen(attention, alive), count=count, protected=protected, importance=importance)

    @property
    def needs_rows(self) -> bool:
        """Whether the pruner must see the attention of each text token; if not, `from_statistics` will do."""
        plain = self.score is None and self.recycle is None and not self.rank
        return not plain or type(self).__call__ is not PrefillPruner.__call__

    def from_statistics(
        self,
        statistics: Tensor,
        alive: Tensor,
        *,
        count: Tensor | int | None = None,
        protected: Tensor | None = None,
        importance: Tensor | None = None,
    ) -> Selection:
        """What a call with the whole attention chooses, from its sum and maximum over the text tokens.

        Args:
            statistics: (B, 2, N) from `mustdrop.kernels.text_statistics`.
            alive: (B, N) bool, candidates.
            count: (B,) long or a number, tokens that stay.
            protected: (B, N) bool, tokens that come before all others, or None.
            importance: (B, N), orders the protected ones among themselves, or None.

        Returns:
            `Selection` over the N tokens, ascending.

        Raises:
            ConfigError: the rank rule, a scorer or recycling needs the whole attention; or `count` is missing in
                budget mode.
        """
        if self.rank or self.score is not None or self.recycle is not None:
            raise ConfigError(
                "PrefillPruner with the rank rule, a scorer or recycling needs the attention of every text token: "
                "call it."
            )
        return self._dual(shares(statistics, alive), alive, count, protected, importance)

    def _dual(
        self,
        statistics: tuple[Tensor, Tensor],
        alive: Tensor,
        count: Tensor | int | None,
        protected: Tensor | None,
        importance: Tensor | None,
    ) -> Selection:
        """Dual attention, by thresholds or by a count."""
        if self.keep is None and self.survivors is None and not self.rank:
            stay = dual_filter(statistics, alive, self.global_threshold or 0.0, self.individual_threshold or 0.0)
            return Selection.from_mask(stay if protected is None else stay | (protected & alive))
        score = dual_score(statistics, self.global_threshold or 1.0, self.individual_threshold or 1.0)
        return Selection.from_mask(keep_best(score, _wanted(count, alive), alive, protected, importance))

    def filter(
        self,
        seen: Seen,
        *,
        count: Tensor | int | None = None,
        protected: Tensor | None = None,
        importance: Tensor | None = None,
    ) -> Selection:
        """As the call, with all that a scorer may read.

        Args:
            seen: what the layer knows; `hidden` is needed with `recycle`.
            count: see the call.
            protected: see the call.
            importance: see the call.

        Returns:
            `Selection` over the n tokens; with `recycle`, its `merge_into` says which tokens became a cluster.

        Raises:
            ConfigError: `count` is missing where there is a budget, or `seen` lacks what is read.
        """
        if self.rank:
            count = rank_counts(seen.attention, seen.alive, 1.0 if self.scale is None else self.scale, self.bias or 0.0)
        if self.score is None and self.recycle is None:
            return self._dual(dual_statistics(seen.attention, seen.alive), seen.alive, count, protected, importance)
        wanted = _wanted(count, seen.alive)
        if self.recycle is None:
            return Selection.from_mask(self.stays(seen, wanted, protected=protected, importance=importance))
        return self._recycled(seen, wanted, protected, importance)

    def stays(
        self, seen: Seen, count: Tensor, *, protected: Tensor | None = None, importance: Tensor | None = None
    ) -> Tensor:
        """(B, n) bool, the vision tokens that stay where `count` (B,) of each row do; arguments as for `filter`."""
        if self.score is not None:
            return answers.stays(self.score, seen, count=count, protected=protected, importance=importance)
        return keep_best(self._score(seen), count, seen.alive, protected, importance)

    def joined(
        self,
        seen: Seen,
        count: Tensor,
        groups: Sequence[Group],
        *,
        protected: Tensor | None = None,
        importance: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `filter` with `keep` and `recycle`, where it is known how many of each row do what; nothing waits.

        Args:
            seen: what the layer knows, with `hidden`.
            count: (B,) long, tokens that stay as they are (see `Recycling.plan`).
            groups: what is recycled (see `mustdrop.pruners.recycling.groups`).
            protected: see the call.
            importance: see the call.

        Returns:
            (B, n) bool, the vision tokens that stay, and those that stand for clusters; (B, n) long, the token that
            each one becomes part of (see `Recycling.join`).
        """
        if self.recycle is None or seen.hidden is None:
            raise ConfigError(_NO_HIDDEN)
        keep = self.stays(seen, count, protected=protected, importance=importance)
        score = self._score(seen) if self.score is None else answers.scores(self.score, seen)
        into = self.recycle.join(keep, seen.alive, score, seen.hidden, groups)
        return keep | (into == torch.arange(into.shape[1], dtype=torch.long, device=into.device)), into

    def _score(self, seen: Seen) -> Tensor:
        """(B, n) dual attention."""
        statistics = dual_statistics(seen.attention, seen.alive)
        return dual_score(statistics, self.global_threshold or 1.0, self.individual_threshold or 1.0)

    def _recycled(self, seen: Seen, wanted: Tensor, protected: Tensor | None, importance: Tensor | None) -> Selection:
        """What stays, and clusters of what does not."""
        if self.recycle is None or seen.hidden is None:
            raise ConfigError(_NO_HIDDEN)
        alive, choose = seen.alive, partial(self.stays, seen, protected=protected, importance=importance)
        score = self._score(seen) if self.score is None else answers.scores(self.score, seen)
        kept = wanted
        if self.keep is not None:
            room = [self.recycle.kept(*pair) for pair in zip(alive.sum(1).tolist(), wanted.tolist(), strict=True)]
            kept = torch.tensor(room, dtype=torch.long, device=wanted.device)
        # no room for a token and a cluster: those rows keep what they may, and recycle nothing
        crowded = (kept == 0)[:, None]
        keep = torch.where(crowded, choose(count=wanted), choose(count=kept))
        return self.recycle(keep, alive & (keep | ~crowded), score, seen.hidden, self.compat == "released")


def _wanted(count: Tensor | int | None, alive: Tensor) -> Tensor:
    """(B,) long."""
    if count is None:
        raise ConfigError(
            "PrefillPruner(keep=...) called without count: pass counts(total, n_layers)[k] at the k-th filter layer."
        )
    return torch.as_tensor(count, dtype=torch.long, device=alive.device).expand(len(alive))


def needs_rows(pruner: object) -> bool:
    """Whether a pruner must see the attention of each text token: true of any that does not say otherwise."""
    return bool(getattr(pruner, "needs_rows", True))
