"""Compositions beside the registered methods: what was searched for mustdrop+, and what is left of it without a stage.

    python -m benchmarks quality --variants search     # scenes of the split that the model was trained on
    python -m benchmarks quality --variants taper      # the same scenes, larger budgets: what may the filters cost?
    python -m benchmarks quality --variants smallest   # more such scenes, smallest budgets: can it be better there?
    python -m benchmarks quality --variants ablations  # scenes of the selection split
    python -m benchmarks quality --variants geometry   # the same: features as they are, centred, and standardized
    python -m benchmarks quality --variants merging    # the same: how many windows merge in mustdrop
    python -m benchmarks quality --variants last_row   # the same: why is fastv behind random?
    python -m benchmarks quality --variants inside --model pages   # held-out: inside a packed encoder, or behind
    python -m benchmarks quality --variants tolerance --model pages   # held-out: what need not be encoded

All are of the first edition of `mustdrop+`. Each writes a result file of its own. None but `inside` and `tolerance`, by
which nothing was chosen, looks at held-out scenes. Sets whose names begin with plus2_ are in
`benchmarks.quality.second`; one of them is a reported run.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import mustdrop
import mustdrop.method
from benchmarks.quality import second
from benchmarks.quality.cells import Cell
from mustdrop import DecodeCachePruner, PrefillPruner, VisionStagePruner
from mustdrop.methods.mustdrop_plus import LAYERS, TAPER, AttendedAndDiverse, MustDropPlus
from mustdrop.methods.tome import SoftMatching
from mustdrop.pruners import LastRow
from mustdrop.pruners.vision import Taper

BUDGETS = {
    "search": (2 / 9, 1 / 9, 1 / 18),
    "taper": (1 / 2, 1 / 3, 2 / 9),
    "smallest": (1 / 9, 1 / 18),
    "ablations": (2 / 9, 1 / 9, 1 / 18),
    "geometry": (2 / 9, 1 / 9, 1 / 18),
    "merging": (1 / 3, 2 / 9, 1 / 9, 1 / 18),
    "last_row": (1 / 2, 1 / 3),
    "inside": (1 / 4, 1 / 9),
    **second.BUDGETS,
}
SPLITS = {
    "search": "train",
    "taper": "train",
    "smallest": "train",
    "ablations": "selection",
    "geometry": "selection",
    "merging": "selection",
    "last_row": "selection",
    "inside": "heldout",
    "tolerance": "heldout",
    **dict.fromkeys(second.SETS, "selection"),
    second.REPORTED: "heldout",
}
SEEDS = {
    "search": (2001, 2002),
    "taper": (2001, 2002),
    "smallest": (2001, 2002, 2003, 2004),
    "ablations": (3001, 3002),
    "geometry": (3001, 3002),
    "merging": (3001, 3002),
    "last_row": (3001,),
    "inside": (6002, 6003),
    "tolerance": (6002, 6003),
}
FREE = ("tolerance",)  # sets of compositions without a budget
PAGES = ("inside", "tolerance")  # sets for an encoder of packed patches
COMPARING = ("divprune", "cdpruner", "scope", "mmr", "vispruner")  # methods that compare features
REFERENCES = {
    "inside": ["mustdrop; windows merge behind", "selected behind", "tome; merges behind"],
    "geometry": [f"{name}; raw" for name in COMPARING],
    "tolerance": [],  # beside the unpruned model alone
}

Stages = Mapping[str, Any]


def seeds(which: str | None, model: str) -> tuple[int, ...]:
    """Of the scenes or samples that a set asks a model about; empty: there is no such set, or it names none."""
    if which in second.SETS:
        return second.seeds(which, model)
    return SEEDS.get(which or "", ())


@dataclass(frozen=True)
class Variant(Cell):
    """A cell whose stages are built here, by its set and by `method`, which is what its row is called.

    It holds names alone, since it goes to other processes.
    """

    which: str = ""

    def patched(self, model: Any, seed: int) -> AbstractContextManager[Any]:
        """See `Cell.patched`."""
        return mustdrop.patched(model, **SETS[self.which]()[self.method](1.0 if self.keep is None else self.keep))


def plan(which: str, budgets: Sequence[float] | None, model: str = "pages") -> list[Cell]:
    """The cells of a set of variants, after the unpruned model; `model` matters in the reported run alone."""
    if which == second.REPORTED:
        own = second.reported()
        runs = [(name, keep) for name, keeps in second.RUNS[model].items() for keep in budgets or keeps]
        return [Cell("none", None), *(Variant(n, k, which) if n in own else Cell(n, k) for n, k in runs)]
    keeps: Sequence[float | None] = (None,) if which in FREE else budgets or BUDGETS[which]
    return [Cell("none", None), *(Variant(name, keep, which) for name in SETS[which]() for keep in keeps)]


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
    return {"tome": _named("tome")} | found


def smallest() -> dict[str, Callable[[float], Stages]]:
    """Single changes to `mustdrop+`, beside the methods that come closest to it."""
    changes: dict[str, dict[str, Any]] = {
        "mustdrop+": {},
        "power 0.25": {"power": 0.25},
        "power 0": {"power": 0.0},
        "filters 4, 16": {"layers": (4, 16)},
        "filters 12": {"layers": (12,)},
        "filters 4, 12, 20": {"layers": (4, 12, 20)},
        "taper 0.15": {"taper": 0.15},
        "taper 0.35": {"taper": 0.35},
        "merge 0.2": {"merge": 0.2},
        "merge 0.15": {"merge": 0.15},
        "merge 0.1": {"merge": 0.1},
        "merge 0.15; power 0": {"merge": 0.15, "power": 0.0},
    }
    rivals = {name: _named(name) for name in ("vscan", "tome", "divprune")}
    return rivals | {name: _with(**({"layers": LAYERS} | change)) for name, change in changes.items()}


def _named(name: str, **knobs: Any) -> Callable[[float], Stages]:
    def stages(keep: float) -> Stages:
        method = mustdrop.method.find(name, keep=keep, **knobs)
        return {"vision": method.vision, "prefill": method.prefill, "decode": method.decode}

    return stages


def _with(
    layers: tuple[int, ...],
    taper: Taper = TAPER,
    merge: float = MustDropPlus().merge,
    power: float = MustDropPlus().power,
) -> Callable[[float], Stages]:
    def stages(keep: float) -> Stages:
        method = MustDropPlus(keep=keep, taper=taper, merge=merge, power=power, behind="merge").build()
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
        "8 % of the tokens are protected": entered(key_share=0.08, score=SoftMatching(share=settings.merge)),
        "the cache halves what is left": lambda keep: (
            _whole(keep) | {"decode": DecodeCachePruner(keep=keep / 2, interval=1)}
        ),
    }


def geometry() -> dict[str, Callable[[float], Stages]]:
    """Methods that compare features, in each of the coordinates in which they can."""
    return {
        f"{name}; {kind}": _named(name, geometry=kind)
        for name in COMPARING
        for kind in ("raw", "centered", "standardized")
    }


def merging() -> dict[str, Callable[[float], Stages]]:
    """How many windows merge in the encoder in `mustdrop`: as the data decide, or as the prompt's shape does."""
    shares = {
        f"windows merge: {share:.3g} at most": _named("mustdrop", merge_share=share) for share in (1 / 4, 3 / 8, 1 / 2)
    }
    return {
        "windows merge: from a similarity on": _named("mustdrop", merge="threshold"),
        **shares,
        "windows merge: all that the budget allows": _named("mustdrop", merge_share=1.0),
        "windows merge: none": _named("mustdrop", window=None),
    }


