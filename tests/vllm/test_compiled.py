"""A compiled language model, as servers run it, gives the tokens of transformers."""

from __future__ import annotations

import shutil

import pytest

from mustdrop.adapters import registry
from mustdrop.integrations.vllm import settings
from support import engines
from support import tiny_checkpoints as tiny
from support.engines import Request

SIDE = tiny.TILE


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for CPUs with g++, and there is none")
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])  # one axis of positions, and three
def test_compiled(family, tmp_path):
    from vllm.config import CompilationMode

    given = {"method": "divprune", "keep": 0.25}
    model, processor = tiny.save(family, tmp_path)
    asked = [
        Request("w6 w7", [tiny.picture(0, 2 * SIDE, SIDE)]),
        Request("w8 w9 w10"),
        Request("w8", [tiny.picture(1, SIDE, SIDE)]),
    ]
    pruner = settings.parse(given).pruner
    expected = [engines.reference(model, processor, family, one, pruner)[0] for one in asked]
    with engines.engine(tmp_path, registry()[family].classes[0], given, enforce_eager=False) as llm:
        assert llm.llm_engine.vllm_config.compilation_config.mode != CompilationMode.NONE
        assert engines.tokens(engines.answers(llm, family, asked)) == expected
