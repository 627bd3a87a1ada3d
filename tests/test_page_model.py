"""The page model: its folder, its own processor, what the bundled one can do, and pruning of all that it is asked."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from benchmarks.page_model.export import save
from benchmarks.page_model.network import build
from PIL import Image
from transformers import Qwen3VLForConditionalGeneration

import mustdrop
from mustdrop.demo import model as demo_model
from mustdrop.demo.model import NAMES, load, prompt
from mustdrop.demo.page_processor import UNIT, PageProcessor, fitted
from mustdrop.demo.tasks import KINDS, LEARNED, TYPES, WORDS, TaskMaker
from mustdrop.errors import ConfigError


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """As `python -m benchmarks page_model export` writes it, and as it is read."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("page_checkpoint")
    save(build(), folder)
    model = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.eval(), PageProcessor.from_pretrained(folder)


def asked(processor, sample, questions):
    """Model inputs for several questions about one sample."""
    videos = int(sample.video)
    texts = [prompt(processor, q.text, 0 if videos else len(sample.pictures), videos) for q in questions]
    media = {"videos" if videos else "images": [list(sample.pictures)] * len(texts)}
    return processor(text=texts, padding=True, **media)


def answers(model, processor, inputs):
    output = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
    return processor.batch_decode(output, skip_special_tokens=True)


def test_prompts_are_those_the_model_was_trained_on(pages):
    _, processor = pages
    still = np.zeros((32, 80, 3), np.uint8)
    names = processor.tokenizer.convert_ids_to_tokens
    inputs = processor(text=prompt(processor, "read K", images=2), images=[Image.fromarray(still)] * 2)
    picture = ["<|vision_start|>", *["<|image_pad|>"] * 10, "<|vision_end|>"]
    assert names(inputs["input_ids"][0]) == ["<|im_start|>", "user", *picture, *picture, "read", "K", "assistant"]
    assert inputs["image_grid_thw"].tolist() == [[1, 4, 10]] * 2

    inputs = processor(text=prompt(processor, "which comes first ?", images=0, videos=1), videos=[still] * 3)
    frames = ["<|vision_start|>", *["<|video_pad|>"] * 10, "<|vision_end|>"]
    times = (["<", "0", ".", second, "seconds>"] for second in "2")
    words = [word for time in times for word in (*time, *frames)]
    words += ["<", "1", ".", "2", "seconds>", *frames]
    question = ["which", "comes", "first", "?", "assistant"]
    assert names(inputs["input_ids"][0]) == ["<|im_start|>", "user", *words, *question]
    assert inputs["video_grid_thw"].tolist() == [[2, 4, 10]]
    assert (inputs["mm_token_type_ids"] == 2).sum() == 20


def test_pixels_are_those_of_transformers(pages):
    _, processor = pages
    try:
        from transformers import Qwen2VLImageProcessorPil as ImageProcessor
    except ImportError:
        pytest.skip("this transformers has no image processor that needs no torchvision")
    theirs = ImageProcessor(
        patch_size=8, image_mean=[0.5] * 3, image_std=[0.5] * 3, size={"shortest_edge": 48 * 48, "longest_edge": 256**2}
    )
    for size in ((96, 128), (100, 75), (20, 31), (700, 300)):
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8))
        mine = processor(text=prompt(processor, "read K"), images=image)
        expected = theirs(images=image, return_tensors="pt")
        assert mine["image_grid_thw"].tolist() == expected["image_grid_thw"].tolist()
        torch.testing.assert_close(mine["pixel_values"], expected["pixel_values"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (17, 400), (3000, 2000), (96, 96)])
def test_pictures_are_fitted_into_whole_tokens(size):
    height, width = fitted(*size)
    assert height % UNIT == width % UNIT == 0
    assert UNIT**2 <= height * width <= 2 * 256 * 256


