"""The table of family x method: how many conformance tests passed, from benchmarks/results/product.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def render(record: Mapping[str, Any], table: Callable[..., str]) -> str:
    """What was run, how often each test passed, and the matrix. A number in brackets stands for a reason."""
    pairs, reasons = record["pairs"], []
    methods = sorted({method for own in pairs.values() for method in own})

    def cell(own: Any) -> str:
        if own is None:
            return ""
        if isinstance(own, int):
            return str(own)
        marks = []
        for reason, where in own["rest"].items():
            if reason not in reasons:
                reasons.append(reason)
            marks.append(f"{len(where)} [{reasons.index(reason) + 1}]")
        return " + ".join([str(own["passed"])] * (own["passed"] > 0) + marks)

    rows = []
    for case, own in pairs.items():
        family, kind = case.rsplit("-", 1)
        rows.append([f"`{family}`", kind, *(cell(own.get(method)) for method in methods)])
    outcomes = sorted({outcome for counts in record["tests"].values() for outcome in counts})
    counts = [[f"`{test}`", *(own.get(outcome, 0) for outcome in outcomes)] for test, own in record["tests"].items()]
    total = sum(sum(own.values()) for own in record["tests"].values())
    lines = [
        f"{total} tests ({record['breadth']}): tiny models with random weights, float32, "
        f"torch {record['versions']['torch']}, transformers {record['versions']['transformers']}, "
        f"{record['hardware']}, commit {str(record['commit'])[:10]}.",
        "",
        table(["test", *outcomes], counts),
        "",
        table(["family", "media", *(f"`{method}`" for method in methods)], rows),
        "",
        *(f"{n}. {reason}" for n, reason in enumerate(reasons, 1)),
    ]
    return "\n".join(lines).rstrip()
