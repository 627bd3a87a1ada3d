"""Write the generated blocks of README.md and docs/*.md from the result files in benchmarks/results.

A block stands between two comments, each alone on its line:

    <!-- begin: versions -->
    whatever stands here is replaced
    <!-- end: versions -->

Run `python tools/docs/generate.py` to rewrite the blocks, and with `--check` to fail where one is out of date. A
new kind of block is one function here, registered with `renderer("its name")`: result files in, Markdown out.
A result file is a JSON object; beside its own numbers it records `versions` (a mapping), `hardware`, `seed`,
`commit` and `dirty`.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import evaluation_tables
import front
import gpu_tables
import kernel_table
import launch_table
import learned_table
import method_cards
import notebooks
import packed_table
import peer_table
import product_table
import quality_aims
import quality_pages_table
import quality_table
import serving_table
import speed_table
import support_table

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(
    r"^(?P<begin><!-- begin: (?P<name>\S+) -->\n)(?P<body>.*?)^(?P<end><!-- end: (?P=name) -->)$",
    flags=re.MULTILINE | re.DOTALL,
)
MARKER = re.compile(r"^<!-- (?:begin|end): \S+ -->$", flags=re.MULTILINE)

Results = Mapping[str, Mapping[str, Any]]
Renderer = Callable[[Results], str]
RENDERERS: dict[str, Renderer] = {}


class GenerateError(Exception):
    """A block or a result file that cannot be rendered: what was expected, what was found, where."""


def renderer(name: str) -> Callable[[Renderer], Renderer]:
    """Register a function as what writes the blocks called `name`."""

    def register(function: Renderer) -> Renderer:
        RENDERERS[name] = function
        return function

    return register


def part(function: Callable[..., str], record: str) -> Renderer:
    """A renderer that gives `function` one result file and what makes a table."""
    return lambda results: function(results[record], table)


def whole(function: Callable[..., str]) -> Renderer:
    """A renderer that gives `function` all result files and what makes a table."""
    return lambda results: function(results, table)


for _part in (front.headline, front.facts, front.when, front.methods, front.families, front.proof, front.downloads):
    renderer(f"front-{_part.__name__}")(whole(_part))
for _notebook in notebooks.PAGES:
    renderer(f"notebook-{_notebook}")(lambda results, name=_notebook: notebooks.links(name))
renderer("install")(whole(front.costs))
renderer("support")(part(support_table.render, "support"))
renderer("product")(part(product_table.render, "product"))
renderer("speed-cpu")(part(speed_table.rows, "end_to_end_cpu"))
renderer("speed-cpu-plain")(part(speed_table.rows, "end_to_end_cpu_plain"))
renderer("speed-cpu-xeon")(part(speed_table.rows, "end_to_end_cpu_xeon"))
renderer("speed-cpu-hardware")(part(speed_table.hardware, "end_to_end_cpu"))
renderer("cpu-targets")(part(speed_table.targets, "end_to_end_cpu"))
renderer("serving-cpu")(part(gpu_tables.serving, "serving_cpu"))
renderer("serving-cpu-eager")(part(gpu_tables.serving, "serving_cpu_eager"))
renderer("vllm-cpu")(part(serving_table.render, "vllm_cpu"))
renderer("peers-cpu")(part(peer_table.render, "peers_cpu"))
renderer("launches")(part(launch_table.render, "launches"))
renderer("host-time")(part(launch_table.host_time, "host_time"))
renderer("kernels-cuda")(part(gpu_tables.kernels, "kernels_cuda"))
renderer("kernels-growth")(part(gpu_tables.growth, "kernels_cuda"))
renderer("serving-cuda")(part(gpu_tables.serving, "serving_cuda"))
renderer("peers-cuda")(part(peer_table.render, "peers_cuda"))
renderer("evaluation")(part(evaluation_tables.scenes, "evaluation"))
for _name, _record in (("quality", "quality"), ("quality-pages", "quality_pages")):
    renderer(_name)(part(quality_pages_table.overview, _record))
    renderer(f"{_name}-abilities")(part(quality_pages_table.abilities, _record))
    renderer(f"{_name}-beside")(part(quality_pages_table.beside, _record))
    renderer(f"{_name}-against")(part(quality_pages_table.against, _record))
    renderer(f"{_name}-details")(
        lambda results, name=_record: quality_table.details(results[name], table, results.get("method_time"))
    )
renderer("quality-types")(part(quality_table.types, "quality"))
renderer("quality-short")(whole(quality_aims.short))
renderer("quality-aims")(whole(quality_aims.render))
renderer("quality-earlier")(part(quality_table.overview, "quality_earlier"))
renderer("quality-plus")(part(quality_table.against_the_best, "quality_earlier"))
renderer("quality-pages-earlier")(part(quality_pages_table.overview, "quality_pages_earlier"))
renderer("quality-plus-first")(part(quality_table.against_the_best, "quality_first"))
renderer("quality-tolerance")(part(quality_pages_table.tolerance, "quality_tolerance_pages"))
renderer("quality-inside")(part(quality_pages_table.inside, "quality_inside_pages"))
renderer("quality-search")(part(quality_table.variants, "quality_search"))
renderer("quality-taper")(part(quality_table.variants, "quality_taper"))
renderer("quality-smallest")(part(quality_table.variants, "quality_smallest"))
renderer("quality-ablations")(part(quality_table.variants, "quality_ablations"))
renderer("quality-last-row")(part(quality_table.variants, "quality_last_row"))
renderer("plus2-why")(part(quality_table.variants, "quality_plus2_why_pages"))
renderer("plus2-why-abilities")(part(quality_pages_table.abilities, "quality_plus2_why_pages"))
renderer("plus2-single")(part(quality_table.variants, "quality_plus2_single_pages"))
renderer("plus2-cheaper")(part(quality_table.variants, "quality_plus2_cheaper_pages"))
renderer("plus2-pages")(part(quality_pages_table.overview, "quality_plus2_reported_pages"))
renderer("plus2-pages-abilities")(part(quality_pages_table.abilities, "quality_plus2_reported_pages"))
renderer("plus2-pages-against")(part(quality_pages_table.against, "quality_plus2_reported_pages"))
renderer("quality-fixed")(whole(quality_table.fixed))
renderer("quality-learned")(whole(learned_table.against))
renderer("quality-learned-earlier")(whole(learned_table.earlier))
renderer("scorers")(part(learned_table.scorers, "scorers"))
renderer("quality-merging")(part(quality_table.variants, "quality_merging"))
renderer("quality-geometry")(part(quality_table.geometry, "quality_geometry"))
renderer("packed-encoder")(part(packed_table.rows, "packed-encoder"))
renderer("packed-encoder-plain")(part(packed_table.rows, "packed-encoder-plain"))
renderer("prompt-length")(part(packed_table.lengths, "prompt_length"))


@renderer("versions")
def versions(results: Results) -> str:
    """Where each result file comes from, one row per file."""
    rows = []
    for name, record in sorted(results.items()):
        software = ", ".join(f"{package} {version}" for package, version in record["versions"].items())
        commit = str(record["commit"])[:10] + (" (dirty tree)" if record["dirty"] else "")
        rows.append((f"`{name}`", software, record["hardware"], record["seed"], commit))
    return table(("results", "versions", "hardware", "seed", "commit"), rows)


@renderer("demo")
def demo(results: Results) -> str:
    """What `python -m mustdrop demo` measured: one row per setting."""
    record = results["demo"]
    questions = len(record["questions"])
    software = ", ".join(f"{package} {version}" for package, version in record["versions"].items())
    commit = str(record["commit"])[:10] + (" (dirty tree)" if record["dirty"] else "")
    rows = []
    for row in record["rows"]:
        right = "" if row["correct"] is None else f"{row['correct']} of {questions}"
        time = "1.00" if row["prefill_ratio"] is None else f"{row['prefill_ratio']:.2f}"
        tokens = " ".join(str(count) for count in row["tokens"])
        kv = f"{row['kv_bytes'] / 1e6:.2f} MB ({row['kv_ratio']:.0%})"
        budget = "all" if row["keep"] is None else row["keep"]
        equal = f"{row['equal_tokens']:.1f}"
        rows.append((f"`{row['method']}`", budget, right, equal, tokens, f"{row['flops']:.0%}", time, kv))
    header = ("method", "`keep`", "right", "tokens per layer", "layer by layer", "FLOPs", "prefill time", "KV cache")
    return (
        f"Bundled model, {questions} questions about {record['scenes']} held-out scenes (seed {record['seed']}). "
        f"{record['hardware']}, {record['threads']} threads, {software}, commit {commit}. "
        "FLOPs and time are those of the whole prompt, encoder and pruning included, relative to the unpruned model. "
        f"The time is the median over {record['timed_pairs']} alternating pairs on the first question. "
        "Tokens per layer and KV cache are those of the first question too.\n\n" + table(header, rows)
    )


def _card(name: str) -> Renderer:
    return lambda results: method_cards.card(name, results, table)


for _name in method_cards.names():
    renderer(f"method-{_name}")(_card(_name))


def example(*names: str, body_of: str | None = None) -> Renderer:
    """A renderer that shows parts of `examples/home_made_stack.py`.

    Args:
        names: top-level functions and classes; none for what stands before the first of them.
        body_of: a function whose statements are shown without their `def` line.
    """

    def show(results: Results) -> str:
        text = (ROOT / "examples" / "home_made_stack.py").read_text(encoding="utf-8")
        lines, tree = text.splitlines(), ast.parse(text).body
        owners = {node.name: node for node in tree if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        if body_of is not None:
            body = owners[body_of].body
            code = textwrap.dedent("\n".join(lines[body[0].lineno - 1 : body[-1].end_lineno]))
        elif names:
            code = "\n\n\n".join("\n".join(lines[owners[n].lineno - 1 : owners[n].end_lineno]) for n in names)
        else:
            first = min(node.lineno for node in owners.values())
            code = "\n".join(lines[tree[1].lineno - 1 : first - 1]).strip()
        return f"```python\n{code}\n```"

    return show


renderer("stack-start")(example())
renderer("stack-layer")(example("Layer"))
renderer("stack-encode")(example("encode"))
renderer("stack-prefill")(example("prefill"))
renderer("stack-decode")(example("cascade", "decode"))
renderer("stack-run")(example(body_of="main"))


@renderer("kernels-aot")
def kernels_aot(results: Results) -> str:
    """Registers and shared memory of every kernel."""
    sentence, header, rows = kernel_table.launches(results["kernels_aot"])
    return sentence + "\n\n" + table(header, rows)


@renderer("gpu-targets")
def gpu_targets(results: Results) -> str:
    """What was promised of a GPU, what came out."""
    return gpu_tables.targets(results, table)


@renderer("published-scores")
def published_scores(results: Results) -> str:
    """Published scores of MustDrop."""
    return evaluation_tables.scores(table)


@renderer("published-commands")
def published_commands(results: Results) -> str:
    """The commands that ask for them."""
    return evaluation_tables.commands()


def table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def load_results(folder: Path) -> dict[str, Mapping[str, Any]]:
    """Every result file of a folder, by its name without the suffix."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def render(text: str, results: Results, where: str = "text") -> str:
    """`text` with the body of every block replaced by what its renderer returns."""

    def replace(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in RENDERERS:
            known = ", ".join(sorted(RENDERERS))
            raise GenerateError(f"{where}: no renderer is called {name!r}; known: {known}")
        try:
            body = RENDERERS[name](results)
        except KeyError as missing:
            raise GenerateError(f"{where}: {name!r} needs {missing}, which a result file lacks") from missing
        return f"{match['begin']}{body.strip()}\n{match['end']}"

    stray = MARKER.search(BLOCK.sub("", text))
    if stray:
        raise GenerateError(f"{where}: {stray[0]!r} stands alone; expected a begin and an end of one name")
    return BLOCK.sub(replace, text)


def documents(root: Path) -> list[Path]:
    """The files whose blocks are generated."""
    return [path for path in (root / "README.md", *sorted((root / "docs").rglob("*.md"))) if path.exists()]


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Rewrite or check the documents; the exit status."""
    parser = argparse.ArgumentParser(description="Write the generated blocks of the documents.")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a block is out of date")
    check = parser.parse_args(arguments).check
    results = load_results(root / "benchmarks" / "results")
    stale = 0
    for path in documents(root):
        name = str(path.relative_to(root))
        old = path.read_text(encoding="utf-8")
        try:
            new = render(old, results, where=name)
        except GenerateError as error:
            print(error, file=sys.stderr)
            return 2
        if new == old:
            continue
        stale += 1
        if check:
            diff = difflib.unified_diff(old.splitlines(), new.splitlines(), name, "generated", lineterm="")
            print(*diff, sep="\n")
        else:
            path.write_text(new, encoding="utf-8")
            print(f"wrote {name}")
    if check and stale:
        print(f"{stale} out of date: run `python tools/docs/generate.py`", file=sys.stderr)
    return int(check and stale > 0)


if __name__ == "__main__":
    sys.exit(main())
