"""SCOPE, MMTok, MMR and HoloV: the published formulas written out in float64, and small cases by hand."""

from __future__ import annotations

import pytest
import torch

import mustdrop
from mustdrop.adapters import registry
from mustdrop.errors import ConfigError, UnsupportedOptionError
from mustdrop.method import find
from mustdrop.methods.holov import CropsByContext
from mustdrop.methods.mmr import MMR, MarginalRelevance
from mustdrop.methods.mmtok import TwoCoverages
from mustdrop.methods.scope import AttendedCoverage
from mustdrop.pruners import Features
from mustdrop.pruners.importance import Importance, Question
from mustdrop.rules.groups import best_in_groups, largest_remainder
from mustdrop.rules.scores import min_max, min_max_in_groups
from support.builders import answer
from support.families import batch, clone


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def positive(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) + 0.01


def cosines(x, y=None):
    unit = torch.nn.functional.normalize(x.double(), dim=-1)
    other = unit if y is None else torch.nn.functional.normalize(y.double(), dim=-1)
    return unit @ other.mT


def covering(rows, quality, count):
    """Greedy coverage, each gain computed from nothing."""
    picks = []
    for _ in range(count):
        best = rows[:, picks].amax(1).clamp(min=0) if picks else torch.zeros(len(rows)).double()
        gain = quality * (rows - best[:, None]).clamp(min=0).sum(0)
        gain[picks] = -1
        picks.append(int(gain.argmax()))
    return sorted(picks)


# -- budgets ----------------------------------------------------------------------------------------------------------


def test_largest_remainders_by_hand():
    size = torch.tensor([[10, 10, 10]])
    assert largest_remainder(torch.tensor([[1.0, 2, 3]]), 7, size).tolist() == [[1, 2, 4]]  # 1.17, 2.33, 3.5
    assert largest_remainder(torch.tensor([[1.0, 1, 1]]), 8, size).tolist() == [[3, 3, 2]]
    # a full group hands on, in proportion: 2 of the first, then 6 over 1 to 2
    assert largest_remainder(torch.tensor([[9.0, 1, 2]]), 8, torch.tensor([[2, 10, 10]])).tolist() == [[2, 2, 4]]
    assert largest_remainder(torch.tensor([[1.0, 0, 0]]), 6, size, least=1).tolist() == [[4, 1, 1]]
    assert largest_remainder(torch.tensor([[0.0, 0, 0]]), 6, size).tolist() == [[2, 2, 2]]
    assert largest_remainder(torch.tensor([[1.0, 3, 2]]), 2, size, least=1).tolist() == [
        [0, 1, 1]
    ]  # not enough for all


@pytest.mark.parametrize("least", [0, 1, 2])
def test_budgets_add_up_and_no_group_gets_more_than_it_has(least):
    draw = torch.Generator().manual_seed(least)
    size = torch.randint(0, 9, (20, 7), generator=draw)
    weight = torch.rand(20, 7, generator=draw) ** 4
    for row, w in zip(size, weight, strict=True):
        for amount in range(int(row.sum()) + 1):
            got = largest_remainder(w[None], amount, row[None], least)[0]
            assert int(got.sum()) == amount
            assert bool((got <= row).all())
            assert amount < int(row.clamp(max=least).sum()) or bool((got >= row.clamp(max=least)).all())


def test_the_best_of_groups_and_scales_within_them():
    score = torch.tensor([[3.0, 1, 2, 9, 7, 8]])
    group = torch.tensor([[0, 0, 0, 1, 1, 1]])
    assert best_in_groups(score, group, torch.tensor([[2, 1]]), 3).tolist() == [[0, 2, 3]]
    assert min_max(score)[0, 3] == 1
    assert min_max(torch.ones(1, 3)).tolist() == [[1.0, 1.0, 1.0]]
    assert min_max_in_groups(score, group, 2).tolist() == [[1.0, 0.0, 0.5, 1.0, 0.0, 0.5]]


