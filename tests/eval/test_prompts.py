"""Prompts word for word, and which questions share a call."""

from __future__ import annotations

from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlamaConfig, LlavaConfig, LlavaNextConfig, Qwen2Config

from eval import folders
from mustdrop.demo.model import load
from mustdrop.errors import BudgetError, ConfigError, UnsupportedOptionError
from mustdrop.eval.batches import Inputs, plan
from mustdrop.eval.benchmark import Item
from mustdrop.eval.media import Drawn, Picture
from mustdrop.eval.prompts import Prompter, prompter
from mustdrop.eval.published import published, rows
from mustdrop.eval.run import evaluate
from mustdrop.eval.settings import Settings
from mustdrop.media_limits import MediaLimits

PIXELS = np.zeros((192, 192, 3), np.uint8)
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: <image>\nIs it?\nAnswer. ASSISTANT:"
)


SCENE = Drawn(PIXELS)


def item(text="what digit is red ?", medium=SCENE):
    return Item(1, text, medium, text)


def test_vicuna_v1_word_for_word():
    processor = SimpleNamespace(image_token="<image>", tokenizer=SimpleNamespace(bos_token="<s>"))
    ask = Prompter(processor, vicuna=True)
    assert ask.text(item("Is it?\nAnswer.")) == VICUNA
    assert ask.text(item("Is it?\nAnswer.", None)) == VICUNA.replace("<image>\n", "")
    assert ask.special_tokens(VICUNA)  # the tokenizer puts <s> first
    assert not ask.special_tokens("<s>USER")


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (LlavaConfig(text_config=LlamaConfig(vocab_size=32064)), "vicuna_v1"),
        (LlavaNextConfig(text_config=LlamaConfig(vocab_size=32064)), "vicuna_v1"),
        (LlavaConfig(text_config=LlamaConfig(vocab_size=128256)), "chat template of the processor"),
        (LlavaConfig(text_config=Qwen2Config(vocab_size=32064)), "chat template of the processor"),
    ],
)
def test_the_template_follows_the_model(config, name):
    processor = SimpleNamespace(chat_template="x", image_processor=SimpleNamespace(image_mean=[0.48, 0.45, 0.4]))
    assert prompter(processor, config, "auto").name == name
    assert prompter(processor, config, "vicuna_v1").name == "vicuna_v1"
    assert prompter(processor, config, "processor").name == "chat template of the processor"


def test_llava_gets_squares_with_its_template():
    processor = SimpleNamespace(chat_template="x", image_processor=SimpleNamespace(image_mean=[0.4815, 0.4578, 0.4082]))
    words = LlamaConfig(vocab_size=32064)
    ask = prompter(processor, LlavaConfig(text_config=words), "auto")
    assert ask.pictures == "padded to squares with (122, 116, 104)"
    wide = Image.new("RGB", (7, 4), (255, 0, 0))
    pixels = np.asarray(ask.picture(wide))
    assert pixels.shape == (7, 7, 3)
    assert (pixels[1:5] == (255, 0, 0)).all()
    assert (pixels[[0, 5, 6]] == (122, 116, 104)).all()
    high = np.asarray(ask.picture(wide.transpose(Image.Transpose.TRANSPOSE)))
    assert (high == pixels.transpose(1, 0, 2)).all()
    for config, template in (
        (LlavaNextConfig(text_config=words), "auto"),
        (LlavaConfig(text_config=words), "processor"),
    ):
        other = prompter(processor, config, template)
        assert other.picture(wide) is wide
        assert other.pictures == "as the processor has it"


def test_no_template_at_all():
    with pytest.raises(ConfigError, match="no chat template"):
        prompter(SimpleNamespace(chat_template=None), LlavaConfig(text_config=Qwen2Config()), "auto")


def test_the_processors_template_puts_the_image_first():
    model, processor = load()
    ask = prompter(processor, model.config, "auto")
    assert ask.text(item()) == "USER: <image> what digit is red ? ASSISTANT:"
    assert ask.text(item(medium=None)) == "USER: what digit is red ? ASSISTANT:"


def test_calls_have_pictures_or_none_and_keep_the_order():
    items = [item(medium=None if i in (1, 2, 5) else Drawn(PIXELS)) for i in range(8)]
    assert plan(items, 3) == [[0, 3, 4], [1, 2, 5], [6, 7]]
    assert plan(items, 1) == [[i] for i in range(8)]
    assert plan(items, 100) == [[0, 3, 4, 6, 7], [1, 2, 5]]


def test_what_cannot_be_read_leaves_its_call(tmp_path):
    model, processor = load()
    (tmp_path / "torn.png").write_bytes(b"\x89PNG")
    items = [item(), item(medium=Picture(tmp_path / "torn.png")), item(medium=Picture(tmp_path / "none.png")), item()]
    batch = Inputs(items, prompter(processor, model.config, "auto"))[[0, 1, 2, 3]]
    assert batch.places == [0, 3]
    assert sorted(batch.failed) == [1, 2]
    assert batch.inputs["pixel_values"].shape[0] == 2


