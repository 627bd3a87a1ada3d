"""Compositions that were searched for the second edition of `mustdrop+`, on both bundled models.

    python -m benchmarks quality --variants plus2_why --model pages       # what mustdrop+ loses on pages, and where
    python -m benchmarks quality --variants plus2_single --model pages    # one thing changed at a time
    python -m benchmarks quality --variants plus2_cheaper --model pages   # what would make a packed encoder cheaper
    python -m benchmarks quality --variants plus2_reported --model pages  # held out, once

Samples and scenes are of the selection split, but for the last set. `docs/quality.md` says how one was chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch

import mustdrop.method
from mustdrop import DecodeCachePruner, PrefillPruner, VisionStagePruner
from mustdrop.methods.divprune import MaxMinDiversity
from mustdrop.methods.mmr import MarginalRelevance
from mustdrop.methods.mustdrop_plus import LAYERS, TAPER, AttendedAndDiverse
from mustdrop.methods.scope import AttendedCoverage
from mustdrop.methods.tome import SoftMatching
from mustdrop.methods.vcast import CurvedFrames
from mustdrop.methods.vidcom2 import FrameUniqueness
from mustdrop.pruners import Features, InputPruner, Selection, TextScorer, VisionRule
from mustdrop.pruners.importance import Distinct
from mustdrop.pruners.vision import Taper
from mustdrop.rules.diversity import greedy_determinant
from mustdrop.rules.groups import spread
from mustdrop.rules.scores import min_max_in_groups
from mustdrop.rules.segments import frame_means

Stages = Mapping[str, Any]
Composition = Callable[[float], Stages]
Sets = dict[str, Composition]

#: The set of the reported run, which alone is of held-out samples.
REPORTED = "plus2_reported"
SEEDS = {"scenes": (3101,), "pages": (7001,)}
HELD_OUT_SEEDS = {"scenes": (1008, 1009), "pages": (6002,)}
FIRST = "mustdrop+, first edition"  # called mustdrop+ in the result files of its time

#: What the reported run asks at which budgets: `mustdrop+`, those that were best in the run before it, and baselines.
_HALF, _QUARTER, _SMALL = (1 / 2,), (1 / 4,), (1 / 9, 1 / 18)
RUNS: dict[str, dict[str, tuple[float, ...]]] = {
    "pages": {
        **dict.fromkeys(("mustdrop+", "vcast"), _HALF + _QUARTER + _SMALL),
        FIRST: _QUARTER + _SMALL,
        "vscan": _HALF,
        "vidcom2": _QUARTER,
        "gleanvid": _QUARTER + _SMALL[:1],
        "mustdrop": _SMALL,
        "random": _QUARTER + _SMALL,
        "uniform": _QUARTER,
        "downsample": _QUARTER + _SMALL,
    },
    "scenes": dict.fromkeys(("mustdrop+", FIRST, "vscan", "divprune", "mustdrop", "random"), _SMALL),
}


def seeds(which: str, model: str) -> tuple[int, ...]:
    """Of the samples that a set asks a model about."""
    return (HELD_OUT_SEEDS if which == REPORTED else SEEDS)[model]


def named(name: str, **knobs: Any) -> Composition:
    """A registered method with some of its knobs set."""

    def stages(keep: float) -> Stages:
        method = mustdrop.method.find(name, keep=keep, **knobs)
        return {"vision": method.vision, "prefill": method.prefill, "decode": method.decode}

    return stages


def first() -> Composition:
    """`mustdrop+` as it was: what the encoder's layers cannot merge merges behind it."""
    return named("mustdrop+", behind="merge")


def alone(rule: VisionRule) -> Composition:
    """A rule after the encoder that keeps what the budget allows; no filter."""
    return lambda keep: {"vision": VisionStagePruner(window=None, key_share=0, keep=keep, score=rule)}


def filtered(
    rule: VisionRule | str,
    layers: tuple[int, ...] = LAYERS,
    taper: Taper = TAPER,
    score: TextScorer | None = None,
    **vision: Any,
) -> Composition:
    """A rule after the encoder that lets in more than the budget, and filters that take the rest."""

    def stages(keep: float) -> Stages:
        return {
            "vision": VisionStagePruner(**({"window": None, "key_share": 0, "taper": taper, "score": rule} | vision)),
            "prefill": PrefillPruner(paper_layers=layers, keep=keep, score=score),
            "decode": DecodeCachePruner(interval=8),
        }

    return stages


