"""Two processes that share a model's heads keep what one process keeps."""

from __future__ import annotations

import os

import pytest

from mustdrop.adapters import registry
from mustdrop.integrations.vllm import settings
from support import engines
from support import tiny_checkpoints as tiny
from support.engines import Request

GIVEN = {"method": "visionzip", "keep": 0.25}  # it reads attention, and merges before the projector


@pytest.mark.parametrize("family", ["llava"])
def test_two_processes(family, tmp_path, monkeypatch):
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("two processes of vLLM want a core each")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{cores[0]}|{cores[1]}")
    model, processor = tiny.save(family, tmp_path)
    asked = [Request("w6 w7", [tiny.picture(0, 96, 48)]), Request("w8 w9", [tiny.picture(1, 48, 96)])]
    pruner = settings.parse(GIVEN).pruner
    expected = [engines.reference(model, processor, family, one, pruner)[0] for one in asked]
    options = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    with engines.engine(tmp_path, registry()[family].classes[0], GIVEN, **options) as llm:
        assert engines.tokens(engines.answers(llm, family, asked)) == expected
