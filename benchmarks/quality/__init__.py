"""Quality of every method at every budget: accuracy of the bundled models, and fidelity to the unpruned ones.

    python -m benchmarks quality                       # development: scenes of the selection split, printed only
    python -m benchmarks quality --split heldout       # the reported run: writes benchmarks/results/quality.json
    python -m benchmarks quality --model pages         # the other bundled model: pages, videos, two pictures, places
    python -m benchmarks quality --family qwen2_5_vl   # fidelity alone, tiny random-weight model; "all": every family
    python -m benchmarks quality --variants search     # what was tried for mustdrop+; "ablations": what it owes to what

All methods answer the same questions, batch by batch. Every (method, budget, batch) is one line of a journal, so a run
that was killed goes on where it stopped. `docs/quality.md` says what the figures mean.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from benchmarks.common import RESULTS, ROOT, origin, save, significant
from benchmarks.quality import cells, measure, subjects, summary, variants
from benchmarks.quality.journal import Journal
from mustdrop.demo.scenes import SPLITS
from mustdrop.method import DEFAULT_METHOD

# None of these is used by the demo, the documents or the tests.
SEEDS = {"scenes": (1004, 1005, 1006, 1007), "pages": (6001,)}
BUDGETS = {"scenes": cells.BUDGETS, "pages": (1 / 2, 1 / 4, 1 / 9, 1 / 18)}
SAMPLES = {"scenes": (20, 20), "pages": (16, 8)}  # scenes per seed (pages: samples of each kind), and at a time


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=tuple(SEEDS), default="scenes", help="which bundled model is asked")
    parser.add_argument("--split", choices=SPLITS, help="default: selection; heldout is for the reported run alone")
    parser.add_argument("--family", action="append", help="tiny random model instead of the demo model, or 'all'")
    parser.add_argument("--method", action="append", help="default: every method that is registered")
    parser.add_argument("--variants", choices=variants.SETS, help="compositions in place of registered methods")
    budgets = "1/2, 1/3, 2/9, 1/9, 1/18 (pages: 1/2, 1/4, 1/9, 1/18)"
    parser.add_argument("--keep", action="append", type=float, help=f"share; default: {budgets}")
    parser.add_argument("--seeds", type=int, nargs="+", help="of the scenes")
    parser.add_argument("--scenes", type=int, help="per seed (pages: of each kind), a question of each type about each")
    parser.add_argument("--batch", type=int, help="scenes at a time")
    parser.add_argument("--reference", action="append", help="method that the others are compared with, scene by scene")
    parser.add_argument("--jobs", type=int, default=2, help="processes, each on batches of its own")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--journal", type=Path, help="default: build/quality-....jsonl")
    parser.add_argument("--out", type=Path, help="result file; default: none, with --split heldout the published one")


def run(options: argparse.Namespace) -> int:
    torch.set_num_threads(options.threads)
    options.seeds = options.seeds or list(variants.seeds(options.variants, options.model) or SEEDS[options.model])
    scenes, batch = SAMPLES[options.model]
    scenes, batch = options.scenes or scenes, options.batch or batch
    if options.variants:
        found, references = variants.plan(options.variants, options.keep, options.model), options.reference
        references = references or variants.REFERENCES.get(options.variants, ["mustdrop+", "tome"])
    else:
        budgets = options.keep or BUDGETS[options.model]
        found, references = cells.plan(options.method, budgets), options.reference or ["mustdrop+", DEFAULT_METHOD]
        for name in references:
            cells.check(name)
    split = options.split or variants.SPLITS.get(options.variants, "selection")
    if options.family:
        subject: subjects.Subject = subjects.Families(options.family, options.seeds, options.device)
    else:
        about = subjects.Scenes if options.model == "scenes" else subjects.Samples
        subject = about(split, options.seeds, scenes, batch, options.device)
    name = "-".join(["quality", *([options.variants] if options.variants else []), subject.name])
    path = options.journal or ROOT / "build" / f"{name}.jsonl"
    device = torch.device(options.device)
    journal = Journal(path, {"setting": subject.setting, "commit": origin(device, 0)["commit"]})
    came_from, start = origin(device, options.seeds[0]), time.perf_counter()
    resumed = bool(journal.lines)
    measure.measure(subject, found, journal, options.jobs)
    result = came_from | {"seeds": options.seeds, "jobs": options.jobs, "resumed": resumed} | subject.setting
    result["minutes"] = significant((time.perf_counter() - start) / 60, 3)
    result |= summary.summary(journal.lines, found, references, subject.setting.get("abilities"))
    summary.show(result)
    published = "quality" if split == "heldout" and not options.family else None
    published = f"quality_{options.variants}" if options.variants else published
    published = f"{published}_{options.model}" if published and options.model != "scenes" else published
    out = options.out or (RESULTS / f"{published}.json" if published else None)
    if out is not None:
        save(out, result)
        print(f"wrote {out}")
    return 0
