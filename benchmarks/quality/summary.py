"""From the journal's lines to the result file: a row per model and cell, and differences on the same questions."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.common import significant
from benchmarks.quality.cells import Cell
from benchmarks.quality.intervals import Array, difference, interval
from mustdrop.eval.report.paired import groups, paired
from mustdrop.registry import registry

MEASURES = ("correct", "loglik", "kl", "agreement", "same")
PER_ANSWER = ("prompt", "length", "flops", "flops_unpruned")
COSTS = ("equal_tokens", "equal_share", "flops", "kv")
DOWNSAMPLED = "downsample"  # the method whose rows divide the questions into the groups of VTC-Bench

Row = dict[str, Any]
Key = tuple[str, str, float | None]  # model, method, budget


@dataclass(frozen=True)
class Asked:
    """The answers of one cell, question by question, in an order that is the same for all cells.

    Attributes:
        types: of each question.
        scene: number of the scene that it is about.
        numbers: measure -> a number for each question.
    """

    types: NDArray[np.str_]
    scene: NDArray[np.int64]
    numbers: dict[str, Array]

    def of(self, names: Collection[str]) -> Asked:
        """The questions of some types."""
        chosen = np.isin(self.types, list(names))
        return Asked(self.types[chosen], self.scene[chosen], {k: v[chosen] for k, v in self.numbers.items()})

    def interval(self, measure: str) -> dict[str, float]:
        """Mean and interval of a measure."""
        return interval(self.numbers[measure], self.scene)

    @property
    def right(self) -> list[bool]:
        """Whether each answer is right."""
        return [bool(value) for value in self.numbers["correct"]]


def summary(
    lines: Sequence[Mapping[str, Any]],
    found: Iterable[Cell],
    references: Sequence[str],
    abilities: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Rows of all cells, and the references against every other method at the same budget.

    Args:
        lines: of the journal.
        found: the cells.
        references: methods that the others are compared with.
        abilities: type of question -> the ability that it asks for.
    """
    rows: list[Row] = []
    asked: dict[Key, Asked] = {}
    for model in dict.fromkeys(line["model"] for line in lines):
        for cell in found:
            own = [x for x in lines if (x["model"], x["method"], x["keep"]) == (model, *cell.key)]
            row, answers = _row(own, abilities or {})
            recipe = registry().get(cell.method)  # none for a composition
            trained = {"trained": True} if recipe is not None and recipe.trained else {}
            rows.append({"model": model, "method": cell.method, "keep": cell.key[1], **trained} | row)
            if answers is not None:
                asked[(model, *cell.key)] = answers
    for row in rows:
        row |= _beside(row, asked)
    costs = {(row["model"], row["method"], row["keep"]): row for row in rows}
    return {"rows": rows, "differences": [d for name in references for d in differences(name, asked, costs)]}


def _row(own: Sequence[Mapping[str, Any]], abilities: Mapping[str, str]) -> tuple[Row, Asked | None]:
    """Numbers of one cell, or the reason why there are none: a mean over what was not refused would flatter."""
    refused = [line["cannot"] for line in own if "cannot" in line]
    if refused:
        return {"cannot": refused[0], "refused_batches": f"{len(refused)} of {len(own)}"}, None
    if not own:
        return {"cannot": "not measured yet"}, None
    lines = sorted(own, key=lambda line: str(line["batch"]))  # one order for all cells: questions are compared in pairs
    asked = _asked(lines)
    measures = [name for name in MEASURES if name in asked.numbers]
    number = [line["scenes"] for line in lines]
    costs = {name: significant(np.average([line[name] for line in lines], weights=number)) for name in COSTS}
    kinds = {kind: asked.of([kind]) for kind in dict.fromkeys(asked.types.tolist())}
    of_ability = {name: asked.of([k for k in kinds if abilities.get(k) == name]) for name in abilities.values()}
    row = {
        "scenes": sum(number),
        "questions": len(asked.types),
        **costs,
        "most_equal_tokens": significant(max(line["most_equal_tokens"] for line in lines)),
        "seconds": round(sum(line["seconds"] for line in lines), 2),
        **{name: asked.interval(name) for name in measures},
        "answer": _answer(asked),
        "types": {
            kind: {name: own.interval(name) for name in ("correct", "loglik", "agreement") if name in own.numbers}
            for kind, own in kinds.items()
        },
        "abilities": {
            name: {"questions": len(own.types)}
            | {what: own.interval(what) for what in ("correct", "same") if what in own.numbers}
            for name, own in of_ability.items()
            if len(own.types)
        },
    }
    return row, asked


