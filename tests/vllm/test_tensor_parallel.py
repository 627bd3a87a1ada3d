"""Processes that share a model's heads: the first decides, and all do what it decided."""

from __future__ import annotations

import pytest
import torch

from mustdrop.adapters import registry
from mustdrop.integrations.vllm import settings
from support import engines, vllm_ranks
from support import tiny_checkpoints as tiny
from support.engines import Request

READ = ("visionzip", "tome", "fastervlm")  # attention or keys
METHODS = ("divprune", "random", "pooling", *READ)
# The first two read attention, whose heads lie in two processes; the first merges before the projector. The others have
# three axes of positions, and the last one rows of DeepStack.
MODELS = {"llava": "visionzip", "qwen2_5_vl": "hiprune", "qwen3_vl": "divprune"}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return vllm_ranks.run(METHODS, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("method", METHODS)
def test_all_processes_hand_over_what_the_first_decided(ranks, method):
    first, *others = (rank["together"][method] for rank in ranks)
    assert all(torch.equal(first, other) for other in others)
    assert not torch.equal(ranks[0]["alone"][method], ranks[1]["alone"][method]), "each by itself decides otherwise"
    if method not in READ:  # what is read of the heads of one process is not what is read of all
        assert torch.equal(first, ranks[0]["alone"][method])


def test_every_type_is_sent_and_heads_are_put_side_by_side(ranks):
    own = [vllm_ranks.features(i) for i in range(vllm_ranks.PROCESSES)]
    for rank in ranks:
        assert all(map(torch.equal, rank["sent"], vllm_ranks.kinds(own[0])))
        assert torch.equal(rank["gathered"], torch.cat(own, 1))


@pytest.mark.parametrize("family", MODELS)
def test_two_processes_give_the_tokens_of_one(family, tmp_path, monkeypatch):
    """Each waits for the other without letting go of its core: slow where other work runs."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("KMP_BLOCKTIME", "0")
    given = {"method": MODELS[family], "keep": 0.25}
    model, processor = tiny.save(family, tmp_path)
    asked = [Request("w6 w7", [tiny.picture(0, 96, 48)]), Request("w8 w9", [tiny.picture(1, 48, 96)])]
    if tiny.FAMILIES[family][2]:
        asked.append(Request("w10", [tiny.picture(2, 48, 96)], [tiny.video(0, 4, 32, 48)]))
    pruner = settings.parse(given).pruner
    expected = [engines.reference(model, processor, family, one, pruner)[0] for one in asked]
    options = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    with engines.engine(tmp_path, registry()[family].classes[0], given, **options) as llm:
        assert engines.tokens(engines.answers(llm, family, asked)) == expected
