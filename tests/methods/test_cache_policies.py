"""Cache policies: their rules on small cases worked out by hand, and through a model against its own attention."""

from __future__ import annotations

import pytest
import torch

import mustdrop
from mustdrop import DecodeCachePruner
from mustdrop.errors import ConfigError
from mustdrop.method import find
from mustdrop.methods.tgvkv import TextGuided
from mustdrop.pruners import AllRows, LastQuery, ObservationWindow, Received
from mustdrop.rules.layer_budgets import proportional
from mustdrop.rules.scores import neighbour_mean
from mustdrop.runtime.language import attention_call
from support.builders import IMAGE, LLAMA, QWEN2, answer, batch, plain, row_alone
from support.masking_check import patched

ONES = torch.ones(1, 4, dtype=torch.bool)


def read(given, queries=1.0):
    given = torch.tensor([given])
    return Received(given, torch.full_like(given, queries))


# -------------------------------------------------------------------------------------------------------------- rules


def test_the_pooling_averages_over_the_candidates_around():
    score = torch.tensor([[6.0, 0.0, 3.0, 9.0, 100.0, 2.0]])
    vision = torch.tensor([[True, True, True, True, False, True]])
    assert neighbour_mean(score, vision, 3).tolist() == [[3.0, 3.0, 4.0, 6.0, 5.5, 2.0]]
    assert neighbour_mean(score, vision, 1).tolist() == [[6.0, 0.0, 3.0, 9.0, 0.0, 2.0]]
    assert neighbour_mean(score, torch.zeros_like(vision), 3).tolist() == [[0.0] * 6]
    torch.testing.assert_close(neighbour_mean(score, vision, 5)[0, :2], torch.tensor([3.0, 4.5]))


def test_padding_on_the_left_changes_no_pooled_score():
    score, vision = torch.rand(1, 9), torch.rand(1, 9) > 0.3
    padded = [torch.nn.functional.pad(t, (4, 0)) for t in (score + 1, vision)]
    assert torch.equal(neighbour_mean(*padded, 5)[:, 4:], neighbour_mean(score + 1, vision, 5))


def test_a_window_is_the_last_text_rows():
    text = torch.tensor([[False, True, True, True], [True, False, False, True]])
    assert ObservationWindow(window=2).rows(text, text).tolist() == [[False, False, True, True], text[1].tolist()]
    assert torch.equal(ObservationWindow().rows(text, text), text)
    assert LastQuery().rows(text, text).tolist() == [[False, False, False, True]] * 2


def test_all_rows_divide_by_how_many_queries_see_an_entry():
    every = Received(torch.tensor([[1.6, 1.2, 0.5, 0.9]]), torch.tensor([[4.0, 3.0, 2.0, 1.0]]))
    torch.testing.assert_close(AllRows().score(every, ONES), torch.tensor([[0.4, 0.4, 0.25, 0.9]]))
    more = AllRows().add(every, read([0.4, 0.0, 0.4, 0.0]))
    torch.testing.assert_close(AllRows().score(more, ONES), torch.tensor([[0.4, 0.3, 0.3, 0.45]]))


def test_a_step_is_added_averaged_in_or_takes_over():
    known, step = read([0.8, 0.0, 0.4, 0.0], 2.0), read([0.0, 0.6, 0.2, 0.0])
    scorer = ObservationWindow(kernel=1, decay=0.75)
    torch.testing.assert_close(scorer.score(scorer.add(known, step), ONES), torch.tensor([[0.3, 0.15, 0.2, 0.0]]))
    assert torch.equal(LastQuery().score(LastQuery().add(known, step), ONES), step.given)


def test_a_text_row_weighs_what_the_text_behind_it_gives_its_token():
    # entries: vision 0 and 1, text 2 and 3; rows: padding, text 2, text 3
    attention = torch.tensor([[[0.0, 0, 0, 0], [0.4, 0.2, 0.4, 0.0], [0.1, 0.5, 0.2, 0.2]]])
    own = torch.tensor([[-1, 2, 3]])
    # weights: token 2 (0.4 + 0.2) / 2 = 0.3, token 3 0.2 / 1; normalised 0.6 and 0.4
    expected = torch.tensor([[0.28, 0.32, 0.32, 0.08]])
    torch.testing.assert_close(TextGuided().gather(attention, own), expected)


