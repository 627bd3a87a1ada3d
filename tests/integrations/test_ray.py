"""The class for `Dataset.map_batches` in Ray, whose workers may die. `nox -s ray` installs Ray."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mustdrop.demo.scenes import SceneMaker
from mustdrop.integrations.ray import ADDED, Answer
from support import documented

ray = pytest.importorskip("ray", reason="Ray is not installed (nox -s ray installs it)")

ROWS, BATCH = 20, 4
OPTIONS = {"device": "cpu", "dtype": "float32", "generation": {"max_new_tokens": 4}}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Ray on this machine alone, in a folder of its own, with the path that this process imports mustdrop from."""
    import mustdrop

    folder = tmp_path_factory.mktemp("cluster")
    source = str(Path(mustdrop.__file__).parents[1])
    variables = {"PYTHONPATH": source, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # workers start here, and relative paths are theirs
        ray.init(
            num_cpus=2,
            object_store_memory=100 * 2**20,
            include_dashboard=False,
            _node_ip_address="127.0.0.1",
            runtime_env={"env_vars": variables},
            log_to_driver=False,
            _system_config={"worker_niceness": 0},  # what else runs beside the tests would starve them
        )
        ray.data.DataContext.get_current().enable_progress_bars = False
        yield folder
        ray.shutdown()


@pytest.fixture(scope="module")
def rows():
    maker = SceneMaker("heldout", 11)
    found = []
    for i in range(ROWS):
        scene = maker.scene()
        asked = maker.question(scene, "region2color")
        found.append({"id": i, "image": scene.image, "question": asked.text, "truth": asked.answer})
    return found


@pytest.fixture(scope="module")
def expected(rows):
    """Without Ray, from rows one by one."""
    ours = Answer("bundled", "mustdrop", 64, **OPTIONS)
    found = {}
    for row in rows:
        one = ours({name: np.array([row[name]]) for name in ("image", "question")})
        found[row["id"]] = str(one["generated_text"][0])
    return found


def ask(rows, kind=Answer, **more):
    """All rows, by two workers."""
    data = ray.data.from_items(rows, override_num_blocks=5)
    return data.map_batches(
        kind,
        batch_size=BATCH,
        compute=ray.data.ActorPoolStrategy(size=2),
        num_cpus=0.9,
        fn_constructor_kwargs={"pretrained": "bundled", "keep": 64, **OPTIONS, **more},
    )


def test_every_row_is_answered_once_and_keeps_its_columns(cluster, rows, expected):
    faulty = rows[3] | {"question": "where is <image> ?"}
    given = [*rows[:3], faulty, *rows[4:]]
    found = ask(given).take_all()
    assert sorted(row["id"] for row in found) == list(range(ROWS))
    by_id = {row["id"]: row for row in found}
    assert by_id[3]["generated_text"] == ""
    assert "<image>" in by_id[3]["error"]
    for i in set(range(ROWS)) - {3}:
        row = by_id[i]
        assert set(row) == {*rows[i], *ADDED}
        assert row["error"] == ""
        assert row["generated_text"] == expected[i]
        assert row["truth"] == rows[i]["truth"]
        assert np.array_equal(row["image"], rows[i]["image"])
        assert row["num_vision_tokens"] == 576
        assert row["num_equal_tokens"] < 70


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_killed_worker_loses_nothing_and_doubles_nothing(cluster, rows, expected, when, tmp_path):
    marker = tmp_path / "killed"

    class Killed(Answer):
        """Kills its process, once, with a batch in its hands: before it is answered, or when all of it is."""

        def __call__(self, batch):
            mine = 9 in batch["id"] and not marker.exists()
            if mine and when == "before":
                self._end()
            found = super().__call__(batch)
            if mine:
                self._end()
            return found | {"worker": np.full(len(batch["id"]), os.getpid())}

        @staticmethod
        def _end():
            marker.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)

    found = ask(rows, Killed).take_all()
    dead = int(marker.read_text())
    assert dead not in {row["worker"] for row in found if row["id"] == 9}
    assert sorted(row["id"] for row in found) == list(range(ROWS))
    assert {row["id"]: row["generated_text"] for row in found} == expected
    assert {row["error"] for row in found} == {""}


def test_results_are_written_and_read_again(cluster, rows, expected, tmp_path):
    ask(rows[:8]).drop_columns(["image"]).write_parquet(str(tmp_path / "out"))
    found = ray.data.read_parquet(str(tmp_path / "out")).take_all()
    assert {row["id"]: row["generated_text"] for row in found} == {i: expected[i] for i in range(8)}


def test_the_documented_example(cluster, rows):
    folder = cluster / "pictures"
    folder.mkdir()
    for row in rows[:3]:
        Image.fromarray(row["image"]).save(folder / f"{row['id']}.png")
    (text,) = documented.examples("docs/serving.md", "integrations.ray import Answer", "read_images")
    exec(text, {})
    found = ray.data.read_parquet("answers").take_all()
    assert len({row["path"] for row in found}) == 3
    assert all(row["generated_text"] and not row["error"] for row in found)


def test_wrong_settings_end_the_run(cluster, rows):
    with pytest.raises(Exception, match="fastv"):
        ask(rows[:2], method="fastr").take_all()
