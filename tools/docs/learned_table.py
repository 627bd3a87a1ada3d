"""The tables of the learned scorer: what was trained, and what it is worth on held-out questions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import quality_pages_table
import quality_table

NAMES = {"scenes": "LLaVA, scenes", "pages": "Qwen3-VL, pages"}
OWN = "learned"
BESIDE = ("random", "uniform", "downsample", "divprune", "vcast", "mustdrop+")  # what it is compared with

Table = Callable[..., str]
Record = Mapping[str, Any]


def scorers(record: Record, table: Table) -> str:
    """Every fit of the bundled scorers: what it read, how long it took, and what came of it."""
    lines = []
    for row in record["rows"]:
        minutes, power = row["minutes"]["cpu_minutes"], f"{row['coverage']:g}"
        lines.append(
            [
                NAMES[row["model"]] + (" (**bundled**)" if row["bundled"] else ""),
                "features and question" if row["question"] else "features",
                f"{row['weights']:,}",
                f"{row['samples']} ({row['split']})",
                f"{row['step']} of {row['settings']['steps']}",
                f"{row['held_before']:.3f} \u2192 {row['held']:.3f}",
                power,
                " / ".join(f"{value:.3f}" for value in row["covered"][power]),
                f"{minutes:.0f}",
            ]
        )
    first = record["rows"][0]
    keeps = " / ".join(f"{float(keep):.1%}" for keep in first["log"][0]["held_at"])
    header = [
        "model",
        "reads",
        "weights",
        "prompts",
        "best step",
        "divergence",
        "coverage",
        f"with it at {keeps}",
        "CPU minutes",
    ]
    commits = ", ".join(
        sorted({str(row["commit"])[:10] + (" (dirty tree)" if row["dirty"] else "") for row in record["rows"]})
    )
    return (
        table(header, lines)
        + "\n\nDivergence from the unpruned answers in nats per token, on the part of the prompts that was held out of "
        "training: before training and at the best step, both by rank alone; "
        "then with the exponent of coverage that did best. "
        f"{first['hardware']}, one thread, torch {first['versions']['torch']}, transformers "
        f"{first['versions']['transformers']}, commit {commits}. Seeds, settings and logs are in "
        "`benchmarks/results/scorers.json`."
    )


def against(results: Mapping[str, Record], table: Table) -> str:
    """The scorer minus each other method in the reported run, on both models."""
    names = {"quality": "Scenes", "quality_pages": "Pages"}
    found = {what: results[name] for name, what in names.items() if name in results}
    return "\n\n".join(f"{what}:\n\n{_against(record, table)}" for what, record in found.items())


def earlier(results: Mapping[str, Record], table: Table) -> str:
    """Accuracy on held-out questions of both models before, beside methods that were not trained."""
    parts = []
    for name, words in (("quality_learned", quality_table), ("quality_learned_pages", quality_pages_table)):
        record = results[name]
        parts.append(words.overview(record, table))
        parts.append(_against(record, table))
    return "\n\n".join(parts)


def _against(record: Record, table: Table) -> str:
    """The scorer minus each other method: difference, exact test, FLOPs."""
    lines = []
    for row in record["differences"]:
        if row["reference"] != OWN or row["keep"] is None or row["method"] not in BESIDE:
            continue
        test = row["mcnemar"]
        gain = test["gained"] - test["lost"]
        verdict = "no difference shown" if test["p"] > quality_pages_table.LEVEL else "better" if gain > 0 else "worse"
        apart = row["correct"]
        lines.append(
            [
                f"`{row['method']}`",
                f"{row['keep']:.0%}",
                f"{apart['mean']:+.3f} ({apart['low']:+.3f} to {apart['high']:+.3f})",
                f"{test['gained']} / {test['lost']}",
                f"{test['p']:.2g}",
                verdict,
                f"{row['cost']['flops']:+.1%}",
            ]
        )
    lines.sort(key=lambda line: (line[0], -float(line[1].rstrip("%"))))
    return table(["`learned` minus", "`keep`", "accuracy", "gained / lost", "McNemar p", "it is", "FLOPs"], lines)
