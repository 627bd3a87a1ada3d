"""`mustdrop eval-suite`: published tables as commands that can be run."""

from __future__ import annotations

import inspect
import json
import shlex

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from mustdrop import cli
from mustdrop.errors import ConfigError
from mustdrop.eval.benchmarks import benchmarks
from mustdrop.eval.published import published
from mustdrop.eval.suites import find, suites
from mustdrop.media_limits import MediaLimits
from mustdrop.registry import resolve


def call(*arguments):
    return CliRunner().invoke(cli.app, ["eval-suite", *arguments])


def of(harness):
    return [name for name, suite in suites().items() if suite.harness == harness]


def after(command, option):
    words = shlex.split(command)
    return words[words.index(option) + 1]


@pytest.mark.parametrize("name", suites())
def test_every_cell_is_a_method_that_there_is_with_settings_that_it_takes(name):
    suite = suites()[name]
    assert suite.cells[0].method == "none"
    assert len({cell.run for cell in suite.cells}) == len(suite.cells)  # no run writes over another
    for cell in suite.cells:
        settings = cell.settings
        resolve(settings.pop("method"), **settings)
    commands = {step.plain["command"] for step in suite.steps() if "command" in step.plain}
    assert len(commands) == sum("command" in step.plain for step in suite.steps())
    assert all(command in "\n".join(step.text for step in suite.steps()) for command in commands)


@pytest.mark.parametrize("name", of("lmms-eval"))
def test_commands_of_lmms_eval(name):
    suite = suites()[name]
    taken = set(inspect.signature(MediaLimits).parameters) - {"frames"} | {"max_num_frames"}
    for cell, step in zip(suite.cells, suite.steps(), strict=True):
        pairs = [pair.split("=") for pair in after(step.plain["command"], "--model_args").split(",")]
        arguments = dict(pairs)
        assert len(arguments) == len(pairs)
        assert (arguments.pop("pretrained"), arguments.pop("method")) == (suite.model, cell.method)
        assert set(arguments) - taken == set(cell.settings) - {"method"}
        assert after(step.plain["command"], "--tasks") == ",".join(suite.tasks)
        assert after(step.plain["command"], "--output_path") == f"results/{name}/{cell.run}"
        # a share of the unpruned score: pruning may help a little, and further frames help more
        assert cell.value is None or 0 < cell.value < (101 if cell.frames is None else 110)
    without = [(cell.method, cell.keep) for cell in suite.cells if cell.value is None]
    assert without == ([("divprune", 0.1), ("dart", 0.1)] if name == "angelslim-3b" else [])


@pytest.mark.parametrize("name", of("VLMEvalKit"))
def test_lines_for_vlmevalkit_are_python_that_makes_our_class(name):
    made, suite, steps = {}, suites()[name], suites()[name].steps()

    def remember(kind, model, **settings):
        return kind, model, settings

    names = {"supported_VLM": made, "partial": remember, "MustDropVLM": "ours"}
    assert steps[0].plain["line"] == "from mustdrop.integrations.vlmevalkit import MustDropVLM"
    for step in steps[1:-1]:
        exec(step.plain["line"], names)
    assert list(made.values()) == [("ours", suite.model, cell.settings) for cell in suite.cells]
    words = shlex.split(steps[-1].plain["command"])
    assert words[: words.index("--model")] == ["python", "run.py", "--data", *suite.tasks]
    assert words[words.index("--model") + 1 :] == list(made)
    values = {cell.label: cell.value for cell in suite.cells if cell.value is not None}
    assert values == (
        {"random keep=0.333": 57.5, "random keep=0.111": 50.1}
        if name == "uniprune-qwen"
        else {"divprune keep=0.222": 67.58, "divprune keep=0.111": 64.04}
    )
    assert "# Harness: VLMEvalKit." in call(name).stdout


@pytest.mark.parametrize("name", of("mustdrop eval"))
def test_runs_of_eval_and_the_report(name):
    suite, steps = suites()[name], suites()[name].steps()
    assert set(suite.tasks) <= set(benchmarks())
    assert steps[-1].plain["command"] == "python -m mustdrop report mustdrop-eval"
    for step in steps[:-1]:
        words = shlex.split(step.plain["command"])
        assert words[:5] == ["python", "-m", "mustdrop", "eval", step.plain["benchmark"]]
        methods = [words[i + 1] for i, word in enumerate(words) if word == "--method"]
        budgets = {float(budget) for budget in after(step.plain["command"], "--keep").split(",")}
        assert {value["method"] for value in step.plain["values"]} <= set(methods)
        assert {value["keep"] for value in step.plain["values"]} - {None} <= budgets
        options = [word for word in words if word.startswith("--")]
        known = {option for parameter in get_command(cli.app).commands["eval"].params for option in parameter.opts}
        assert set(options) <= known


