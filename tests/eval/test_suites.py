"""`mustdrop eval-suite`: published tables as commands that can be run."""

from __future__ import annotations

import json
import shlex

import pytest
from typer.testing import CliRunner

from mustdrop import cli
from mustdrop.errors import ConfigError
from mustdrop.eval.suites import find, suites
from mustdrop.registry import resolve


def call(*arguments):
    return CliRunner().invoke(cli.app, ["eval-suite", *arguments])


@pytest.mark.parametrize("name", suites())
def test_every_command_names_a_method_with_its_settings(name):
    suite = suites()[name]
    assert suite.cells[0].method == "none"
    commands = [suite.command(cell) for cell in suite.cells]
    folders = [command.rpartition(" ")[2] for command in commands]
    assert len(set(folders)) == len(commands)  # no run writes over another
    for cell, command in zip(suite.cells, commands, strict=True):
        resolve(cell.method, **({} if cell.keep is None else {"keep": cell.keep}), **cell.knobs)
        words = shlex.split(command)
        arguments = dict(pair.split("=") for pair in words[words.index("--model_args") + 1].split(","))
        assert (arguments["pretrained"], arguments["method"]) == (suite.model, cell.method)
        assert cell.value is not None
        assert 0 < cell.value < 101  # a share of the unpruned score: pruning may help a little


def test_the_tables_that_there_are():
    assert set(suites()) == {
        "cen", "cen-next", "cen-qwen", "gleanvid", "gleanvid-64", "gleanvid-onevision", "angelslim",
    }  # fmt: skip
    asked = json.loads(call("angelslim", "--method", "scope", "--json").stdout)
    assert [row["value"] for row in asked] == [100.0, 92.51, 79.35]
    (short, long) = (json.loads(call(name, "--json").stdout)[-1] for name in ("gleanvid", "gleanvid-64"))
    assert "max_num_frames=32 " in short["command"]
    assert "max_num_frames=64 " in long["command"]
    assert (short["value"], long["value"]) == (97.0, 96.0)


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
