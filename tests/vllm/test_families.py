"""Every served family gives the tokens of transformers with the same rows at the same positions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from mustdrop.adapters import registry
from mustdrop.integrations.vllm import settings
from support import engines
from support import tiny_checkpoints as tiny
from support.engines import Request

SIDE = tiny.TILE
KEEP = 0.5
# Where an image of several tiles is one medium here and several in transformers, a rule must choose by tile.
METHODS = dict.fromkeys(("internvl", "idefics3", "smolvlm"), "fastervlm")
FAMILIES = tuple(tiny.FAMILIES)
# Tokens per step, of all requests together. It is also the size of the encoder's cache, into which the largest picture
# must fit whole.
STEPS = {"idefics3": 256, "llava_next": 200, "llava_onevision": 200, "smolvlm": 256}


def steps(family):
    """Tokens per step of a family's engine."""
    return STEPS.get(family, 48)


def requests(family):
    """Portrait and landscape, one to three pictures of several shapes, a text, a video, a video beside a picture."""
    one = tiny.picture
    found = [
        Request("w6 w7", [one(0, 2 * SIDE, SIDE)]),
        Request("w9 w8", [one(1, SIDE, 2 * SIDE)]),
        Request("w11", [one(2, SIDE, SIDE), one(3, 2 * SIDE, SIDE)]),
        Request("w12 w13 w14 w15"),
        Request("w11", [one(4, SIDE, SIDE), one(5, SIDE, SIDE), one(6, SIDE, 2 * SIDE)]),
    ]
    if tiny.FAMILIES[family][2]:
        found.append(Request("w16", videos=[tiny.video(0, 4, 32, 48)]))
        frames = 5 if family == "llava_onevision" else 6  # its line break must not make the halves uneven
        found.append(Request("w17 w18", [one(7, 2 * SIDE, SIDE)], [tiny.video(1, frames, 48, 32)]))
    return found


@pytest.fixture(scope="module", params=FAMILIES)
def served(request, tmp_path_factory):
    """An engine whose steps are short, and the model in transformers."""
    family = request.param
    folder = tmp_path_factory.mktemp(family)
    model, processor = tiny.save(family, folder)
    given = {"method": METHODS.get(family, "divprune"), "keep": KEEP}
    limits = {"max_num_batched_tokens": steps(family), "block_size": 32}
    with engines.engine(folder, registry()[family].classes[0], given, **limits) as llm:
        yield SimpleNamespace(
            family=family, llm=llm, model=model, processor=processor, pruner=settings.parse(given).pruner
        )


def reference(served, request):
    return engines.reference(served.model, served.processor, served.family, request, served.pruner)


@contextmanager
def ends_within_media(llm) -> Iterator[set[str]]:
    """The kinds of media whose tokens a step of the engine has split, once the block is left."""
    scheduler, found = llm.llm_engine.engine_core.engine_core.scheduler, set()
    plain = scheduler.schedule

    def schedule(*args, **kwargs):
        out = plain(*args, **kwargs)
        for request in scheduler.running:
            for feature in request.mm_features:
                first = feature.mm_position.offset
                if first < request.num_computed_tokens < first + feature.mm_position.length:
                    found.add(feature.modality)
        return out

    scheduler.schedule = schedule
    try:
        yield found
    finally:
        del scheduler.schedule


def test_tokens_are_those_of_transformers_also_from_the_prefix_cache(served):
    asked = requests(served.family)
    expected = [reference(served, one) for one in asked]
    for _ in range(2):
        answered = engines.answers(served.llm, served.family, asked)
        assert engines.tokens(answered) == [one[0] for one in expected]
    assert any(one.num_cached_tokens for one in answered)


def test_steps_that_end_within_a_picture_or_video(served):
    media = {"image": {"images": [tiny.picture(9, 2 * SIDE, SIDE)]}}
    if tiny.FAMILIES[served.family][2]:
        media["video"] = {"videos": [tiny.video(4, 4, 32, 48)]}
    for first, (kind, given) in enumerate(media.items(), 100):  # other words, none of which is in the prefix cache
        lead = " ".join(f"w{first + i}" for i in range(steps(served.family) - 6))  # the step has six tokens more
        one = Request("w21 w22", **given, lead=lead)
        expected, _, kept = reference(served, one)
        assert kept > 6
        with ends_within_media(served.llm) as split:
            assert engines.tokens(engines.answers(served.llm, served.family, [one])) == [expected]
        assert split == {kind}


def test_each_request_of_a_batch_may_keep_as_many_as_it_likes(served):
    picture = [tiny.picture(8, SIDE, SIDE)]
    keeps = (0.25, 1.0, None, 10**6)
    answered = engines.answers(served.llm, served.family, [Request("w19 w20", picture, keep=keep) for keep in keeps])
    lengths = [len(one.prompt_token_ids) for one in answered]
    assert lengths[0] < lengths[2] < lengths[1] == lengths[3]
    got = engines.tokens(answered)
    whole, _, _ = engines.reference(served.model, served.processor, served.family, Request("w19 w20", picture), None)
    assert got[1] == got[3] == whole
    quarter = served.pruner.model_copy(update={"keep": 0.25})
    expected, total, kept = engines.reference(
        served.model, served.processor, served.family, Request("w19 w20", picture), quarter
    )
    assert got[0] == expected
    assert lengths[1] - lengths[0] == total - kept


def test_what_vllm_warms_up_with_is_processed(served):
    """All kinds of media in one prompt, without text between them; vLLM warns if it fails, and goes on."""
    processor = served.llm.llm_engine.renderer.mm_processor
    limits = {kind: 1 for kind, most in processor.info.allowed_mm_limits.items() if most}
    made = processor.get_dummy_mm_inputs(limits)
    assert set(made["mm_placeholders"]) == set(limits)
