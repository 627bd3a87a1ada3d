"""The scores of every benchmark against scores worked out by hand."""

from __future__ import annotations

import json

import pytest

from mustdrop.eval.benchmark import Answer, Item
from mustdrop.eval.benchmarks import find, gqa, mmbench, mme, ocrbench, pope, scienceqa, textvqa


def answers(*rows, failed=()):
    """(id, said, truth, category, extra) each."""
    found = []
    for i, (number, said, truth, category, extra) in enumerate(rows):
        item = Item(number, extra.get("text", "q"), None, "q", truth, category, extra)
        found.append(Answer(item, "" if i in failed else said, i in failed))
    return found


@pytest.mark.parametrize(
    ("said", "read"),
    [
        ("Yes", "yes"), ("no", "no"), ("YES, there is", "yes"), ("No.", "no"), ("Not at all", "no"), ("nope", "no"),
        ("Well, yes", "other"), ("1 no", "no"), ("I know", "other"), ("", "other"), ("maybe", "other"),
    ],
)  # fmt: skip
def test_mme_reads(said, read):
    assert mme.parse(said) == read


def test_mme_pairs_and_sums():
    rows = [
        # existence: picture 1 both right, picture 2 one of two; count: neither; code_reasoning: both
        ("existence/1.png", "Yes", "yes", "existence", {"file": "1.png"}),
        ("existence/1.png", "no", "no", "existence", {"file": "1.png"}),
        ("existence/2.png", "yes", "yes", "existence", {"file": "2.png"}),
        ("existence/2.png", "yes", "no", "existence", {"file": "2.png"}),
        ("count/1.png", "five", "yes", "count", {"file": "1.png"}),
        ("count/1.png", "Yes", "no", "count", {"file": "1.png"}),
        ("code_reasoning/1.png", "yes", "yes", "code_reasoning", {"file": "1.png"}),
        ("code_reasoning/1.png", "No", "no", "code_reasoning", {"file": "1.png"}),
    ]
    scores = find("mme").scores(answers(*rows))
    assert scores["existence/accuracy"] == 75.0
    assert scores["existence/accuracy+"] == 50.0
    assert scores["existence"] == 125.0
    assert scores["count"] == 0.0
    assert scores["perception"] == 125.0
    assert scores["cognition"] == scores["code_reasoning"] == 200.0
    assert scores["total"] == 325.0
    # a picture with one question, because the other line is broken, has not both right
    assert find("mme").scores(answers(*rows[:3]))["existence/accuracy+"] == 50.0
    # a failed question is wrong, and its picture with it
    assert find("mme").scores(answers(*rows, failed=(7,)))["code_reasoning"] == 50.0 + 0.0


@pytest.mark.parametrize(
    ("said", "read"),
    [
        ("Yes", "yes"), ("No", "no"), ("No, there is not", "no"), ("There is no dog", "no"), ("not here", "no"),
        ("Yes. No.", "yes"), ("NO", "yes"), ("None", "yes"), ("", "yes"), ("Yes,no", "yes"), ("well, no, sir", "no"),
        ("there isn't", "yes"),
    ],
)  # fmt: skip
def test_pope_reads(said, read):
    assert pope.parse(said) == read


def test_pope_counts_by_category():
    rows = [
        # random: TP TP FP FN TN -> precision 2/3, recall 2/3, F1 2/3, accuracy 3/5, yes 3/5
        *[(i, said, truth, "random", {}) for i, (said, truth) in enumerate(
            [("Yes", "yes"), ("yes", "yes"), ("Yes", "no"), ("No", "yes"), ("no", "no")])],
        # popular: everything right; adversarial: never yes -> no precision, no recall
        (5, "yes", "yes", "popular", {}),
        (6, "no", "no", "popular", {}),
        (7, "no", "yes", "adversarial", {}),
        (8, "no", "no", "adversarial", {}),
    ]  # fmt: skip
    scores = find("pope").scores(answers(*rows))
    assert scores["random/precision"] == scores["random/recall"] == pytest.approx(200 / 3)
    assert scores["random/f1"] == pytest.approx(200 / 3)
    assert (scores["random/accuracy"], scores["random/yes"]) == (60.0, 60.0)
    assert scores["popular/f1"] == 100.0
    assert scores["adversarial/f1"] == scores["adversarial/precision"] == 0.0
    assert scores["f1"] == pytest.approx((200 / 3 + 100 + 0) / 3)
    assert scores["accuracy"] == pytest.approx((60 + 100 + 50) / 3)


