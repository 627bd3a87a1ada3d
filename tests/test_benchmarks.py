"""The benchmarks run, and their arithmetic is right; what they measure here means nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmarks import __main__ as command
from benchmarks import common, end_to_end
from benchmarks.packed import PackedPatches, pack
from torch import nn

import generate

ROOT = Path(__file__).parents[1]


def test_without_a_name_the_benchmarks_are_listed():
    done = subprocess.run([sys.executable, "-m", "benchmarks"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert all(name in done.stdout for name in command.BENCHMARKS)


def test_ratios_pair_neighbours():
    seen = common.ratios([2.0, 6.0, 20.0], [1.0, 2.0, 5.0])
    assert (seen["min"], seen["median"], seen["max"]) == (2.0, 3.0, 4.0)
    assert common.spread([1.5]) == {"median": 1.5, "q1": 1.5, "q3": 1.5, "min": 1.5, "max": 1.5}


def test_the_origin_names_no_machine():
    record = common.origin(torch.device("cpu"), seed=3)
    assert {"versions", "hardware", "threads", "seed", "commit", "dirty", "date"} <= set(record)
    assert str(ROOT) not in json.dumps(record)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    threads = torch.get_num_threads()
    out = tmp_path_factory.mktemp("results") / "end_to_end_cpu.json"
    arguments = ["end_to_end", "--quick", "--pairs", "1", "--steps", "2", "--threads", str(threads), "--out", str(out)]
    assert command.main(arguments) == 0
    return json.loads(out.read_text())


def test_every_row_reports_both_scopes_and_exact_bytes(result):
    rows = {(row["method"], row["keep"]): row for row in result["rows"] if row["batch"] == 1}
    several = [row["keep"] for row in result["rows"] if row["batch"] == end_to_end.BATCH]
    assert several == list(end_to_end.BUDGETS)
    assert set(rows) == {("none", None), ("mustdrop", 576)} | {
        (method, keep) for method in ("mustdrop", "random") for keep in end_to_end.BUDGETS
    }
    for (method, keep), row in rows.items():
        bytes_ = row["kv_bytes"]
        assert bytes_["reported"] == bytes_["stored"] == bytes_["of_kept_tokens"]
        pruned = keep in end_to_end.BUDGETS
        assert (row["equal_tokens"] <= keep) if pruned else (row["equal_tokens"] == 576)
        assert (row["text"]["flops_ratio"] > 2) is pruned
        assert ("bare" in row) is pruned
        assert ("decode" in row) is (method != "random")
        for scope in ("text", "prompt"):
            measured = row[scope]["speed_up"]["median"] / row[scope]["flops_ratio"]
            assert row[scope]["share_of_flops_ratio"] == pytest.approx(measured, rel=1e-4)
    assert result["promises"]["kv_bytes_exact"]["met"]


def test_packed_weights_change_nothing_but_how_they_lie():
    patches, pictures = nn.Conv3d(3, 32, (2, 4, 4), (2, 4, 4)), nn.Conv3d(3, 8, 3, 1, padding=1)
    model = nn.ModuleList([patches, pictures, nn.Linear(32, 5, bias=False)])
    before = [module.weight for module in model]
    x, several, rows = torch.randn(10, 3, 2, 4, 4), torch.randn(1, 3, 4, 8, 8), torch.randn(7, 32)
    with torch.inference_mode():
        expected = patches(x), patches(several), model[2](rows)
        assert pack(model) == 2
        assert isinstance(model[0], PackedPatches)
        assert model[1] is pictures, "it overlaps: no linear layer"
        got = model[0](x), model[0](several), model[2](rows)
    assert all(module.weight is weight for module, weight in zip(model, before, strict=True))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_roofline_starts_at_the_whole_prompt(result):
    assert result["roofline"][0]["tokens"] == 640
    assert result["roofline"][0]["efficiency"] == 1


@pytest.mark.parametrize("block", ["speed-cpu", "speed-cpu-hardware"])
def test_the_documents_show_the_result(result, block):
    text = generate.render(f"<!-- begin: {block} -->\n<!-- end: {block} -->\n", {"end_to_end_cpu": result})
    assert result["hardware"] in text
    assert "| `random` | 64 |" in text or "| 640 |" in text


def test_prompts_of_several_lengths(tmp_path):
    out = tmp_path / "prompt_length.json"
    few = ["--size", "tiny", "--pictures", "1", "--pictures", "2", "--pairs", "1"]
    threads = torch.get_num_threads()
    assert command.main(["prompt_length", *few, "--out", str(out)]) == 0
    assert torch.get_num_threads() == threads == 1  # as tests/conftest.py sets it
    rows = json.loads(out.read_text())["rows"]
    assert [row["vision_tokens"] for row in rows] == [144, 144, 288, 288]
    assert all(row["flops_ratio"] > 1 > row["kv"] for row in rows)


def test_without_a_gpu_the_kernels_benchmark_says_that_it_measures_none(tmp_path):
    out = tmp_path / "kernels.json"
    assert command.main(["kernels", "--quick", "--rounds", "1", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert not record["valid"]
    assert "No GPU" in record["note"]
    assert {row["ran"] for row in record["rows"]} == {"reference"}
    assert all("nothing about the kernels" in row["measures"] for row in record["rows"])
    assert {row["operation"] for row in record["rows"]} >= {"text statistics", "compact", "best match"}
    assert all(row["share_of_roofline"] > 0 for row in record["rows"])


def test_the_gpu_command_runs_without_a_gpu_and_says_so(tmp_path):
    left_out = [word for part in ("kernels", "serving", "peers") for word in ("--skip", part)]
    assert command.main(["gpu", "--device", "cpu", "--out", str(tmp_path), *left_out]) == 0
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert not record["valid"]
    assert [(part["part"], part["outcome"]) for part in record["parts"]][:2] == [
        ("checks", "done"),
        ("captured", "done"),
    ]
    captured = json.loads((tmp_path / "captured_cpu_tiny.json").read_text())
    assert not captured["valid"]
    assert {row["keep"] for row in captured["rows"] if row["model"] == "tiny"} == {192, 64, 32}
    assert set(captured["rows"][0]["prefill"]["speed_up"]) == {"untouched captured", "patched", "captured"}
    assert {row["model"] for row in captured["rows"]} == {"tiny", "llava-next-tiny"}
    assert {row["method"] for row in captured["rows"] if "not_captured" in row} == {"snapkv"}
    assert {(row["method"], row["cache"]) for row in captured["decode"]} == {
        (method, cache) for method in ("mustdrop", "snapkv") for cache in ("growing", "static")
    }
    checks = json.loads((tmp_path / "checks_cpu_tiny.json").read_text())
    assert len(checks["rows"]) > 50
    assert all(row["passed"] for row in checks["rows"])


def test_the_parts_of_the_first_token_add_up(tmp_path):
    out, threads = tmp_path / "serving.json", str(torch.get_num_threads())
    assert command.main(["serving", "--quick", "--attention", "sdpa", "--steps", "2", "--threads", threads,
                         "--out", str(out)]) == 0  # fmt: skip
    record = json.loads(out.read_text())
    assert [model["model"] for model in record["models"]] == ["tiny", "qwen2.5-vl-tiny"]
    for model in record["models"]:
        assert [row["share"] for row in model["rows"]] == pytest.approx([1, 1 / 3, 2 / 9, 1 / 9], abs=0.01)
        for row in model["rows"]:
            assert row["equal_tokens"] <= row["keep"]
            parts = sum(row["parts"][name]["median"] for name in ("vision", "prefill", "pruning", "rest"))
            assert parts == pytest.approx(row["first_token"]["seconds_patched"]["median"], rel=1e-3)
            assert row["kv_bytes"]["patched"] <= row["kv_bytes"]["unpatched"]
