"""Every kernel compiles for GPUs that are not here, spills no register and fits their shared memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "benchmarks" / "results" / "kernels_aot.json"


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    out = tmp_path_factory.mktemp("aot") / "kernels_aot.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks", "kernels_aot", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert out.exists(), done.stderr[-4000:]
    return json.loads(out.read_text())["rows"]


def test_nothing_spills_and_everything_fits(rows):
    assert [row for row in rows if not row["good"]] == []
    assert {row["target"] for row in rows} == {"sm_80", "sm_90", "gfx942"}


def test_every_kernel_is_compiled(rows):
    folder = ROOT / "src" / "mustdrop" / "kernels" / "triton"
    lines = [line for path in folder.glob("*.py") for line in path.read_text().splitlines()]
    grids = {line.strip().split("[(")[0] for line in lines if line.strip().startswith("_") and "[(" in line}
    assert grids == {row["kernel"] for row in rows}


def test_the_committed_file_is_of_these_kernels(rows):
    committed = json.loads(COMMITTED.read_text())["rows"]
    name = lambda row: (row["case"], row["kernel"], row["target"])  # noqa: E731
    assert {name(row) for row in committed} == {name(row) for row in rows}
    assert all(row["good"] for row in committed)
