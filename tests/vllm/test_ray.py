"""A data set asked by `ray.data.llm`, whose engine finds the plugin by itself."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image

import mustdrop
from mustdrop.demo.model import CHECKPOINT, load, prompt
from mustdrop.demo.scenes import SceneMaker
from mustdrop.integrations.vllm import VARIABLE
from support import documented, engines

ray = pytest.importorskip("ray", reason="Ray is not installed (nox -s vllm installs it)")

ALL, KEEP, FEW = 576, 128, 64
ROWS = 8
BROKEN = 5


@pytest.fixture(scope="module")
def rows():
    maker, (_, processor) = SceneMaker("heldout", 7), load()
    found = []
    for i in range(ROWS):
        scene, made = maker.scene(), io.BytesIO()
        asked = maker.question(scene, "region2color")
        Image.fromarray(scene.image).save(made, "PNG")
        row = {"id": i, "image": made.getvalue(), "prompt": prompt(processor, asked.text), "truth": asked.answer}
        found.append(row | {"keep": FEW if i % 2 else None})
    found[BROKEN]["keep"] = -1
    return found


@pytest.fixture
def cluster():
    """Ray on this machine alone."""
    source = str(Path(mustdrop.__file__).parents[1])
    asked = {VARIABLE: json.dumps({"method": "divprune", "keep": KEEP}), "PYTHONPATH": source}
    variables = {name: value for name, value in engines.QUIET.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    ray.init(
        num_cpus=2,
        object_store_memory=100 * 2**20,
        include_dashboard=False,
        _node_ip_address="127.0.0.1",
        runtime_env={"env_vars": variables | asked},
        log_to_driver=False,
        _system_config={"worker_niceness": 0},  # what else runs beside the tests would starve them
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield
    ray.shutdown()


def test_a_data_set(cluster, rows):
    (text,) = documented.examples("docs/serving.md", "build_processor")
    text = text.replace('"max_model_len": 1024', '"max_model_len": 1024, "dtype": "float32", "enforce_eager": True')
    names = {"model": str(CHECKPOINT), "rows": ray.data.from_items(rows)}
    exec(text, names)
    found = names["answered"].take_all()
    assert sorted(row["id"] for row in found) == list(range(ROWS))
    good = {row["id"]: row for row in found if not row["__inference_error__"]}
    assert set(range(ROWS)) - set(good) == {BROKEN}
    lengths = {i: row["num_input_tokens"] for i, row in good.items()}
    assert {lengths[i] for i in (1, 3, 7)} == {lengths[0] - KEEP + FEW}
    assert KEEP < lengths[0] < KEEP + 20
    right = sum(row["generated_text"].strip() == rows[i]["truth"] for i, row in good.items())
    assert right >= len(good) - 1
