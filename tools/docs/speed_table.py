"""The tables of speed, from the result files of the end-to-end benchmark."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[2]))

from benchmarks.aims import MOST_OVERHEAD, SHARE_OF_FLOPS

Table = Callable[..., str]


def rows(record: Mapping[str, Any], table: Table) -> str:
    """What was run in one sentence, then one row per method and budget."""
    lines = []
    for row in record["rows"]:
        text, whole = row["text"], row["prompt"]
        lines.append(
            (
                f"`{row['method']}`",
                row["keep"] or "all",
                row["batch"],
                f"{text['flops_ratio']:.2f}",
                _ratio(text["speed_up"]),
                f"{text['share_of_flops_ratio']:.0%}",
                f"{whole['flops_ratio']:.2f}",
                _ratio(whole["speed_up"]),
                f"{row['decode']['speed_up']['median']:.2f}" if "decode" in row else "",
                f"{row['kv_bytes']['stored'] / 2**20:.1f}",
            )
        )
    header = (
        "method",
        "keep",
        "batch",
        "prefill: FLOPs ratio",
        "speed-up",
        "of the FLOPs ratio",
        "whole prompt: FLOPs ratio",
    )
    return _setting(record) + "\n\n" + table((*header, "speed-up", "decoding", "KV MiB"), lines)


def hardware(record: Mapping[str, Any], table: Table) -> str:
    """What fewer rows cost the hardware, and what is left of the speed-up after pruning took its share."""
    points = [(p["tokens"], f"{p['gflops']:.0f}", f"{p['efficiency']:.0%}") for p in record["roofline"]]
    shares = [
        (
            f"`{row['method']}`",
            row["keep"],
            row["batch"],
            _ratio(row["text"]["speed_up"]),
            _ratio(row["bare"]["speed_up"]),
            f"{row['bare']['pruning_share']['median']:.1%}",
        )
        for row in record["rows"]
        if "bare" in row
    ]
    first = table(("tokens", "GFLOP/s of the linear layers", "efficiency"), points)
    second = table(
        ("method", "keep", "batch", "prefill speed-up", "of the bare layers", "time that pruning takes"), shares
    )
    return f"{_setting(record)}\n\n{first}\n\n{second}"


def targets(record: Mapping[str, Any], table: Table) -> str:
    """What was aimed at on a CPU, what came out, and whether it is met."""
    ours = [row for row in record["rows"] if row["method"] == "mustdrop"]
    pruned, (whole,) = [row for row in ours if "bare" in row], [row for row in ours if "bare" not in row]
    lines = []
    for batch in sorted({row["batch"] for row in pruned}):
        shares = [row["text"]["share_of_flops_ratio"] for row in pruned if row["batch"] == batch]
        measured = f"{min(shares):.0%} to {max(shares):.0%}".replace("%", " %")
        prompts = "one prompt" if batch == 1 else f"{batch} prompts at a time"
        verdict = "met" if min(shares) >= SHARE_OF_FLOPS else "missed"
        aim = f"at least {100 * SHARE_OF_FLOPS:.0f} % of the FLOPs ratio"
        lines.append((f"prefill, {prompts}", aim, measured, verdict))
    overhead = 1 / whole["text"]["speed_up"]["median"] - 1
    verdict = "met" if overhead <= MOST_OVERHEAD else "missed"
    aim = f"at most {100 * MOST_OVERHEAD:.0f} % slower"
    lines.append(("prefill where nothing is dropped", aim, f"{100 * overhead:+.1f} %", verdict))
    return table(("what", "aimed at", "measured", ""), lines)


def _ratio(spread: Mapping[str, float]) -> str:
    return f"{spread['median']:.2f} ({spread['min']:.2f} to {spread['max']:.2f})"


_WEIGHTS = {"plain": "weights laid out at every product", "packed": "weights laid out for the processor once"}


def _setting(record: Mapping[str, Any]) -> str:
    model, prompt, versions = record["model"], record["prompt"], record["versions"]
    return (
        f"A LLaVA with random weights ({model['parameters'] / 1e9:.2f} B parameters, {model['dtype']}, "
        f"{model['attention']}, {_WEIGHTS[model.get('weights', 'plain')]}) on {record['hardware']}, "
        f"{record['threads']} threads; "
        f"{prompt['vision_tokens']} vision and {prompt['text_tokens']} text tokens; torch {versions['torch']}, "
        f"transformers {versions['transformers']}; medians (and extremes) of {record['pairs']['prefill']} pairs of "
        f"neighbouring runs, {record['pairs']['keep_all']} where nothing is dropped."
    )