def test_what_the_processor_refuses_leaves_its_call():
    model, processor = load()
    wrong = np.zeros((1, 1, 3), np.uint8)
    ask = prompter(processor, model.config, "auto")
    refused = Refusing(processor)
    batch = Inputs([item(), item(medium=Drawn(wrong)), item()], Prompter(refused, ask.vicuna))[[0, 1, 2]]
    assert batch.places == [0, 2]
    assert batch.failed == {1: "the processor refuses it: ValueError: too small"}
    nothing = Inputs([item(medium=Drawn(wrong))], Prompter(refused, ask.vicuna))[[0]]
    assert nothing.inputs is None
    assert list(nothing.failed) == [0]


class Refusing:
    """A processor that refuses tiny pictures, as some families' do."""

    def __init__(self, processor):
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.apply_chat_template = processor.apply_chat_template

    def __call__(self, images, **arguments):
        if any(image.size == (1, 1) for (image,) in images):
            raise ValueError("too small")
        return self.processor(images=images, **arguments)


class Qwen2VLImageProcessor:
    """Limits of pixels are known by this name."""

    size: ClassVar = {"shortest_edge": 256, "longest_edge": 25600}


class Limited:
    """A processor that says what it is called with."""

    def __init__(self, processor):
        self.processor, self.tokenizer, self.seen = processor, processor.tokenizer, []
        self.chat_template, self.apply_chat_template = processor.chat_template, processor.apply_chat_template
        self.image_processor = Qwen2VLImageProcessor()

    def __call__(self, images_kwargs=None, **arguments):
        self.seen.append(images_kwargs)
        return self.processor(**arguments)


def test_limits_of_pixels_reach_the_processor_and_the_result():
    model, processor = load()
    limited = Limited(processor)
    ask = prompter(limited, model.config, "processor", limits=MediaLimits(min_pixels=1024, max_pixels=4096))
    Inputs([item()], ask)[[0]]
    assert limited.seen == [{"size": {"shortest_edge": 1024, "longest_edge": 4096}}]
    assert ask.pictures == "as the processor has it, min_pixels=1024, max_pixels=4096"
    plain = prompter(limited, model.config, "processor")
    Inputs([item()], plain)[[0]]
    assert limited.seen[1] is None
    assert plain.pictures == "as the processor has it"


def test_limits_that_the_processor_has_not_are_refused_before_a_question_is_asked(tmp_path):
    for limits in ({"max_pixels": 4096}, {"min_pixels": 4096}, {"total_pixels": 4096}):
        settings = Settings("scenes", limit=1, out=tmp_path / "out", workers=0, **limits)
        with pytest.raises(UnsupportedOptionError, match=rf"{next(iter(limits))}: the \w+ of this model has no such"):
            evaluate(settings)
    with pytest.raises(ConfigError, match="min_pixels=2 is above max_pixels=1"):
        evaluate(Settings("scenes", limit=1, out=tmp_path / "out", workers=0, min_pixels=2, max_pixels=1))


def test_a_prompt_too_small_for_the_budget_fails_alone(tmp_path, monkeypatch):
    from mustdrop.eval.engine import Engine

    ask = Engine.ask

    def refusing(self, batch, limit):
        if 1 in batch.places:
            raise BudgetError("keep=192 is more than the 100 vision tokens of this prompt.")
        return ask(self, batch, limit)

    monkeypatch.setattr(Engine, "ask", refusing)
    settings = Settings(
        "gqa", data=folders.gqa(tmp_path / "data"), out=tmp_path / "out", knobs={"keep": 192}, workers=0
    )
    result = evaluate(settings)
    assert [failure.name for failure in result.failed] == ["1"]
    assert "more than the 100 vision tokens" in result.failed[0].reason
    assert result.scores["accuracy"] == 75.0


def test_published_scores_are_found_by_model_method_and_budget():
    found = published("mme", "llava-hf/llava-1.5-7b-hf", "mustdrop", 192)
    assert (found.score, found.tokens) == (1787, 192)
    assert "2502.11494" in found.source
    assert published("mme", "somewhere/LLaVA-1.5-7B-copy", "none", None).score == 1862
    assert published("textvqa", "llava-hf/llava-v1.6-vicuna-7b-hf", "mustdrop", 320).score == 59.9
    assert published("mme", "llava-hf/llava-1.5-13b-hf", "mustdrop", 192) is None
    assert published("mme", "llava-hf/llava-1.5-7b-hf", "mustdrop", 100) is None
    assert published("scenes", "bundled", "mustdrop", 192) is None
    assert len(rows()) == 10 * (13 + 5)


def test_inputs_are_padded_on_the_left(tmp_path):
    model, processor = load()
    processor.tokenizer.padding_side = "left"
    ask = prompter(processor, model.config, "auto")
    batch = Inputs([item("what ?"), item("how many digits are there ?")], ask)[[0, 1]]
    mask = batch.inputs["attention_mask"]
    assert mask[0, 0] == 0
    assert bool(mask[:, -1].all())
    assert torch.is_tensor(batch.inputs["pixel_values"])
