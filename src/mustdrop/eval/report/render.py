"""Comparison tables for the terminal and in Markdown. The same cells, so that neither knows more than the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from mustdrop.eval.report.groups import Average, Group, Row

BESIDE = (
    "setting", "same answer", "gained", "lost", "McNemar p", "right where a smaller picture fails", "and where it does",
    "prompt tokens", "answer tokens", "FLOPs of an answer",
)  # fmt: skip
HEADER = ("setting", "score", "retained", "tokens per layer", "FLOPs", "KV", "prefill ms", "decode ms", "published")
METHOD_TIME = "method ms (share of prefill)"  # a column of its own where a run of the table has it
AVERAGES = ("model", "setting", "mean retained", "benchmarks")
_NOTHING = "-"
_FRAME = 3  # what a column takes beside its cells: a blank on both sides, and a line


def comparison(group: Group, sources: list[str]) -> list[tuple[str, ...]]:
    """Header and rows of the table of a group.

    Args:
        group: the runs.
        sources: of the published numbers so far; a new one is added, and its number stands beside the score.
    """
    rows = [HEADER, *(cells(row, sources) for row in group.rows)]
    if all(row.result.method_time is None for row in group.rows):
        return rows
    place = HEADER.index("decode ms")
    added = [METHOD_TIME, *(_method_time(row) for row in group.rows)]
    return [(*row[:place], own, *row[place:]) for row, own in zip(rows, added, strict=True)]


def _method_time(row: Row) -> str:
    own = row.result.method_time
    return _NOTHING if own is None else f"{_number(own.method_ms)} ({_share(own.share)})"


def cells(row: Row, sources: list[str]) -> tuple[str, ...]:
    """The cells of one run, without the time of the method.

    Args:
        row: the run.
        sources: see `comparison`.
    """
    result = row.result
    tokens, cost, latency = result.tokens, result.cost, result.latency
    return (
        row.setting,
        _number(result.score),
        _share(row.retained),
        f"{tokens.equal.mean:.1f} ± {tokens.equal.std:.1f}" if tokens else _NOTHING,
        _share(cost.flops_ratio if cost else None),
        _share(cost.kv_ratio if cost else None),
        _number(latency.prefill_ms if latency else None),
        _number(latency.decode_ms if latency else None),
        _published(row, sources),
    )


def _published(row: Row, sources: list[str]) -> str:
    if row.published is None:
        return _NOTHING
    if row.published.source not in sources:
        sources.append(row.published.source)
    mark = f"[{sources.index(row.published.source) + 1}]"
    share = f" ({_share(row.published_retained)})" if row.published_retained is not None else ""
    return f"{_number(row.published.score)}{share} {mark}"


def beside_cells(row: Row, unpruned: Row | None) -> tuple[str, ...]:
    """The cells of one run in the table of questions.

    Args:
        row: the run.
        unpruned: the run that its FLOPs are a share of.
    """
    answer, beside = row.result.answer, row.beside
    apart = beside.apart if beside else None
    divided = beside.divided if beside else None
    whole = unpruned and unpruned.result.answer
    shares = divided.shares if divided else (None, None)
    sizes = (divided.hard, divided.easy) if divided else (0, 0)
    return (
        row.setting,
        _share(beside.same if beside else None),
        _NOTHING if apart is None else str(apart.gained),
        _NOTHING if apart is None else str(apart.lost),
        _NOTHING if apart is None else f"{apart.p:.2g}",
        *(_NOTHING if s is None else f"{_share(s)} of {n}" for s, n in zip(shares, sizes, strict=True)),
        _number(answer.prompt_tokens if answer else None),
        _NOTHING if answer is None else f"{answer.tokens:.2f}",
        _share(answer.flops / whole.flops if answer and whole and whole.flops else None),
    )


def beside_rows(group: Group) -> list[tuple[str, ...]]:
    """The table of questions without its header; empty where no run of the group has them."""
    if not any(row.abilities or row.beside for row in group.rows):
        return []
    unpruned = next((row for row in group.rows if row.result is group.unpruned), None)
    return [beside_cells(row, unpruned) for row in group.rows]


def ability_rows(group: Group) -> list[tuple[str, ...]]:
    """Header and rows of accuracy by ability; empty where there are fewer than two abilities."""
    names = list(dict.fromkeys(name for row in group.rows for name in row.abilities))
    if len(names) < 2:
        return []
    sizes = {name: next(row.abilities[name][1] for row in group.rows if name in row.abilities) for name in names}
    header = ("setting", *(f"{name} ({sizes[name]})" for name in names))
    return [
        header,
        *(
            (row.setting, *(_share(row.abilities[name][0] if name in row.abilities else None) for name in names))
            for row in group.rows
        ),
    ]


def average_cells(average: Average) -> tuple[str, ...]:
    """The cells of one mean over benchmarks."""
    return average.model, average.setting, _share(average.retained), ", ".join(average.benchmarks)


def footnotes(group: Group, sources: Sequence[str]) -> list[str]:
    """What stands below a table: notes, then where published numbers were read."""
    marks = [f"[{i}] Published score (share of the published unpruned one): {s}." for i, s in enumerate(sources, 1)]
    return [*group.notes, *marks]


def rich_table(group: Group, width: int) -> tuple[Table, list[str]]:
    """A group for the terminal, and what stands below it.

    Args:
        group: the runs.
        width: of the terminal; in a narrow one every word of a cell gets a line of its own.
    """
    sources: list[str] = []
    table = _drawn(comparison(group, sources), group.title, width)
    return table, footnotes(group, sources)


def show(groups: Sequence[Group], console: Console) -> None:
    """Print all groups."""
    for group in groups:
        table, notes = rich_table(group, console.width)
        console.print(table, markup=False)
        for note in notes:
            console.print(note, markup=False, highlight=False)
        if rows := beside_rows(group):
            console.print(_drawn([BESIDE, *rows], "Beside the unpruned run, question by question", console.width))
        if rows := ability_rows(group):
            console.print(_drawn(rows, "By ability (questions)", console.width))
        console.print()


def _drawn(rows: list[tuple[str, ...]], title: str, width: int) -> Table:
    """A table for the terminal; in a narrow one every word of a cell gets a line of its own."""
    narrow = sum(max(map(len, column)) + _FRAME for column in zip(*rows, strict=True)) >= width
    if narrow:
        rows = [tuple(cell.replace("± ", "±\u00a0").replace(" ", "\n") for cell in row) for row in rows]
    look: dict[str, Any] = {"box": box.SIMPLE_HEAD, "padding": 0, "pad_edge": False} if narrow else {}
    table = Table(title=title, title_justify="left", **look)
    for i, name in enumerate(rows[0]):
        table.add_column(name, justify="right" if i else "left", overflow="fold", no_wrap=narrow and i > 0)
    for row in rows[1:]:
        table.add_row(*row)
    return table


def markdown(groups: Sequence[Group], means: Sequence[Average]) -> str:
    """All groups as Markdown."""
    blocks = []
    for group in groups:
        sources: list[str] = []
        header, *rows = comparison(group, sources)
        notes = "\n".join(f"- {note}" for note in footnotes(group, sources))
        blocks.append(f"### {group.title}\n\n{_table(header, rows)}" + (f"\n\n{notes}" if notes else ""))
        if own := beside_rows(group):
            blocks.append(f"Beside the unpruned run, question by question:\n\n{_table(BESIDE, own)}")
        if own := ability_rows(group):
            blocks.append(f"By ability (questions):\n\n{_table(own[0], own[1:])}")
    if means:
        blocks.append("### Mean over benchmarks\n\n" + _table(AVERAGES, [average_cells(mean) for mean in means]))
    return "\n\n".join(blocks) + "\n"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *([cell.replace("|", r"\|") for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _share(value: float | None) -> str:
    return _NOTHING if value is None else f"{value:.1%}"


def _number(value: float | None) -> str:
    if value is None:
        return _NOTHING
    return f"{value:.0f}" if value == round(value) or abs(value) >= 1000 else f"{value:.1f}"
