"""ToMe: the matching by hand, the numbers per layer, and what an encoder must have. Recordings: test_golden_methods."""

from __future__ import annotations

import pytest
import torch

import mustdrop
from mustdrop.adapters import registry
from mustdrop.errors import ConfigError, UnsupportedOptionError
from mustdrop.pruners import Features
from mustdrop.rules import bipartite
from support import fake_flash
from support.builders import answer
from support.families import batch, clone, plain

METRIC = torch.tensor([[[1.0, 0], [0, 1], [0.1, 1], [1, 0.2], [-1, 0]]])  # sources 0, 2, 4; destinations 1, 3


def test_the_closest_pair_merges_first():
    into, slots = bipartite.join(METRIC, 1)
    assert slots == 4
    # 2 resembles 1 most (0.995), 0 resembles 3 (0.98); what stays is sources 0 and 4, then destinations 1 and 3
    assert into.tolist() == [[0, 2, 2, 3, 1]]
    assert bipartite.join(METRIC, 2)[0].tolist() == [[2, 1, 1, 2, 0]]


def test_a_class_token_neither_goes_nor_takes_in():
    into, slots = bipartite.join(METRIC, 2, protected=1)
    assert slots == 3
    assert into.tolist() == [[0, 1, 1, 2, 1]]  # 4 joins 1 (cosine 0, 3 would be -0.98)


@pytest.mark.parametrize(("tokens", "target", "layers"), [(576, 192, 23), (576, 64, 23), (36, 35, 3), (9, 9, 4)])
def test_layers_merge_alike_and_meet_the_target(tokens, target, layers):
    made = bipartite.amounts(tokens, target, layers)
    assert len(made) == layers
    assert tokens - sum(made) == target
    assert max(made) - min(made) <= 1


def test_no_layer_merges_more_than_half():
    assert bipartite.amounts(16, 1, 2) == [8, 4]


def test_behind_the_encoder_it_matches_as_often_as_it_takes_and_weighs_by_size():
    rule = mustdrop.method.find("tome").vision.score
    x = torch.eye(8).repeat_interleave(2, 0)[None]  # eight pairs of equals
    seen = Features.of_grid(x, (4, 4), {})
    chosen = rule(seen, 8)
    assert chosen.keep.tolist() == [list(range(0, 16, 2))]
    assert torch.equal(chosen.blend(x), torch.eye(8)[None])
    one = rule(seen, 1)
    assert torch.allclose(one.blend(x), torch.full((1, 1, 8), 1 / 8))


def test_the_encoder_itself_gets_cheaper():
    inputs = batch(registry()["llava"], plain("llava"), (("image",),))
    costs = {}
    for method in ("tome", "random"):
        model = mustdrop.patch(clone("llava"), method, keep=0.25)
        answer(model, inputs, steps=1)
        trace = mustdrop.trace(model)
        costs[method] = trace.flops.parts["vision"].ratio
    assert costs["tome"] < 0.9
    assert costs["random"] == 1


def test_flash_attention_has_no_place_for_sizes(flash):
    model = mustdrop.patch(fake_flash.use(clone("llava")), "tome", keep=0.5)
    inputs = batch(registry()["llava"], model, (("image",),))
    with pytest.raises(UnsupportedOptionError, match=r"'flash_attention_2' takes no bias.*proportional=False"):
        answer(model, inputs, steps=1)
    mustdrop.patch(model, "tome", keep=0.5, proportional=False)  # as usable as before
    answer(model, inputs, steps=1)
    assert mustdrop.trace(model).dropped_anything


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"keep": 64, "r": 8}, "keep= or r="),
        ({"compat": "released"}, "needs r="),
        ({"r": -1}, "greater than or equal to 0"),
        ({"r": 8, "slope": 2.0}, "slope"),
    ],
)
def test_settings_that_contradict(knobs, message):
    with pytest.raises(ConfigError, match=message):
        mustdrop.method.find("tome", **knobs)


@pytest.mark.parametrize("knobs", [{}, {"proportional": False}], ids=str)
def test_images_of_one_batch_merge_as_much_as_each_alone(knobs):
    """A budget in tokens leaves each of two images half of what it leaves the only one of another prompt."""
    adapter, model = registry()["llava"], mustdrop.patch(clone("llava"), "tome", keep=12, **knobs)
    rows = (("image",), (), ("image", "image"))
    lengths = []
    block = adapter.tower(model).blocks[-1]
    block.register_forward_hook(lambda _, args, out: lengths.append(args[0].shape[1]))
    together, trace = answer(model, batch(adapter, model, rows), 2), mustdrop.trace(model)
    for r, row in enumerate(rows):
        alone = answer(model, batch(adapter, model, (row,), first=r), 2)
        assert torch.equal(mustdrop.trace(model).assignment(), trace.assignment(r))
        assert (alone.logits[0] - together.logits[r]).abs().max() <= 1e-5
    assert lengths[0] == lengths[1] > lengths[2]  # beside the longer one, the two were padded