def test_groups_of_vtc_bench():
    steps = json.loads(call("vtc", "--method", "dart", "--json").stdout)
    assert len(steps) == 7  # six benchmarks and the report
    first = steps[0]
    assert "--method none --method downsample --method dart --keep 0.25,0.1111,0.0625,0.04,0.01" in first["command"]
    # the two edges of the file for this benchmark
    assert first["values"][0] == {
        "method": "dart", "keep": 0.25, "value": {"hard": 1021, "hard_right": 601, "easy": 6815, "easy_right": 6005}
    }  # fmt: skip
    assert first["values"][-1]["value"] == {"hard": 3139, "hard_right": 768, "easy": 4697, "easy_right": 3576}
    for cell in suites()["vtc"].cells:  # what the unpruned model answers rightly does not depend on the budget
        for task, groups in (cell.value or {}).items():
            total = {"gqa": 7836, "mmbench": 3658, "mmbench-cn": 3386, "mme": 2090, "ocrbench": 807, "pope": 7957}
            assert groups.hard + groups.easy == total[task]
            assert groups.hard_right <= groups.hard
            assert groups.easy_right <= groups.easy
    lines = call("vtc").stdout.splitlines()
    assert "# dart keep=0.25: group A 601 of 1021 right, group B 6005 of 6815" in lines
    assert any("--method prumerge --knob plus=True --keep 0.25," in line for line in lines)


def test_the_classic_table_is_the_one_that_report_prints():
    steps = json.loads(call("llava", "--method", "mustdrop", "--json").stdout)
    gqa = next(step for step in steps if step.get("benchmark") == "gqa")
    assert gqa["values"][0] == {"method": "none", "keep": None, "value": 61.9}
    assert [value["value"] for value in gqa["values"][1:]] == [
        published("gqa", "llava-hf/llava-1.5-7b-hf", "mustdrop", keep).score for keep in (192, 128, 64)
    ]
    assert "--method none --method mustdrop --keep 192,128,64" in gqa["command"]


def test_the_tables_that_there_are():
    assert set(suites()) == {
        "cen", "cen-next", "cen-qwen", "gleanvid", "gleanvid-64", "gleanvid-onevision", "flashvid", "flashvid-qwen",
        "flashvid-frames", "angelslim", "angelslim-3b", "uniprune-qwen", "uniprune-internvl", "vtc", "llava",
        "llava-next",
    }  # fmt: skip
    asked = json.loads(call("angelslim", "--method", "scope", "--json").stdout)
    assert [row["value"] for row in asked] == [100.0, 92.51, 79.35]
    (short, long) = (json.loads(call(name, "--json").stdout)[-1] for name in ("gleanvid", "gleanvid-64"))
    assert "max_num_frames=32,min_pixels=200704,max_pixels=786432 " in short["command"]
    assert "max_num_frames=64,min_pixels=200704,max_pixels=786432 " in long["command"]
    assert (short["value"], long["value"]) == (97.0, 96.0)


def test_further_frames_for_the_same_tokens():
    rows = json.loads(call("flashvid-frames", "--method", "flashvid", "--json").stdout)
    frames = [dict(pair.split("=") for pair in after(row["command"], "--model_args").split(",")) for row in rows]
    assert [(one["max_num_frames"], one.get("keep")) for one in frames] == [
        ("16", None), ("48", "0.333"), ("64", "0.25"), ("80", "0.2"), ("160", "0.1"),
    ]  # fmt: skip
    assert [row["value"] for row in rows] == [100.0, 105.3, 105.9, 106.8, 108.6]
    assert all(one["max_pixels"] == "200704" for one in frames)


def test_a_share_that_is_dropped_stands_in_place_of_a_budget():
    rows = json.loads(call("flashvid", "--method", "fastv", "--json").stdout)
    assert [row["keep"] for row in rows] == [None] * 5
    assert "method=fastv,ratio=0.75,max_num_frames=32 " in rows[1]["command"]


def test_commands_with_the_values_of_the_table():
    outcome = call("cen", "--method", "divprune")
    assert outcome.exit_code == 0
    lines = outcome.stdout.splitlines()
    at = next(i for i, line in enumerate(lines) if "method=divprune,keep=64,geometry=centered " in line)
    assert lines[at - 1] == "# 96.2"
    assert "--tasks gqa,mmbench_en_dev," in lines[at]
    assert not any("method=visionzip" in line for line in lines)
    rows = json.loads(call("cen", "--json").stdout)
    assert {row["method"] for row in rows} > {"none", "visionzip", "cdpruner"}
    assert "cen-qwen" in call().stdout
    with pytest.raises(ConfigError, match="there is no suite 'cem'"):
        find("cem")
    with pytest.raises(ConfigError, match=r"cen has no row of 'divprun'.*divprune"):
        find("cen").steps(["divprun"])
