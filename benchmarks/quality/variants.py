"""Compositions beside the registered methods: what was searched for mustdrop+, and what is left of it without a stage.

    python -m benchmarks quality --variants search     # scenes of the split that the model was trained on
    python -m benchmarks quality --variants taper      # the same scenes, larger budgets: what may the filters cost?
    python -m benchmarks quality --variants ablations  # scenes of the selection split

Each writes a result file of its own, and none looks at held-out scenes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import mustdrop
import mustdrop.method
from benchmarks.quality.cells import Cell
from mustdrop import DecodeCachePruner, PrefillPruner, VisionStagePruner
from mustdrop.methods.mustdrop_plus import LAYERS, AttendedAndDiverse, MustDropPlus
from mustdrop.methods.tome import SoftMatching

BUDGETS = {"search": (2 / 9, 1 / 9, 1 / 18), "taper": (1 / 2, 1 / 3, 2 / 9), "ablations": (2 / 9, 1 / 9, 1 / 18)}
SPLITS = {"search": "train", "taper": "train", "ablations": "selection"}
SEEDS = {"search": (2001, 2002), "taper": (2001, 2002), "ablations": (3001, 3002)}

Stages = Mapping[str, Any]


@dataclass(frozen=True)
class Variant(Cell):
    """A cell whose stages are built here; `method` is what its row is called."""

    stages: Callable[[float], Stages] = dict

    def patched(self, model: Any, seed: int) -> AbstractContextManager[Any]:
        """See `Cell.patched`."""
        assert self.keep is not None
        return mustdrop.patched(model, **self.stages(self.keep))


def plan(which: str, budgets: Sequence[float] | None) -> list[Cell]:
    """The cells of a set of variants, after the unpruned model."""
    found = SETS[which]()
    return [
        Cell("none", None),
        *(Variant(name, keep, stages) for name, stages in found.items() for keep in budgets or BUDGETS[which]),
    ]


def search() -> dict[str, Callable[[float], Stages]]:
    """Where the filters lie (of 32 layers), how much each stage leaves to the next, and how the filters choose."""
    grid = list(itertools.product(((4,), (4, 8)), (0.1, 0.2, 0.35, 0.5), (0.3, 0.5), (0.5,)))
    grid += [((4, 12), 0.2, 0.3, 0.5), ((4, 8), 0.2, 0.2, 0.5), ((4, 8), 0.2, 0.3, 0.25), ((4, 8), 0.2, 0.3, 0.8)]
    return {
        f"filters {', '.join(map(str, layers))}; taper {taper:g}; merge {merge:g}; power {power:g}": _with(
            layers, taper, merge, power
        )
        for layers, taper, merge, power in grid
    }


def taper() -> dict[str, Callable[[float], Stages]]:
    """What the last filter leaves of what enters, beside `tome`, which has no filters and costs the least there."""
    grid = [(LAYERS, taper) for taper in (0.2, 0.35, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)]
    grid += [((4, 8), 0.5), ((4, 8), 0.7), ((4,), 0.5), ((4,), 0.7)]
    settings = MustDropPlus()
    found = {
        f"filters {', '.join(map(str, layers))}; taper {taper:g}": _with(layers, taper, settings.merge, settings.power)
        for layers, taper in grid
    }
    return {"tome": _tome} | found


def _tome(keep: float) -> dict[str, Any]:
    method = mustdrop.method.find("tome", keep=keep)
    return {"vision": method.vision, "prefill": method.prefill, "decode": method.decode}


def _with(layers: tuple[int, ...], taper: float, merge: float, power: float) -> Callable[[float], Stages]:
    def stages(keep: float) -> Stages:
        method = MustDropPlus(keep=keep, taper=taper, merge=merge, power=power).build()
        filters = PrefillPruner(paper_layers=layers, keep=keep, score=AttendedAndDiverse(power=power))
        return {"vision": method.vision, "prefill": filters, "decode": method.decode}

    return stages


def ablations() -> dict[str, Callable[[float], Stages]]:
    """mustdrop+ as it is, and with one thing changed."""
    settings = MustDropPlus()

    def filtered(**changes: Any) -> Callable[[float], Stages]:
        filters = {"paper_layers": LAYERS, "score": AttendedAndDiverse(power=settings.power)} | changes
        return lambda keep: _whole(keep) | {"prefill": PrefillPruner(keep=keep, **filters)}

    def entered(**changes: Any) -> Callable[[float], Stages]:
        vision = {"window": None, "key_share": 0, "taper": settings.taper} | changes
        return lambda keep: _whole(keep) | {"vision": VisionStagePruner(**vision)}

    return {
        "mustdrop+": _whole,
        "the encoder alone: merged to the budget, no filter": lambda keep: {
            "vision": VisionStagePruner(window=None, key_share=0, keep=keep, score=SoftMatching(share=settings.merge))
        },
        "nothing merges: encoder attention selects what enters": entered(),
        "windows merge, as in mustdrop": entered(window=3),
        "as many merge in each layer, as in tome": entered(score=SoftMatching()),
        "the filter ranks by dual attention": filtered(score=None),
        "the filter looks at diversity alone": filtered(score=AttendedAndDiverse(power=0)),
        "8 % of the tokens are pinned": entered(key_share=0.08, score=SoftMatching(share=settings.merge)),
        "the cache halves what is left": lambda keep: (
            _whole(keep) | {"decode": DecodeCachePruner(keep=keep / 2, interval=1)}
        ),
    }


def _whole(keep: float) -> dict[str, Any]:
    method = MustDropPlus(keep=keep).build()
    return {"vision": method.vision, "prefill": method.prefill, "decode": method.decode}


SETS: dict[str, Callable[[], dict[str, Callable[[float], Stages]]]] = {
    "search": search,
    "taper": taper,
    "ablations": ablations,
}
