"""What `benchmarks.launches` may count, per method: what is aimed at, and what holds until then.

To tighten: lower a number of `UNTIL_THEN`, or delete it where the aim holds. `tests/test_launches.py` fails where a
figure of the committed file, or of a run of its own, is above its bound.
"""

from __future__ import annotations

from typing import Any

LAYERS, MERGING = 32, 23  # decoder layers; encoder blocks that merge in ToMe

# Of the prompt's pass; host operations at batch 1 and 8.
WAITS, COPIES, HOST = 1, 4, {1: 60, 8: 80}
# Launches beyond those of the untouched model.
LAUNCHES = {
    **dict.fromkeys(("mustdrop", "divprune", "cdpruner", "fastv", "visionzip", "vispruner"), 60),
    **dict.fromkeys(("snapkv", "h2o", "tgvkv"), 2 * LAYERS),
    "mustdrop+": 200,
    "tome": 6 * MERGING,
    "none": 1,  # ids and mask of a prompt come over together, in the one wait of our own
}
# A decode step waits for nothing and starts what the untouched model starts.
FIGURES = ("launches", "host", "waits", "copies", "step_launches", "step_waits")
UNTIL_THEN: dict[str, dict[str, dict[str, int]]] = {
    # How many entries each layer keeps is decided by what all layers have read, and tensors must have their sizes.
    "tgvkv": {f"{cache} {batch}": {"waits": 2} for cache in ("growing", "static") for batch in (1, 8)},
}


def aim(method: str, figure: str, batch: int) -> int | None:
    """What is aimed at; None where nothing is said."""
    if figure == "launches":
        return LAUNCHES.get(method)
    if figure == "host":
        return HOST.get(batch)
    return {"waits": WAITS, "copies": COPIES, "step_launches": 0, "step_waits": 0}[figure]


def bound(method: str, figure: str, batch: int, cache: str) -> int | None:
    """What may be counted today."""
    key = f"{cache} {batch}"
    today = UNTIL_THEN.get(method, {}).get(key, {}).get(figure)
    return aim(method, figure, batch) if today is None else today


def figures(row: dict[str, Any]) -> dict[str, int]:
    """Of a row, what is bounded."""
    prefill, step = row["prefill"], row["step"]
    return {
        "launches": prefill["more_launches"],
        **{name: prefill[f"own_{name}"] for name in ("host", "waits", "copies")},
        "step_launches": step["more_launches"],
        "step_waits": step["own_waits"],
    }


def above(rows: list[dict[str, Any]]) -> list[str]:
    """Every figure above its bound, in words."""
    found = []
    for row in rows:
        if "refused" in row:
            continue
        for figure, number in figures(row).items():
            most = bound(row["method"], figure, row["batch"], row["cache"])
            if most is not None and number > most:
                found.append(f"{row['method']}, batch {row['batch']}, {row['cache']} cache: {number} {figure} > {most}")
    return found
