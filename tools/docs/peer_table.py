"""The tables of mustdrop beside other packages, from the result file of `python -m benchmarks peers`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Table = Callable[..., str]

HEADER = (
    "",
    "may drop",
    "`keep`",
    "tokens per layer",
    "first token: speed-up",
    "decoding: speed-up",
    "cache entries per layer",
    "KV bytes",
)
STAGES = {"prefill": "Prefill: fewer tokens are processed", "cache": "Cache: all tokens are processed, fewer stay"}


def render(record: Mapping[str, Any], table: Table) -> str:
    """The setting, a table per stage, the remarks, and what was skipped with the reason."""
    parts = [_setting(record)]
    for stage, title in STAGES.items():
        rows = [_row(row) for row in record["rows"] if row["stage"] == stage]
        parts.append(f"**{title}.**\n\n" + (table(HEADER, rows) if rows else "Nothing ran."))
    remarks = _grouped((row["remark"], _name(row)) for row in record["rows"] if row["remark"])
    parts += [_bullets("About the rows", remarks)] if remarks else []
    reasons = _grouped((_reason(row), _name(row)) for row in record["skipped"])
    parts += [_bullets("Skipped", reasons)] if reasons else []
    return "\n\n".join(parts) + f"\n\nThe command: `{record['command']}`."


def _setting(record: Mapping[str, Any]) -> str:
    model, prompt, versions = record["model"], record["prompt"], record["versions"]
    commit = str(record["commit"])[:10] + (" (dirty tree)" if record["dirty"] else "")
    pairs = [[row["pairs"][scope] for row in record["rows"]] for scope in ("prompt", "decode")]
    first, decode = (str(min(p)) if min(p) == max(p) else f"{min(p)} to {max(p)}" for p in pairs)
    return (
        f"A LLaVA with random weights ({model['parameters'] / 1e9:.2f} B parameters, {model['dtype']}, "
        f"{model['attention']}, {model['weights']} weights) on {record['hardware']}, {record['threads']} threads, "
        f"load average {record['load_average']} before the run; {prompt['vision_tokens']} vision and "
        f"{prompt['text_tokens']} text tokens, {prompt['decode_steps']} decode steps; torch {versions['torch']}, "
        f"transformers {versions['transformers']}, commit {commit}. Medians and extremes of {first} pairs for the "
        f"first token and {decode} for decoding."
    )


def _name(row: Mapping[str, Any]) -> str:
    return f"`{row['name']}`" if row["package"] == "mustdrop" else f"{row['name']} {row['version']}".strip()


def _row(row: Mapping[str, Any]) -> tuple[object, ...]:
    cache = row["kv_bytes"]["after_prompt"]
    speeds = [row[scope]["speed_up"] for scope in ("first_token", "decode")]
    return (
        _name(row),
        row["prunes"],
        row["keep"],
        f"{row['tokens_per_layer']:.0f}",
        *(f"{s['median']:.2f} ({s['min']:.2f} to {s['max']:.2f})" for s in speeds),
        f"{cache['entries_per_layer']:.0f}",
        f"{cache['stored'] / 2**20:.1f} MiB ({cache['stored'] / cache['untouched']:.0%})",
    )


def _reason(row: Mapping[str, Any]) -> str:
    return row["skipped"].rstrip(".") + (f" ({row['remark']})" if row["remark"] else "")


def _grouped(pairs: Any) -> dict[str, list[str]]:
    """Who shares each text, in order."""
    found: dict[str, list[str]] = {}
    for text, name in pairs:
        names = found.setdefault(text, [])
        if name not in names:
            names.append(name)
    return found


def _bullets(title: str, texts: Mapping[str, Sequence[str]]) -> str:
    return f"{title}:\n\n" + "\n".join(f"- {', '.join(names)}: {text}." for text, names in texts.items())
