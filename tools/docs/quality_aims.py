"""Quality on both bundled models in a few rows, and what was aimed at with `mustdrop+`: a table and three verdicts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from quality_pages_table import LEVEL, OWN, over_budget

MODELS = {"quality": "scenes", "quality_pages": "pages"}  # result file -> what is asked
DEFAULT = "mustdrop"  # what `patch` takes when no method is named
SMALL = 0.12  # budgets up to this are the small ones
QUARTER, WANTED = 0.25, 0.95  # on pages: this share of the unpruned accuracy, at this budget
SAME = 1e-9

Table = Callable[..., str]
Record = Mapping[str, Any]


def render(results: Mapping[str, Record], table: Table) -> str:
    """For each model and budget the best other method at no more FLOPs, then each aim: met, or by how much not."""
    lines, beaten, leads = [], [], []
    for name, asked in ((n, a) for n, a in MODELS.items() if n in results):
        for keep, own, others in _budgets(results[name]):
            rivals = [row for row in others if row["cost"]["flops"] >= -SAME]
            better = [row for row in rivals if _sign(row) < 0]
            beaten += [f"{asked}, {keep:.0%}: {_against(row)}" for row in better]
            if rivals and keep <= SMALL:
                leads.append((f"{asked}, {keep:.0%}", _best(rivals)))
            cells = [asked, f"{keep:.0%}", _score(own), f"{own['flops']:.0%}", str(len(rivals))]
            lines.append([*cells, _beside(rivals), _beside(others, cost=True)])
    header = ["model", "`keep`", "`mustdrop+`", "its FLOPs", "others at no more", "against the best of these"]
    header.append("against the best at any FLOPs")
    return (
        table(header, lines)
        + "\n\n"
        + "\n".join([_never(beaten, [MODELS[n] for n in MODELS if n in results]), _ahead(leads), _quarter(results)])
    )


def short(results: Mapping[str, Record], table: Table) -> str:
    """For each model and budget: the default method, `mustdrop+`, the best of the others, and two baselines."""
    lines = []
    for name, asked in ((n, a) for n, a in MODELS.items() if n in results):
        rows = {(row["method"], row["keep"]): row for row in results[name]["rows"] if "cannot" not in row}
        for keep, own, others in _budgets(results[name]):
            signs = [_sign(row) for row in others]
            rest = {row["method"]: row["accuracy"] for row in others if row["method"] != DEFAULT}
            best = [method for method in sorted(rest) if rest[method] == max(rest.values())]
            cells = [asked, f"{keep:.0%}", _score(rows["none", None]), _score(rows[DEFAULT, keep]), _score(own)]
            cells.append(f"{max(rest.values()):.3f} ({', '.join(f'`{method}`' for method in best)})")
            cells += [_score(rows[method, keep]) for method in ("downsample", "random")]
            lines.append([*cells, " / ".join(str(signs.count(sign)) for sign in (1, 0, -1))])
    header = ["model", "kept", "unpruned", f"`{DEFAULT}`", f"`{OWN}`", "best of the others", "`downsample`", "`random`"]
    return table([*header, f"`{OWN}` is better / level / worse"], lines)


def _budgets(record: Record) -> list[tuple[float, Record, list[Record]]]:
    """(budget, row of mustdrop+, its differences from the others that keep the budget), largest budget first."""
    rows = {(row["method"], row["keep"]): row for row in record["rows"] if "cannot" not in row}
    found: list[tuple[float, Record, list[Record]]] = []
    for keep in sorted({keep for name, keep in rows if name == OWN}, reverse=True):
        own = rows[OWN, keep]
        rivals: list[Record] = [
            {**row, "accuracy": rows[row["method"], keep]["correct"]["mean"]}
            for row in record["differences"]
            if (row["reference"], row["keep"]) == (OWN, keep) and _rival(rows[row["method"], keep])
        ]
        found.append((keep, own, rivals))
    return found


def _rival(row: Record) -> bool:
    """Whether a method is one that needs no training and keeps the budget."""
    return not row.get("trained") and not over_budget(row)


def _beside(rows: Sequence[Record], cost: bool = False) -> str:
    """The best of some methods: who it is, points apart, p and, if asked for, how many FLOPs apart."""
    if not rows:
        return ""
    best = _best(rows)
    more = f", FLOPs {best['cost']['flops']:+.1%}" if cost else ""
    return f"`{best['method']}`: {_points(best)} points, p {_p(best)}{more}"


def _best(rivals: Sequence[Record]) -> Record:
    return max(rivals, key=lambda row: (row["accuracy"], row["mcnemar"]["p"]))  # of equals, the one harder to beat


def _sign(row: Record) -> int:
    """1: mustdrop+ is significantly better; -1: it is worse; 0: no difference is shown."""
    test = row["mcnemar"]
    if test["p"] > LEVEL:
        return 0
    return 1 if test["gained"] > test["lost"] else -1


def _never(beaten: Sequence[str], asked: Sequence[str]) -> str:
    on = "both models" if len(asked) == len(MODELS) else f"{asked[0]} (the other model's run is not whole yet)"
    text = f"- **No method better at equal or fewer FLOPs, at any budget, on {on}** (exact McNemar, 5 %): "
    return text + ("**met**." if not beaten else f"**missed**: {'; '.join(beaten)}.")


def _ahead(leads: Sequence[tuple[str, Record]]) -> str:
    """On one model at least, at both small budgets."""
    text = "- **Significantly better than the best other at no more FLOPs, at 11 and 6 %, on one model at least**: "
    names = [where.partition(",")[0] for where, row in leads if _sign(row) > 0]
    met = any(names.count(model) == sum(where.startswith(model) for where, _ in leads) for model in names)
    each = "; ".join(f"{where}: {_against(row)}" for where, row in leads)
    return text + ("**met**" if met else "**missed**") + f". {each}."


def _quarter(results: Mapping[str, Record]) -> str:
    rows = results["quality_pages"]["rows"]
    (whole,) = (row["correct"]["mean"] for row in rows if row["method"] == "none")
    (own,) = (row["correct"]["mean"] for row in rows if (row["method"], row["keep"]) == (OWN, QUARTER))
    return (
        f"- **{WANTED:.0%} of the unpruned accuracy on pages, at a quarter of the tokens**: "
        f"{'**met**' if own >= WANTED * whole else '**missed**'}: {own:.3f} of {whole:.3f} are {own / whole:.1%}."
    )


def _against(row: Record) -> str:
    return f"{_points(row)} points against `{row['method']}`, p {_p(row)}"


def _points(row: Record) -> str:
    return f"{100 * row['correct']['mean']:+.1f}"


def _p(row: Record) -> str:
    return f"{row['mcnemar']['p']:.2g}"


def _score(row: Record) -> str:
    return f"{row['correct']['mean']:.3f}"
