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
        assert 0 < cell.value <= 100


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
