"""`mustdrop app` as it is called: what it needs, whom it lets in."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

import mustdrop.app
from mustdrop import extras
from test_cli import call


@pytest.fixture
def launched(monkeypatch):
    """Stands in for gradio and for the page; collects the options of each launch."""
    seen = []
    page = SimpleNamespace(
        build=lambda session: session, launch=lambda blocks, session, **options: seen.append(options)
    )
    monkeypatch.setitem(sys.modules, "gradio", SimpleNamespace(__spec__=SimpleNamespace()))
    monkeypatch.setitem(sys.modules, "mustdrop.app.page", page)
    monkeypatch.setattr(mustdrop.app, "page", page, raising=False)
    return seen


def test_without_gradio_one_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: None)
    code, _, said = call(monkeypatch, capsys, "app")
    assert code == 2
    assert "`mustdrop app` needs gradio" in said
    assert "[app]" in said


def test_only_this_machine_is_let_in_unless_a_host_is_named(launched, monkeypatch, capsys):
    assert call(monkeypatch, capsys, "app")[0] == 0
    assert (launched[0]["server_name"], launched[0]["server_port"]) == ("127.0.0.1", 7860)
    assert call(monkeypatch, capsys, "app", "--host", "0.0.0.0", "--port", "0")[0] == 0
    assert launched[1]["server_name"] == "0.0.0.0"
    assert launched[1]["server_port"] > 0


@pytest.mark.parametrize(("arguments", "says"), [(("--device", "nothing"), "nothing"), (("--dtype", "int3"), "int3")])
def test_what_is_wrong_is_said_before_anything_is_served(arguments, says, launched, monkeypatch, capsys):
    code, _, said = call(monkeypatch, capsys, "app", *arguments)
    assert code == 2
    assert says in said
    assert launched == []


def test_a_port_that_is_taken_is_one_line(launched, monkeypatch, capsys):
    def refuse(*_, **__):
        raise OSError("Cannot find empty port")

    sys.modules["mustdrop.app.page"].launch = refuse
    code, _, said = call(monkeypatch, capsys, "app", "--port", "1234")
    assert code == 2
    assert "cannot listen on 127.0.0.1, port 1234" in said
