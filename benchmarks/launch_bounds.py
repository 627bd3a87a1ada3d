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
    "none": 0,
}
# A decode step waits for nothing and starts what the untouched model starts.
FIGURES = ("launches", "host", "waits", "copies", "step_launches", "step_waits")
UNTIL_THEN: dict[str, dict[str, dict[str, int]]] = {
    "cdpruner": {
        "static 1": {"step_launches": 3},
        "static 8": {"step_launches": 3},
    },
    "dart": {
        "growing 1": {"waits": 23},
        "static 1": {"waits": 23, "step_launches": 2},
        "growing 8": {"waits": 170},
        "static 8": {"waits": 170, "step_launches": 2},
    },
    "divprune": {
        "static 1": {"step_launches": 3},
        "static 8": {"step_launches": 3},
    },
    "downsample": {
        "growing 1": {"host": 130, "waits": 3},
        "static 1": {"host": 130, "waits": 3, "step_launches": 3},
        "growing 8": {"host": 180, "waits": 10, "copies": 11},
        "static 8": {"host": 180, "waits": 10, "copies": 11, "step_launches": 3},
    },
    "dycoke": {
        "static 1": {"step_launches": 3},
        "static 8": {"step_launches": 3},
    },
    "fastervlm": {
        "static 1": {"step_launches": 3},
        "static 8": {"step_launches": 3},
    },
    "fastv": {
        "static 1": {"step_launches": 2},
        "static 8": {"step_launches": 2},
    },
    "fastvid": {
        "growing 1": {"waits": 14},
        "static 1": {"waits": 14, "step_launches": 3},
        "growing 8": {"waits": 110},
        "static 8": {"waits": 110, "step_launches": 3},
    },
    "flashvid": {
        "growing 1": {"waits": 19},
        "static 1": {"waits": 19, "step_launches": 4},
        "growing 8": {"waits": 150},
        "static 8": {"waits": 150, "step_launches": 4},
    },
    "gleanvid": {
        "growing 1": {"waits": 10},
        "static 1": {"waits": 10, "step_launches": 3},
        "growing 8": {"waits": 32},
        "static 8": {"waits": 32, "step_launches": 3},
    },
    "h2o": {
        "growing 1": {"launches": 84, "host": 120, "waits": 3},
        "static 1": {"launches": 91, "host": 120, "waits": 3, "step_launches": 35},
        "growing 8": {"launches": 87, "host": 130, "waits": 3},
        "static 8": {"launches": 93, "host": 120, "waits": 3, "step_launches": 35},
    },
    "hiprune": {
        "static 1": {"step_launches": 3},
        "static 8": {"step_launches": 3},
    },
    "holov": {
        "growing 1": {"waits": 4},
        "static 1": {"waits": 4, "step_launches": 3},
        "growing 8": {"waits": 4},
        "static 8": {"waits": 4, "step_launches": 3},
    },
    "learned": {
        "static 1": {"step_launches": 2},
        "static 8": {"step_launches": 2},
    },
    "mmr": {
        "static 1": {"step_launches": 3},
        "static 8": {"step_launches": 3},
    },
    "mmtok": {
        "static 1": {"step_launches": 3},
        "static 8": {"step_launches": 3},
    },
    "mustdrop": {
        "static 1": {"launches": 82, "step_launches": 4},
        "static 8": {"launches": 83, "step_launches": 4},
    },
    "mustdrop+": {
        "static 1": {"launches": 220, "step_launches": 4},
        "static 8": {"launches": 230, "step_launches": 4},
    },
    "none": {
        "growing 1": {"launches": 2},
        "static 1": {"launches": 2},
        "growing 8": {"launches": 2},
        "static 8": {"launches": 2},
    },
    "pooling": {
        "growing 1": {"host": 120},
        "static 1": {"host": 120, "step_launches": 3},
        "growing 8": {"host": 120},
        "static 8": {"host": 120, "step_launches": 3},
    },
    "prumerge": {
        "static 1": {"step_launches": 3},
        "static 8": {"step_launches": 3},
    },
    "pyramiddrop": {
        "static 1": {"step_launches": 4},
        "static 8": {"step_launches": 4},
    },
    "random": {
        "static 1": {"step_launches": 3},
        "static 8": {"step_launches": 3},
    },
    "scope": {
        "static 1": {"step_launches": 3},
        "static 8": {"step_launches": 3},
    },
    "snapkv": {
        "growing 1": {"launches": 96, "host": 120, "waits": 3},
        "static 1": {"launches": 110, "host": 120, "waits": 3, "step_launches": 35},
        "growing 8": {"launches": 98, "host": 130, "waits": 3},
        "static 8": {"launches": 110, "host": 120, "waits": 3, "step_launches": 35},
    },
    "sparsevlm": {
        "growing 1": {"host": 150, "waits": 24, "copies": 35},
        "static 1": {"host": 150, "waits": 24, "copies": 39, "step_launches": 4},
        "growing 8": {"host": 220, "waits": 110, "copies": 35},
        "static 8": {"host": 220, "waits": 110, "copies": 39, "step_launches": 4},
    },
    "tgvkv": {
        "growing 1": {"launches": 150, "host": 240, "waits": 4},
        "static 1": {"launches": 150, "host": 230, "waits": 4, "copies": 6, "step_launches": 35},
        "growing 8": {"launches": 150, "host": 250, "waits": 4},
        "static 8": {"launches": 150, "host": 240, "waits": 4, "copies": 6, "step_launches": 35},
    },
    "tome": {
        "static 1": {"step_launches": 3},
        "static 8": {"step_launches": 3},
    },
    "uniform": {
        "static 1": {"step_launches": 3},
        "static 8": {"step_launches": 3},
    },
    "vcast": {
        "static 1": {"step_launches": 3},
        "static 8": {"step_launches": 3},
    },
    "vidcom2": {
        "static 1": {"step_launches": 3},
        "static 8": {"step_launches": 3},
    },
    "visionzip": {
        "static 1": {"step_launches": 3},
        "static 8": {"launches": 67, "step_launches": 3},
    },
    "vispruner": {
        "static 1": {"step_launches": 3},
        "static 8": {"step_launches": 3},
    },
    "vscan": {
        "static 1": {"step_launches": 4},
        "static 8": {"step_launches": 4},
    },
}  # fmt: skip


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
