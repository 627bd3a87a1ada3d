"""Caches never mix what was pruned differently, and hold as much as stays."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from mustdrop.adapters import registry
from mustdrop.integrations.vllm import settings
from support import engines
from support import tiny_checkpoints as tiny
from support.engines import Request

FAMILY = "llava"
TOTAL, KEPT = 36, 9  # tokens of a picture, and those that stay of it
STEP = 8  # tokens per step, and the least that the encoder's cache has room for


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp(FAMILY)
    model, processor = tiny.save(FAMILY, folder)
    given = {"method": "divprune", "keep": KEPT}
    limits = {"max_num_batched_tokens": STEP, "limit_mm_per_prompt": {"image": 1}}
    with engines.engine(folder, registry()[FAMILY].classes[0], given, block_size=32, **limits) as llm:
        yield SimpleNamespace(llm=llm, model=model, processor=processor, pruner=settings.parse(given).pruner)


def ask(served, requests, **more):
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=engines.NEW, ignore_eos=True)
    return served.llm.generate([one.data(FAMILY) | more for one in requests], sampling, use_tqdm=False)


def test_a_picture_with_a_name_of_its_clients_is_told_apart_by_what_stays_of_it(served):
    """`multi_modal_uuids` stand in place of a hash of the picture."""
    keeps = (3, None, 7, None, 3)
    requests = [Request("w6 w7 w8", [tiny.picture(0, 48, 24)], keep=keep) for keep in keeps]
    answered = [ask(served, [one], multi_modal_uuids={"image": ["mine"]})[0] for one in requests]
    for keep, one, got in zip(keeps, requests, answered, strict=True):
        pruner = served.pruner.model_copy(update={"keep": keep or KEPT})
        expected, _, kept = engines.reference(served.model, served.processor, FAMILY, one, pruner)
        assert kept == (keep or KEPT)
        assert engines.tokens([got]) == [expected]


def test_the_encoders_budget_and_cache_are_as_large_as_what_stays_of_a_picture(served):
    scheduler = served.llm.llm_engine.engine_core.engine_core.scheduler
    assert scheduler.encoder_cache_manager.cache_size == KEPT
    assert scheduler.max_num_encoder_input_tokens == KEPT


def test_a_request_that_keeps_more_than_the_cache_holds_is_refused_and_the_next_one_answered(served):
    from vllm.exceptions import VLLMValidationError

    usual = Request("w6 w7", [tiny.picture(1, 24, 24)])
    before = engines.tokens(ask(served, [usual]))
    with pytest.raises(VLLMValidationError, match=f"{TOTAL} embedding tokens, which exceeds"):
        ask(served, [Request("w6 w7", [tiny.picture(1, 24, 24)], keep=1.0)])
    assert engines.tokens(ask(served, [usual])) == before
