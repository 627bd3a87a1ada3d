"""The normalisation and the soft accuracy of the VQA challenges, on hand-worked cases."""

from __future__ import annotations

import itertools

import pytest

from mustdrop.eval.vqa import normalise, soft_accuracy


@pytest.mark.parametrize(
    ("said", "compared"),
    [
        ("Yes", "yes"),
        ("  A red   Bus. ", "red bus"),
        ("the Eiffel tower", "eiffel tower"),
        ("two", "2"),
        ("None", "0"),
        ("ten dogs and a cat", "10 dogs and cat"),
        ("eleven", "eleven"),
        ("1,000", "1000"),  # commas go before anything else
        ("3.5", "3.5"),
        ("3.", "3"),
        (".5", ".5"),
        ("e.g.", "eg"),
        ("St. John", "st john"),
        ("cant", "can't"),
        ("can't", "can't"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("yall'd've", "y'all'd've"),
        ("y'alld've", "y'all'd've"),
        ("'owsat", "'owsat"),  # two apostrophes are missing
        ("ow's'at", "ow 's'at"),  # "'s" is detached before contractions are looked up
        ("shed", "shed"),
        ("somebody'd", "somebodyd"),  # so the scorer has it
        ("John's", "john 's"),
        ("what?", "what"),
        ("red/green", "red green"),  # between letters: a space
        ("red / green", "red green"),  # beside a space: gone
        ("red/ green - blue", "red green blue"),
        ("t-shirt", "t shirt"),
        ("t-shirt - red", "tshirt red"),  # one mark that touches a space takes all of its kind along
        ("(left)", "left"),
        ("a_b", "b"),  # the article is seen only after the marks are gone
        ("line\nbreak\tand tab", "line break and tab"),
        ("!", ""),
        ("", ""),
        ("日本", "日本"),
    ],
)
def test_normalisation(said, compared):
    assert normalise(said) == compared


def test_normalising_again_changes_little():
    for said in ("A red   Bus.", "two t-shirts", "cant", "what's up, doc?"):
        once = normalise(said)
        assert normalise(once) == once or "'s" in once


def literally(answer: str, truths: list[str]) -> float:
    """The definition, one human left out at a time."""
    truths = [normalise(truth) for truth in truths]
    scores = []
    for left_out in range(len(truths)):
        others = truths[:left_out] + truths[left_out + 1 :]
        scores.append(min(1, others.count(normalise(answer)) / 3))
    return sum(scores) / len(scores)


@pytest.mark.parametrize(
    ("same", "score"),
    # k of ten agree: k times min(1, (k-1)/3), 10-k times min(1, k/3), over ten
    [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)],
)
def test_soft_accuracy_of_ten_humans(same, score):
    truths = ["Nokia"] * same + [f"other {i}" for i in range(10 - same)]
    assert soft_accuracy("nokia.", truths) == pytest.approx(score)


def test_soft_accuracy_is_its_definition():
    for number, same in itertools.product((1, 2, 5, 10), range(11)):
        truths = ["the 2"] * min(same, number) + ["x"] * (number - min(same, number))
        assert soft_accuracy("Two", truths) == pytest.approx(literally("Two", truths))


def test_nobody_said_anything():
    assert soft_accuracy("x", []) == 0.0
