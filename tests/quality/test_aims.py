"""The verdicts on what was aimed at with mustdrop+ follow from the result files."""

from __future__ import annotations

import pytest

import generate
import quality_aims

KEEPS = (1 / 2, 1 / 4, 1 / 9, 1 / 18)


def record(others, own=0.9, whole=0.9):
    """A result of `mustdrop+` and others: name -> (FLOPs, accuracy, gained by mustdrop+, lost, p, more of its row)."""
    rows = [{"method": "none", "keep": None, "correct": {"mean": whole}}]
    apart = []
    for keep in KEEPS:
        rows.append({"method": "mustdrop+", "keep": keep, "correct": {"mean": own}, "flops": 0.5, "equal_share": keep})
        for name, (flops, accuracy, gained, lost, p, more) in others.items():
            row = {"method": name, "keep": keep, "correct": {"mean": accuracy}, "flops": flops, "equal_share": keep}
            row |= more
            rows.append(row)
            apart.append(
                {"reference": "mustdrop+", "method": name, "keep": keep, "correct": {"mean": own - accuracy}}
                | {"mcnemar": {"gained": gained, "lost": lost, "p": p}, "cost": {"flops": 0.5 - row["flops"]}}
            )
    return {"rows": rows, "differences": apart}


def verdicts(scenes, pages):
    """The three lines below the table, and the table."""
    text = quality_aims.render({"quality": scenes, "quality_pages": pages}, generate.table)
    table, _, below = text.partition("\n\n")
    return table, below.splitlines()


LEVEL = {"level": (0.5, 0.89, 4, 3, 1.0, {})}


def test_who_leads_significantly_at_both_small_budgets_on_one_model_meets_the_aims():
    table, lines = verdicts(record(LEVEL), record({"worse": (0.5, 0.8, 20, 2, 0.001, {})}))
    assert all("**met**" in line for line in lines)
    best = "`worse`: +10.0 points, p 0.001"
    assert f"| pages | 11% | 0.900 | 50% | 1 | {best} | {best}, FLOPs +0.0% |" in table


def test_a_method_that_is_better_at_no_more_flops_is_named():
    _, lines = verdicts(record(LEVEL), record({"best": (0.4, 0.95, 1, 15, 0.0005, {})}))
    assert "**missed**: pages, 50%: -5.0 points against `best`, p 0.0005; pages, 25%" in lines[0]
    assert "**missed**" in lines[1]


@pytest.mark.parametrize("more", [{"trained": True}, {"equal_share": 0.9}, {"flops": 0.51}])
def test_what_is_trained_keeps_no_budget_or_costs_more_is_no_rival(more):
    table, lines = verdicts(record(LEVEL), record({"best": (0.4, 0.95, 1, 15, 0.0005, more)}))
    assert "**met**" in lines[0]
    assert "| pages | 6% | 0.900 | 50% | 0 |  | " in table
    assert ("FLOPs -1.0%" in table) == ("flops" in more)


def test_the_quarter_is_of_the_unpruned_accuracy():
    _, lines = verdicts(record(LEVEL), record(LEVEL, own=0.90, whole=0.96))
    assert lines[2].endswith("**missed**: 0.900 of 0.960 are 93.8%.")