def _asked(lines: Sequence[Mapping[str, Any]]) -> Asked:
    """The answers of all batches, put together by type and batch."""
    kinds = list(dict.fromkeys(kind for line in lines for kind in line["answers"]))
    types, scene, numbers = [], [], []
    start = 0
    for line in lines:
        for kind in kinds:
            own = line["answers"].get(kind)
            if own is not None:
                count = len(own["kl"])
                types += [kind] * count
                scene += [start + place for place in own.get("scene", range(count))]
                numbers.append({name: values for name, values in own.items() if name != "scene"})
        start += line["scenes"]
    names = [name for name in (*MEASURES, *PER_ANSWER) if all(name in own for own in numbers)]
    whole = {name: np.concatenate([np.asarray(own[name], dtype=np.float64) for own in numbers]) for name in names}
    return Asked(np.asarray(types), np.asarray(scene, dtype=np.int64), whole)


def _answer(asked: Asked) -> Row:
    """What a whole answer costs: tokens of the prompt in a decoder layer, tokens written, FLOPs; means."""
    numbers = asked.numbers
    if not all(name in numbers for name in PER_ANSWER):
        return {}
    return {
        "prompt_tokens": significant(numbers["prompt"].mean()),
        "tokens": significant(numbers["length"].mean()),
        "flops": significant(numbers["flops"].mean()),
        "flops_ratio": significant(numbers["flops"].sum() / numbers["flops_unpruned"].sum()),
    }


def _beside(row: Row, asked: Mapping[Key, Asked]) -> Row:
    """A row beside the unpruned one, and on the two groups of VTC-Bench; empty where a cell is missing."""
    own = asked.get((row["model"], row["method"], row["keep"]))
    whole = asked.get((row["model"], "none", None))
    if own is None or whole is None or own is whole or "correct" not in own.numbers:
        return {}
    found: Row = {"against_unpruned": _apart(own, whole)}
    small = asked.get((row["model"], DOWNSAMPLED, row["keep"]))
    if small is not None:
        divided = groups(own.right, whole.right, small.right)
        found["vtc"] = asdict(divided) | dict(zip(("hard_share", "easy_share"), divided.shares, strict=True))
    return found


def _apart(one: Asked, other: Asked) -> Row:
    """Difference in accuracy on the same questions, with its interval and the exact test."""
    apart = difference(one.numbers["correct"], other.numbers["correct"], one.scene)
    return {"correct": apart, "mcnemar": paired(one.right, other.right).to_dict()}


def differences(reference: str, asked: Mapping[Key, Asked], costs: Mapping[Key, Row]) -> list[Row]:
    """The reference minus each other method, on the same questions; positive accuracy: the reference is better."""
    out = []
    for (model, method, keep), own in asked.items():
        ours = asked.get((model, reference, keep))
        if method == reference or ours is None:
            continue
        shared = [name for name in MEASURES if name in own.numbers and name in ours.numbers]
        apart: Row = {name: difference(ours.numbers[name], own.numbers[name], own.scene) for name in shared}
        if "correct" in apart:
            apart["mcnemar"] = paired(ours.right, own.right).to_dict()
        ends = costs[model, reference, keep], costs[model, method, keep]
        cost = {name: significant(ends[0][name] - ends[1][name]) for name in COSTS}
        row = {"model": model, "reference": reference, "method": method, "keep": keep}
        out.append(row | apart | {"cost": cost})
    return out


def show(result: Mapping[str, Any]) -> None:
    """Print the rows."""
    table = Table(title=f"Quality, split {result.get('split', 'none')}", title_justify="left")
    for header in ("model", "method", "keep", "equal", "FLOPs", "KV", "accuracy", "log-lik.", "KL", "agreement"):
        table.add_column(header)
    for row in result["rows"]:
        keep = "all" if row["keep"] is None else f"{row['keep']:.1%}"
        if "cannot" in row:
            table.add_row(row["model"], row["method"], keep, "cannot: " + row["cannot"].split(":")[0])
            continue
        numbers = [f"{row['equal_share']:.1%}", f"{row['flops']:.1%}", f"{row['kv']:.1%}"]
        shown = [
            f"{row[name]['mean']:.3f} ({row[name]['low']:.3f} to {row[name]['high']:.3f})" if name in row else ""
            for name in ("correct", "loglik", "kl", "agreement")
        ]
        table.add_row(row["model"], row["method"], keep, *numbers, *shown)
    Console(width=160).print(table)
    for row in result["differences"]:
        name = "correct" if "correct" in row else "agreement"
        apart, budget = row[name], "" if row["keep"] is None else f" at {row['keep']:.1%}"
        print(
            f"{row['model']}: {row['reference']} - {row['method']}{budget}: {name} {apart['mean']:+.3f} "
            f"({apart['low']:+.3f} to {apart['high']:+.3f})"
            + (f", McNemar p {row['mcnemar']['p']:.3g}" if "mcnemar" in row else "")
        )
