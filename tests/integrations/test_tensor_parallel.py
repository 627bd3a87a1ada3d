"""A model whose heads lie in two processes drops what the whole model drops, in both of them."""

from __future__ import annotations

import pytest
import torch

import mustdrop
from mustdrop import errors
from support import two_processes
from support.builders import LLAMA, answer, batch, clone, plain
from support.masking_check import TOLERANCE, distance
from support.two_processes import CASES, PROCESSES, ROWS, SPLIT_ENCODER, VARIED, measure
from support.versions import SPLITS_INTO_DTENSORS

CACHE_ALONE = ("h2o", "snapkv", "tgvkv")
NOT_SPLIT = "this version of transformers splits weights into plain tensors: such a model is refused"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """What the two processes wrote down."""
    pytest.importorskip("accelerate", reason="accelerate is not installed, and transformers splits no model without it")
    folder = tmp_path_factory.mktemp("split")
    clone().save_pretrained(folder)
    return two_processes.start(folder)


@pytest.mark.skipif(not SPLITS_INTO_DTENSORS, reason=NOT_SPLIT)
@pytest.mark.parametrize("name", [*CASES, *VARIED, *SPLIT_ENCODER])
def test_two_processes_drop_what_one_drops(name, written):
    whole = measure(clone(), name)
    for part in (each[name] for each in written):
        assert part.keys() == whole.keys()
        for key in {"tokens", "entries", "flops"} & whole.keys():
            assert torch.equal(part[key], whole[key]), key
        for key in {"kept", "vision"} & whole.keys():
            assert all(map(torch.equal, part[key], whole[key])), key
        for key in {"logits", "turn", "loss", "gradient"} & whole.keys():
            assert distance(part[key], whole[key]) < TOLERANCE, key
        if "bytes" in whole:
            assert torch.equal(part["bytes"] * PROCESSES, whole["bytes"]), "a process stores its own heads"
    left = whole["tokens"] if CASES[name.split(",")[0]].get("method") not in CACHE_ALONE else whole["entries"]
    assert (left < LLAMA.n_vision * torch.tensor(ROWS)).any(), "nothing was dropped"


@pytest.mark.skipif(not SPLITS_INTO_DTENSORS, reason=NOT_SPLIT)
def test_unpatching_leaves_the_parts_as_they_were(written):
    expected = answer(plain(), batch(LLAMA, ROWS, seed=5)).logits
    for part in (each["unpatched"] for each in written):
        assert part["same"]
        assert torch.equal(part["logits"], part["before"])
        assert distance(part["logits"], expected) < TOLERANCE


@pytest.mark.skipif(SPLITS_INTO_DTENSORS, reason="this version of transformers says on the weights how they are split")
def test_weights_that_do_not_say_how_they_are_split_are_refused(written):
    assert all("DTensors" in part["refused"] for part in written)


@pytest.mark.parametrize(
    ("note", "reason"),
    [
        ({"_tp_size": 2}, "no DTensors"),
        ({"_tp_size": 2, "hf_quantizer": object()}, "quantised"),
        ({"_tp_size": 1}, None),
    ],
    ids=["unknown", "quantised", "alone"],
)
def test_what_cannot_be_told_is_refused(note, reason):
    model = clone()
    vars(model).update(note)
    if reason is None:
        assert mustdrop.patch(model) is model
        return
    with pytest.raises(errors.UnsupportedOptionError, match=reason):
        mustdrop.patch(model)
    assert "_mustdrop" not in vars(model)
    assert not model.model.language_model.layers[0]._forward_pre_hooks
