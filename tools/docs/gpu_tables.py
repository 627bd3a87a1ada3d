"""The tables of what a GPU run measured: the kernels, a whole model (on a CPU too), and what was promised of both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Table = Callable[..., str]
Record = Mapping[str, Any]

#: Operations of the kernels that a share of the roofline was promised for.
PROMISED = ("text statistics", "window similarity", "merge tokens", "gather rows", "compact")
SHARE_OF_ROOFLINE, SHARE_OF_FLOPS, MOST_OVERHEAD = 0.80, 0.95, 0.01
FILTERS = 4  # layers at which `mustdrop` scores and gathers by default


def kernels(record: Record, table: Table) -> str:
    """One row per operation and size: time on the device, share of the roofline, against eager and compiled."""
    lines = []
    for (operation, size), runs in _by_variant(record).items():
        own, compiled = runs["kernel"], runs.get("compiled")
        rate = f"{own['gbytes_per_second']:,.0f} GB/s"
        if own["tflops"] >= 1:
            rate += f", {own['tflops']:.0f} TFLOP/s"
        lines.append(
            (
                operation,
                size,
                f"{1e6 * own['device_seconds']['median']:.1f}",
                rate,
                f"{own['share_of_roofline']:.0%}",
                f"{own['share_of_roofline_and_launch']:.0%}",
                _times(own["speed_up_over_eager"]["median"]),
                _over(own, compiled, "device_seconds"),
                _over(own, runs["eager"], "call_seconds"),
                _over(own, compiled, "call_seconds"),
            )
        )
    header = ("operation", "size", "µs", "rate", "of the roofline", "with one launch", "× eager", "× compiled")
    limits = record["ceilings"]
    sentence = (
        f"{_setting(record)}; {record['dtype']}, {record['rounds']} rounds. Ceilings of the same run: "
        f"{limits['bytes_per_second'] / 1e12:.2f} TB/s (a copy), {limits['flops'] / 1e12:.0f} TFLOP/s (a matrix "
        f"product), {1e6 * limits['launch_seconds']:.1f} µs for a launch that does nothing."
    )
    return sentence + "\n\n" + table((*header, "× eager, per call", "× compiled, per call"), lines)


def growth(record: Record, table: Table) -> str:
    """What scoring costs as vision tokens grow, and how that compares with growing in proportion."""
    points = record["growth"]
    lines = []
    for before, point in zip([None, *points], points, strict=False):
        more = ""
        if before is not None:
            tokens = point["vision_tokens"] / before["vision_tokens"]
            more = f"{point['kernel']['median'] / before['kernel']['median']:.2f} for {tokens:.2f} × the tokens"
        times = (f"{1e6 * point[name]['median']:.1f}" for name in ("kernel", "eager"))
        lines.append((f"{point['vision_tokens']:,}", *times, more))
    return table(("vision tokens", "kernel µs", "reference µs", "kernel, × the row above"), lines)


def serving(record: Record, table: Table) -> str:
    """One table per model: time to the first token and its parts, decoding and memory, as ratios to unpatched."""
    parts = [
        f"{_setting(record)}; medians of {record['pairs']} pairs of neighbouring runs, {record['decode_steps']} decode "
        f"steps, {record['threads']} threads."
    ]
    for model in record["models"]:
        if not model["rows"]:
            continue
        title = (
            f"**{model['model']}**, {model['parameters'] / 1e9:.1f} B parameters with random values, {model['dtype']}; "
            f"{model['vision_tokens']} vision and {model['text_tokens']} text tokens"
        )
        lines = [_served(row) for row in model["rows"]]
        columns = len(_SERVING) if any(line[-1] for line in lines) else len(_SERVING) - 1  # no peak on a CPU
        parts.append(title + "\n\n" + table(_SERVING[:columns], [line[:columns] for line in lines]))
    if record["left_out"]:
        parts.append("Left out: " + "; ".join(record["left_out"]) + ".")
    return "\n\n".join(parts)


_SERVING = (
    "attention",
    "batch",
    "keep",
    "first token",
    "prefill",
    "FLOPs ratio",
    "share of it",
    "bare layers",
    "ms: vision / prefill / pruning / rest",
    "decoding",
    "KV bytes",
    "peak memory",
)


def _served(row: Record) -> tuple[object, ...]:
    parts, prefill, kv = row["parts"], row["prefill"], row["kv_bytes"]
    peak = row.get("peak_bytes")
    return (
        row["attention"],
        row["batch"],
        f"{row['keep']} ({row['share']:.0%})",
        _times(row["first_token"]["speed_up"]["median"]),
        _times(prefill["speed_up"]["median"]),
        f"{prefill['flops_ratio']:.2f}",
        f"{prefill['share_of_flops_ratio']:.0%}",
        _times(prefill["of_bare_layers"]["median"]),
        " / ".join(f"{1e3 * parts[name]['median']:.1f}" for name in ("vision", "prefill", "pruning", "rest")),
        _times(row["decode"]["speed_up"]["median"]),
        f"{kv['patched'] / kv['unpatched']:.0%}",
        f"{peak['patched'] / peak['unpatched']:.0%}" if peak else "",
    )


def targets(results: Mapping[str, Record], table: Table) -> str:
    """What was promised of a GPU, what came out, and whether it is met."""
    kernels_, served = results["kernels_cuda"], results["serving_cuda"]
    rows = [row for model in served["models"] for row in model["rows"]]
    pruned = [row for row in rows if row["share"] < 1]
    at_192 = [row for row in rows if row["keep"] == 192]
    lines = [_of_roofline(kernels_, name) for name in PROMISED]
    work = _extremes([_scoring(kernels_, row) for row in at_192 if row["attention"] == "sdpa"])
    host = _extremes(
        [row["parts"]["pruning"]["median"] / row["prefill"]["seconds_patched"]["median"] for row in at_192]
    )
    lines += [
        (
            "scoring and gathering at keep=192, time on the device",
            "at most 1 % of the prefill",
            _range(work),
            "met" if work[1] <= MOST_OVERHEAD else "missed",
        ),
        ("all that pruning takes at keep=192, Python included", "", f"{_range(host)} of the prefill", ""),
        _over_rows("prefill", "at least 95 % of the FLOPs ratio", pruned, _share),
        _over_rows("bare layers: what the hardware itself gains", "", pruned, _bare),
    ]
    for batch, aim in ((1, "never slower"), (8, "faster")):
        speeds = _extremes([r["decode"]["speed_up"]["median"] for r in pruned if r["batch"] == batch])
        good = speeds[0] >= 1 if batch == 1 else speeds[0] > 1
        lines.append(
            (f"decoding, batch {batch}", aim, f"× {speeds[0]:.2f} to {speeds[1]:.2f}", "met" if good else "missed")
        )
    lines.append(_against_compiled(kernels_))
    return table(("what", "aimed at", "measured", ""), lines)


def _of_roofline(record: Record, operation: str) -> tuple[object, ...]:
    found = [runs["kernel"] for (name, _), runs in _by_variant(record).items() if name == operation]
    shares = _extremes([run["share_of_roofline"] for run in found])
    launch = _extremes([run["share_of_roofline_and_launch"] for run in found])
    met = sum(run["share_of_roofline"] >= SHARE_OF_ROOFLINE for run in found)
    verdict = "met" if met == len(found) else f"met at {met} of {len(found)} sizes" if met else "missed"
    return (
        f"`{operation}`",
        "at least 80 % of the roofline",
        f"{_range(shares)}; {_range(launch)} with one launch",
        verdict,
    )


def _scoring(record: Record, row: Record) -> float:
    """Device time of scoring and gathering at every filter layer, as a share of the patched prefill."""
    size = "LLaVA-1.5-7B" + (", batch 8" if row["batch"] == 8 else "")
    runs = _by_variant(record)
    seconds = sum(runs[name, size]["kernel"]["device_seconds"]["median"] for name in ("text statistics", "gather rows"))
    return float(FILTERS * seconds / row["prefill"]["seconds_patched"]["median"])


def _share(row: Record) -> float:
    return float(row["prefill"]["share_of_flops_ratio"])


def _bare(row: Record) -> float:
    return float(row["prefill"]["of_bare_layers"]["median"] / row["prefill"]["flops_ratio"])


def _over_rows(what: str, aim: str, rows: Sequence[Record], of: Callable[[Record], float]) -> tuple[object, ...]:
    """A share of the FLOPs ratio, by batch."""
    shares = {batch: _extremes([of(row) for row in rows if row["batch"] == batch]) for batch in (1, 8)}
    text = "; ".join(f"batch {batch}: {_range(pair)}" for batch, pair in shares.items())
    verdict = "met" if min(pair[0] for pair in shares.values()) >= SHARE_OF_FLOPS else "missed"
    return what, aim, f"{text} of it", verdict if aim else ""


def _against_compiled(record: Record) -> tuple[object, ...]:
    runs = [pair for pair in _by_variant(record).values() if "compiled" in pair]
    device = [_ratio(pair["compiled"], pair["kernel"], "device_seconds") for pair in runs]
    call = sum(_ratio(pair["compiled"], pair["kernel"], "call_seconds") > 1 for pair in runs)
    low, high = _extremes(device)
    return (
        "kernels against `torch.compile` of their references",
        "faster, or deleted",
        f"on the device × {low:.2f} to {high:.2f}; per call, host included, faster in {call} of {len(runs)}",
        "met on the device" if low > 1 else "missed",
    )


def _by_variant(record: Record) -> dict[tuple[str, str], dict[str, Record]]:
    found: dict[tuple[str, str], dict[str, Record]] = {}
    for row in record["rows"]:
        found.setdefault((row["operation"], row["size"]), {})[row["variant"]] = row
    return found


def _ratio(above: Record, below: Record, clock: str) -> float:
    return float(above[clock]["median"] / below[clock]["median"])


def _over(own: Record, other: Record | None, clock: str) -> str:
    return "" if other is None else _times(_ratio(other, own, clock))


def _times(ratio: float) -> str:
    return f"{ratio:.2f}"


def _extremes(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)


def _range(pair: tuple[float, float]) -> str:
    low, high = (f"{100 * value:.2g} %" if value < 0.1 else f"{value:.0%}".replace("%", " %") for value in pair)
    return low if low == high else f"{low} to {high}"


def _setting(record: Record) -> str:
    versions = ", ".join(f"{name} {record['versions'][name]}" for name in ("torch", "transformers", "python"))
    commit = str(record["commit"])[:10] + (" and changes on top" if record["dirty"] else "")
    return f"{record['hardware']}, load average {record['load_average']} before the run; {versions}; commit {commit}"
