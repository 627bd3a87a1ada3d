"""The generated parts of the first page: two numbers, what is saved and what not, methods, families, proof."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping
from typing import Any

import method_cards

Table = Callable[..., str]
Record = Mapping[str, Any]
Results = Mapping[str, Record]

SMALL, LARGE = 64, 192  # budgets that the page speaks of
VISION = 576  # tokens of the prompts of all runs but the one by length
EVEN = 0.05  # a ratio as near to 1 as this is called the same
STAGES = (("before the encoder", "input"), ("vision encoder", "encoder"), ("prefill", "prefill"), ("KV cache", "cache"))


def headline(results: Results, table: Table) -> str:
    """One sentence with two measured numbers."""
    served = results["serving_cuda"]
    row, alone = _row(served, batch=8, keep=SMALL), _first(_row(served, batch=1, keep=SMALL))
    model = served["models"][0]
    return (
        f"Measured: with {SMALL} of {model['vision_tokens']} vision tokens, a model of the size of LLaVA-1.5-7B on an "
        f"{_gpu(served)} starts answering eight prompts **{_first(row):.1f} times as fast**, and its KV cache takes "
        f"**{_kv(row):.0%}** of the memory. One such prompt alone is {_says([alone])} ({alone:.2f} x): "
        "[when it helps](#when-it-helps-and-when-not)."
    )


def facts(results: Results, table: Table) -> str:
    """Five rows of the default method: speed on a GPU and a CPU, memory, quality, and the price."""
    served, cpu, quality = results["serving_cuda"], results["end_to_end_cpu"], results["quality_fixed"]
    large, small = _row(served, batch=8, keep=LARGE), _row(served, batch=8, keep=SMALL)
    alone = [_first(_row(served, batch=1, keep=keep)) for keep in (LARGE, SMALL)]
    one = {row["keep"]: row["prompt"]["speed_up"]["median"] for row in _alone(cpu)}
    right = {row["keep"]: row["correct"]["mean"] for row in _ours(quality)}
    (whole,) = [row["correct"]["mean"] for row in quality["rows"] if row["method"] == "none"]
    model, prompt = served["models"][0], f"{cpu['prompt']['vision_tokens']} + {cpu['prompt']['text_tokens']}"
    gpu = f"LLaVA-1.5-7B's sizes, {model['dtype']}, sdpa, {_gpu(served)}, prompts of {prompt} tokens"
    total = model["vision_tokens"]
    shares = {keep: _nearest(right, keep / total) for keep in (LARGE, SMALL)}
    lines = [
        ("first token, GPU", f"{_first(large):.2f} x", f"{_first(small):.2f} x", f"eight prompts; {gpu}"),
        ("first token, CPU", f"{one[LARGE]:.2f} x", f"{one[SMALL]:.2f} x", f"one prompt; {_cpu(cpu)}"),
        (
            "KV cache; working memory",
            f"{_kv(large):.0%}; {_peak(large):.0%}",
            f"{_kv(small):.0%}; {_peak(small):.0%}",
            "as the first row; of the unpruned call",
        ),
        (
            "right answers",
            f"{shares[LARGE]:.1%}",
            f"{shares[SMALL]:.1%}",
            f"unpruned {whole:.1%}; the small bundled model, {_questions(quality)} questions about digits",
        ),
        ("**the price:** one prompt, GPU", f"{alone[0]:.2f} x", f"{alone[1]:.2f} x", "slower; as the first row"),
    ]
    return table(("", f"{LARGE} of {total} tokens", f"{SMALL} of {total}", "conditions"), lines)


def when(results: Results, table: Table) -> str:
    """By hardware and batch: what the recorded runs say, good and bad, and what no run says.

    One prompt on a CPU is of the run that has more pairs of it, which the table above shows too.
    """
    alone = results["end_to_end_cpu"]
    cuda, cpu, vllm = results["serving_cuda"], results["serving_cpu"], results["vllm_cpu"]
    lines = [
        _served(cuda, 1, f"One prompt on an {_gpu(cuda)} ({LARGE}, then {SMALL} tokens)")
        + " Such a call is CPU launch-bound: the GPU waits for its layers to be launched, and pruning launches more.",
        _served(cuda, 8, f"Eight prompts on an {_gpu(cuda)}"),
        _line(
            f"One prompt on {alone['threads']} CPU cores",
            [row["prompt"]["speed_up"]["median"] for row in _alone(alone)],
            [row["decode"]["speed_up"]["median"] for row in _alone(alone)],
            [row["kv_bytes"]["stored"] / row["kv_bytes"]["unpruned"] for row in _alone(alone)],
        ),
        _served(cpu, 8, f"Eight prompts on {cpu['threads']} CPU cores"),
    ]
    many = {row["keep"]: row for row in vllm["rows"] if row["concurrency"] == 16}
    rates = [many[keep]["throughput"]["median"] for keep in (LARGE, SMALL)]
    room = {row["keep"]: row["running"] for row in vllm["small_cache"]["rows"]}
    lines.append(
        f"**16 requests in vLLM on a CPU: {_says(rates)}.** Throughput {_pair(rates)}, and one small cache holds "
        f"{room[LARGE]} and {room[SMALL]} requests instead of {room[None]} (a tiny model)."
    )
    lines.append(_by_length(results["prompt_length"]))
    return "\n".join(f"- {line}" for line in lines)


def _by_length(record: Record) -> str:
    """First token of one prompt on a CPU, from the shortest prompt to the longest, at both budgets."""
    times: dict[int, list[float]] = {}
    for row in record["rows"]:
        times.setdefault(row["vision_tokens"], []).append(row["speed_up"]["median"])
    short, *_, long = times
    said = {_says(pair) for pair in times.values()}
    verdict = f"{said.pop()} at every length" if len(said) == 1 else "not the same at every length"
    columns = [list(column) for column in zip(*times.values(), strict=True)]
    grows = ", and by more with longer prompts" if all(column == sorted(column) for column in columns) else ""
    each = ", ".join(f"{_pair(pair)} with {tokens:,}" for tokens, pair in times.items())
    return (
        f"**Prompts of {short} to {long:,} vision tokens on one CPU core: {verdict}{grows}.** "
        f"First token at a third and at a ninth of them: {each}. The lines above are of {VISION} vision tokens; on a "
        "GPU no other length has been timed. Long answers gain little: a decode step reads all weights, pruned or not."
    )


def _served(record: Record, batch: int, who: str) -> str:
    rows = [_row(record, batch=batch, keep=keep) for keep in (LARGE, SMALL)]
    steps = [row["decode"]["speed_up"]["median"] for row in rows]
    return _line(who, [_first(row) for row in rows], steps, [_kv(row) for row in rows])


def _line(who: str, first: list[float], steps: list[float], stored: list[float]) -> str:
    """The verdict, and the numbers that it rests on: speed-ups and share of the cache at the two budgets."""
    shares = " and ".join(f"{share:.0%}" for share in stored)
    numbers = f"First token {_pair(first)}, decode steps {_pair(steps)}, KV cache {shares}."
    return f"**{who}: first token {_says(first)}, decode steps {_says(steps)}.** {numbers}"


def methods(results: Results, table: Table) -> str:
    """One line per method: idea, stages, paper."""
    lines, baselines = [], []
    for name in method_cards.names():
        text = (method_cards.METHODS / f"{name}.py").read_text(encoding="utf-8")
        doc, (recipe,) = ast.get_docstring(ast.parse(text)) or "", _recipes(text)
        paper = re.search(r"\b(\d{4}\.\d{5})\b", doc)
        stages = method_cards._stages(recipe)
        short = ", ".join(word for stage, word in STAGES if stage in stages)
        link = f"[{paper[1]}](https://arxiv.org/abs/{paper[1]})" if paper else ""
        called = name.replace("_plus", "+")
        if doc.startswith("Baseline"):
            baselines.append(f"`{called}`")
        else:
            order = (called not in ("mustdrop", "mustdrop+"), called)
            lines.append((order, (f"`{called}`", idea(doc), short, link)))
    lines.append(((True, "~"), (", ".join(baselines), "baselines", "", "")))
    return table(("method", "idea", "stages", "paper"), [line for _, line in sorted(lines)])


def idea(doc: str) -> str:
    """The words after the name in the first line of a method's docstring, without the paper."""
    first = doc.partition("\n")[0].partition(": ")[2]
    first = re.sub(r"\s*\((?:\w+, )?(?:arXiv )?\d{4}\.\d{5}[^)]*\)", "", first)
    aside = r", its vision stage|\. All three stages|\. For video|\. Input stage|\. PruMerge\+ samples too"
    first = re.sub(aside, "", first)
    return re.sub(r" \(as [^)]*\)", "", first).strip().rstrip(".")


