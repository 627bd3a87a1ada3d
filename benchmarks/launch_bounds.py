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
        "growing 1": {"launches": 78, "host": 310, "waits": 17, "copies": 15},
        "static 1": {"launches": 120, "host": 310, "waits": 17, "copies": 18, "step_launches": 7, "step_waits": 3},
        "growing 8": {"launches": 260, "host": 1300, "waits": 60, "copies": 29},
        "static 8": {"launches": 300, "host": 1300, "waits": 60, "copies": 32, "step_launches": 7, "step_waits": 3},
    },
    "dart": {
        "growing 1": {"launches": 160, "host": 230, "waits": 29, "copies": 14},
        "static 1": {"launches": 200, "host": 230, "waits": 30, "copies": 20, "step_launches": 7, "step_waits": 3},
        "growing 8": {"launches": 930, "host": 580, "waits": 180, "copies": 14},
        "static 8": {"launches": 970, "host": 580, "waits": 180, "copies": 20, "step_launches": 7, "step_waits": 3},
    },
    "divprune": {
        "growing 1": {"host": 300, "waits": 13, "copies": 13},
        "static 1": {"launches": 87, "host": 300, "waits": 13, "copies": 16, "step_launches": 7, "step_waits": 3},
        "growing 8": {"launches": 160, "host": 1300, "waits": 27, "copies": 20},
        "static 8": {"launches": 190, "host": 1300, "waits": 27, "copies": 23, "step_launches": 7, "step_waits": 3},
    },
    "dycoke": {
        "growing 1": {"launches": 230, "host": 300, "waits": 31, "copies": 13},
        "static 1": {"launches": 270, "host": 300, "waits": 31, "copies": 16, "step_launches": 7, "step_waits": 3},
        "growing 8": {"launches": 340, "host": 1300, "waits": 46, "copies": 20},
        "static 8": {"launches": 370, "host": 1300, "waits": 46, "copies": 23, "step_launches": 7, "step_waits": 3},
    },
    "fastervlm": {
        "growing 1": {"launches": 80, "host": 310, "waits": 16, "copies": 15},
        "static 1": {"launches": 120, "host": 310, "waits": 16, "copies": 18, "step_launches": 7, "step_waits": 3},
        "growing 8": {"launches": 220, "host": 1300, "waits": 52, "copies": 29},
        "static 8": {"launches": 260, "host": 1300, "waits": 52, "copies": 32, "step_launches": 7, "step_waits": 3},
    },
    "fastv": {
        "growing 1": {"host": 230, "waits": 8, "copies": 14},
        "static 1": {"launches": 71, "host": 230, "waits": 9, "copies": 20, "step_launches": 7, "step_waits": 3},
        "growing 8": {"host": 570, "waits": 8, "copies": 14},
        "static 8": {"launches": 71, "host": 570, "waits": 9, "copies": 20, "step_launches": 7, "step_waits": 3},
    },
    "h2o": {
        "growing 1": {"launches": 1400, "host": 1900, "waits": 71, "copies": 240},
        "static 1": {"launches": 3100, "host": 600, "waits": 510, "copies": 71, "step_launches": 71, "step_waits": 3},
        "growing 8": {"launches": 1400, "host": 2300, "waits": 71, "copies": 240},
        "static 8": {"launches": 3100, "host": 940, "waits": 510, "copies": 71, "step_launches": 71, "step_waits": 3},
    },
    "hiprune": {
        "growing 1": {"launches": 110, "host": 310, "waits": 16, "copies": 16},
        "static 1": {"launches": 140, "host": 310, "waits": 16, "copies": 19, "step_launches": 7, "step_waits": 3},
        "growing 8": {"launches": 240, "host": 1300, "waits": 52, "copies": 30},
        "static 8": {"launches": 270, "host": 1300, "waits": 52, "copies": 33, "step_launches": 7, "step_waits": 3},
    },
    "mustdrop": {
        "growing 1": {"launches": 73, "host": 1200, "waits": 13, "copies": 40},
        "static 1": {"launches": 460, "host": 960, "waits": 81, "copies": 57, "step_launches": 17, "step_waits": 3},
        "growing 8": {"launches": 290, "host": 2000, "waits": 13, "copies": 41, "step_launches": 120},
        "static 8": {"launches": 670, "host": 1700, "waits": 81, "copies": 58, "step_launches": 35, "step_waits": 3},
    },
    "mustdrop+": {
        "growing 1": {"launches": 1400, "host": 630, "waits": 51, "copies": 39},
        "static 1": {"launches": 1600, "host": 500, "waits": 110, "copies": 50, "step_launches": 13, "step_waits": 3},
        "growing 8": {"launches": 1500, "host": 1600, "waits": 88, "copies": 54},
        "static 8": {"launches": 1800, "host": 1500, "waits": 140, "copies": 65, "step_launches": 13, "step_waits": 3},
    },
    "none": {
        "growing 1": {"host": 160, "waits": 5},
        "static 1": {"launches": 37, "host": 160, "waits": 5, "step_launches": 5, "step_waits": 3},
        "growing 8": {"host": 490, "waits": 5},
        "static 8": {"launches": 37, "host": 500, "waits": 5, "step_launches": 5, "step_waits": 3},
    },
    "pooling": {
        "growing 1": {"launches": 59, "host": 390, "waits": 14, "copies": 15},
        "static 1": {"launches": 96, "host": 390, "waits": 14, "copies": 18, "step_launches": 7, "step_waits": 3},
        "growing 8": {"launches": 170, "host": 1300, "waits": 28, "copies": 22},
        "static 8": {"launches": 200, "host": 1300, "waits": 28, "copies": 25, "step_launches": 7, "step_waits": 3},
    },
    "prumerge": {
        "growing 1": {"launches": 150, "host": 310, "waits": 21, "copies": 16},
        "static 1": {"launches": 190, "host": 310, "waits": 21, "copies": 19, "step_launches": 7, "step_waits": 3},
        "growing 8": {"launches": 290, "host": 1300, "waits": 57, "copies": 30},
        "static 8": {"launches": 320, "host": 1300, "waits": 57, "copies": 33, "step_launches": 7, "step_waits": 3},
    },
    "pyramiddrop": {
        "growing 1": {"launches": 86, "host": 410, "waits": 12, "copies": 32},
        "static 1": {"launches": 140, "host": 410, "waits": 15, "copies": 45, "step_launches": 11, "step_waits": 3},
        "growing 8": {"launches": 86, "host": 770, "waits": 12, "copies": 32},
        "static 8": {"launches": 140, "host": 770, "waits": 15, "copies": 45, "step_launches": 11, "step_waits": 3},
    },
    "random": {
        "growing 1": {"launches": 13, "host": 310, "waits": 7, "copies": 10},
        "static 1": {"launches": 49, "host": 310, "waits": 7, "copies": 13, "step_launches": 7, "step_waits": 3},
        "growing 8": {"launches": 13, "host": 880, "waits": 7, "copies": 10},
        "static 8": {"launches": 49, "host": 880, "waits": 7, "copies": 13, "step_launches": 7, "step_waits": 3},
    },
    "snapkv": {
        "growing 1": {"launches": 1800, "host": 1900, "waits": 71, "copies": 240},
        "static 1": {"launches": 3500, "host": 600, "waits": 510, "copies": 71, "step_launches": 71, "step_waits": 3},
        "growing 8": {"launches": 1800, "host": 2300, "waits": 71, "copies": 240},
        "static 8": {"launches": 3500, "host": 940, "waits": 510, "copies": 71, "step_launches": 71, "step_waits": 3},
    },
    "sparsevlm": {
        "growing 1": {"launches": 360, "host": 410, "waits": 26, "copies": 35},
        "static 1": {"launches": 410, "host": 410, "waits": 29, "copies": 48, "step_launches": 11, "step_waits": 3},
        "growing 8": {"launches": 1500, "host": 780, "waits": 110, "copies": 35},
        "static 8": {"launches": 1500, "host": 780, "waits": 110, "copies": 48, "step_launches": 11, "step_waits": 3},
    },
    "tgvkv": {
        "growing 1": {"launches": 2100, "host": 3200, "waits": 110, "copies": 270},
        "static 1": {"launches": 4100, "host": 1700, "waits": 650, "copies": 110, "step_launches": 71, "step_waits": 3},
        "growing 8": {"launches": 2100, "host": 3600, "waits": 110, "copies": 270},
        "static 8": {"launches": 4100, "host": 2100, "waits": 650, "copies": 110, "step_launches": 71, "step_waits": 3},
    },
    "tome": {
        "growing 1": {"launches": 1200, "host": 300, "waits": 44, "copies": 13},
        "static 1": {"launches": 1300, "host": 300, "waits": 44, "copies": 16, "step_launches": 7, "step_waits": 3},
        "growing 8": {"launches": 1400, "host": 1200, "waits": 80, "copies": 27},
        "static 8": {"launches": 1400, "host": 1200, "waits": 80, "copies": 30, "step_launches": 7, "step_waits": 3},
    },
    "uniform": {
        "growing 1": {"launches": 13, "host": 380, "waits": 7, "copies": 10},
        "static 1": {"launches": 49, "host": 380, "waits": 7, "copies": 13, "step_launches": 7, "step_waits": 3},
        "growing 8": {"launches": 13, "host": 950, "waits": 7, "copies": 10},
        "static 8": {"launches": 49, "host": 950, "waits": 7, "copies": 13, "step_launches": 7, "step_waits": 3},
    },
    "vidcom2": {
        "growing 1": {"launches": 160, "host": 300, "waits": 16, "copies": 13},
        "static 1": {"launches": 200, "host": 300, "waits": 16, "copies": 16, "step_launches": 7, "step_waits": 3},
        "growing 8": {"launches": 260, "host": 1300, "waits": 30, "copies": 20},
        "static 8": {"launches": 300, "host": 1300, "waits": 30, "copies": 23, "step_launches": 7, "step_waits": 3},
    },
    "visionzip": {
        "growing 1": {"launches": 130, "host": 310, "waits": 18, "copies": 16},
        "static 1": {"launches": 170, "host": 310, "waits": 18, "copies": 19, "step_launches": 7, "step_waits": 3},
        "growing 8": {"launches": 270, "host": 1300, "waits": 54, "copies": 30},
        "static 8": {"launches": 310, "host": 1300, "waits": 54, "copies": 33, "step_launches": 7, "step_waits": 3},
    },
    "vispruner": {
        "growing 1": {"launches": 80, "host": 310, "waits": 16, "copies": 15},
        "static 1": {"launches": 120, "host": 310, "waits": 16, "copies": 18, "step_launches": 7, "step_waits": 3},
        "growing 8": {"launches": 220, "host": 1300, "waits": 52, "copies": 29},
        "static 8": {"launches": 260, "host": 1300, "waits": 52, "copies": 32, "step_launches": 7, "step_waits": 3},
    },
    "vscan": {
        "growing 1": {"launches": 170, "host": 410, "waits": 21, "copies": 29},
        "static 1": {"launches": 210, "host": 410, "waits": 22, "copies": 35, "step_launches": 9, "step_waits": 3},
        "growing 8": {"launches": 300, "host": 1400, "waits": 57, "copies": 44},
        "static 8": {"launches": 340, "host": 1400, "waits": 58, "copies": 50, "step_launches": 9, "step_waits": 3},
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
