"""Positions of a pruned prompt, step by step, without an engine."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

TOTAL, KEPT = 9, 4
PLACES = [1, 4, 5, 8]  # of what stays, in the image
BEFORE, BEHIND = 3, 2  # tokens of text
LENGTH = BEFORE + KEPT + BEHIND


@pytest.fixture
def model():
    from mustdrop.integrations.vllm.model import OneAxis

    return OneAxis.__new__(OneAxis)


def positions(model):
    from mustdrop.integrations.vllm.processor import FIELD, Announced

    none = torch.zeros(0, dtype=torch.long)
    announced = Announced("image", KEPT, TOTAL, none, none.bool())
    place = SimpleNamespace(offset=BEFORE, length=KEPT, is_embed=None)
    feature = SimpleNamespace(data={FIELD: SimpleNamespace(data=announced.tensor())}, mm_position=place)
    return model.get_mrope_input_positions([7] * LENGTH, [feature])


def rows(places):
    """Features of two numbers, and the place of each in two columns."""
    place = torch.tensor(places, dtype=torch.float32)
    return torch.cat([torch.ones(len(places), 2), (place // 256)[:, None], (place % 256)[:, None]], 1)


def test_text_stands_where_it_stood_before_the_encoder_has_run(model):
    found, ahead = positions(model)
    assert found[0].tolist()[:BEFORE] == [0, 1, 2]
    assert found[0].tolist()[-BEHIND:] == [BEFORE + TOTAL, BEFORE + TOTAL + 1]
    assert ahead == TOTAL - KEPT


@pytest.mark.parametrize("split", [0, 1, 3, 4])
def test_rows_get_their_places_also_where_a_step_ends_between_them(model, split):
    found, ahead = positions(model)
    computed = 0
    for part in (PLACES[:split], PLACES[split:]):
        given = [rows(part)] if part else []
        out, found, now = model.recompute_mrope_positions([7] * LENGTH, given, found, computed)
        assert [len(one) for one in out] == [len(part)] * bool(part)
        assert now == ahead
        computed = BEFORE + split
    assert found[0].tolist() == [0, 1, 2, *(BEFORE + place for place in PLACES), BEFORE + TOTAL, BEFORE + TOTAL + 1]


def test_steps_of_the_answer_change_and_copy_nothing(model):
    from mustdrop.integrations.vllm.mrope import ThreeAxes

    found, ahead = positions(model)
    assert model.recompute_mrope_positions([7] * LENGTH, [], found, LENGTH) == ([], found, ahead)
    three = ThreeAxes.__new__(ThreeAxes)
    given = torch.arange(5).expand(3, 5)
    out, same, ahead = three.recompute_mrope_positions(None, [], given, 5)  # a prompt of embeddings has no ids
    assert (out, ahead) == ([], 0)
    assert same is given
