"""The tables of vLLM with the plugin, from the result file of `python -m benchmarks vllm`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Table = Callable[..., str]

SPEED = (
    "at a time",
    "`keep`",
    "prompt tokens",
    "KV blocks",
    "requests per second",
    "throughput",
    "processor time",
    "latency, s",
)
ROOM = ("`keep`", "prompt tokens", "requests at once", "KV blocks used", "preemptions", "steps")


def render(record: Mapping[str, Any], table: Table) -> str:
    """The setting, speed by concurrency, and what fits into a small cache."""
    versions = record["versions"]
    commit = str(record["commit"])[:10] + (" (dirty tree)" if record["dirty"] else "")
    setting = (
        f"The {record['model']} model ({record['dtype']}, {record['vision_tokens']} vision tokens, "
        f"`{record['method']}`) in vLLM {record['vllm']} on {record['hardware']}, "
        f"load average {record['load_average']} before the run; torch {versions['torch']}, transformers "
        f"{versions['transformers']}, commit {commit}. {record['rounds']} rounds of {record['requests']} "
        f"requests with different pictures, {record['new_tokens']} tokens each, prefix cache off. "
        "Throughput and processor time are relative to vLLM's own class in the same round: median (and extremes)."
    )
    rows = [
        (
            row["concurrency"],
            name(row["keep"], record["vision_tokens"]),
            row["prompt_tokens"],
            row["blocks_used"],
            f"{row['requests_per_second']:.2f}",
            spread(row["throughput"]),
            spread(row["processor"]),
            f"{row['latency']['median']:.2f} (to {row['latency']['max']:.2f})",
        )
        for row in record["rows"]
    ]
    cache = record["small_cache"]
    room = [
        (
            name(row["keep"], record["vision_tokens"]),
            row["prompt_tokens"],
            row["running"],
            row["blocks_used"],
            row["preemptions"],
            row["steps"],
        )
        for row in cache["rows"]
    ]
    small = (
        f"A KV cache of {cache['blocks']} blocks of {record['block']} tokens, {cache['requests']} requests at the same "
        f"time, answers of {cache['new_tokens']} tokens: how many ran at once at most, how often one was thrown out "
        "for want of room and begun again, and how many steps of the engine answered all "
        f"(commit {str(cache['commit'])[:10]})."
    )
    return f"{setting}\n\n{table(SPEED, rows)}\n\n{small}\n\n{table(ROOM, room)}\n\nThe command: `{record['command']}`."


def name(keep: Any, total: int) -> str:
    """How a row is called."""
    if keep is None:
        return "vLLM's own class"
    return "all" if keep == 1.0 else f"{keep} ({keep / total:.0%})"


def spread(values: Mapping[str, float]) -> str:
    """Median and extremes."""
    return f"{values['median']:.2f} ({values['min']:.2f} to {values['max']:.2f})"
