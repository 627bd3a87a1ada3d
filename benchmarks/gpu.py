"""Everything that needs a GPU, in one command and inside eight minutes, on a machine with nothing but torch on it.

Six parts, each in a process of its own: `checks` (what every kernel must do, without pytest), `captured` (the prompt's
pass plain and as one CUDA graph, and decode steps), `serving`, `kernels`, the tests marked `gpu` where pytest is
installed, and `peers` where time is left. A part that takes too long is ended and the next one starts; each writes its
own result file, and `gpu.json` says how each part ended.

Without a GPU the same command runs: the references take the place of the kernels, sizes are tiny, every result says so.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, ROOT, origin, save, significant

PARTS = ("checks", "captured", "serving", "kernels", "tests", "peers")
# Of the budget that may be gone after a part: a kernel that is wrong comes first, then what is most asked for.
SHARES = {"checks": 0.15, "captured": 0.6, "serving": 0.8, "kernels": 0.93, "tests": 0.97, "peers": 1.0}
PEERS_SECONDS = 45  # then it begins no further pair; building the model and the first pairs take some time more
PEERS_LEAST = 60  # with less than that left, it is not started


def checks(device: str) -> list[dict[str, Any]]:
    """Run every kernel check here; one row each."""
    sys.path.insert(0, str(ROOT / "tests"))
    from kernels.checks_tokens import CASES  # all of them: it adds its own to those of attention
    from mustdrop.kernels import use_kernels

    cuda = device.startswith("cuda")
    use_kernels("triton" if cuda else "reference")
    rows = []
    for case in CASES:
        if not cuda and case.name.startswith("check_splits"):  # calls a launcher itself
            continue
        start, error = time.perf_counter(), ""
        try:
            case.call(device)
        except Exception:  # one kernel that fails must not hide the others
            error = traceback.format_exc()[-1500:]
            print(case.name, error, sep="\n", flush=True)
        seconds = significant(time.perf_counter() - start, 3)
        rows.append({"name": case.name, "passed": not error, "seconds": seconds, "error": error})
    return rows


def commands(options: argparse.Namespace, folder: Path) -> dict[str, list[str]]:
    """What each part runs."""
    python = [sys.executable, "-m"]
    device, cuda = options.device, options.device.startswith("cuda")
    quick = [] if cuda and not options.quick else ["--quick"]
    suffix = "cuda" if cuda else "cpu_tiny"
    seconds = {
        part: str(round(options.budget * share))
        for part, share in (("kernels", 0.1), ("serving", 0.15), ("captured", 0.4))
    }
    workers = ["-n", "auto"] if importlib.util.find_spec("xdist") else []
    out = {part: str(folder / f"{part}_{suffix}.json") for part in PARTS}
    return {
        "checks": [*python, "benchmarks", "gpu", "--device", device, "--part", "checks", "--out", out["checks"]],
        "captured": [*python, "benchmarks", "captured", "--device", device, "--seconds", seconds["captured"], *quick,
                     "--pairs", "4" if cuda else "1", "--out", out["captured"]],
        "serving": [*python, "benchmarks", "serving", "--device", device, "--seconds", seconds["serving"], *quick,
                    "--pairs", "4" if cuda else "1", "--out", out["serving"]],
        "kernels": [*python, "benchmarks", "kernels", "--device", device, "--seconds", seconds["kernels"], *quick,
                    "--out", out["kernels"]],
        "tests": [*python, "pytest", "-q", "-m", "gpu", *workers, "tests/test_gpu.py"],
        "peers": [*python, "benchmarks", "peers", "--device", device, *quick, "--pairs", "5" if cuda else "1",
                  "--seconds", str(PEERS_SECONDS), "--out", out["peers"]],
    }  # fmt: skip


def conduct(options: argparse.Namespace) -> dict[str, Any]:
    """Run the parts one after the other, none of them past its share of the time."""
    began = time.perf_counter()
    folder = Path(options.out) if options.out else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])}
    outcomes: list[dict[str, Any]] = []
    cuda = options.device.startswith("cuda")
    for part, command in commands(options, folder).items():
        if part in options.skip:
            continue
        missing = part == "tests" and (not cuda or importlib.util.find_spec("pytest") is None)
        if missing:
            outcomes.append({"part": part, "outcome": "left out: no GPU" if not cuda else "left out: no pytest"})
            continue
        start = time.perf_counter()
        left = options.budget * SHARES[part] - (start - began)
        if part == "peers" and left < PEERS_LEAST:
            outcomes.append({"part": part, "outcome": f"left out: {left:.0f} s left"})
            continue
        try:
            done = subprocess.run(command, cwd=ROOT, env=environment, timeout=max(10.0, left), check=False)
            outcome = "done" if done.returncode == 0 else f"exit status {done.returncode}"
        except subprocess.TimeoutExpired:
            outcome = f"ended after {left:.0f} s"
        outcomes.append({"part": part, "outcome": outcome, "seconds": significant(time.perf_counter() - start, 3)})
        save(folder / "gpu.json", summary(options, outcomes))  # what there is survives, whatever happens next
    return summary(options, outcomes)


def summary(options: argparse.Namespace, outcomes: list[dict[str, Any]]) -> dict[str, Any]:
    """The content of gpu.json."""
    cuda = options.device.startswith("cuda")
    return {
        "what": "everything that needs a GPU",
        "valid": cuda and not options.quick,
        "note": "" if cuda else "No GPU: the references ran on the CPU at tiny sizes. Nothing here is about a kernel.",
        **origin(torch.device(options.device), 0),
        "parts": outcomes,
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m benchmarks gpu`."""
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=usual, help="default: cuda where there is one")
    parser.add_argument("--quick", action="store_true", help="tiny sizes on the GPU too")
    parser.add_argument("--budget", type=float, default=480, help="seconds for everything (default 480)")
    parser.add_argument("--part", choices=["checks"], help="run this part here instead of all parts")
    parser.add_argument("--skip", choices=PARTS, action="append", default=[], help="leave a part out")
    parser.add_argument("--out", help="folder of the result files (default: benchmarks/results); with --part, the file")


def run(options: argparse.Namespace) -> int:
    """Run, save; 1 where a part did not end well."""
    if options.part == "checks":
        rows = checks(options.device)
        failed = [row["name"] for row in rows if not row["passed"]]
        if options.out:
            save(Path(options.out), summary(options, []) | {"what": "what every kernel must do", "rows": rows})
        print(f"{len(rows) - len(failed)} of {len(rows)} checks passed", *failed, sep="\n")
        return int(bool(failed))
    cuda = options.device.startswith("cuda")
    if not cuda and not options.out:
        print("without a GPU the results are for looking at only: name a folder with --out", file=sys.stderr)
        return 2
    outcomes = conduct(options)["parts"]
    for row in outcomes:
        print(row["part"], row["outcome"], sep=": ")
    return int(any(row["outcome"].startswith(("exit", "ended")) for row in outcomes))
