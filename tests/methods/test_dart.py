"""DART's choice on small cases worked out by hand, and what it must never do."""

from __future__ import annotations

import pytest
import torch

import mustdrop
from mustdrop.errors import ConfigError
from mustdrop.method import find
from mustdrop.methods.dart import Duplication
from mustdrop.pruners import Seen
from support.builders import LLAMA, answer, batch, row_alone
from support.masking_check import assert_dropping_equals_masking, patched


def seen(norms, angles, vision, text):
    """One row: keys of these L1 norms over two heads, hidden states at these angles in degrees."""
    norm, angle = torch.tensor([norms]), torch.deg2rad(torch.tensor([angles]))
    keys = torch.stack([0.25 * norm, -0.75 * norm], 2)
    hidden = torch.stack([angle.cos(), angle.sin()], 2) * (1 + norm[..., None])  # only the direction counts
    marks = [torch.tensor([[bool(int(c)) for c in mask]]) for mask in (vision, text)]
    return Seen(torch.zeros(1, 0, len(norms)), marks[0], marks[1], keys, hidden)


def chosen(scorer, given, count, **options):
    return scorer.choose(given, torch.tensor([count]), **options)[0].nonzero()[:, 0].tolist()


# vision tokens 0 to 5, text 6 and 7
CASE = seen(
    norms=[1.0, 9.0, 2.0, 3.0, 4.0, 5.0, 7.0, 8.0],
    angles=[0.0, 10.0, 40.0, 80.0, 120.0, 170.0, 60.0, 180.0],
    vision="11111100",
    text="00000011",
)


def test_pivots_take_what_resembles_them_least_in_turn():
    # image pivot 1 (10 degrees), text pivot 7 (180 degrees): one token each
    scorer = Duplication(image_pivots=1, text_pivots=1)
    assert chosen(scorer, CASE, 3) == [0, 1, 5]  # 5 is 160 degrees from pivot 1; of the rest 0 is 180 from pivot 7


def test_the_last_share_is_cut_so_that_the_number_is_exact():
    scorer = Duplication(image_pivots=1, text_pivots=1)
    assert chosen(scorer, CASE, 4) == [0, 1, 4, 5]  # pivot 1 takes two (5 and 4), pivot 7 the third
    assert chosen(scorer, CASE, 2) == [1, 5]  # pivot 1 takes one, and that is all
    assert chosen(scorer, CASE, 1) == [1]


def test_more_pivots_than_tokens_leave_those_of_the_largest_norm():
    assert chosen(Duplication(), CASE, 2) == [1, 5]
    assert chosen(Duplication(), CASE, 6) == [0, 1, 2, 3, 4, 5]


def test_text_alone_may_hold_the_pivots():
    # text pivots 7 (180 degrees) and 6 (60 degrees): 0 for the first, then 5 (110 degrees) for the second
    assert chosen(Duplication(image_pivots=0, text_pivots=2), CASE, 2) == [0, 5]


def test_without_text_the_image_is_compared_with_itself():
    alone = seen([1.0, 3.0, 2.0], [0.0, 90.0, 80.0], "111", "000")
    assert chosen(Duplication(image_pivots=0), alone, 1) == [0]  # pivot 1, which is not kept for being one
    assert chosen(Duplication(image_pivots=1), alone, 2) == [0, 1]


def test_equal_norms_and_equal_angles_go_to_the_lower_index():
    flat = seen([1.0] * 5, [0.0, 90.0, 90.0, 90.0, 0.0], "11110", "00001")
    assert chosen(Duplication(image_pivots=1, text_pivots=1), flat, 2) == [0, 1]


def test_protected_tokens_stay_before_all_pivots():
    protected = torch.zeros(1, 8, dtype=torch.bool)
    protected[0, [2, 3]] = True
    scorer = Duplication(image_pivots=1, text_pivots=0)
    assert chosen(scorer, CASE, 4, protected=protected) == [1, 2, 3, 5]
    importance = torch.tensor([[0.0, 0, 1, 2, 0, 0, 0, 0]])
    assert chosen(scorer, CASE, 1, protected=protected, importance=importance) == [3]


@pytest.mark.parametrize("count", range(1, 37))
def test_the_number_is_exact_and_only_vision_tokens_are_chosen(count):
    draw = torch.Generator().manual_seed(count)
    vision = torch.zeros(3, 50, dtype=torch.bool)
    vision[0, 3:40], vision[1, 10:46], vision[2, 2:5] = True, True, True
    keys, hidden = torch.randn(3, 50, 8, generator=draw), torch.randn(3, 50, 6, generator=draw)
    given = Seen(torch.zeros(3, 0, 50), vision, ~vision & (torch.arange(50) > 45), keys, hidden)
    stay = Duplication().choose(given, torch.full((3,), count))
    assert stay.sum(1).tolist() == [count, count, min(count, 3)]
    assert not bool((stay & ~vision).any())
    pivots = keys.abs().sum(2).masked_fill(~vision, -1).topk(4, 1).indices[:2]
    assert bool(stay[:2].gather(1, pivots)[:, : min(count, 4)].all())


@pytest.mark.parametrize("attn", ["sdpa", "eager", "flash_attention_2"])
def test_dropping_equals_masking_and_no_attention_is_read(attn, request):
    if attn == "flash_attention_2":
        request.getfixturevalue("flash")
    model = patched(LLAMA, attn, method="dart", keep=0.6)
    both = assert_dropping_equals_masking(model, batch(LLAMA, (1, 0, 2), seed=2), LLAMA, attn)
    assert both.trace.flops.parts["scoring"].actual == 0
    assert both.trace.filters == (1,)


def test_a_row_chooses_as_it_does_alone():
    inputs, model = batch(LLAMA, (1, 2, 1), seed=3), patched(LLAMA, method="dart", keep=0.5)
    answer(model, inputs, 1)
    kept = [mustdrop.trace(model).kept(2, row).tolist() for row in range(3)]
    for row in range(3):
        answer(model, row_alone(inputs, row), 1)
        assert mustdrop.trace(model).kept(2).tolist() == kept[row]


def test_what_cannot_work_is_refused():
    with pytest.raises(ConfigError, match="pivot"):
        find("dart", image_pivots=0, text_pivots=0)
    with pytest.raises(ConfigError, match="keys"):
        Duplication().choose(Seen(torch.zeros(1, 0, 4), torch.ones(1, 4, dtype=torch.bool)), torch.tensor([2]))
