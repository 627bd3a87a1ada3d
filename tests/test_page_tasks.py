"""The second model's samples depend on nothing but their seed, share nothing between splits, and are what they say."""

from __future__ import annotations

import numpy as np
import pytest

from mustdrop.demo import lettering, tasks
from mustdrop.demo.drawing import digit_data
from mustdrop.demo.tasks import ABILITIES, ABILITY, KINDS, SPLITS, TYPES, WORDS, TaskMaker, page
from mustdrop.demo.tasks.common import BINS, UNIT, Question, in_split, place


def samples(kind, split="selection", seed=3, number=12):
    maker = TaskMaker(kind, split, seed)
    return maker, [maker.sample() for _ in range(number)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", SPLITS)
def test_samples_depend_on_kind_split_and_seed_only(kind, split):
    one, other = TaskMaker(kind, split, 5), TaskMaker(kind, split, 5)
    for _ in range(4):
        first, second = one.sample(), other.sample()
        one.questions(first)  # asking in between changes nothing
        assert len(first.pictures) == len(second.pictures)
        for mine, theirs in zip(first.pictures, second.pictures, strict=True):
            np.testing.assert_array_equal(mine, theirs)
        assert first.marks == second.marks
    different = TaskMaker(kind, split, 6).sample(), TaskMaker(kind, split, 5).sample()
    assert different[0].marks != different[1].marks
    elsewhere = TaskMaker(kind, SPLITS[SPLITS.index(split) - 1], 5).sample()
    assert elsewhere.marks != different[1].marks


def test_fonts_of_splits_are_disjoint_families():
    data = lettering.letter_data()
    assert data.images.shape[1:] == (len(lettering.LETTERS), lettering.GLYPH, lettering.GLYPH)
    families = [set(data.family[data.split == index]) for index in range(len(SPLITS))]
    letters = [{image.tobytes() for font in data.images[data.split == index] for image in font} for index in range(3)]
    for index, other in ((0, 1), (0, 2), (1, 2)):
        assert not families[index] & families[other]
        assert not letters[index] & letters[other]
    assert [lettering.number_of_fonts(split) for split in SPLITS] == [int((data.split == i).sum()) for i in range(3)]
    assert digit_data().split.max() == 2  # the digits are those of the first model, and so is their split


def test_a_layout_is_of_one_split():
    found = dict.fromkeys(SPLITS, 0)
    for height in range(300):
        owners = [split for split in SPLITS if in_split(split, "page", (height, 7), "lines", (2, 3))]
        assert len(owners) == 1
        found[owners[0]] += 1
    assert found["train"] > found["heldout"] > found["selection"] > 0


@pytest.mark.parametrize("split", SPLITS)
def test_pages_have_layouts_of_their_split(split):
    _, drawn = samples("pages", split)
    for sample in drawn:
        facts = sample.facts
        lengths = tuple(len(line) for _, line in facts.lines)
        lengths = (len(lengths), lengths[0]) if facts.layout == "table" else lengths
        assert in_split(split, "page", sample.size, facts.layout, lengths)


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_and_marks_fit(kind):
    maker, drawn = samples(kind)
    for sample in drawn:
        height, width = sample.size
        assert sample.size in maker.sizes()
        assert height % UNIT == width % UNIT == 0
        assert {picture.shape for picture in sample.pictures} == {(height, width, 3)}
        assert sample.video == (kind == "videos")
        for mark in sample.marks:
            assert 0 <= mark.top <= height - mark.height
            assert 0 <= mark.left <= width - mark.width
            assert mark.picture < len(sample.pictures)


@pytest.mark.parametrize("kind", KINDS)
def test_questions_are_in_words_of_the_model_and_their_answers_right(kind):
    maker, drawn = samples(kind, number=40)
    seen = set()
    for sample in drawn:
        for question in maker.questions(sample):
            seen.add(question.type)
            assert question.ability == ABILITY[kind][question.type]
            assert question.ability in ABILITIES
            assert set((question.text + " " + question.answer).split()) <= set(WORDS)
            assert question.right(question.answer)
            assert not question.right("")
            assert not question.right("nowhere nothing")
    assert seen == set(TYPES[kind])


def test_words_are_different():
    assert len(set(WORDS)) == len(WORDS)


def test_counts_and_reading_are_those_of_the_page():
    maker, drawn = samples("pages", number=60)
    for sample in drawn:
        shown = [mark.kind for mark in sample.marks]
        for question in maker.questions(sample):
            if question.type == "count":
                assert int(question.answer) == shown.count(question.text.split()[2])
            if question.type == "exist":
                assert (question.answer == "yes") == (question.text.split()[3] in shown)
            if question.type.startswith("read"):
                assert "".join(question.answer.split()) in "".join(shown)


def test_places_are_right_within_the_box_and_wrong_outside():
    maker, drawn = samples("grounding")
    asked = [(s, q) for s in drawn for q in maker.questions(s) if q.box is not None]
    assert asked
    for sample, question in asked:
        x, y = (int(word[1:]) for word in question.answer.split())
        assert any(place(mark, sample.size) == (x, y) for mark in sample.marks)
        far = f"x{(x + BINS // 2) % BINS} y{y}"
        assert not question.right(far)
        assert not question.right(question.answer + " y0")
        assert not question.right(" ".join(question.answer.split()[::-1]))


def test_a_place_counts_where_it_lies_in_the_box():
    question = Question("point at the 7", "x8 y8", "point_kind", "position", box=(0.2, 0.2, 0.3, 0.3))
    assert question.right("x8 y8")
    assert question.right("x7 y9")
    assert not question.right("x4 y8")


def test_what_changed_is_what_differs():
    maker, drawn = samples("changes", number=40)
    for sample in drawn:
        before, after = ({(m.kind, m.ink, m.top, m.left) for m in sample.marks if m.picture == i} for i in (0, 1))
        assert (before == after) == (sample.facts.what == "nothing")
        assert (len(before) < len(after)) == (sample.facts.what == "new")
        assert (len(before) > len(after)) == (sample.facts.what == "gone")
        assert [q.answer for q in maker.questions(sample) if q.type == "change"] == [sample.facts.what]


def test_videos_show_digits_when_they_are_there():
    maker, drawn = samples("videos", number=40)
    for sample in drawn:
        for actor in sample.facts:
            at = {mark.picture // 2 for mark in sample.marks if mark.kind == actor.kind}
            assert at == {moment for moment, there in enumerate(actor.there) if there}
            way = [(m.top, m.left) for m in sample.marks if m.kind == actor.kind]
            assert (len(set(way)) == 1) == (actor.goes == "nowhere")
        for question in maker.questions(sample):
            if question.type == "first":
                assert question.answer == min(sample.facts, key=lambda actor: actor.first).kind


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="unknown kind 'page'"):
        TaskMaker("page", "train", 0)
    with pytest.raises(ValueError, match="unknown split 'test'"):
        TaskMaker("pages", "test", 0)
    maker = TaskMaker("pages", "selection", 0)
    with pytest.raises(ValueError, match="unknown question type 'colour'"):
        maker.question(maker.sample(), "colour")


def test_every_type_has_one_ability():
    assert set(ABILITY) == set(KINDS)
    assert {ability for types in ABILITY.values() for ability in types.values()} == set(ABILITIES)
    assert tasks.TYPES["pages"] == tuple(page.ABILITY)
