"""Every served method chooses in vLLM what it chooses in transformers."""

from __future__ import annotations

import pytest

from mustdrop.adapters import registry
from mustdrop.integrations.vllm import settings
from support import engines
from support import tiny_checkpoints as tiny
from support.engines import Request

SIDE = tiny.TILE
# On LLaVA; `tome` and `mustdrop` merge inside its encoder in transformers, and behind it here, and `prumerge` reads a
# layer that vLLM does not load.
ON_LLAVA = ("visionzip", "vispruner", "hiprune", "scope", "mmr", "holov", "pooling", "uniform", "random")
# On a packed encoder both merge behind it.
ON_QWEN = ("mustdrop", "tome", "hiprune", "prumerge", "vidcom2", "dycoke", "vcast", "gleanvid", "fastvid")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    made = {}
    for family in ("llava", "qwen2_5_vl"):
        folder = tmp_path_factory.mktemp(family)
        made[family] = (folder, *tiny.save(family, folder))
    return made


@pytest.mark.parametrize(
    ("family", "method"), [("llava", name) for name in ON_LLAVA] + [("qwen2_5_vl", name) for name in ON_QWEN]
)
def test_methods(checkpoints, family, method):
    folder, model, processor = checkpoints[family]
    given = {"method": method, "keep": 0.25}
    pruner = settings.parse(given).pruner
    asked = [
        Request("w6 w7", [tiny.picture(20, 2 * SIDE, SIDE)]),
        Request("w8", [tiny.picture(21, SIDE, SIDE), tiny.picture(22, SIDE, SIDE)]),
    ]
    if family != "llava":
        asked.append(Request("w9", videos=[tiny.video(3, 4, 32, 48)]))
    expected = [engines.reference(model, processor, family, one, pruner)[0] for one in asked]
    with engines.engine(folder, registry()[family].classes[0], given) as llm:
        assert engines.tokens(engines.answers(llm, family, asked)) == expected
