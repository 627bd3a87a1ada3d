"""mustdrop+: the filter's choice by hand, and how the encoder's merging is spread."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from PIL import Image

import mustdrop
import mustdrop.method
from mustdrop import VisionStagePruner, budget
from mustdrop.demo.model import load, prompt
from mustdrop.demo.scenes import SceneMaker
from mustdrop.demo.tasks import TaskMaker
from mustdrop.errors import ConfigError
from mustdrop.methods.mustdrop_plus import TAPER, AttendedAndDiverse, MergedOrSelected
from mustdrop.methods.tome import SoftMatching
from mustdrop.methods.vcast import CurvedFrames
from mustdrop.pruners import Features, PrefillPruner, Seen
from mustdrop.rules import bipartite
from mustdrop.runtime.plan import plan_row

# three things of two tokens each, one after the other, then a token of text
THINGS = torch.eye(4).repeat_interleave(2, 0)[:7]
ATTENTION = torch.tensor([0.30, 0.29, 0.10, 0.11, 0.02, 0.01, 0.17])


def seen(rows=1, attention=ATTENTION):
    alive = torch.ones(rows, 7, dtype=torch.bool)
    alive[:, 6] = False
    return Seen(attention.expand(rows, 1, 7), alive, hidden=THINGS.expand(rows, 7, 4))


def chosen(scorer, given, *counts, **options):
    return [row.nonzero()[:, 0].tolist() for row in scorer.choose(given, torch.tensor(counts), **options)]


def test_each_thing_keeps_its_most_attended_token_before_any_keeps_two():
    assert chosen(AttendedAndDiverse(), seen(), 3) == [[0, 3, 4]]
    assert chosen(AttendedAndDiverse(), seen(), 2) == [[0, 3]]


def test_the_power_lies_between_diversity_and_the_ranking():
    attention = torch.tensor([0.30, 0.29, 0.02, 0.01, 0.01, 0.01, 0.36])
    hidden = THINGS.clone()
    hidden[1] = torch.tensor([0.8, 0.6, 0, 0])  # not quite what 0 is: 0.36 of it is its own
    given = Seen(attention.expand(1, 1, 7), seen().alive, hidden=hidden[None])
    assert chosen(AttendedAndDiverse(power=1), given, 2) == [[0, 1]]  # 0.36 (29/30)^2 against (2/30)^2
    assert chosen(AttendedAndDiverse(power=0), given, 2) == [[0, 2]]  # 0.36 against 1


def test_protected_tokens_stay_and_are_what_others_differ_from():
    protected = torch.zeros(1, 7, dtype=torch.bool)
    protected[0, [4, 5]] = True
    assert chosen(AttendedAndDiverse(), seen(), 3, protected=protected) == [[0, 4, 5]]
    assert chosen(AttendedAndDiverse(), seen(), 1, protected=protected, importance=torch.arange(7.0)[None]) == [[5]]


def test_rows_are_chosen_from_alone():
    attention = torch.rand(3, 1, 7, generator=torch.Generator().manual_seed(0))
    hidden = torch.randn(3, 7, 4, generator=torch.Generator().manual_seed(1))
    alive = seen(3).alive.clone()
    alive[1, :2] = False
    together = chosen(AttendedAndDiverse(), Seen(attention, alive, hidden=hidden), 3, 3, 2)
    alone = [
        chosen(AttendedAndDiverse(), Seen(attention[[r]], alive[[r]], hidden=hidden[[r]]), count)[0]
        for r, count in enumerate((3, 3, 2))
    ]
    assert together == alone
    assert [len(row) for row in together] == [3, 3, 2]
    given = Seen(attention, alive, hidden=hidden)
    assert chosen(AttendedAndDiverse(), given, 0, 9, 6) == [[], [2, 3, 4, 5], [*range(6)]]


def test_it_needs_the_hidden_states():
    pruner = PrefillPruner(keep=3, score=AttendedAndDiverse())
    with pytest.raises(ConfigError, match="hidden"):
        pruner(ATTENTION[None, None, :6], count=3)


@pytest.mark.parametrize(("tokens", "target", "layers"), [(576, 192, 23), (576, 75, 4), (36, 35, 3), (9, 9, 4)])
def test_layers_merge_the_same_share(tokens, target, layers):
    made = bipartite.geometric_amounts(tokens, target, layers)
    assert sum(made) == tokens - target
    left = torch.tensor([tokens, *made]).double()
    left[1:] = tokens - left[1:].cumsum(0)
    wanted = tokens * (target / tokens) ** (torch.arange(layers + 1) / layers)
    assert (left - wanted).abs().max() <= 0.5


def test_no_layer_merges_more_than_half_by_share():
    assert bipartite.geometric_amounts(16, 1, 2) == [8, 4]
    assert bipartite.geometric_amounts(16, 0, 2) == [8, 4]
    assert bipartite.geometric_amounts(100, 10, 2, 0.3) == [30, 21]


def test_layers_merge_as_before_and_the_rule_chooses_where_nothing_has_merged():
    rule, merging = MergedOrSelected(share=0.3), SoftMatching(share=0.3)
    assert rule.amounts(576, 64, 23) == merging.amounts(576, 64, 23)
    keys = torch.randn(1, 2, 12, 4, generator=torch.Generator().manual_seed(0))
    for one, other in zip(rule.join(keys, 3, 1), merging.join(keys, 3, 1), strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))
    features = Features.of_grid(torch.randn(1, 12, 4, generator=torch.Generator().manual_seed(1)), (3, 4), {})
    assert torch.equal(rule(features, 5).keep, CurvedFrames()(features, 5).keep)
    merged = replace(features, size=torch.arange(1.0, 13.0)[None])
    assert torch.equal(rule(merged, 5).merge_into, merging(merged, 5).merge_into)


def composed(rule, keep):
    """The stages of mustdrop+ with another rule of the vision stage."""
    method = mustdrop.method.find("mustdrop+", keep=keep)
    vision = VisionStagePruner(window=None, key_share=0, taper=TAPER, score=rule)
    return {"vision": vision, "prefill": method.prefill, "decode": method.decode}


def logits(model, inputs, *method, **knobs):
    with torch.no_grad(), mustdrop.patched(model, *method, **knobs):
        return model(**inputs).logits


@pytest.mark.parametrize("keep", [0.25, 1 / 18])
def test_a_packed_encoder_merges_nothing_unless_asked_to(keep):
    model, processor = load("pages")
    sample = TaskMaker("pages", "selection", seed=4).sample()
    inputs = processor(text=prompt(processor, "is there a K ?", 1), images=list(sample.pictures), return_tensors="pt")
    chosen = logits(model, inputs, "mustdrop+", keep=keep)
    merged = logits(model, inputs, "mustdrop+", keep=keep, behind="merge")
    assert torch.equal(chosen, logits(model, inputs, **composed(CurvedFrames(), keep)))
    assert torch.equal(merged, logits(model, inputs, **composed(SoftMatching(share=0.3), keep)))
    assert not torch.equal(chosen, merged)


@pytest.mark.parametrize("keep", [0.5, 1 / 18])  # at the smaller one, something is left to merge behind
def test_where_the_layers_merge_both_editions_are_the_same(keep):
    model, processor = load()
    image = Image.fromarray(SceneMaker("selection", seed=4).scene().image)
    inputs = processor(text=prompt(processor, "how many digits are there ?"), images=image, return_tensors="pt")
    first, second = (logits(model, inputs, "mustdrop+", keep=keep, behind=how) for how in ("merge", "choose"))
    assert torch.equal(first, second)


def test_the_preset_fills_all_three_sockets():
    method = mustdrop.method.find("mustdrop+", keep=64)
    assert None not in (method.vision, method.prefill, method.decode)


@pytest.mark.parametrize(
    ("share", "taper"),
    [(0.01, 0.2), (1 / 9, 0.2), (1 / 6, 0.36), (2 / 9, 0.52), (5 / 12, 0.815), (1 / 2, 0.9), (1.0, 0.9)],
)
def test_what_the_filters_leave_of_what_enters_grows_with_the_budget(share, taper):
    vision = mustdrop.method.find("mustdrop+", keep=share).vision
    assert vision.taper_at(share) == pytest.approx(taper)
    if share < 1:  # one number is the same at every budget
        assert mustdrop.method.find("mustdrop+", keep=share, taper=0.3).vision.taper_at(share) == 0.3


@pytest.mark.parametrize("keep", [32, 64, 128, 192, 288])
def test_the_budget_is_split_at_that_taper(keep):
    method = mustdrop.method.find("mustdrop+", keep=keep)
    layers = method.prefill.filter_layers(32)
    taper = method.vision.taper_at(keep / 576)
    entering = budget.entry(576, 32, layers, keep, taper)
    assert budget.spread(entering, 32, layers, keep)[-1] >= taper * entering - 1e-6
    plan = plan_row(method, 576, 32, layers)
    assert plan.at_most == entering


def test_points_that_do_not_ascend_are_refused():
    with pytest.raises(ConfigError, match="must ascend"):
        VisionStagePruner(taper=((0.5, 0.2), (0.5, 0.9)))
    with pytest.raises(ConfigError, match="taper"):
        VisionStagePruner(taper=((0.5, 1.2),))
