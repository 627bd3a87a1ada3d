"""Positions of a pruned prompt, step by step, without an engine."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

TOTAL, KEPT = 9, 4
PLACES = [1, 4, 5, 8]  # of what stays, in the image
BEFORE, BEHIND = 3, 2  # tokens of text
LENGTH = BEFORE + KEPT + BEHIND
WHOLE = [0, 1, 2, *(BEFORE + place for place in PLACES), BEFORE + TOTAL, BEFORE + TOTAL + 1]


@pytest.fixture
def model():
    from mustdrop.integrations.vllm.model import OneAxis

    return OneAxis.__new__(OneAxis)


def picture():
    from vllm.multimodal.inputs import PlaceholderRange

    from mustdrop.integrations.vllm.processor import FIELD, Announced

    none = torch.zeros(0, dtype=torch.long)
    announced = Announced("image", KEPT, TOTAL, none, none.bool())
    place = PlaceholderRange(BEFORE, KEPT)
    return SimpleNamespace(data={FIELD: SimpleNamespace(data=announced.tensor())}, mm_position=place)


def positions(model):
    return model.get_mrope_input_positions([7] * LENGTH, [picture()])


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
    assert found[0].tolist() == WHOLE


class Staged:
    """Positions as vLLM's runner for GPUs keeps them: in 32 bits, beyond the prompt's length."""

    def __init__(self, found):
        self.kept = torch.zeros(3, LENGTH + 5, dtype=torch.int32)
        self.kept[:, :LENGTH] = found

    def read_prefill_positions(self, index, length):
        return self.kept[:, :length]

    def update_prefill_positions(self, index, found, ahead):
        self.kept[:, :LENGTH] = found
        self.ahead = ahead


@pytest.mark.parametrize("split", [0, 1, 3, 4])
def test_the_runner_for_gpus_asks_the_same(model, split):
    """Its kernels need a GPU; the part of it that asks the model does not."""
    from vllm.v1.worker.gpu.model_states.mm_pruning import MultiModalPruner

    found, ahead = positions(model)
    state, ids = Staged(found), torch.full((1, LENGTH), 7, dtype=torch.int32)
    pruner = MultiModalPruner(model, state, SimpleNamespace(mm_features={"one": [picture()]}), 2)
    requests = SimpleNamespace(all_token_ids=SimpleNamespace(gpu=ids))
    for part, start, end in ((PLACES[:split], 0, BEFORE + split), (PLACES[split:], BEFORE + split, LENGTH)):
        numbers = {
            "prefill_len_np": LENGTH,
            "num_computed_prefill_tokens_np": start,
            "num_scheduled_tokens": end - start,
        }
        step = {name: np.array([number]) for name, number in numbers.items()}
        batch = SimpleNamespace(req_ids=["one"], idx_mapping_np=np.array([0]), **step)
        given = [rows(part)] if part else []
        assert [one.tolist() for one in pruner.recompute(given, batch, requests)] == [[[1, 1]] * len(part)] * bool(part)
    assert state.kept[0, :LENGTH].tolist() == WHOLE
    assert state.ahead == ahead


def test_steps_of_the_answer_change_and_copy_nothing(model):
    from mustdrop.integrations.vllm.mrope import ThreeAxes

    found, ahead = positions(model)
    assert model.recompute_mrope_positions([7] * LENGTH, [], found, LENGTH) == ([], found, ahead)
    three = ThreeAxes.__new__(ThreeAxes)
    given = torch.arange(5).expand(3, 5)
    out, same, ahead = three.recompute_mrope_positions(None, [], given, 5)  # a prompt of embeddings has no ids
    assert (out, ahead) == ([], 0)
    assert same is given