def test_pope_failures_are_wrong_either_way():
    # the script reads "" as yes, which would be right here
    assert find("pope").scores(answers((1, "yes", "yes", "random", {}), failed=(0,)))["accuracy"] == 0.0
    assert find("pope").scores(answers((1, "no", "no", "random", {}), failed=(0,)))["accuracy"] == 0.0


@pytest.mark.parametrize(
    ("prompt", "question"),
    [
        ("What Is It?\nReference OCR token: a, B\nAnswer.", "what is it?"),
        ("Reference OCR token: a\nWhat is it?\nAnswer.", "what is it?"),
        ("What is it?\nAnswer.", "what is it?"),
        ("What is it?", None),
        ("a\nb\nc", None),
    ],
)
def test_textvqa_finds_the_question(prompt, question):
    assert textvqa.question_of(prompt) == question


def test_textvqa_leaves_one_human_out():
    two_of_ten = ("Pepsi",) * 2 + ("coke",) * 8
    rows = [("a", "the pepsi", two_of_ten, "", {}), ("b", "Coke!", two_of_ten, "", {}), ("c", "x", two_of_ten, "", {})]
    assert find("textvqa").scores(answers(*rows)) == {"accuracy": pytest.approx(100 * (0.6 + 1.0 + 0.0) / 3)}


@pytest.mark.parametrize(("said", "read"), [("Yes.", "yes"), ("Left", "left"), ("a. b..", "a. b"), (" no", " no")])
def test_gqa_reads(said, read):
    assert gqa.prediction(said) == read


def test_gqa_splits_open_from_binary():
    rows = [("1", "Yes.", "yes", "binary", {}), ("2", "no", "yes", "binary", {}), ("3", "Dog", "dog", "open", {})]
    scores = find("gqa").scores(answers(*rows))
    assert scores == {"accuracy": pytest.approx(200 / 3), "binary": 50.0, "open": 100.0}


@pytest.mark.parametrize(
    ("said", "letter"),
    [
        ("A", "A"), ("E", "E"), ("F", None), ("B. because", "B"), ("B.", None), ("b", None), ("", None), ("AB", None),
        ("I think. The answer is C.", "C"), ("The answer is C", None), ("The answer is A. The answer is B.", None),
        ("The answer is Z.", "Z"), ("(A)", None), (" A", None), ("The answer is D, I think", "D"),
        ("The answer is C because it barks.", "C"), ("the answer is C.", None), ("A.\nbecause", None), ("A. B. C", "A"),
    ],
)  # fmt: skip
def test_scienceqa_reads(said, letter):
    assert scienceqa.parse(said) == letter


def test_scienceqa_reports_the_questions_with_a_picture():
    picture, plain = {"text": "<image>\nq"}, {"text": "q"}
    rows = [
        ("1", "A", "A", "", picture),
        ("2", "B", "A", "", picture),
        ("3", "C", "C", "", plain),
        ("4", "x", "C", "", picture),
    ]
    scores = find("scienceqa").scores(answers(*rows))
    assert scores == {"image": pytest.approx(100 / 3), "text": 100.0, "accuracy": 50.0, "unreadable": 25.0}


@pytest.mark.parametrize(
    ("said", "letter"),
    [
        ("A", "A"), (" B ", "B"), ("C. red", "C"), ("C) x", "C"), ("A: x", "A"), ("(B)", "B"), ("All", None),
        ("b", None), ("", None), ("D", None), ("A or B", None), ("The answer is B.", "B"), ("Answer: C", "C"),
        ("B it is, since I can see it in the picture", None),  # too far from the end
        ("A dog and a house", "C"), ("Is it A or not?", None),  # the article, so the texts decide
        ("a cat", "A"), ("The cat.", "A"), ("cat or red bus", None), ("I see something else there, but what?", None),
        ("cat" + " and nothing" * 9, None),  # longer than twice the choices
    ],
)  # fmt: skip
def test_mmbench_reads(said, letter):
    assert mmbench.parse(said, ["cat", "red bus", "house"]) == letter