def families(results: Results, table: Table) -> str:
    """The families that passed the conformance tests, in one paragraph."""
    kinds: dict[str, list[str]] = {}
    for pair in results["support"]["outcomes"]:
        name, _, kind = pair.rpartition("-")
        kinds.setdefault(name, []).append(kind)
    both, one = ([name for name in sorted(kinds) if ("video" in kinds[name]) is video] for video in (True, False))
    named = [", ".join(f"`{name}`" for name in names) for names in (both, one)]
    return f"{len(kinds)} families. With images and videos: {named[0]}. With images: {named[1]}."


def proof(results: Results, table: Table) -> str:
    """How many tests say so."""
    product = results["product"]
    passed = sum(outcomes.get("passed", 0) for outcomes in product["tests"].values())
    masked = product["tests"]["test_dropping_equals_masking"]["passed"]
    methods = {name for pair in product["pairs"].values() for name in pair}
    return (
        f"In the recorded run {passed:,} tests passed, {masked:,} of them comparisons with the masked reference: "
        f"{len(methods)} methods on {len(product['pairs'])} pairs of family and kind of media under each attention "
        "backend."
    )


def downloads(results: Results, table: Table) -> str:
    """What an installation downloads."""
    record = results["install"]
    plain, cpu, figures = record["downloads"]["plain"], record["downloads"]["cpu"], record["figures"]
    return (
        f"On Linux the first line downloads {plain['bytes'] / 1e9:.1f} GB, since the default torch brings its CUDA "
        f"libraries; the two for the CPU download {cpu['bytes'] / 1e9:.2f} GB. Of that, mustdrop is "
        f"{figures['wheel_bytes'] / 1e6:.1f} MB, its two models included."
    )


