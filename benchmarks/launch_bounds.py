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
        "growing 1": {"launches": 77, "host": 200, "waits": 13, "copies": 14},
        "static 1": {"launches": 110, "host": 210, "waits": 13, "copies": 15, "step_launches": 5},
        "growing 8": {"launches": 250, "host": 730, "waits": 56, "copies": 28},
        "static 8": {"launches": 290, "host": 740, "waits": 56, "copies": 29, "step_launches": 5},
    },
    "dart": {
        "growing 1": {"host": 130, "waits": 27, "copies": 14},
        "static 1": {"host": 140, "waits": 27, "copies": 16, "step_launches": 5},
        "growing 8": {"host": 220, "waits": 170, "copies": 14},
        "static 8": {"host": 220, "waits": 170, "copies": 16, "step_launches": 5},
    },
    "divprune": {
        "growing 1": {"host": 190, "waits": 9, "copies": 12},
        "static 1": {"launches": 81, "host": 190, "waits": 9, "copies": 13, "step_launches": 5},
        "growing 8": {"launches": 150, "host": 700, "waits": 23, "copies": 19},
        "static 8": {"launches": 180, "host": 710, "waits": 23, "copies": 20, "step_launches": 5},
    },
    "downsample": {
        "growing 1": {"host": 280, "waits": 11, "copies": 15},
        "static 1": {"host": 280, "waits": 11, "copies": 16, "step_launches": 5},
        "growing 8": {"host": 830, "waits": 32, "copies": 29},
        "static 8": {"host": 830, "waits": 32, "copies": 30, "step_launches": 5},
    },
    "dycoke": {
        "growing 1": {"host": 190, "waits": 27, "copies": 12},
        "static 1": {"host": 190, "waits": 27, "copies": 13, "step_launches": 5},
        "growing 8": {"host": 700, "waits": 41, "copies": 19},
        "static 8": {"host": 710, "waits": 41, "copies": 20, "step_launches": 5},
    },
    "fastervlm": {
        "growing 1": {"host": 200, "waits": 12, "copies": 14},
        "static 1": {"host": 200, "waits": 12, "copies": 15, "step_launches": 5},
        "growing 8": {"host": 740, "waits": 47, "copies": 28},
        "static 8": {"host": 750, "waits": 47, "copies": 29, "step_launches": 5},
    },
    "fastv": {
        "growing 1": {"host": 130, "waits": 6, "copies": 14},
        "static 1": {"launches": 66, "host": 140, "waits": 6, "copies": 16, "step_launches": 5},
        "growing 8": {"host": 220, "waits": 6, "copies": 14},
        "static 8": {"launches": 66, "host": 220, "waits": 6, "copies": 16, "step_launches": 5},
    },
    "fastvid": {
        "growing 1": {"host": 190, "waits": 30, "copies": 13},
        "static 1": {"host": 190, "waits": 30, "copies": 14, "step_launches": 5},
        "growing 8": {"host": 710, "waits": 160, "copies": 20},
        "static 8": {"host": 720, "waits": 160, "copies": 21, "step_launches": 5},
    },
    "flashvid": {
        "growing 1": {"host": 230, "waits": 38, "copies": 26},
        "static 1": {"host": 240, "waits": 38, "copies": 28, "step_launches": 7},
        "growing 8": {"host": 780, "waits": 210, "copies": 33},
        "static 8": {"host": 790, "waits": 210, "copies": 35, "step_launches": 7},
    },
    "gleanvid": {
        "growing 1": {"host": 190, "waits": 26, "copies": 12},
        "static 1": {"host": 190, "waits": 26, "copies": 13, "step_launches": 5},
        "growing 8": {"host": 700, "waits": 62, "copies": 19},
        "static 8": {"host": 710, "waits": 62, "copies": 20, "step_launches": 5},
    },
    "h2o": {
        "growing 1": {"launches": 83, "host": 160, "waits": 4},
        "static 1": {"launches": 160, "host": 260, "waits": 4, "step_launches": 67},
        "growing 8": {"launches": 85, "host": 230, "waits": 4},
        "static 8": {"launches": 160, "host": 330, "waits": 4, "step_launches": 67},
    },
    "hiprune": {
        "growing 1": {"host": 200, "waits": 12, "copies": 15},
        "static 1": {"host": 200, "waits": 12, "copies": 16, "step_launches": 5},
        "growing 8": {"host": 740, "waits": 47, "copies": 29},
        "static 8": {"host": 740, "waits": 47, "copies": 30, "step_launches": 5},
    },
    "holov": {
        "growing 1": {"host": 190, "waits": 17, "copies": 14},
        "static 1": {"host": 200, "waits": 17, "copies": 15, "step_launches": 5},
        "growing 8": {"host": 730, "waits": 52, "copies": 28},
        "static 8": {"host": 730, "waits": 52, "copies": 29, "step_launches": 5},
    },
    "mmr": {
        "growing 1": {"host": 190, "waits": 12, "copies": 14},
        "static 1": {"host": 200, "waits": 12, "copies": 15, "step_launches": 5},
        "growing 8": {"host": 730, "waits": 47, "copies": 28},
        "static 8": {"host": 730, "waits": 47, "copies": 29, "step_launches": 5},
    },
    "mmtok": {
        "growing 1": {"host": 200, "waits": 13, "copies": 15},
        "static 1": {"host": 210, "waits": 13, "copies": 16, "step_launches": 5},
        "growing 8": {"host": 740, "waits": 56, "copies": 29},
        "static 8": {"host": 750, "waits": 56, "copies": 30, "step_launches": 5},
    },
    "mustdrop": {
        "growing 1": {"launches": 69, "host": 790, "waits": 9, "copies": 39},
        "static 1": {"launches": 120, "host": 810, "waits": 9, "copies": 41, "step_launches": 7},
        "growing 8": {"launches": 280, "host": 1400, "waits": 9, "copies": 40, "step_launches": 120},
        "static 8": {"launches": 330, "host": 1400, "waits": 9, "copies": 42, "step_launches": 13},
    },
    "mustdrop+": {
        "growing 1": {"launches": 300, "host": 380, "waits": 21, "copies": 38},
        "static 1": {"launches": 340, "host": 390, "waits": 21, "copies": 40, "step_launches": 7},
        "growing 8": {"launches": 440, "host": 940, "waits": 56, "copies": 52},
        "static 8": {"launches": 490, "host": 950, "waits": 56, "copies": 54, "step_launches": 7},
    },
    "none": {
        "growing 1": {"launches": 3, "host": 87},
        "static 1": {"launches": 4, "host": 99, "step_launches": 3},
        "growing 8": {"launches": 3, "host": 150},
        "static 8": {"launches": 4, "host": 160, "step_launches": 3},
    },
    "pooling": {
        "growing 1": {"host": 270, "waits": 10, "copies": 14},
        "static 1": {"host": 280, "waits": 10, "copies": 15, "step_launches": 5},
        "growing 8": {"host": 790, "waits": 24, "copies": 21},
        "static 8": {"host": 790, "waits": 24, "copies": 22, "step_launches": 5},
    },
    "prumerge": {
        "growing 1": {"host": 200, "waits": 17, "copies": 15},
        "static 1": {"host": 200, "waits": 17, "copies": 16, "step_launches": 5},
        "growing 8": {"host": 750, "waits": 52, "copies": 29},
        "static 8": {"host": 760, "waits": 52, "copies": 30, "step_launches": 5},
    },
    "pyramiddrop": {
        "growing 1": {"host": 200, "waits": 10, "copies": 32},
        "static 1": {"host": 210, "waits": 10, "copies": 36, "step_launches": 9},
        "growing 8": {"host": 330, "waits": 10, "copies": 32},
        "static 8": {"host": 350, "waits": 10, "copies": 36, "step_launches": 9},
    },
    "random": {
        "growing 1": {"host": 210, "copies": 9},
        "static 1": {"host": 220, "copies": 10, "step_launches": 5},
        "growing 8": {"host": 410, "copies": 9},
        "static 8": {"host": 410, "copies": 10, "step_launches": 5},
    },
    "scope": {
        "growing 1": {"host": 190, "waits": 12, "copies": 14},
        "static 1": {"host": 200, "waits": 12, "copies": 15, "step_launches": 5},
        "growing 8": {"host": 730, "waits": 47, "copies": 28},
        "static 8": {"host": 730, "waits": 47, "copies": 29, "step_launches": 5},
    },
    "snapkv": {
        "growing 1": {"launches": 94, "host": 160, "waits": 4},
        "static 1": {"launches": 170, "host": 260, "waits": 4, "step_launches": 67},
        "growing 8": {"launches": 96, "host": 230, "waits": 4},
        "static 8": {"launches": 170, "host": 330, "waits": 4, "step_launches": 67},
    },
    "sparsevlm": {
        "growing 1": {"host": 200, "waits": 24, "copies": 35},
        "static 1": {"host": 210, "waits": 24, "copies": 39, "step_launches": 9},
        "growing 8": {"host": 330, "waits": 101, "copies": 35},
        "static 8": {"host": 350, "waits": 101, "copies": 39, "step_launches": 9},
    },
    "tgvkv": {
        "growing 1": {"launches": 140, "host": 280, "waits": 5},
        "static 1": {"launches": 210, "host": 380, "waits": 5, "copies": 7, "step_launches": 67},
        "growing 8": {"launches": 150, "host": 500, "waits": 5},
        "static 8": {"launches": 210, "host": 440, "waits": 5, "copies": 7, "step_launches": 67},
    },
    "tome": {
        "growing 1": {"launches": 180, "host": 210, "waits": 16, "copies": 12},
        "static 1": {"launches": 220, "host": 210, "waits": 16, "copies": 13, "step_launches": 5},
        "growing 8": {"launches": 330, "host": 690, "waits": 51, "copies": 26},
        "static 8": {"launches": 360, "host": 690, "waits": 51, "copies": 27, "step_launches": 5},
    },
    "uniform": {
        "growing 1": {"host": 280, "copies": 9},
        "static 1": {"host": 280, "copies": 10, "step_launches": 5},
        "growing 8": {"host": 480, "copies": 9},
        "static 8": {"host": 480, "copies": 10, "step_launches": 5},
    },
    "vcast": {
        "growing 1": {"host": 190, "waits": 15, "copies": 12},
        "static 1": {"host": 190, "waits": 15, "copies": 13, "step_launches": 5},
        "growing 8": {"host": 700, "waits": 29, "copies": 19},
        "static 8": {"host": 710, "waits": 29, "copies": 20, "step_launches": 5},
    },
    "vidcom2": {
        "growing 1": {"host": 190, "waits": 12, "copies": 12},
        "static 1": {"host": 190, "waits": 12, "copies": 13, "step_launches": 5},
        "growing 8": {"host": 700, "waits": 26, "copies": 19},
        "static 8": {"host": 710, "waits": 26, "copies": 20, "step_launches": 5},
    },
    "visionzip": {
        "growing 1": {"launches": 130, "host": 200, "waits": 14, "copies": 15},
        "static 1": {"launches": 160, "host": 200, "waits": 14, "copies": 16, "step_launches": 5},
        "growing 8": {"launches": 260, "host": 750, "waits": 49, "copies": 29},
        "static 8": {"launches": 300, "host": 760, "waits": 49, "copies": 30, "step_launches": 5},
    },
    "vispruner": {
        "growing 1": {"launches": 77, "host": 200, "waits": 12, "copies": 14},
        "static 1": {"launches": 110, "host": 200, "waits": 12, "copies": 15, "step_launches": 5},
        "growing 8": {"launches": 210, "host": 740, "waits": 47, "copies": 28},
        "static 8": {"launches": 250, "host": 750, "waits": 47, "copies": 29, "step_launches": 5},
    },
    "vscan": {
        "growing 1": {"host": 240, "waits": 17, "copies": 28},
        "static 1": {"host": 240, "waits": 17, "copies": 30, "step_launches": 7},
        "growing 8": {"host": 810, "waits": 52, "copies": 42},
        "static 8": {"host": 820, "waits": 52, "copies": 44, "step_launches": 7},
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