@pytest.mark.parametrize(
    ("mass", "count", "entries", "expected"),
    [
        ([1.0, 2.0, 3.0], 4, [9, 9, 9], [2, 4, 6]),
        ([1.0, 1.0, 2.0], 3, [9, 9, 9], [2, 2, 5]),  # 2.25, 2.25, 4.5: the largest remainder
        ([1.0, 1.0, 10.0], 4, [9, 9, 5], [4, 3, 5]),  # a full layer frees 3.5 and 3.5; the tie goes to the lower one
        ([0.0, 0.0, 1.0], 3, [9, 9, 9], [1, 1, 7]),
        ([0.0, 0.0, 0.0], 2, [9, 9, 9], [2, 2, 2]),
        ([5.0, 1.0, 1.0], 9, [9, 9, 9], [9, 9, 9]),
        ([5.0, 1.0, 1.0], 8, [2, 0, 3], [2, 0, 3]),
        ([1.0, 1.0, 1.0], 0, [0, 0, 0], [0, 0, 0]),
    ],
)
def test_layers_share_a_budget_by_their_mass(mass, count, entries, expected):
    columns = [torch.tensor(values)[:, None] for values in (mass, entries)]
    assert proportional(columns[0], torch.tensor([count]), columns[1])[:, 0].tolist() == expected


def test_shares_add_up_whatever_the_mass():
    draw = torch.Generator().manual_seed(0)
    mass, entries = torch.rand(28, 50, generator=draw) ** 4, torch.full((28, 50), 576)
    count = torch.randint(1, 577, (50,), generator=draw)
    made = proportional(mass, count, entries)
    assert torch.equal(made.sum(0), 28 * count)
    assert made.min() >= 1
    assert made.max() <= 576


# ----------------------------------------------------------------------------------------------------- contradictions


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"after_prefill": True, "keep": 4}, "ObservationWindow"),
        ({"score": AllRows()}, "keep"),
        ({"score": TextGuided(), "keep": 4}, "after_prefill=True"),
    ],
    ids=["nothing_to_rank_by", "nothing_leaves", "no_mass"],
)
def test_settings_that_contradict_are_refused(settings, says):
    with pytest.raises(ConfigError, match=says):
        DecodeCachePruner(**settings)


# ------------------------------------------------------------------------------------------------------ through a model


def reference(name, attention, n_vision, text, keep):
    """Entries of each layer that stay, from whole attention matrices (L, S, S) of one prompt, with plain loops."""
    scores, masses = [], []
    for layer in attention:
        rows = {"snapkv": text[-3:], "snapkv_text": text, "h2o": list(range(len(layer))), "tova": text[-1:]}
        if name == "tgvkv":
            weight = [sum(float(layer[i, j]) for i in text if i >= j) / sum(i >= j for i in text) for j in text]
            given = sum(w / sum(weight) * layer[t] for w, t in zip(weight, text, strict=True))
            masses.append(sum(float(layer[t, n_vision].sum()) for t in text))
        else:
            picked = rows[name]
            given = torch.stack([layer[[r for r in picked if r >= j], j].mean() for j in range(len(layer))])
        own = given[n_vision]
        if name.startswith("snapkv"):
            near = [[k for k in range(len(own)) if abs(int(n_vision[k] - n_vision[i])) <= 2] for i in range(len(own))]
            own = torch.stack([own[some].mean() for some in near])
        scores.append(own)
    counts = [keep] * len(scores)
    if name == "tgvkv":
        entries = torch.full((len(scores), 1), len(n_vision))
        counts = proportional(torch.tensor(masses)[:, None], torch.tensor([keep]), entries)[:, 0].tolist()
    return [own.argsort(descending=True)[:n].sort().values.tolist() for own, n in zip(scores, counts, strict=True)]


def stored(cache, row, prompt_keys, where):
    """Per layer, which of the vision tokens at `where` have their key in the cache."""
    kept = []
    for layer, keys in zip(cache.layers, prompt_keys, strict=True):
        apart = (layer.keys[row].transpose(0, 1)[:, None] - keys[0][:, where].transpose(0, 1)[None]).abs().amax((2, 3))
        kept.append((apart.amin(0) < 1e-3).nonzero()[:, 0].tolist())
    return kept


POLICIES = {
    "snapkv": find("snapkv", keep=10, window=3).decode,
    "snapkv_text": find("snapkv", keep=10).decode,
    "h2o": find("h2o", keep=10).decode,
    "tgvkv": find("tgvkv", keep=10).decode,
    "tova": DecodeCachePruner(keep=10, score=LastQuery(), after_prefill=True),
}


