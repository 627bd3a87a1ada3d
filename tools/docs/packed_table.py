"""Tables of the first token in processor time: of packed encoders, and by length of the prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Table = Callable[..., str]
AIM = 0.9  # of the FLOPs ratio


def rows(record: Mapping[str, Any], table: Table) -> str:
    """What was run, then one row per way and budget, and which rows miss the aim."""
    lines = [
        (
            _after(row["method"]),
            f"{row['keep']:.0%}",
            f"{row['entering']} of {row['tokens']}",
            f"{row['flops_ratio']:.2f}",
            _ratio(row["speed_up"]),
            f"{row['share_of_it']:.0%}",
            f"{row['encoder_flops_ratio']:.2f}",
            _ratio(row["encoder_speed_up"]),
        )
        for row in record["rows"]
    ]
    header = ("what drops", "`keep`", "retained", "first token: FLOPs ratio", "speed-up", "of the FLOPs ratio")
    return (
        _setting(record) + "\n\n" + table((*header, "encoder: FLOPs ratio", "speed-up"), lines) + "\n\n" + _met(record)
    )


def lengths(record: Mapping[str, Any], table: Table) -> str:
    """What was run (benchmarks/results/prompt_length.json), then one row per length and budget."""
    lines = [
        (
            row["vision_tokens"],
            f"{row['keep']:.0%}",
            f"{row['seconds_unpatched']['median']:.1f} s",
            _ratio(row["speed_up"]),
            f"{row['flops_ratio']:.2f}",
            f"{row['kv']:.0%}",
        )
        for row in record["rows"]
    ]
    model = f"`{record['method']}` on a LLaVA of the size `{record['size']}`, {record['text_tokens']} text tokens"
    header = ("vision tokens", "`keep`", "first token, unpatched", "speed-up", "FLOPs ratio", "KV cache")
    return f"{model}, {_run(record)}" + "\n\n" + table(header, lines)


def _met(record: Mapping[str, Any]) -> str:
    missed = [row for row in record["rows"] if row["share_of_it"] < AIM]
    names = "; ".join(f"{row['method']} at {row['keep']:.0%}" for row in missed)
    met = len(record["rows"]) - len(missed)
    return f"{met} of {len(record['rows'])} rows reach {AIM:.0%} of their FLOPs ratio" + (
        f"; not: {names}." if missed else "."
    )


def _setting(record: Mapping[str, Any]) -> str:
    laid = {"packed": "once", "plain": "at every product"}[record["weights"]]
    return f"`{record['model']}` ({record['patches']} patches), weights laid out {laid}, {_run(record)}"


def _run(record: Mapping[str, Any]) -> str:
    versions, commit = record["versions"], str(record["commit"])[:10] + (" (dirty tree)" if record["dirty"] else "")
    return (
        f"random weights, float32, {record['threads']} thread; medians and quartiles of {record['pairs']} pairs of "
        "runs side by side, in processor time. "
        f"{record['hardware']}, load {record['load_average']:.1f} at the start, torch {versions['torch']}, "
        f"transformers {versions['transformers']}, {record['date']}, commit {commit}."
    )


def _ratio(spread: Mapping[str, float]) -> str:
    return f"{spread['median']:.2f} ({spread['q1']:.2f} to {spread['q3']:.2f})"


def _after(method: str) -> str:
    """A method's name in the field's words: the record says "behind"."""
    return method.replace("behind the encoder", "after the encoder").replace("merge behind", "merge after the encoder")
