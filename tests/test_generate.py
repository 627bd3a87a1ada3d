"""tools/docs/generate.py: blocks come from result files, and a stale or unknown block is found."""

from __future__ import annotations

import json

import pytest

import generate

RECORD = {
    "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
    "hardware": "2 cores",
    "seed": 7,
    "commit": "0123456789abcdef",
    "dirty": True,
}
STALE = "before\n<!-- begin: versions -->\nold\n<!-- end: versions -->\nafter\n"


@pytest.fixture
def project(tmp_path):
    (tmp_path / "docs").mkdir()
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    (results / "speed.json").write_text(json.dumps(RECORD))
    (tmp_path / "README.md").write_text(STALE)
    (tmp_path / "docs" / "plain.md").write_text("no blocks\n")
    return tmp_path


def test_versions_shows_where_a_result_comes_from():
    text = generate.render(STALE, {"speed": RECORD})
    row = "| `speed` | torch 2.13.0, transformers 5.23.0 | 2 cores | 7 | 0123456789 (dirty tree) |"
    assert row in text.splitlines()
    assert text.startswith("before\n<!-- begin: versions -->\n")
    assert text.endswith("\n<!-- end: versions -->\nafter\n")
    assert "old" not in text


def test_writing_settles_what_check_reports(project, capsys):
    assert generate.main(["--check"], root=project) == 1
    assert "-old" in capsys.readouterr().out
    assert (project / "README.md").read_text() == STALE
    assert generate.main([], root=project) == 0
    assert generate.main(["--check"], root=project) == 0
    assert (project / "docs" / "plain.md").read_text() == "no blocks\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "<!-- begin: weather -->\n<!-- end: weather -->\n",
            "no renderer is called 'weather'; known: ",
        ),
        ("<!-- begin: versions -->\n", "stands alone"),
        ("<!-- end: versions -->\n", "stands alone"),
        ("<!-- begin: versions -->\n<!-- end: version -->\n", "stands alone"),
    ],
)
def test_a_wrong_block_is_an_error(text, message):
    with pytest.raises(generate.GenerateError, match=message):
        generate.render(text, {"speed": RECORD})


def test_a_result_without_its_record_is_an_error(project, capsys):
    (project / "benchmarks" / "results" / "speed.json").write_text("{}")
    assert generate.main([], root=project) == 2
    assert "README.md: 'versions' needs 'versions'" in capsys.readouterr().err


def test_markers_inside_a_sentence_are_text():
    text = "a block begins with `<!-- begin: NAME -->`\n"
    assert generate.render(text, {}) == text
