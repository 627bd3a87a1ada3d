"""What may be compared with what: runs of one set-up, and the published number beside each."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import zip_longest
from typing import Any

from mustdrop.budget import knob_text
from mustdrop.eval.published import Published, published, rows
from mustdrop.eval.questions import Told
from mustdrop.eval.report.questions import BASELINES, DOWNSAMPLED, Beside, abilities, beside
from mustdrop.eval.result import EvalResult

UNPRUNED = "none"
Run = tuple[EvalResult, Sequence[Told] | None]  # and what was said to each question
NEAR = 0.05  # how far from a published budget a run without one may be
MUCH_FAILED = 0.01  # of the questions, from which a run is said to be incomplete


@dataclass(frozen=True)
class Row:
    """One run.

    Attributes:
        result: what it found.
        retained: its score over that of the unpruned run of the same set-up; None without one.
        published: the published score of this benchmark, model, method and budget; None where none is known.
        published_retained: the same share, of the published scores.
        beside: the run beside the unpruned one, question by question; None where there is no such file.
        abilities: ability -> mean credit and number of questions; empty where there is no such file.
    """

    result: EvalResult
    retained: float | None
    published: Published | None
    published_retained: float | None
    beside: Beside | None = None
    abilities: Mapping[str, tuple[float, int]] = field(default_factory=dict)

    @property
    def setting(self) -> str:
        """The method and its knobs."""
        return setting(self.result)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        result = self.result
        return {
            "method": result.method,
            "keep": result.keep,
            "knobs": result.knobs,
            "score": result.score,
            "scores": result.scores,
            "retained": self.retained,
            "equal_tokens": result.tokens and result.tokens.equal.model_dump(),
            "flops_ratio": result.cost and result.cost.flops_ratio,
            "kv_ratio": result.cost and result.cost.kv_ratio,
            "prefill_ms": result.latency and result.latency.prefill_ms,
            "decode_ms": result.latency and result.latency.decode_ms,
            "method_time": result.method_time and result.method_time.model_dump() | {"share": result.method_time.share},
            "peak_memory_bytes": result.peak_memory_bytes,
            "failed_share": result.failed_share,
            "published": self.published and {"score": self.published.score, "source": self.published.source},
            "published_retained": self.published_retained,
            "answer": result.answer and result.answer.model_dump(),
            **self._questions(),
        }

    def _questions(self) -> dict[str, Any]:
        apart, divided = (self.beside and self.beside.apart), (self.beside and self.beside.divided)
        return {
            "same_answer": self.beside and self.beside.same,
            "mcnemar": apart and apart.to_dict(),
            "vtc": divided and asdict(divided) | dict(zip(("hard_share", "easy_share"), divided.shares, strict=True)),
            "abilities": {name: {"credit": c, "questions": n} for name, (c, n) in self.abilities.items()},
        }


@dataclass(frozen=True)
class Group:
    """Runs of one set-up: the same questions, put to the same model in the same way.

    Attributes:
        setup: `EvalResult.setup_sha256`.
        rows: the unpruned run first, then by method and from many tokens to few.
        unpruned: the run that the others are compared with, None if there is none.
        notes: what a reader must know before comparing.
    """

    setup: str
    rows: list[Row]
    unpruned: EvalResult | None
    notes: list[str]

    @property
    def first(self) -> EvalResult:
        """Any run: what belongs to the set-up is the same in all."""
        return self.rows[0].result

    @property
    def title(self) -> str:
        """Benchmark, model and data."""
        result = self.first
        asked, there = result.data.asked, result.data.questions
        part = f"{asked} of {there}" if asked != there else str(there)
        return f"{result.title} ({result.metric}), {result.model.name}, {part} questions"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        result = self.first
        return {
            "benchmark": result.benchmark,
            "metric": result.metric,
            "headline": result.headline,
            "model": result.model.name,
            "setup_sha256": self.setup,
            "questions": result.data.asked,
            "rows": [row.to_dict() for row in self.rows],
            "notes": self.notes,
        }


@dataclass(frozen=True)
class Average:
    """One setting of one model over several benchmarks, as papers' last column has it.

    Attributes:
        model: name of the model.
        setting: the method and its knobs.
        retained: mean over the benchmarks of the share of the unpruned score.
        benchmarks: their names.
    """

    model: str
    setting: str
    retained: float
    benchmarks: tuple[str, ...]


def setting(run: EvalResult) -> str:
    """The method of a run and its knobs in words."""
    if run.method == UNPRUNED:
        return "unpruned"
    knobs = {"keep": run.keep} | run.knobs if run.keep is not None else run.knobs
    return " ".join([run.method, *(knob_text(name, value) for name, value in knobs.items())])


def group(results: Iterable[EvalResult], told: Sequence[Sequence[Told] | None] = ()) -> list[Group]:
    """Sort runs into set-ups; runs of different set-ups are never compared.

    Args:
        results: what evaluations found.
        told: of each result, its questions with what was said to them, or None.

    Returns:
        One group per set-up, in the order in which they came.
    """
    by_setup: dict[tuple[str, str], list[Run]] = {}
    for result, questions in zip_longest(results, told):
        by_setup.setdefault((result.benchmark, result.setup_sha256), []).append((result, questions))
    groups = [_group(setup, runs) for (_, setup), runs in by_setup.items()]
    for one in groups:
        others = [o.first for o in groups if o is not one and o.first.benchmark == one.first.benchmark]
        different = [_difference(one.first, other) for other in others if other.model.name == one.first.model.name]
        one.notes.extend(
            f"Not comparable with the other set-up of this model on {one.first.title}: {text}." for text in different
        )
    return groups


def averages(groups: Sequence[Group]) -> list[Average]:
    """Mean of what is retained, per model and setting, where more than one benchmark has an unpruned run.

    Args:
        groups: the set-ups; where a benchmark has several of one model, it is left out, since none is the right one.
    """
    found: dict[tuple[str, str, str], dict[str, list[float]]] = {}
    for one in groups:
        for row in one.rows:
            if row.retained is not None and row.result.method != UNPRUNED:
                model = one.first.model
                benchmarks = found.setdefault((model.name, model.config_sha256, row.setting), {})
                benchmarks.setdefault(one.first.benchmark, []).append(row.retained)
    out = []
    for (name, _, knobs), benchmarks in found.items():
        single = {benchmark: shares[0] for benchmark, shares in benchmarks.items() if len(shares) == 1}
        if len(single) > 1:
            out.append(Average(name, knobs, statistics.mean(single.values()), tuple(single)))
    return out


def _group(setup: str, runs: list[Run]) -> Group:
    plain = [run for run in runs if run[0].method == UNPRUNED]
    unpruned = plain[0] if plain else None
    small = {run.keep: told for run, told in runs if run.method == DOWNSAMPLED}
    rows = []
    for run, told in sorted(runs, key=lambda one: _order(one[0])):
        row = _row(run, unpruned and unpruned[0])
        if told is not None:
            compared = unpruned is not None and unpruned[1] is not None and run.method != UNPRUNED
            row = replace(
                row,
                abilities=abilities(told),
                beside=beside(told, unpruned[1], small.get(run.keep)) if compared else None,  # type: ignore[index, arg-type]
            )
        rows.append(row)
    results = [run for run, _ in runs]
    notes = [*_baselines(results), *_notes(results, [run for run, _ in plain])]
    return Group(setup, rows, unpruned and unpruned[0], notes)


def _baselines(runs: Sequence[EvalResult]) -> Iterable[str]:
    """What is missing to tell a method's merit from what its budget costs."""
    there: dict[Any, set[str]] = {}
    for run in runs:
        if run.keep is not None:
            there.setdefault(run.keep, set()).add(run.method)
    for keep, methods in sorted(there.items(), key=lambda item: str(item[0])):
        missing = [name for name in BASELINES if name not in methods]
        if missing and methods - set(BASELINES):
            yield (
                f"At {knob_text('keep', keep)} there is no run of {', '.join(missing)}: what the budget itself costs "
                f"is not known. `mustdrop eval` takes --method several times."
            )