def why() -> Sets:
    """`mustdrop+` of the first edition, its stages one by one, and the methods that are better on pages."""
    own = AttendedAndDiverse()
    merging = SoftMatching(share=0.3)
    return {
        FIRST: first(),
        **{name: named(name) for name in ("mustdrop", "vcast", "vidcom2", "gleanvid", "tome")},
        "merged after the encoder, no filter": alone(merging),
        "selected as in vcast; filters as in mustdrop+": filtered(CurvedFrames(), score=own),
        "merged; the filters rank by attention": filtered(merging),
        "selected as in vcast; the filters rank by attention": filtered(CurvedFrames()),
        "selected by the attention received; filters as in mustdrop+": filtered("attention", score=own),
    }


class StandsOut(VisionRule):
    """As `CurvedFrames` scores, but picked by a determinant: what stands out of its frame, and differs from the picks.

    Attributes:
        power: of the score; 0 is diversity alone.
    """

    by_view: ClassVar[bool] = False
    power: float = 1.0

    def choose(self, seen: Features, count: int | None) -> Selection:
        """See `VisionRule.choose`."""
        assert count is not None
        means, _ = frame_means(seen.values, seen.frame)
        own = spread(means, seen.frame)
        unlike = 1 - torch.cosine_similarity(seen.values, own, dim=2)
        score = unlike + min_max_in_groups(seen.values.norm(dim=2), seen.frame, means.shape[1])
        quality = (score / score.amax(1, keepdim=True).clamp(min=1e-30)).clamp(min=1e-6) ** self.power
        return Selection.picked(greedy_determinant(seen.values - own, quality, count))


RULES: dict[str, VisionRule] = {
    "vidcom2": FrameUniqueness(),
    "divprune standardized": MaxMinDiversity(geometry="standardized"),
    "scope centered": AttendedCoverage(geometry="centered"),
    "scope centered, no attention": AttendedCoverage(alpha=0, geometry="centered"),
    "mmr distinct": MarginalRelevance(importance=Distinct(), geometry="centered"),
    "mmr attention": MarginalRelevance(geometry="centered"),
    "determinant, power 2": StandsOut(power=2),
    "determinant, power 4": StandsOut(power=4),
}


#: Behind the others on the first 35 questions of stage 2, and not followed any further.
DROPPED = ("divprune standardized", "scope centered", "scope centered, no attention", "mmr distinct", "mmr attention")


def single() -> Sets:
    """From the rule of vcast with the filters of the first edition, one thing changed at a time."""
    vcast, diverse = CurvedFrames(), AttendedAndDiverse()
    found = {"base: vcast's rule; filters of the first edition": filtered(vcast, score=diverse)}
    found |= {f"rule {name}": filtered(rule, score=diverse) for name, rule in RULES.items() if name not in DROPPED}
    found |= {f"power {power:g}": filtered(vcast, score=AttendedAndDiverse(power=power)) for power in (0.25, 1)}
    for layers in ((4,), (4, 12, 20)):
        found[f"filters {', '.join(map(str, layers))}"] = filtered(vcast, layers, score=diverse)
    return found | {f"taper {taper:g}": filtered(vcast, taper=taper, score=diverse) for taper in (0.1, 0.35)}


def cheaper() -> Sets:
    """What would make a packed encoder cheaper, from the composition that stage 2 began with."""
    rule, diverse = CurvedFrames(), AttendedAndDiverse()
    base = filtered(rule, score=diverse)
    windows = {"window": 2, "merge_count": "budget", "merge_share": 0.25}
    return {
        "base": base,
        "what is predictable does not enter the encoder": lambda keep: {**base(keep), "input": InputPruner()},
        "what is not chosen leaves after the third of four layers": filtered(rule, score=diverse, select_layer=2),
        "a quarter of the windows of 2 x 2 merge inside": filtered(rule, score=diverse, **windows),
    }


def reported() -> Sets:
    """All that is asked in the reported run and is no registered method with its defaults."""
    return {FIRST: first()}


SETS: dict[str, Callable[[], Sets]] = {
    "plus2_why": why,
    "plus2_single": single,
    "plus2_cheaper": cheaper,
    REPORTED: reported,
}
BUDGETS = {
    "plus2_why": (1 / 4, 1 / 9, 1 / 18),
    "plus2_single": (1 / 9, 1 / 18),
    "plus2_cheaper": (1 / 4, 1 / 9),
    REPORTED: _QUARTER + _SMALL,
}