# -- SCOPE ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_scope_is_the_formula_for_every_view(alpha):
    rule = AttendedCoverage(alpha=alpha)
    x, attention = random(2, 30, 6), positive(2, 30)
    seen = Features.of_grid(x, (5, 6), {rule.reads[0]: attention})
    for count in (1, 7, 20):
        expected = [covering(cosines(row), a.double() ** alpha, count) for row, a in zip(x, attention, strict=True)]
        assert rule(seen, count).keep.tolist() == expected


def test_scope_by_hand():
    """Two groups of duplicates: attention decides in a group, coverage between them."""
    x = torch.eye(2)[[0, 0, 0, 1, 1]][None]
    rule = AttendedCoverage()
    attention = torch.tensor([[0.1, 0.5, 0.2, 0.1, 0.3]])
    seen = Features.of_grid(x, (1, 5), {rule.reads[0]: attention})
    assert rule(seen, 1).keep.tolist() == [[1]]
    assert rule(seen, 2).keep.tolist() == [[1, 4]]
    blind = Features.of_grid(x, (1, 5), {rule.reads[0]: torch.tensor([[0.0, 0.0, 0.0, 0.9, 0.9]])})
    assert AttendedCoverage(alpha=0)(blind, 1).keep.tolist() == [[0]]  # of three alike, before two alike


# -- MMTok ------------------------------------------------------------------------------------------------------------


def test_mmtok_is_the_formula_and_words_of_a_batch_do_not_mix():
    rule = TwoCoverages(text_temperature=0.1)
    x, states = random(2, 24, 8), random(2, 24, 5, seed=1)
    words = (random(3, 8, seed=2), random(6, 8, seed=3))
    seen = Features.of_grid(x, (4, 6), {rule.reads[0]: states}, words)
    expected = []
    for values, own, asked in zip(x, states, words, strict=True):
        text = (cosines(asked, values) / 0.1).softmax(1) / len(asked)
        picture = (cosines(own) / 0.2).softmax(1) / len(own)
        expected.append(covering(torch.cat([text, 0.5 * picture]), torch.ones(24).double(), 9))
    assert rule(seen, 9).keep.tolist() == expected


def test_mmtok_without_a_picture_weight_keeps_what_the_words_name():
    rule = TwoCoverages(alpha=0)
    x = torch.eye(4)[None]
    for word in range(4):
        seen = Features.of_grid(x, (2, 2), {rule.reads[0]: x}, (torch.eye(4)[word][None],))
        assert rule(seen, 1).keep.tolist() == [[word]]
    nothing = Features.of_grid(x, (2, 2), {rule.reads[0]: x}, (torch.zeros(0, 4),))
    assert TwoCoverages()(nothing, 2).keep.unique().numel() == 2


def test_mmtok_needs_the_question():
    rule = TwoCoverages()
    seen = Features.of_grid(torch.eye(4)[None], (2, 2), {rule.reads[0]: torch.eye(4)[None]})
    with pytest.raises(ConfigError, match="question"):
        rule(seen, 1)
    model = mustdrop.patch(clone("llava"), "mmtok", keep=0.5)
    inputs = batch(registry()["llava"], model, (("image",),))
    with pytest.raises(UnsupportedOptionError, match="question"):
        model.get_image_features(inputs["pixel_values"])


# -- MMR --------------------------------------------------------------------------------------------------------------


def marginal(x, importance, balance, count):
    c = cosines(x)
    imp = (importance - importance.min()) / (importance.max() - importance.min())
    picks = [int(imp.argmax())]
    while len(picks) < count:
        worth = balance * imp.double() - (1 - balance) * c[:, picks].amax(1)
        worth[picks] = -9
        picks.append(int(worth.argmax()))
    return sorted(picks)


@pytest.mark.parametrize("balance", [0.0, 0.5, 1 / 1.3, 1.0])
def test_mmr_is_the_formula_for_every_view(balance):
    rule = MarginalRelevance(balance=balance)
    x, attention = random(2, 30, 6), positive(2, 30)
    seen = Features.of_grid(x, (5, 6), {rule.reads[0]: attention})
    for count in (1, 2, 11):
        expected = [marginal(row, a, balance, count) for row, a in zip(x, attention, strict=True)]
        assert rule(seen, count).keep.tolist() == expected


