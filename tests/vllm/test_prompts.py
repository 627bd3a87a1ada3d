"""Prompts whose positions go beyond the model's rotary tables, and prompts whose media cannot be told apart."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import transformers

from mustdrop.adapters import registry
from mustdrop.errors import ConfigError
from mustdrop.integrations.vllm import engine, settings
from support import engines
from support import tiny_checkpoints as tiny
from support.engines import Request

TOTAL, KEPT = 36, 4  # tokens of a picture, and those that stay of it
LONGEST = 128  # positions of the checkpoint, and tokens of a prompt with its answer
GIVEN = {"method": "divprune", "keep": KEPT / TOTAL}


def pictures(number):
    return [tiny.picture(40 + i, 24, 24) for i in range(number)]


def test_positions_beyond_the_checkpoints_own(tmp_path):
    """What is dropped leaves gaps, so that a prompt that fits reaches further than the tables would."""
    model, processor = tiny.save("llava", tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    config.text_config.max_position_embeddings = LONGEST
    config.save_pretrained(tmp_path)
    limits = {"max_model_len": LONGEST, "limit_mm_per_prompt": {"image": 16}}
    lead = " ".join(f"w{50 + i}" for i in range(40))
    far = Request("w6 w7", pictures(4), lead=lead)
    too_far = Request("w6", pictures(engine.ROOM * LONGEST // (TOTAL - KEPT)))  # the first four of them are asked again
    expected, total, kept = engines.reference(model, processor, "llava", far, settings.parse(GIVEN).pruner)
    assert len(lead.split()) + total > LONGEST > len(lead.split()) + kept + 12
    with engines.engine(tmp_path, registry()["llava"].classes[0], GIVEN, **limits) as llm:
        for _ in range(2):
            with pytest.raises(ConfigError, match=r"whose positions stay empty.*--max-model-len"):
                engines.answers(llm, "llava", [too_far])
            assert engines.tokens(engines.answers(llm, "llava", [far])) == [expected]


@pytest.mark.parametrize(("kind", "room"), [("default", True), ("llama3", True), ("dynamic", False), ("yarn", False)])
def test_tables_are_made_longer_where_they_depend_on_frequencies_alone(kind, room):
    for given in ({"rope_type": kind}, {"full_attention": {"rope_type": "default"}, "sliding": {"rope_type": kind}}):
        text = SimpleNamespace(rope_parameters=given, max_position_embeddings=LONGEST)
        assert engine.rotary_room(text) is room
        assert engine.positions(text) == (engine.ROOM if room else 1) * LONGEST


def test_media_side_by_side_are_refused_where_text_must_stand_before_each(tmp_path):
    family = "qwen2_5_vl"
    model, processor = tiny.save(family, tmp_path)
    usual = Request("w6", pictures(2))
    expected = engines.reference(model, processor, family, usual, settings.parse(GIVEN).pruner)[0]
    bare = usual.data(family) | {"prompt": "w5 <|vision_start|><|image_pad|><|image_pad|><|vision_end|> w6"}
    with engines.engine(tmp_path, registry()[family].classes[0], GIVEN) as llm:
        with pytest.raises(ConfigError, match="found none before the image at token 3: use the chat template"):
            llm.generate([bare], use_tqdm=False)
        assert engines.tokens(engines.answers(llm, family, [usual])) == [expected]
