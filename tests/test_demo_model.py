"""The bundled demo model answers held-out questions, and its scenes are what they say they are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from mustdrop.demo import drawing, scenes
from mustdrop.demo.model import load, prompt
from mustdrop.demo.scenes import QUESTION_TYPES, SPLITS, SceneMaker

EASY_TYPES = ("region2color", "locate", "color2digit", "exist")


@pytest.fixture(scope="module")
def demo():
    return load()


@torch.inference_mode()
def test_answers_held_out_questions(demo):
    model, processor = demo
    maker = SceneMaker("heldout", seed=123)
    texts, images, answers = [], [], []
    for _ in range(10):
        scene = maker.scene()
        for name in EASY_TYPES:
            question = maker.question(scene, name)
            texts.append(prompt(processor, question.text))
            images.append(Image.fromarray(scene.image))
            answers.append(question.answer)
    inputs = processor(text=texts, images=images, return_tensors="pt", padding=True)
    output = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
    given = processor.batch_decode(output, skip_special_tokens=True)
    right = sum(said == answer for said, answer in zip(given, answers, strict=True))
    assert right >= 30, dict(zip(texts, zip(given, answers, strict=True), strict=True))  # chance: about 9 of 40


def test_prompt_and_pixels_are_what_the_model_was_trained_on(demo):
    _, processor = demo
    scene = SceneMaker("selection", seed=0).scene()
    text = prompt(processor, "where is the red one ?")
    assert text == "USER: <image> where is the red one ? ASSISTANT:"

    inputs = processor(text=text, images=Image.fromarray(scene.image), return_tensors="pt")
    words = ["<s>", "USER:", *["<image>"] * 576, "where", "is", "the", "red", "one", "?", "ASSISTANT:"]
    assert processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0]) == words
    expected = torch.from_numpy(scene.image).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(inputs["pixel_values"][0], expected, rtol=0, atol=1e-6)


def test_model_is_ready_for_inference(demo):
    model, _ = demo
    assert not model.training
    assert all(torch.isfinite(weight).all() for weight in model.parameters())
    half, _ = load(dtype=torch.bfloat16)
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}


def test_vocabulary_is_that_of_the_tokenizer(demo):
    _, processor = demo
    assert processor.tokenizer.get_vocab() == {word: index for index, word in enumerate(scenes.WORDS)}


@pytest.mark.parametrize("split", SPLITS)
def test_scenes_depend_on_split_and_seed_only(split):
    one, other = SceneMaker(split, seed=5), SceneMaker(split, seed=5)
    for _ in range(4):
        first, second = one.scene(), other.scene()
        one.questions(first)  # asking in between changes nothing
        np.testing.assert_array_equal(first.image, second.image)
        assert first.objects == second.objects
    assert not np.array_equal(SceneMaker(split, seed=6).scene().image, SceneMaker(split, seed=5).scene().image)


def test_splits_are_disjoint_and_stratified():
    data = drawing.digit_data()
    assert data.images.shape == (1797, 8, 8)
    assert data.images.max() == 16
    shares = {"train": 1096, "selection": 300, "heldout": 401}
    for index, name in enumerate(SPLITS):
        labels = data.labels[data.split == index]
        assert len(labels) == shares[name]
        expected = np.bincount(data.labels) * shares[name] / len(data.labels)
        assert np.abs(np.bincount(labels) - expected).max() <= 1

    pictures = [{image.tobytes() for image in data.images[data.split == index]} for index in range(len(SPLITS))]
    assert not pictures[0] & pictures[1]
    assert not pictures[0] & pictures[2]
    assert not pictures[1] & pictures[2]


def test_bundled_digits_are_those_of_scikit_learn():
    datasets = pytest.importorskip("sklearn.datasets")
    original, data = datasets.load_digits(), drawing.digit_data()
    np.testing.assert_array_equal(data.images, original.images)
    np.testing.assert_array_equal(data.labels, original.target)


def test_objects_are_where_the_scene_says():
    maker = SceneMaker("selection", seed=1)
    for _ in range(5):
        scene = maker.scene()
        assert scene.image.shape == (192, 192, 3)
        assert scene.image.dtype == np.uint8
        assert len({obj.colour for obj in scene.objects}) == len({obj.cell for obj in scene.objects})
        shown = np.zeros(576, bool)
        for obj in scene.objects:
            patches = scene.patches(obj)
            assert (np.diff(patches) > 0).all()
            shown[patches] = True
            rows, columns = patches // 24, patches % 24
            assert set(rows // 8 * 3 + columns // 8) == {obj.cell}
            assert scenes.REGIONS[obj.cell] == obj.region
        brightest = scene.image.max(2).reshape(24, 8, 24, 8).max((1, 3)).ravel()
        assert brightest[~shown].max() <= round(0.6 * 255) < brightest[shown].max()


def test_every_type_of_question_has_its_answer_in_the_scene():
    maker = SceneMaker("selection", seed=2)
    for _ in range(20):
        scene = maker.scene()
        questions = maker.questions(scene)
        assert tuple(question.type for question in questions) == QUESTION_TYPES
        answers = {question.type: question.answer for question in questions}
        assert answers["count"] == str(sum(obj.is_digit for obj in scene.objects))
        named = {f"a {obj.colour} {obj.kind} at {obj.region}" for obj in scene.objects}
        assert answers["describe"] in named
        words = {word for question in questions for word in (question.text + " " + question.answer).split()}
        assert words <= set(scenes.WORDS)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="unknown split 'test'"):
        SceneMaker("test", seed=0)
    maker = SceneMaker("selection", seed=0)
    with pytest.raises(ValueError, match="unknown question type 'colour'"):
        maker.question(maker.scene(), "colour")
