"""`transformers.pipeline` over a patched model: the answers of `model.generate`."""

from __future__ import annotations

import pytest
import torch
import transformers
from PIL import Image

import mustdrop
from mustdrop.demo.model import load, prompt
from mustdrop.demo.scenes import SceneMaker

QUESTIONS = ("where is the magenta one ?", "how many digits are there ?")


@pytest.fixture(scope="module")
def demo():
    return load()


@pytest.fixture(scope="module")
def scenes():
    maker = SceneMaker("heldout", seed=7)
    return [Image.fromarray(maker.scene().image) for _ in QUESTIONS]


@pytest.fixture
def pipe(demo):
    model, processor = demo
    mustdrop.patch(model, keep=64)
    yield transformers.pipeline("image-text-to-text", model=model, processor=processor, device="cpu")
    mustdrop.unpatch(model)


def expected(demo, image, question, **options):
    """What `generate` answers, and the trace of that call."""
    model, processor = demo
    inputs = processor(text=prompt(processor, question), images=image, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=6, do_sample=False, **options)
    words = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return words[0], mustdrop.trace(model)


def chat(image, question):
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]


def test_text_and_image(demo, pipe, scenes):
    for image, question in zip(scenes, QUESTIONS, strict=True):
        (got,) = pipe(
            images=image, text=prompt(demo[1], question), max_new_tokens=6, do_sample=False, return_full_text=False
        )
        trace = mustdrop.trace(pipe.model)
        words, theirs = expected(demo, image, question)
        assert got["generated_text"].strip() == words
        assert torch.equal(trace.tokens, theirs.tokens)
        assert 63 < trace.equal_tokens[0] <= 64


def test_chat_messages(demo, pipe, scenes):
    for image, question in zip(scenes, QUESTIONS, strict=True):
        (got,) = pipe(text=chat(image, question), max_new_tokens=6, do_sample=False, return_full_text=False)
        assert got["generated_text"].strip() == expected(demo, image, question)[0]


def test_chat_template_that_makes_the_inputs_itself(demo, pipe, scenes):
    model, processor = demo
    inputs = processor.apply_chat_template(
        chat(scenes[0], QUESTIONS[0]), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    out = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    words = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert words == expected(demo, scenes[0], QUESTIONS[0])[0]


def test_several_prompts_in_one_batch(demo, pipe, scenes):
    texts = [prompt(demo[1], question) for question in QUESTIONS]
    got = pipe(
        images=[[image] for image in scenes],
        text=texts,
        max_new_tokens=6,
        do_sample=False,
        return_full_text=False,
        padding=True,
    )
    assert mustdrop.trace(pipe.model).tokens.shape[1] == 2
    answers = [entry["generated_text"].strip() for entry in (g[0] if isinstance(g, list) else g for g in got)]
    assert answers == [expected(demo, i, q)[0] for i, q in zip(scenes, QUESTIONS, strict=True)]


def test_generate_options_go_through_the_pipeline(demo, pipe, scenes):
    options = {"num_beams": 3}
    (got,) = pipe(
        text=chat(scenes[0], QUESTIONS[0]),
        max_new_tokens=6,
        return_full_text=False,
        generate_kwargs={"do_sample": False, **options},
    )
    assert got["generated_text"].strip() == expected(demo, scenes[0], QUESTIONS[0], **options)[0]
    with pytest.raises(mustdrop.errors.UnsupportedOptionError, match="quantized"):
        pipe(
            text=chat(scenes[0], QUESTIONS[0]), max_new_tokens=6, generate_kwargs={"cache_implementation": "quantized"}
        )


def test_a_patch_made_after_the_pipeline_acts_in_it(demo, scenes):
    model, processor = demo
    pipe = transformers.pipeline("image-text-to-text", model=model, processor=processor, device="cpu")
    with mustdrop.patched(model, keep=64):
        (got,) = pipe(text=chat(scenes[0], QUESTIONS[0]), max_new_tokens=6, do_sample=False, return_full_text=False)
        assert mustdrop.trace(model).dropped_anything
        assert got["generated_text"].strip() == expected(demo, scenes[0], QUESTIONS[0])[0]


def test_the_pipeline_itself_is_no_model(pipe):
    with pytest.raises(mustdrop.errors.UnsupportedModelError, match="pipeline"):
        mustdrop.patch(pipe)