@pytest.mark.parametrize("attn", ["sdpa", "eager", "flash_attention_2"])
@pytest.mark.parametrize("variant", [LLAMA, QWEN2], ids=str)
@pytest.mark.parametrize("policy", POLICIES)
def test_the_entries_that_stay_are_those_of_the_formula(policy, variant, attn, request):
    if attn == "flash_attention_2":
        request.getfixturevalue("flash")
    inputs = batch(variant, (1, 0, 2), seed=5)
    out = answer(patched(variant, attn, decode=POLICIES[policy]), inputs, steps=3)
    for row in (0, 2):
        alone = row_alone(inputs, row, variant)
        with torch.no_grad():
            whole = plain(variant, "eager")(**alone, output_attentions=True, use_cache=True)
        attention = [layer[0].mean(0) for layer in whole.attentions]
        where = (alone["input_ids"][0] == IMAGE).nonzero()[:, 0]
        text = list(range(int(where[-1]) + 1, alone["input_ids"].shape[1]))
        expected = reference(policy, attention, where, text, 10)
        assert stored(out.cache, row, [layer.keys for layer in whole.past_key_values.layers], where) == expected


@pytest.mark.parametrize(
    ("scorer", "expected"),
    [
        (AllRows(), lambda prompt, steps: (prompt.sum(0) + steps.sum(0)) / ((prompt > 0).sum(0) + len(steps))),
        (LastQuery(), lambda prompt, steps: steps[-1]),
        (
            ObservationWindow(kernel=1, decay=0.5),
            lambda prompt, steps: 0.25 * prompt[-4:].mean(0) + 0.25 * steps[0] + 0.5 * steps[1],
        ),
    ],
    ids=["sum", "last", "average"],
)
def test_generated_tokens_add_to_what_the_prompt_gave(scorer, expected):
    inputs, length = batch(QWEN2, (1,), seed=5, after=(4,)), 0
    out = answer(patched(QWEN2, decode=DecodeCachePruner(keep=10, interval=2, score=scorer)), inputs, steps=3)
    reference = answer(plain(QWEN2, "eager"), inputs, steps=3)
    length = inputs["input_ids"].shape[1]
    where = (inputs["input_ids"][0] == IMAGE).nonzero()[:, 0]
    with torch.no_grad():  # steps 1 and 2 attend before the eviction, which comes before step 3
        ids = reference.sequences[:, : length + 2]
        attention = plain(QWEN2, "eager")(
            input_ids=ids, pixel_values=inputs["pixel_values"], output_attentions=True
        ).attentions
    wanted = []
    for layer in attention:
        mean = layer[0].mean(0)[:, where]
        score = expected(mean[:length], mean[length:])
        wanted.append(score.argsort(descending=True)[:10].sort().values.tolist())
    assert stored(out.cache, 0, [layer.keys for layer in reference.cache.layers], where) == wanted


def test_rows_are_read_in_parts_with_the_same_result(monkeypatch):
    inputs, model = batch(LLAMA, (1, 2), seed=6), patched(LLAMA, "eager", method="h2o", keep=0.3)
    whole = answer(model, inputs, steps=2)
    sizes = []
    real = attention_call.kernels.text_statistics

    def watched(q, k, rows, *rest):
        sizes.append(rows.shape[1] * k.shape[2])
        return real(q, k, rows, *rest)

    monkeypatch.setattr(attention_call.kernels, "text_statistics", watched)
    monkeypatch.setattr(attention_call, "AT_ONCE", 1000)
    parts = answer(model, inputs, steps=2)
    assert torch.equal(whole.logits, parts.logits)
    assert len(sizes) > LLAMA.n_layers
    assert max(sizes) <= 1000


# -------------------------------------------------------------------------------------------------------------- account


@pytest.mark.parametrize("method", ["snapkv", "h2o", "tgvkv"])
def test_the_trace_shows_what_the_cache_saves_and_what_the_prefill_costs(method):
    inputs = batch(LLAMA, (1, 2), seed=7)
    model = patched(LLAMA, method=method, keep=9)
    out, trace = answer(model, inputs, steps=2), mustdrop.trace(model)
    assert trace.equal_tokens.tolist() == trace.total.tolist()
    assert trace.equal_entries.tolist() == [9.0, 9.0]
    text = (inputs["input_ids"] != IMAGE).logical_and(inputs["attention_mask"].bool()).sum(1)
    assert torch.equal(trace.kv_lengths, trace.kv_vision + text + 2)
    assert trace.kv_bytes.actual == sum(layer.keys.nbytes + layer.values.nbytes for layer in out.cache.layers)
    assert trace.kv_bytes.actual < trace.kv_bytes.unpruned
    parts = trace.flops.parts
    assert parts["prefill"].ratio == 1
    assert parts["decode_step"].ratio < 1
    assert parts["scoring"].actual > 0
    assert trace.to_dict()["equal_entries"] == [9.0, 9.0]


def test_a_method_says_which_account_its_budget_is_in():
    assert find("snapkv").account == "equal_entries"
    assert find("mustdrop", decode_keep=5).account == "equal_tokens"
    assert find("dart").account == "equal_tokens"
