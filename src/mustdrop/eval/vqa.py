"""The answer normalisation and the soft accuracy of the VQA challenges, which TextVQA, VQAv2 and VizWiz score by.

Both do what EvalAI's scorer does, with its peculiarities: they decide whether a score can be compared.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

# What the scorer writes with its apostrophes when exactly one of them is missing. Forms that are words without
# apostrophe ("shed", "well", "were") are not among them.
_FORMS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_CONTRACTIONS = {
    form[: mark.start()] + form[mark.end() :]: form for form in _FORMS.split() for mark in re.finditer("'", form)
} | {"somebody'd": "somebodyd"}
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0"} | {word: str(n) for n, word in enumerate(_DIGITS)}
_ARTICLES = ("a", "an", "the")
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"(?<=\d),+(?=\d)")
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = 32  # the scorer hands a flag over as a count
_FULL_MARKS = 3  # so many of the others must have said it


def normalise(answer: str) -> str:
    """An answer as EvalAI's scorer compares it.

    Lower case, "," and "?" gone, "'s" detached; other punctuation gone where it touches a space, else replaced by one;
    periods gone that no digit follows; number words as digits, articles dropped, contractions restored.

    Args:
        answer: what a model or a human said.
    """
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    return " ".join(_words(_without_marks(text)))


def _without_marks(text: str) -> str:
    clean, numbers = text, _COMMA_IN_NUMBER.search(text) is not None
    for mark in _MARKS:
        touches = f"{mark} " in text or f" {mark}" in text
        clean = clean.replace(mark, "" if touches or numbers else " ")
    return _PERIOD.sub("", clean, count=_MOST_PERIODS)


def _words(text: str) -> Iterable[str]:
    for word in text.split():
        digit = _NUMBERS.get(word, word)
        if digit not in _ARTICLES:
            yield _CONTRACTIONS.get(digit, digit)


def soft_accuracy(answer: str, truths: Sequence[str]) -> float:
    """How right an answer is, 0 to 1, by what ten humans said.

    The mean, over leaving out one human each, of min(1, matches among the others / 3). Answers are compared normalised.

    Args:
        answer: the model's.
        truths: the humans', ten where the benchmark is complete.

    Returns:
        The score; 0 without any human answer.
    """
    if not truths:
        return 0.0
    said = [normalise(truth) for truth in truths]
    same = said.count(normalise(answer))
    scores = (min(1.0, (same - 1) / _FULL_MARKS), min(1.0, same / _FULL_MARKS))
    return (same * scores[0] + (len(said) - same) * scores[1]) / len(said) if same else 0.0
