"""The other methods' `compat="released"` against recordings of their authors' code."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

import mustdrop
from mustdrop import kernels
from mustdrop.rules import bipartite, clusters
from support.builders import answer
from support.masking_check import distance
from support.oracle import CacheWatch
from test_golden import inputs_of, plain_model, recorded

SAMPLES = ("s0", "s1")


def run(method, sample, **knobs):
    """(answer, trace, cache lengths [steps, layers]) of one patched generate."""
    model = mustdrop.patch(copy.deepcopy(plain_model()), method, compat="released", **knobs)
    with CacheWatch(model) as watch:
        out = answer(model, inputs_of(sample), steps=5)
    return out, mustdrop.trace(model), torch.tensor([[step[i].shape[2] for i in range(32)] for step in watch.keys])


def same_answer(out, logits, tokens):
    assert distance(out.logits[0], logits) <= 1e-4
    assert torch.equal(out.sequences[0, -6:], tokens)


@pytest.mark.parametrize(("sample", "layer", "share"), list(itertools.product(SAMPLES, (2, 3), (50, 75))))
def test_fastv(sample, layer, share):
    record = recorded(f"fastv/hf_{sample}_K{layer}_R{share}")
    out, trace, lengths = run("fastv", sample, layer=layer, ratio=share / 100)
    assert trace.kept(layer).tolist() == record["cache_kept_all_steps"][0].tolist()
    assert len(trace.kept(layer - 1)) == 576
    assert torch.equal(lengths, record["kv_len"])
    same_answer(out, record["cache_logits"], record["cache_tokens"])


LISTS = {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)}  # METHODS: SparseVLM v1.5
SPARSE = [(f"v15_{s}_ret{n}", {"survivors": LISTS[n]}) for s in SAMPLES for n in LISTS]
SPARSE += [
    (f"v1_{s}_sc{scale}_b{bias}", {"scale": float(scale), "bias": float(bias)})
    for s in SAMPLES
    for scale, bias in (("0.8", 0), ("13.5", 0), ("9", 6))
]


@pytest.mark.parametrize(("name", "knobs"), SPARSE, ids=[name for name, _ in SPARSE])
def test_sparsevlm(name, knobs, monkeypatch):
    record, sample = recorded(f"sparsevlm/{name}"), name.split("_")[1]
    noise = iter([record[f"L{layer}_noise"][0] for layer in (2, 6, 15, 19) if f"L{layer}_noise" in record])
    monkeypatch.setattr(clusters, "tie_noise", lambda *_: next(noise))  # it decides between exact ties
    out, trace, lengths = run("sparsevlm", sample, **knobs)
    names = list(range(576))  # patches that stand for the tokens of a stage, in the released order
    for layer in (2, 6, 15, 19):
        if f"L{layer}_kept_local" not in record:
            continue
        kept = [names[i] for i in record[f"L{layer}_kept_local"].tolist()]
        survivors, centres = trace.kept(layer + 1).tolist(), []
        if f"L{layer}_centers" in record:  # nothing goes where the rank is the number of tokens
            recycled = [names[i] for i in record[f"L{layer}_recycled_local"].tolist()]
            centres = [recycled[i] for i in record[f"L{layer}_centers"][0].tolist()]
            if len(centres) == 1:  # the mean of all recycled tokens, whichever of them it is named by
                centres = sorted(set(survivors) - set(kept))
                assert len(centres) == 1
                assert set(centres) <= set(recycled)
        names = kept + centres
        assert survivors == sorted(names), f"after layer {layer}"
    assert torch.equal(lengths, record["kv_len"])
    same_answer(out, record["gen_logits"], record["gen_tokens"])


PRUMERGE = [(f"{s}_{form}_{how}") for s in SAMPLES for form in ("prumerge", "plus") for how in ("adaptive", "r8")]


@pytest.mark.parametrize("name", PRUMERGE)
def test_prumerge(name):
    sample, form, how = name.split("_")
    record = recorded(f"prumerge/{name}")
    out, trace, _ = run("prumerge", sample, plus=form == "plus", ratio=0.125 if how == "r8" else None)
    number = len(record["features"])
    assert trace.tokens.unique().tolist() == [number]
    named = set(trace.kept(0).tolist())
    assert set(record["idx_final"].tolist()) <= named  # the extra token and duplicates lie on some of the others
    assert len(named) == number
    same_answer(out, record["gen_logits"], record["gen_tokens"])


TOME = {  # the settings of the recordings: r, slope, proportional attention
    "r8": {"r": 8},
    "r16": {"r": 16},
    "r16dec": {"r": 16, "slope": -1.0},
    "r16noprop": {"r": 16, "proportional": False},
    "l0only60": {"r": (60,)},
}


@pytest.mark.parametrize(("sample", "name"), list(itertools.product(SAMPLES, TOME)))
def test_tome_in_the_encoder(sample, name):
    record = recorded(f"tome/clip_{sample}_{name}")
    model = mustdrop.patch(copy.deepcopy(plain_model()), "tome", compat="released", **schedule(TOME[name]))
    seen = []
    model.model.vision_tower.register_forward_hook(lambda *call: seen.append(call[-1].hidden_states[-2]))
    answer(model, inputs_of(sample), steps=1)
    trace, into = mustdrop.trace(model), record["assign_per_block"][22].long()
    assert torch.equal(trace.assignment(0), into[1:] - 1)  # without CLS
    assert trace.tokens.unique().tolist() == [int(record["token_counts"][23]) - 1]
    assert distance(seen[0][0], record["hidden_minus2"][into]) <= 1e-4


def schedule(knobs):
    """The recorded code has merged in 24 layers, LLaVA reads the output of 23 of them."""
    if "slope" not in knobs:
        return knobs
    return {"r": tuple(bipartite.linear_amounts(knobs["r"], knobs["slope"], 24)[:23])}


UNITS = sorted(
    {key.rsplit("_", 1)[0].removesuffix("_unm") for key in recorded("tome/unit") if key.endswith("d0_assign")}
)


@pytest.mark.parametrize("unit", UNITS)
def test_tome_matching(unit):
    record = recorded("tome/unit")
    batch, number, protected = unit.split("_")[0], int(unit.split("_")[1][1:]), int(unit[-3])
    into, slots = bipartite.join(record[f"{batch}_metric"], number, protected)
    kept = record[f"{unit}_unm_idx"].shape[1]
    # without a class token the released code has the sources that stay in the order of their similarity
    rank = record[f"{unit}_unm_idx"].argsort(1).argsort(1).long()
    rank = torch.cat([rank, torch.arange(kept, slots).expand(len(rank), -1)], 1)
    assert torch.equal(into, rank.gather(1, record[f"{unit}_assign"].long()))
    made = kernels.merge_tokens(record[f"{batch}_x"], into, slots, record[f"{batch}_size"][..., 0])
    assert distance(made.gather(1, rank[..., None].expand_as(made)), record[f"{unit}_wavg"]) <= 1e-5
