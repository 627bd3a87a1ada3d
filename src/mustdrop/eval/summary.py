"""Puts the lines of a journal together into a result."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from mustdrop.eval.benchmark import Answer
from mustdrop.eval.engine import Engine
from mustdrop.eval.journal import Line
from mustdrop.eval.prepare import Prepared
from mustdrop.eval.result import EvalResult
from mustdrop.eval.result_parts import (
    AnswerInfo,
    CostInfo,
    Failure,
    LatencyInfo,
    MethodTimeInfo,
    ModelInfo,
    Spread,
    TimeInfo,
    TokenInfo,
)

_PARTS = ("data", "vision", "prefill", "decode", "other")


def summarise(
    ready: Prepared,
    answers: Sequence[Answer],
    lines: Sequence[Line],
    files: list[str],
    starts: Sequence[Line],
    method_time: Line | None = None,
) -> EvalResult:
    """The result.

    Args:
        ready: what was run.
        answers: in the order of the questions.
        lines: the journal's line of each answer.
        files: answer files.
        starts: the journal's lines of all starts of a process.
        method_time: what the journal says about the time of the method, if it was measured.
    """
    failed = [
        Failure(name=str(answer.item.id), reason=line["failed"])
        for answer, line in zip(answers, lines, strict=True)
        if answer.failed
    ]
    said = [line for line in lines if "failed" not in line]
    benchmark, settings, broken = ready.benchmark, ready.settings, ready.folder.broken
    first = starts[0]["start"]
    name, knobs = settings.described
    return EvalResult(
        benchmark=benchmark.name,
        title=benchmark.title,
        scores={name: round(value, 4) for name, value in benchmark.scores(answers).items()},
        headline=benchmark.headline,
        headline_max=benchmark.headline_max,
        metric=benchmark.metric,
        method=name,
        keep=knobs.get("keep"),
        knobs=knobs,
        setup_sha256=ready.setup,
        model=_model(ready.engine, said),
        prompt=ready.prompt,
        data=ready.data,
        tokens=_tokens([line for line in said if line["total"]]),
        cost=_cost(said),
        answer=_answer(said),
        latency=_latency(said, settings.batch_size),
        method_time=None if method_time is None else MethodTimeInfo(**method_time),
        time=_time(lines, starts),
        peak_memory_bytes=max((line["peak"] for line in said), default=0),
        failed=[*broken, *failed],
        failed_share=(len(failed) + len(broken)) / (len(answers) + len(broken)),
        answers=files,
        provenance=first,
        resumed=_different(first, [line["start"] for line in starts[1:]]),
    )


def _different(first: dict[str, Any], later: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Starts on another commit, machine or version than the first one; another day alone is no difference."""
    found: list[dict[str, Any]] = []
    for start in later:
        if all(start != other | {"date": start["date"]} for other in [first, *found]):
            found.append(start)
    return found


def _model(engine: Engine, said: Sequence[Line]) -> ModelInfo:
    identity = engine.identity()
    return ModelInfo(
        name=engine.name,
        architecture=type(engine.model).__name__,
        config_sha256=identity["model_config"],
        layers=engine.layers,
        dtype=identity["dtype"],
        device=str(engine.device),
        attention=identity["attention"],
        kernels=" and ".join(sorted({line["kernels"] for line in said})) or "none",
    )


def _spread(values: Sequence[float]) -> Spread:
    return Spread(
        mean=statistics.fmean(values), std=statistics.pstdev(values), min=float(min(values)), max=float(max(values))
    )


def _tokens(said: Sequence[Line]) -> TokenInfo | None:
    if not said:
        return None
    return TokenInfo(
        items=len(said),
        total=_spread([line["total"] for line in said]),
        equal=_spread([line["equal"] for line in said]),
        reported=_spread([line["reported"] for line in said]),
    )


def _cost(said: Sequence[Line]) -> CostInfo | None:
    if not said:
        return None
    mean = {
        key: statistics.fmean(line[key] for line in said) for key in ("flops", "flops_unpruned", "kv", "kv_unpruned")
    }
    return CostInfo(
        flops=mean["flops"],
        flops_unpruned=mean["flops_unpruned"],
        kv_bytes=mean["kv"],
        kv_bytes_unpruned=mean["kv_unpruned"],
    )


def _answer(said: Sequence[Line]) -> AnswerInfo | None:
    whole = [line for line in said if "answer_flops" in line]
    if not whole or len(whole) < len(said):  # answered by an older version, which did not count
        return None
    names = {
        "prompt_tokens": "prompt",
        "tokens": "tokens",
        "flops": "answer_flops",
        "flops_unpruned": "answer_flops_unpruned",
    }
    return AnswerInfo(**{field: statistics.fmean(line[name] for line in whole) for field, name in names.items()})


def _latency(said: Sequence[Line], batch_size: int) -> LatencyInfo | None:
    if not said:
        return None
    steps = [line["step_s"] for line in said if line["step_s"] is not None]
    return LatencyInfo(
        batch_size=batch_size,
        prefill_ms=1000 * statistics.median(line["first_s"] for line in said),
        decode_ms=1000 * statistics.median(steps) if steps else None,
    )


def _time(lines: Sequence[Line], starts: Sequence[Line]) -> TimeInfo:
    seconds = {part: sum(line["times"][part] for line in lines if "times" in line) for part in _PARTS}
    whole = sum(seconds.values())
    shares = {part: value / whole if whole else 0.0 for part, value in seconds.items()}
    return TimeInfo(seconds=whole, processes=max(start["processes"] for start in starts), **shares)
