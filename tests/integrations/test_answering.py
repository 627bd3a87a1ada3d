"""What the evaluation tools of others are given: answers, and scores of given answers, in batches."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

import mustdrop
from mustdrop import errors
from mustdrop.demo.scenes import SceneMaker
from mustdrop.integrations import conversations as chats
from mustdrop.integrations import generation
from mustdrop.integrations.answering import Answerer, batches


@pytest.fixture(scope="module")
def scenes():
    maker = SceneMaker("heldout", 11)
    found = []
    for _ in range(3):
        scene = maker.scene()
        found.append((Image.fromarray(scene.image), maker.question(scene, "region2color")))
    return found


def answerer(method="none", **settings):
    return Answerer("bundled", method, device="cpu", dtype="float32", **settings)


def asked(scenes):
    return [chats.user([image], question.text) for image, question in scenes]


def by_hand(model, processor, conversation, answer):
    """Mean negative log-likelihood, one conversation at a time, tokens written out one by one."""
    given = dict(chats.inputs(processor, [conversation]))
    ids = processor.tokenizer(answer, add_special_tokens=False, return_tensors="pt")["input_ids"]
    total = 0.0
    with torch.inference_mode():
        out = model(**given, use_cache=True)
        for token in ids[0]:
            total -= float(out.logits[0, -1].log_softmax(-1)[token])
            out = model(input_ids=token[None, None], past_key_values=out.past_key_values, use_cache=True)
    return total / ids.shape[1]


@pytest.mark.parametrize(("method", "keep"), [("none", None), ("mustdrop", 96)])
def test_scores_in_a_batch_of_answers_of_other_lengths_are_those_of_single_calls(method, keep, scenes):
    ours = answerer(method, keep=keep)
    answers = [scenes[0][1].answer, "red blue green", "top-left red"]
    scores = ours.score(asked(scenes), answers)
    for conversation, answer, (loss, _) in zip(asked(scenes), answers, scores, strict=True):
        assert loss == pytest.approx(by_hand(ours.model, ours.processor, conversation, answer), abs=1e-4)
    assert [greedy for _, greedy in scores] == [True, False, False]
    assert scores[0][0] < min(scores[1][0], scores[2][0])


def test_what_is_dropped_does_not_depend_on_the_answer_that_is_scored(scenes):
    ours = answerer("mustdrop", keep=64)
    kept = []
    for answer in ("red", "blue green red one"):
        ours.score(asked(scenes)[:1], [answer])
        kept.append([mustdrop.trace(ours.model).kept(layer) for layer in range(9)])
    assert all(torch.equal(a, b) for a, b in zip(*kept, strict=True))


def test_text_only_prompts_are_answered_and_not_counted(scenes):
    ours = answerer("mustdrop", keep=64)
    first = ours.answer(asked(scenes), max_new_tokens=6, do_sample=False)
    assert [a.text for a in first] == [question.answer for _, question in scenes]
    assert all(576 < a.prompt_tokens < 600 for a in first)
    assert all(1 <= a.tokens <= 6 for a in first)
    ours.answer([chats.user([], "where is the red one ?")], max_new_tokens=2, do_sample=False)
    assert ours.kept.prompts == 3
    assert ours.kept.equal / 3 == pytest.approx(64, abs=1)
    assert "3 prompts with vision tokens" in str(ours.kept)
    assert str(answerer().kept) == "no prompt with an image or a video"


def test_an_answer_ends_before_the_first_stop_word(scenes):
    ours = answerer()
    (whole,) = ours.answer(asked(scenes)[:1], max_new_tokens=6, do_sample=False)
    (cut,) = ours.answer(asked(scenes)[:1], until=[whole.text[2:4]], max_new_tokens=6, do_sample=False)
    assert cut.text == whole.text[:2]


GREEDY = {"do_sample": False, "max_new_tokens": 1024, "num_beams": 1}


@pytest.mark.parametrize(
    ("settings", "options", "until", "unknown"),
    [
        ({}, GREEDY, (), {}),
        ({"until": "stop", "temperature": 0, "do_sample": True, "top_p": 0.9}, GREEDY, ("stop",), {}),
        ({"until": ["a", "b"], "top_p": None, "num_beams": None}, GREEDY, ("a", "b"), {}),
        ({"max_gen_toks": 8, "images": 1}, GREEDY | {"max_new_tokens": 8}, (), {"images": 1}),
        ({"temperature": 0.7, "top_p": 0.9}, GREEDY | {"do_sample": True, "temperature": 0.7, "top_p": 0.9}, (), {}),
        ({"do_sample": True, "top_k": 5}, GREEDY | {"do_sample": True, "top_k": 5}, (), {}),
        ({"num_beams": 3, "temperature": 0.0}, GREEDY | {"num_beams": 3}, (), {}),
    ],
)
def test_generation_settings_of_a_task(settings, options, until, unknown):
    assert generation.arguments(settings) == (options, until, unknown)


def test_media_stand_where_the_text_names_them():
    one, two = Image.new("RGB", (4, 4)), Image.new("RGB", (8, 8))
    (turn,) = chats.user([one, two], "first <image> then <image> done", "<image>")
    assert [part["type"] for part in turn["content"]] == ["text", "image", "text", "image", "text"]
    assert [part.get("image") for part in turn["content"]][1::2] == [one, two]
    (turn,) = chats.user([one, two], "only one <image>", "<image>")  # numbers do not match: media first
    assert [part["type"] for part in turn["content"]] == ["image", "image", "text"]
    (turn,) = chats.user(["a.PNG", "b.mp4"], "?")
    assert [part["type"] for part in turn["content"]] == ["image", "video", "text"]


def test_batches_never_mix_keys_and_lose_nothing():
    seen = []

    def run(chunk):
        seen.append(chunk)
        return [10 * item for item in chunk]

    found = dict(batches([1, 2, 3, 4, 5, 6, 7], 2, lambda item: item % 2, run))
    assert found == {i: 10 * (i + 1) for i in range(7)}
    assert seen == [[1, 3], [5, 7], [2, 4], [6]]


def test_what_cannot_be_asked_is_refused(scenes):
    ours = answerer()
    with pytest.raises(errors.UnsupportedOptionError, match="audio"):
        chats.inputs(ours.processor, [[{"role": "user", "content": [{"type": "audio", "audio": "a.wav"}]}]])
    with pytest.raises(errors.ConfigError, match="no tokens"):
        ours.score(asked(scenes)[:1], [""])
    ours.processor.chat_template = None
    with pytest.raises(errors.ConfigError, match="chat template"):
        ours.answer(asked(scenes)[:1])


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"device": "nowhere"}, errors.ConfigError, "nowhere"),
        ({"dtype": "int8"}, errors.ConfigError, "bfloat16"),
        ({"method": "fastr"}, errors.UnknownMethodError, "fastv"),
    ],
)
def test_wrong_settings_fail_before_weights_are_loaded(settings, error, text):
    with pytest.raises(error, match=text):
        Answerer(**{"pretrained": "no/such-model", "device": "cpu", **settings})