def _order(run: EvalResult) -> tuple[bool, str, float]:
    return run.method != UNPRUNED, run.method, -(run.tokens.equal.mean if run.tokens else 0.0)


def _row(run: EvalResult, unpruned: EvalResult | None) -> Row:
    known = published(run.benchmark, run.model.name, run.method, budget(run))
    whole = published(run.benchmark, run.model.name, UNPRUNED, None)
    base = unpruned.score if unpruned is not None else None
    return Row(
        run,
        run.score / base if run.score is not None and base else None,
        known,
        known.score / whole.score if known and whole else None,
    )


def budget(run: EvalResult) -> int | None:
    """The budget of a published table that a run belongs to: its own in tokens, else what it came out at.

    Thresholds, the rank rule and shares name no number of tokens. Where the tokens that a run kept, counted as the
    tables count them, are within a twentieth of a published budget, it belongs to that.
    """
    if isinstance(run.keep, int) or run.tokens is None:
        return run.keep if isinstance(run.keep, int) else None
    kept = run.tokens.reported.mean
    near = min({row.tokens for row in rows()}, key=lambda tokens: abs(tokens - kept))
    return near if abs(near - kept) <= NEAR * near else None


def _notes(runs: list[EvalResult], plain: list[EvalResult]) -> Iterable[str]:
    if not plain:
        yield (
            "There is no unpruned run of this set-up, so no share of it can be given: run `mustdrop eval` with the "
            "same options and --method none, and name its result too."
        )
    if len({run.score for run in plain}) > 1:
        scores = ", ".join(str(run.score) for run in plain)
        yield f"There are {len(plain)} unpruned runs with different scores ({scores}): shares are those of the first."
    if any(run.score is None for run in runs):
        yield "Some runs have no score: their answers go to the server of the benchmark."
    if runs[0].data.limit is not None:
        yield "Not all questions were asked (--limit), and published numbers are those of all."
    if any(run.method_time for run in runs):
        yield (
            "The time of the method and its share are those of questions asked one by one; prefill ms is that of the "
            "run's own batches."
        )
    unmeasured = [run for run in runs if run.method_time is None and run.method != UNPRUNED]
    if unmeasured:
        names = ", ".join(repr(setting(run)) for run in unmeasured)
        found = f"not measured in {names}" if any(run.method_time for run in runs) else "measured in no run"
        yield (
            f"The time of the method was {found}: the same `mustdrop eval` once more, with --method-time 8, adds it to "
            "the folder of a run that is done."
        )
    for run in runs:
        if run.method != UNPRUNED and not isinstance(run.keep, int) and _row(run, None).published is not None:
            yield f"{setting(run)!r} names no number of tokens: its published number is that of {budget(run)} tokens."
        if run.failed_share >= MUCH_FAILED:
            yield (
                f"{run.failed_share:.1%} of the questions of {setting(run)!r} failed and count as wrong: "
                f"first {run.failed[0].name if run.failed else '?'}."
            )


def _difference(one: EvalResult, other: EvalResult) -> str:
    """Which settings two set-ups differ in, with their values."""
    parts = [{"model": r.model, "prompt": r.prompt, "data": r.data} for r in (one, other)]
    flat = [{f"{name}.{k}": v for name, part in p.items() for k, v in part.model_dump().items()} for p in parts]
    told = [name for name in flat[0] if flat[0][name] != flat[1][name] and name not in ("data.files", "prompt.example")]
    texts = [f"{name} is {_short(flat[0][name])} here and {_short(flat[1][name])} there" for name in told]
    return "; ".join(texts) or "its settings differ in something that the result file does not name"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