def test_marks_and_media_must_agree(pages):
    _, processor = pages
    with pytest.raises(ConfigError, match=r"expected one <\|image_pad\|> in the prompts for each of 1; found 2"):
        processor(text=prompt(processor, "read K", images=2), images=np.zeros((64, 64, 3), np.uint8))


def test_vocabulary_is_that_of_the_tokenizer(pages):
    model, processor = pages
    assert isinstance(processor, PageProcessor)
    assert processor.tokenizer.get_vocab() == {word: index for index, word in enumerate(WORDS)}
    assert not model.training
    assert all(torch.isfinite(weight).all() for weight in model.parameters())


def test_models_are_loaded_by_name(monkeypatch, tmp_path):
    assert NAMES == ("scenes", "pages")
    with pytest.raises(ConfigError, match="no bundled model 'page'"):
        load("page")
    monkeypatch.setattr(demo_model, "PAGE_CHECKPOINT", tmp_path)
    with pytest.raises(ConfigError, match="is not part of this installation"):
        load("pages")


@pytest.fixture(scope="module")
def bundled():
    return load("pages")


def held_out(model, processor, kind, samples):
    """Questions of the types that the bundled model has learned, and what it says to each."""
    maker = TaskMaker(kind, "heldout", seed=77)
    said = []
    for _ in range(samples):
        sample = maker.sample()
        asked_ = [question for question in maker.questions(sample) if question.type in LEARNED[kind]]
        if asked_:
            said += zip(asked_, answers(model, processor, asked(processor, sample, asked_)), strict=True)
    return said


@torch.inference_mode()
@pytest.mark.parametrize("kind", [kind for kind, types in LEARNED.items() if types])
def test_the_bundled_model_answers_held_out_questions(bundled, kind):
    said = held_out(*bundled, kind, samples=6)
    right = [question.right(text) for question, text in said]
    assert sum(right) >= 0.75 * len(right), [(q.text, q.answer, text) for q, text in said]


@torch.inference_mode()
@pytest.mark.parametrize("kind", [kind for kind, types in LEARNED.items() if types])
def test_the_bundled_model_answers_with_a_third_of_its_tokens(bundled, kind):
    model, processor = bundled
    whole = [question.right(text) for question, text in held_out(model, processor, kind, samples=5)]
    with mustdrop.patched(model, "mustdrop", keep=0.33):
        pruned = [question.right(text) for question, text in held_out(model, processor, kind, samples=5)]
        trace = mustdrop.trace(model)
        assert (trace.equal_tokens <= 0.34 * trace.total).all()
        assert trace.kv_bytes.ratio < 0.7
    assert sum(pruned) >= 0.7 * sum(whole)
    again = [question.right(text) for question, text in held_out(model, processor, kind, samples=5)]
    assert again == whole  # nothing of the patch is left


def test_what_the_bundled_model_has_learned_is_a_part_of_what_there_is():
    assert set(LEARNED) == set(KINDS)
    for kind, types in LEARNED.items():
        assert set(types) <= set(TYPES[kind])
    assert sum(map(len, LEARNED.values())) >= 15


@torch.inference_mode()
@pytest.mark.parametrize("kind", KINDS)
def test_keep_all_is_bit_identical_and_dropping_drops(pages, kind):
    model, processor = pages
    maker = TaskMaker(kind, "selection", 4)
    sample = maker.sample()
    inputs = asked(processor, sample, maker.questions(sample)[:2])
    plain = model(**inputs).logits
    with mustdrop.patched(model, "cdpruner", keep=1.0):
        assert torch.equal(model(**inputs).logits, plain)
    with mustdrop.patched(model, "cdpruner", keep=0.25):
        assert not torch.equal(model(**inputs).logits, plain)
        assert mustdrop.trace(model).equal_tokens.max() < (inputs["mm_token_type_ids"] > 0).sum(1).max() * 0.4
        assert all(answers(model, processor, inputs))
    assert torch.equal(model(**inputs).logits, plain)
