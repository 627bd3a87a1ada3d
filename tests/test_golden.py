"""`compat="released"` against recordings of the authors' code: every decision equal, logits within 1e-4."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlavaForConditionalGeneration

import mustdrop
from mustdrop import PrefillPruner, VisionStagePruner
from mustdrop.rules.dual_attention import dual_filter, dual_statistics
from support.builders import answer
from support.masking_check import distance
from support.oracle import CacheWatch

HERE = Path(__file__).parent / "golden"
if not HERE.is_dir():
    pytest.skip("the recordings are in the repository, not in the sdist", allow_module_level=True)
META = json.loads((HERE / "mustdrop/meta.json").read_text())
UNITS = json.loads((HERE / "mustdrop/unit_meta.json").read_text())
FILTERS = (2, 6, 10, 14)
SETTINGS = [(s, name) for s in ("s0", "s1") for name in ("t192", "t128", "t64", "e1", "e2", "e3")]
SETTINGS.append(("s1", "special_none"))


@functools.cache
def recorded(name):
    with np.load(HERE / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


@functools.cache
def plain_model():
    return LlavaForConditionalGeneration.from_pretrained(HERE / "model", dtype=torch.float32).eval()


def inputs_of(sample, setting=None):
    """One prompt; the case without mergeable windows has its own picture."""
    ids = recorded(f"baseline/{sample}")["hf_input_ids"]
    source = "mustdrop/special_none" if setting == "special_none" else f"baseline/{sample}"
    pixels = recorded(source)["pixel_values_i8"].permute(2, 0, 1)[None].float() / 64
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def thresholds_of(sample, setting):
    meta = META["special_none"] if setting == "special_none" else META[sample]["settings"][setting]
    return {"global_threshold": meta["global_thr"], "individual_threshold": meta["individual_thr"]}


def vision_record(sample, setting):
    return recorded("mustdrop/special_none" if setting == "special_none" else f"mustdrop/{sample}_lsm")


def record_of(sample, setting):
    return recorded("mustdrop/special_none" if setting == "special_none" else f"mustdrop/{sample}_{setting}")


def patched_model(**knobs):
    return mustdrop.patch(copy.deepcopy(plain_model()), "mustdrop", compat="released", **knobs)


@functools.cache
def run(sample, setting):
    """One patched generate: (answer, trace, cache lengths [steps, layers], states entering decoder layer 0)."""
    model = patched_model(**thresholds_of(sample, setting))
    entered = []
    handle = model.model.language_model.layers[0].register_forward_hook(lambda _, args, out: entered.append(args[0]))
    with CacheWatch(model) as watch:
        out = answer(model, inputs_of(sample, setting), steps=5)
    handle.remove()
    lengths = torch.tensor([[step[i].shape[2] for i in range(32)] for step in watch.keys])
    return out, mustdrop.trace(model), lengths, entered[0]


def patches_named_by(merged_ids, assignment):
    """Original patches that the recorded ids among the merged tokens stand for: a window is named by its centre."""
    names = []
    for slot in merged_ids.tolist():
        members = (assignment == slot).nonzero()[:, 0]
        names.append(int(members[len(members) // 2]))
    return sorted(names)


@pytest.mark.parametrize("sample", ["s0", "s1"])
def test_the_plain_model_is_the_recorded_model(sample):
    out = answer(plain_model(), inputs_of(sample), steps=5)
    assert distance(out.logits[0], recorded(f"baseline/{sample}")["gen_logits"]) <= 1e-4
    assert torch.equal(out.sequences[0, -6:], recorded(f"baseline/{sample}")["gen_tokens"])


@pytest.mark.parametrize(("sample", "setting"), SETTINGS)
def test_the_same_windows_merge_in_the_same_order(sample, setting):
    record, assignment = vision_record(sample, setting), run(sample, setting)[1].assignment(0)
    expected = torch.full((576,), -1)
    r = int(record["r"])
    for slot, members in enumerate(record["merged_window_token_ids"][0]):
        expected[members] = slot
    expected[record["unmerged_token_ids"][0]] = torch.arange(r, 576 - 8 * r)
    assert torch.equal(assignment, expected)


@pytest.mark.parametrize(("sample", "setting"), [("s0", "e1"), ("s1", "e1"), ("s1", "special_none")])
def test_the_merged_features_enter_the_language_model_in_the_released_order(sample, setting):
    record, entered = vision_record(sample, setting), run(sample, setting)[3]
    first = int((inputs_of(sample)["input_ids"][0] == 120).nonzero()[0])
    merged = record["projected"][0]
    assert distance(entered[0, first : first + len(merged)], merged) <= 1e-4
    assert entered.shape[1] == inputs_of(sample)["input_ids"].shape[1] - 576 + len(merged)


@pytest.mark.parametrize(("sample", "setting"), SETTINGS)
def test_the_same_tokens_survive_every_filter(sample, setting):
    record, (_, trace, _, _) = record_of(sample, setting), run(sample, setting)
    assignment = trace.assignment(0)
    merged = record["L2_attn_sum"].shape[0]
    for layer in range(32):
        before = [f for f in FILTERS if f < layer]
        alive = record[f"L{before[-1]}_kept"] if before else torch.arange(merged)
        assert trace.kept(layer).tolist() == patches_named_by(alive, assignment), f"input of layer {layer}"
        assert trace.tokens[layer, 0] == len(alive)
    assert trace.kept(32).tolist() == patches_named_by(record["L14_kept"], assignment)


@pytest.mark.parametrize(("sample", "setting"), SETTINGS)
def test_the_same_answer_with_logits_within_1e_4(sample, setting):
    record, (out, _, _, _) = record_of(sample, setting), run(sample, setting)
    assert distance(out.logits[0], record["gen_logits"]) <= 1e-4
    assert torch.equal(out.sequences[0, -6:], record["gen_tokens"])


@pytest.mark.parametrize(("sample", "setting"), SETTINGS)
def test_the_same_cache_length_in_every_layer_after_every_step(sample, setting):
    record, (_, trace, lengths, _) = record_of(sample, setting), run(sample, setting)
    assert torch.equal(lengths[1:], record["kv_len"][1:])
    assert torch.equal(lengths[1] - 1, record["kv_len"][0])
    assert torch.equal(trace.kv_lengths[:, 0], record["kv_len"][5])


def test_the_stored_keys_and_values_are_the_recorded_ones():
    record, cache = recorded("mustdrop/s0_t64"), run("s0", "t64")[0].cache
    layers = sorted({int(key.split("_")[1][1:]) for key in record if key.startswith("kv_L")})
    assert layers == [0, 2, 5, 8, 14, 31]
    for layer in layers:
        for name, stored in (("k", cache.layers[layer].keys), ("v", cache.layers[layer].values)):
            expected = record[f"kv_L{layer}_{name}"]
            assert distance(stored[0, :, : expected.shape[1]], expected) <= 1e-4, (layer, name)


@pytest.mark.parametrize(("sample", "setting"), [("s0", "t64"), ("s1", "t64"), ("s1", "special_none")])
def test_the_same_key_set(sample, setting):
    """Under the highest thresholds everything goes that is not protected, so what is left is the key set."""
    model = patched_model(global_threshold=1.0, individual_threshold=1.0)
    answer(model, inputs_of(sample, setting), steps=0)
    trace = mustdrop.trace(model)
    expected = patches_named_by(vision_record(sample, setting)["key_set"][0], trace.assignment(0))
    assert trace.kept(32).tolist() == expected


# ------------------------------------------------------------------------------------------- the two rules on their own


@pytest.mark.parametrize("case", UNITS["lsm"], ids=lambda case: case["key"])
def test_merging_of_plain_tensors_equals_the_released_function(case):
    record, grid = recorded("mustdrop/unit_lsm"), (case["grid"], case["grid"])
    x, key = record[case["key"] + "_x"], case["key"]
    pruner = VisionStagePruner(window=case["window"], threshold=case["thr"], compat="released")
    merged = pruner.merge(x[:, 1:], grid)
    assert torch.equal(merged.merge_into + 1, record[key + "_assign"][:, 1:].long())
    assert torch.equal(merged.sizes().float(), record[key + "_size"][:, 1:])
    assert distance(merged.apply(x[:, 1:]), record[key + "_y"][:, 1:]) <= 1e-6


@pytest.mark.parametrize(
    "case", UNITS["dual_filter"], ids=lambda c: f"{c['case']}-{c['global_thr']}-{c['individual_thr']}"
)
def test_filtering_of_plain_attention_equals_the_released_function(case):
    gamma, alpha = case["global_thr"], case["individual_thr"]
    if isinstance(case["case"], str):
        attention, expected = torch.tensor([[[0.25, 0.25, 0.5]]]), case["important"]
    else:
        record = recorded("mustdrop/unit_filter")
        rows = record[f"f{case['case']}_attn_textrows"].mean(0)
        attention = rows[None, :, case["P"] : case["P"] + case["N"]]
        expected = record[f"f{case['case']}_g{gamma}_i{alpha}_important"].tolist()
    alive = torch.ones(1, attention.shape[2], dtype=torch.bool)
    assert dual_filter(dual_statistics(attention, alive), alive, gamma, alpha)[0].nonzero()[:, 0].tolist() == expected
    if max(gamma, alpha) <= 1:  # the pruner refuses thresholds above 1
        kept = PrefillPruner(global_threshold=gamma, individual_threshold=alpha)(attention)
        assert kept.keep[0, kept.valid[0]].tolist() == expected
