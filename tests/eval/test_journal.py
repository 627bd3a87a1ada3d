"""The journal: whole lines only, whatever kills the writer."""

from __future__ import annotations

import json
import os
import random
import signal
import time

import pytest

from mustdrop.errors import ConfigError, DataFileError
from mustdrop.eval.journal import Journal


def test_a_torn_last_line_is_cut_off(tmp_path):
    journal = Journal(tmp_path, 0)
    journal.write([{"item": 0, "text": "a"}, {"item": 1, "text": "ü"}])
    journal.close()
    whole = journal.path.read_bytes()
    for cut in range(1, 20):
        journal.path.write_bytes(whole[:-cut])
        assert list(Journal(tmp_path, 0).answers()) == [0]  # reading changes nothing
        assert journal.path.read_bytes() == whole[:-cut]
        again = Journal(tmp_path, 0)
        again.open()
        again.write([{"item": 1, "text": "ü"}])
        again.close()
        assert journal.path.read_bytes() == whole


def test_a_broken_line_inside_is_named(tmp_path):
    (tmp_path / "journal-0000.jsonl").write_text(
        '{"item": 0, "text": "a"}\n{"item": 1, "te\n{"item": 2, "text": "c"}\n'
    )
    with pytest.raises(DataFileError, match=r"journal-0000\.jsonl line 2 is broken"):
        Journal(tmp_path, 0).answers()


def test_failures_are_asked_again_only_on_request(tmp_path):
    journal = Journal(tmp_path, 0)
    journal.write([{"start": {}}, {"item": 0, "failed": "x"}, {"item": 1, "text": "a"}])
    assert list(journal.answers()) == [0, 1]
    assert list(journal.answers(retry=True)) == [1]
    journal.write([{"item": 0, "text": "b"}, {"item": 1, "text": "another"}])
    assert [line["text"] for line in journal.answers().values()] == ["b", "a"]  # an answer is never replaced


def test_other_settings_are_refused(tmp_path):
    Journal(tmp_path, 0).claim({"keep": 192, "model": "x"})
    Journal(tmp_path, 1).claim({"keep": 192, "model": "x"})
    with pytest.raises(ConfigError, match=r"other settings:\n  keep: 192 there, 64 now\n.*--out") as caught:
        Journal(tmp_path, 0).claim({"keep": 64, "model": "x"})
    assert "model" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.json"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_two_writers_of_one_file_are_refused(tmp_path):
    journal = Journal(tmp_path, 0)
    journal.open()
    assert opens_elsewhere(tmp_path) == "another process is writing"
    journal.close()
    assert opens_elsewhere(tmp_path) == ""


def opens_elsewhere(folder):
    """What a child process is told when it opens the journal."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            Journal(folder, 0).open()
        except ConfigError as error:
            os.write(writer, str(error).split(" to ")[0].encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader) as told:
        return told.read()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_moment_nothing_is_lost_or_doubled(tmp_path):
    """A process that writes is killed again and again, and goes on each time."""
    number, kills, rng = 1000, 0, random.Random(0)
    while len(Journal(tmp_path, 0).answers()) < number:
        child = os.fork()
        if child == 0:
            write_the_rest(tmp_path, number)
            os._exit(0)
        time.sleep(rng.uniform(0.005, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills += 1
    assert kills >= 3
    (path,) = tmp_path.glob("journal-*")
    items = [json.loads(line)["item"] for line in path.read_text().splitlines()]
    assert items == list(range(number))


def write_the_rest(folder, number):
    journal = Journal(folder, 0)
    journal.open()
    done = journal.answers()
    todo = [item for item in range(number) if item not in done]
    for start in range(0, len(todo), 7):
        journal.write([{"item": item, "text": "x" * (item % 50)} for item in todo[start : start + 7]])
        time.sleep(0.002)  # all of them take longer than any child lives