def test_mmbench_needs_every_turn():
    more = {"options": ["x", "y"]}
    rows = [(1, "A", "A"), (1_000_001, "B", "B"), (2, "A", "A"), (2_000_002, "no", "B")]
    rows = [(*row, "", more) for row in rows]
    scores = find("mmbench").scores(answers(*rows))
    assert scores == {"circular": 50.0, "accuracy": 75.0, "unreadable": 25.0}


def test_only_the_server_knows():
    for name in ("mmbench", "vqav2", "vizwiz"):
        assert find(name).scores(answers((1, "A", None, "", {}))) == {}


@pytest.mark.parametrize(
    ("said", "truths", "source", "right"),
    [
        ("It says CENTRE.", ("centre",), "IIIT5K", True),
        ("cent re", ("centre",), "IIIT5K", False),
        ("a\nb", ("A B",), "IIIT5K", True),
        ("x", ("y", "X"), "IIIT5K", True),
        (r"\frac { 1 } { 2 }", (r"\frac{1}{2}",), "HME100k", True),
        ("A", ("a",), "HME100k", False),
        ("", ("a",), "IIIT5K", False),
    ],
)
def test_ocrbench_compares(said, truths, source, right):
    assert ocrbench.contains(said, truths, source) is right


def test_ocrbench_adds_up_points():
    kinds = ["Regular Text Recognition", "Handwriting Recognition", "Digit String Recognition"]
    kinds += ["Handwritten Mathematical Expression Recognition", "Doc-oriented VQA", "Doc-oriented VQA"]
    rows = [(1, "x", ("x",) if i < 5 else ("y",), kind, {"source": "", "row": {}}) for i, kind in enumerate(kinds)]
    scores = find("ocrbench").scores(answers(*rows))
    assert scores["recognition"] == 3.0
    assert scores["Doc-oriented VQA"] == 1.0
    assert scores["total"] == 5.0


def test_video_answers_are_compared_normalised():
    rows = [("1", "The dog.", "dog", "", {}), ("2", "a dog runs", "dog", "", {}), ("3", "dogs", "dog", "", {})]
    scores = find("msvd").scores(answers(*rows))
    assert scores == {"exact": pytest.approx(100 / 3), "contains": pytest.approx(200 / 3)}


def test_answer_files(tmp_path):
    rows = [
        (
            7,
            "Yes",
            "yes",
            "existence",
            {"file": "1.png", "text": "Is it?\nAnswer the question using a single word or phrase."},
        )
    ]
    jsonl, table = find("mme").write(answers(*rows), tmp_path, "model")
    line = json.loads(jsonl.read_text())
    assert list(line) == ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
    assert (line["question_id"], line["text"], line["model_id"], line["metadata"]) == (7, "Yes", "model", {})
    assert table.name == "existence.txt"
    assert table.read_text() == "1.png\tIs it? Please answer yes or no.\tYes\tYes\n"
    (_, predictions) = find("gqa").write(answers(("12", "Left.", "left", "", {})), tmp_path, "model")
    assert json.loads(predictions.read_text()) == [{"questionId": "12", "prediction": "left"}]
    said = answers((1, "The two", None, "", {"whole": (5, 1)}))
    (_, upload) = find("vqav2").write(said, tmp_path, "model")
    assert json.loads(upload.read_text()) == [{"question_id": 5, "answer": ""}, {"question_id": 1, "answer": "2"}]
    (_, upload) = find("vizwiz").write(answers((1, "A Cup", None, "", {"file": "1.jpg"})), tmp_path, "model")
    assert json.loads(upload.read_text()) == [{"image": "1.jpg", "answer": "cup"}]
    said = answers(*((str(i), text, "B", "", {"choices": 3}) for i, text in enumerate("B?D")))
    (_, own) = find("scienceqa").write(said, tmp_path, "model")
    assert json.loads(own.read_text())["results"] == {"0": 1, "1": -1, "2": -1}  # there is no fourth choice
    (merged,) = find("tgif").write(answers(("1", "dog", "cat", "", {})), tmp_path, "model")
    assert json.loads(merged.read_text()) == {"id": "1", "question": "q", "answer": "cat", "pred": "dog"}