def test_mmr_with_all_weight_on_importance_is_a_ranking():
    rule = MarginalRelevance(balance=1.0)
    attention = positive(1, 20)
    seen = Features.of_grid(random(1, 20, 4), (4, 5), {rule.reads[0]: attention})
    assert rule(seen, 7).keep.tolist() == [sorted(attention[0].argsort(descending=True)[:7].tolist())]


class ToTheRight(Importance):
    """Of one's own."""

    def score(self, seen):
        return seen.column.float()


def test_the_importance_of_mmr_can_be_anything():
    rule = MMR(importance=ToTheRight(), balance=1.0).build().vision.rule
    assert rule.reads == ()
    seen = Features.of_grid(random(1, 20, 4), (4, 5), {})
    assert rule(seen, 4).keep.tolist() == [[4, 9, 14, 19]]
    assert MMR(importance="distinct").build().vision.rule(seen, 4).keep.shape == (1, 4)
    asking = MMR(importance="question").build().vision.rule
    assert asking.asks
    words = Features.of_grid(torch.eye(4)[None], (2, 2), {}, (torch.eye(4)[2:3],))
    assert MarginalRelevance(importance=Question())(words, 1).keep.tolist() == [[2]]
    with pytest.raises(ConfigError, match="importance"):
        find("mmr", importance="beauty")


@pytest.mark.parametrize("importance", ["question", "distinct", ToTheRight()], ids=["question", "distinct", "own"])
def test_other_importances_in_a_model(importance):
    model = mustdrop.patch(clone("llava"), "mmr", keep=0.25, importance=importance)
    answer(model, batch(registry()["llava"], model, (("image",), ("image", "image"), ())), 1)
    trace = mustdrop.trace(model)
    assert trace.tokens[0].tolist() == [int(total * 0.25) for total in trace.total.tolist()]


# -- HoloV ------------------------------------------------------------------------------------------------------------


def test_holov_by_hand():
    """Two crops of three, features alike: attention alone shares the budget 1 to 2, and decides in each crop."""
    rule = CropsByContext(crops=2)
    attention = torch.tensor([[0.1, 0.2, 0.0, 0.1, 0.2, 0.3]])
    seen = Features.of_grid(torch.ones(1, 6, 4), (2, 3), {rule.reads[0]: attention})
    assert rule(seen, 3).keep.tolist() == [[1, 4, 5]]
    assert rule(seen, 1).keep.tolist() == [[5]]


def test_holov_gives_what_a_full_crop_cannot_take_to_the_others():
    rule = CropsByContext(crops=3)
    attention = torch.tensor([[0.9, 0.9, 0.01, 0.02, 0.03, 0.01]])
    seen = Features.of_grid(random(1, 6, 4), (2, 3), {rule.reads[0]: attention})
    for count in range(1, 6):
        keep = rule(seen, count).keep[0].tolist()
        assert len(set(keep)) == count
    assert {0, 1} <= set(rule(seen, 3).keep[0].tolist())


def test_a_varied_crop_of_holov_keeps_more_than_a_flat_one():
    x = torch.cat([torch.ones(1, 8, 4), random(1, 8, 4)], 1)
    for weight, share in ((0.0, [4, 4]), (5.0, None)):
        rule = CropsByContext(crops=2, weight=weight)
        seen = Features.of_grid(x, (4, 4), {rule.reads[0]: torch.full((1, 16), 0.1)})
        of = (rule(seen, 8).keep[0] // 8).bincount(minlength=2).tolist()
        assert of == share or (share is None and of[1] > of[0])


def test_crops_follow_from_the_budget():
    assert [CropsByContext().crops_of(576, count) for count in (64, 192, 575)] == [16, 5, 1]
    assert CropsByContext(crops=9).crops_of(4, 2) == 4