def last_row() -> dict[str, Callable[[float], Stages]]:
    """One filter by last-token attention, as in `fastv`, after each of the first layers; random tokens beside it.

    `keep` is the share that passes the filter, so that a later one does not have to pass less.
    """

    def after(layer: int) -> Callable[[float], Stages]:
        return lambda keep: {"prefill": PrefillPruner(layers=(layer,), survivors=(keep,), score=LastRow())}

    return {"random": _named("random")} | {f"attention in layer {layer}": after(layer) for layer in range(4)}


def inside() -> dict[str, Callable[[float], Stages]]:
    """Tokens that merge or leave inside a packed encoder of four layers, beside the same rule behind it."""
    attention = {"window": None, "key_share": 0}

    def selected(**knobs: Any) -> Callable[[float], Stages]:
        return lambda keep: {"vision": VisionStagePruner(keep=keep, **attention, **knobs)}

    return {
        "mustdrop; windows merge behind": _named("mustdrop", inside=False),
        "mustdrop; windows merge inside": _named("mustdrop"),
        "selected behind": selected(),
        "selected behind, by layer 1": selected(key_layer=1),
        "selected behind, by layer 2": selected(key_layer=2),
        "selected after layer 1": selected(key_layer=1, select_layer=1),
        "selected after layer 2": selected(key_layer=2, select_layer=2),
        "tome; merges behind": _named("tome"),
        "tome; merges after layer 1": _named("tome", select_layer=1),
    }


def tolerance() -> dict[str, Callable[[float], Stages]]:
    """`pixelprune` on drawn paper, which is not of one colour: how much may patches differ that count as equal?"""

    def predicted(**knobs: Any) -> Callable[[float], Stages]:
        return lambda keep: {"input": mustdrop.method.find("pixelprune", **knobs).input}

    found = {f"tolerance {value:g}": predicted(tolerance=value) for value in (0.0, 0.1, 0.2, 0.3, 0.5)}
    return found | {"tolerance 0.2, each picture alone": predicted(tolerance=0.2, previous=False)}


def _whole(keep: float) -> dict[str, Any]:
    method = MustDropPlus(keep=keep, behind="merge").build()
    return {"vision": method.vision, "prefill": method.prefill, "decode": method.decode}


SETS: dict[str, Callable[[], dict[str, Callable[[float], Stages]]]] = {
    "search": search,
    "taper": taper,
    "smallest": smallest,
    "ablations": ablations,
    "geometry": geometry,
    "merging": merging,
    "last_row": last_row,
    "inside": inside,
    "tolerance": tolerance,
    **second.SETS,
}