def costs(results: Results, table: Table) -> str:
    """Everything that having mustdrop costs, beside its bounds."""
    record = results["install"]
    figures, bounds = record["figures"], record["bounds"]
    shown = [
        ("wheel", f"{figures['wheel_bytes'] / 1e6:.1f} MB", f"{bounds['wheel_bytes'] / 1e6:.0f} MB"),
        ("of which the two bundled models", f"{figures['wheel_bytes_of_models'] / 1e6:.1f} MB", ""),
        ("sdist", f"{figures['sdist_bytes'] / 1e6:.1f} MB", f"{bounds['sdist_bytes'] / 1e6:.0f} MB"),
        ("`import mustdrop`", _seconds(figures["seconds_of_import"]), ""),
        ("modules that it loads", figures["modules_of_import"], bounds["modules_of_import"]),
        ("`import torch, transformers`", _seconds(figures["seconds_of_torch_and_transformers"]), ""),
        ("`mustdrop.patch` after that", _seconds(figures["seconds_of_patch"]), ""),
        ("as a share of these", f"{figures['share_of_patch']:.0%}", f"{bounds['share_of_patch']:.0%}"),
        ("modules that it loads", figures["modules_of_patch"], bounds["modules_of_patch"]),
        ("`mustdrop --help`", _seconds(figures["seconds_of_help"]), _seconds(bounds["seconds_of_help"])),
    ]
    setting = (
        f"{record['hardware']}, Python {record['python']}; medians of {record['rounds']} processes, in seconds of a "
        "processor."
    )
    return setting + "\n\n" + table(("what", "measured", "at most"), shown)


# -- helpers ----------------------------------------------------------------------------------------------------------


def _row(record: Record, batch: int, keep: int) -> Record:
    """The row of sdpa attention at this batch and budget."""
    rows = [row for row in record["models"][0]["rows"] if row["attention"] == "sdpa"]
    (found,) = [row for row in rows if row["batch"] == batch and row["keep"] == keep]
    return found


def _ours(record: Record) -> list[Record]:
    return [row for row in record["rows"] if row["method"] == "mustdrop"]


def _alone(record: Record) -> list[Record]:
    """The rows of one prompt at the two budgets."""
    return [row for keep in (LARGE, SMALL) for row in _ours(record) if (row["batch"], row["keep"]) == (1, keep)]


def _first(row: Record) -> float:
    return float(row["first_token"]["speed_up"]["median"])


def _kv(row: Record) -> float:
    return float(row["kv_bytes"]["patched"] / row["kv_bytes"]["unpatched"])


def _peak(row: Record) -> float:
    return float(row["peak_bytes"]["patched"] / row["peak_bytes"]["unpatched"])


def _gpu(record: Record) -> str:
    return str(record["hardware"]).partition(" (")[0].removeprefix("NVIDIA ")


def _cpu(record: Record) -> str:
    return (
        f"a LLaVA of {record['model']['parameters'] / 1e9:.1f} B, {record['model']['dtype']}, {record['threads']} cores"
    )


def _questions(record: Record) -> int:
    return len(record["seeds"]) * record["scenes_per_seed"] * len(record["types"])


def _nearest(values: Mapping[float | None, float], share: float) -> float:
    return values[min((keep for keep in values if keep is not None), key=lambda keep: abs(keep - share))]


def _pair(values: list[float]) -> str:
    return " and ".join(f"{value:.2f} x" for value in values)


def _says(ratios: list[float]) -> str:
    """The verdict of speed-ups."""
    if min(ratios) > 1 + EVEN:
        return "faster"
    if max(ratios) < 1 - EVEN:
        return "slower"
    return "the same" if max(abs(ratio - 1) for ratio in ratios) <= EVEN else "mixed"


def _seconds(value: float) -> str:
    return f"{value:.2f} s"


def _recipes(text: str) -> list[ast.ClassDef]:
    nodes = [node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)]
    return [node for node in nodes if method_cards._bases(node) & {"Recipe"}]
