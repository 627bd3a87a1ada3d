"""The three pruners on plain tensors, against references written here from the paper's formulas. No model in sight."""

from __future__ import annotations

import ast
import importlib
import itertools
import math
import pkgutil
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks.imitated_device import FIRST, Places, where
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import mustdrop
from mustdrop import DecodeCachePruner, PrefillPruner, Selection, VisionStagePruner
from mustdrop.errors import BudgetError, ConfigError, MustDropError, UnknownKnobError
from mustdrop.pruners.base import Settings

examples = settings(max_examples=60, deadline=None, derandomize=True)
seeds = st.integers(0, 10_000)


def tokens_that_merge(seed, batch, grid, channels=6):
    """(B, N, C): 2x2 blocks that share a direction, with noise of very different strength."""
    draw = torch.Generator().manual_seed(seed)
    h, w = grid
    base = torch.randn(batch, h // 2 + 1, w // 2 + 1, channels, generator=draw)
    base = base.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, :h, :w]
    noise = torch.rand(batch, h, w, 1, generator=draw) ** 3
    return (base + noise * torch.randn(batch, h, w, channels, generator=draw)).reshape(batch, h * w, channels)


def windows_of(grid, window):
    """Token indices of every complete window, by hand."""
    h, w = grid
    return [
        [(top + a) * w + left + b for a in range(window) for b in range(window)]
        for top in range(0, h - window + 1, window)
        for left in range(0, w - window + 1, window)
    ]


def mean_pairwise_cosine(x, members):
    pairs = itertools.permutations(members, 2)
    values = [torch.nn.functional.cosine_similarity(x[a].double(), x[b].double(), dim=0).item() for a, b in pairs]
    return sum(values) / len(values)


def text_to_vision(seed, batch, text, vision, extra=3):
    """(B, T, N): softmax rows that also look at ``extra`` other tokens, so that they do not sum to 1."""
    draw = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(batch, text, vision + extra, generator=draw)).softmax(-1)[..., :vision]


# ------------------------------------------------------------------------------------------------------ vision stage


@examples
@given(seeds, st.integers(1, 3), st.integers(4, 9), st.integers(4, 9), st.integers(2, 4), st.floats(-0.5, 0.99))
def test_windows_that_reach_the_threshold_become_their_mean(seed, batch, h, w, window, threshold):
    x = tokens_that_merge(seed, batch, (h, w))
    merged = VisionStagePruner(window=window, threshold=threshold).merge(x, (h, w))
    for row in range(batch):
        similar = {tuple(m): mean_pairwise_cosine(x[row], m) for m in windows_of((h, w), window)}
        assume(all(abs(value - threshold) > 1e-5 for value in similar.values()))
        expected = {n: [n] for n in range(h * w)}
        for members, value in similar.items():
            if value >= threshold:
                for n in members:
                    del expected[n]
                expected[members[(window - 1) // 2 * (window + 1)]] = list(members)
        kept = merged.keep[row, merged.valid[row]].tolist()
        assert kept == sorted(expected)  # a merged window is named by its centre patch, the order is raster
        out = merged.apply(x)[row]
        for slot, name in enumerate(kept):
            assert torch.allclose(out[slot], x[row, expected[name]].mean(0), atol=1e-6)
            assert merged.sizes()[row, slot] == len(expected[name])
            assert (merged.merge_into[row] == slot).nonzero()[:, 0].tolist() == sorted(expected[name])


@examples
@given(seeds, st.integers(2, 4), st.integers(0, 36))
def test_merging_leaves_at_least_the_tokens_that_a_budget_wants(seed, window, at_least):
    x = tokens_that_merge(seed, 1, (6, 6))
    pruner = VisionStagePruner(window=window, threshold=-1.0)
    merged = pruner.merge(x, (6, 6), at_least=torch.tensor([at_least]))
    size, windows = window * window, windows_of((6, 6), window)
    merges = int((merged.sizes()[0] == size).sum())
    assert merges == min(len(windows), (36 - at_least) // (size - 1))
    done = [mean_pairwise_cosine(x[0], m) for m in windows if len(set(merged.merge_into[0, m].tolist())) == 1]
    similar = sorted((mean_pairwise_cosine(x[0], m) for m in windows), reverse=True)
    assert sorted(done, reverse=True) == pytest.approx(similar[:merges])  # the most similar windows are the ones


@pytest.mark.parametrize("grid", [(1, 1), (1, 10), (2, 7), (9, 2)], ids=str)
@pytest.mark.parametrize("compat", ["paper", "released"])
def test_a_grid_smaller_than_a_window_is_not_merged(grid, compat):
    n, pruner = grid[0] * grid[1], VisionStagePruner(window=3, threshold=-1.0, compat=compat)
    features = torch.randn(2, n, 8)
    merged = pruner.merge(features, grid)
    assert torch.equal(merged.apply(features), features)
    assert pruner(features, torch.rand(2, n), grid)[0].keep.shape == (2, n)
    with pytest.raises(ConfigError, match="smaller than one window of 3x3"):
        pruner.check(grid)
    with pytest.raises(ConfigError, match="tokens for a grid"):
        pruner.merge(features, (grid[0] + 1, grid[1]))


@pytest.mark.parametrize("window", [2, 3])
def test_merging_a_row_in_a_batch_equals_merging_it_alone(window):
    x = tokens_that_merge(5, 3, (6, 8))
    pruner = VisionStagePruner(window=window, threshold=0.6 if window == 2 else 0.25)
    together = pruner.merge(x, (6, 8))
    assert len(set(together.counts.tolist())) > 1  # rows of different length, so padding is there
    for row in range(3):
        alone = pruner.merge(x[row : row + 1], (6, 8))
        assert torch.equal(together.keep[row, together.valid[row]], alone.keep[0])
        assert torch.equal(together.merge_into[row], alone.merge_into[0])


def test_without_a_window_nothing_merges():
    x = tokens_that_merge(0, 2, (4, 4))
    merged = VisionStagePruner(window=None).merge(x, (4, 4))
    assert torch.equal(merged.apply(x), x)


@examples
@given(seeds, st.integers(1, 40), st.floats(0, 1), st.data())
def test_the_key_set_is_the_top_share_of_what_is_selected(seed, n, share, data):
    importance = torch.rand(1, n, generator=torch.Generator().manual_seed(seed))
    count = data.draw(st.integers(1, n))
    pruner = VisionStagePruner(window=None, key_share=share)
    keep, protected = pruner.select(importance, torch.ones(1, n, dtype=torch.bool), torch.tensor([count]))
    ranked = importance[0].argsort(descending=True)
    assert set(keep[0].nonzero()[:, 0].tolist()) == set(ranked[:count].tolist())
    assert set(protected[0].nonzero()[:, 0].tolist()) == set(ranked[: math.ceil(share * count - 1e-9)].tolist())


def test_ties_go_to_the_lower_index():
    importance = torch.tensor([[0.1, 0.2, 0.2, 0.2, 0.1]])
    alive = torch.ones(1, 5, dtype=torch.bool)
    keep, _ = VisionStagePruner(window=None).select(importance, alive, torch.tensor([2]))
    assert keep.tolist() == [[False, True, True, False, False]]


def test_random_selection_depends_on_the_seed_and_not_on_the_scores_or_the_batch():
    alive = torch.ones(3, 36, dtype=torch.bool)

    def chosen(seed, importance, rows=3):
        pruner = VisionStagePruner(window=None, score="random", seed=seed)
        return pruner.select(importance, alive[:rows], torch.full((rows,), 9))[0]

    first = chosen(0, torch.rand(3, 36))
    assert first.sum(1).tolist() == [9, 9, 9]
    assert torch.equal(first, chosen(0, torch.zeros(3, 36)))
    assert torch.equal(first[:1], chosen(0, torch.zeros(1, 36), rows=1))
    assert not torch.equal(first, chosen(1, torch.zeros(3, 36)))


@pytest.mark.parametrize("count", [4, 8, 16, 32])
def test_uniform_selection_is_spread_evenly(count):
    alive = torch.ones(1, 64, dtype=torch.bool)
    pruner = VisionStagePruner(window=None, score="uniform")
    keep, _ = pruner.select(torch.rand(1, 64), alive, torch.tensor([count]))
    assert keep.view(4, 16).sum(1).tolist() == [count // 4] * 4


@pytest.mark.parametrize(("keep", "expected"), [(5, 5), (0.25, 9), (0.29, 10), (1.0, 36)])
def test_the_vision_pruner_alone_meets_its_own_budget(keep, expected):
    x, importance = tokens_that_merge(3, 2, (6, 6)), torch.rand(2, 36)
    selection, protected = VisionStagePruner(window=None, keep=keep)(x, importance, (6, 6))
    assert selection.counts.tolist() == [expected] * 2
    assert protected.sum(1).tolist() == [math.ceil(0.08 * expected)] * 2


def test_a_share_is_not_lost_to_floating_point():
    selection, _ = VisionStagePruner(window=None, keep=0.29)(torch.randn(1, 100, 4), torch.rand(1, 100), (10, 10))
    assert selection.counts.tolist() == [29]  # 0.29 * 100 is 28.999999999999996 in floating point


def test_merging_and_selecting_in_one_call_follows_every_token():
    x, importance = tokens_that_merge(4, 2, (6, 6)), torch.rand(2, 36)
    pruner = VisionStagePruner(window=3, threshold=0.5, keep=8)
    selection, _ = pruner(x, importance, (6, 6))
    merged = pruner.merge(x, (6, 6), at_least=torch.tensor([8, 8]))
    assert selection.counts.tolist() == [8, 8]
    for row in range(2):
        names = selection.keep[row]
        assert names.tolist() == sorted(names.tolist())
        for token, slot in enumerate(selection.merge_into[row].tolist()):
            owner = merged.keep[row, merged.merge_into[row, token]]
            assert (slot == -1 and owner not in names) or names[slot] == owner


# ---------------------------------------------------------------------------------------------------- prefill filter


@examples
@given(seeds, st.integers(1, 3), st.integers(1, 6), st.integers(1, 30), st.floats(0, 1), st.floats(0, 1))
def test_a_token_goes_only_if_global_and_individual_attention_are_low_and_it_is_not_protected(
    seed, batch, text, vision, gamma, alpha
):
    gamma, alpha = gamma**3, alpha**3
    attention = text_to_vision(seed, batch, text, vision)
    protected = torch.rand(batch, vision, generator=torch.Generator().manual_seed(seed)) < 0.1
    pruner = PrefillPruner(global_threshold=gamma, individual_threshold=alpha)
    stays = pruner(attention, protected=protected).mask(vision)
    for row in range(batch):
        g, m = attention[row].double().sum(0), attention[row].double().amax(0)
        assume(((g / g.sum() - gamma).abs() > 1e-6).all() and ((m - alpha).abs() > 1e-6).all())
        drop = (g < gamma * g.sum()) & (m < alpha) & ~protected[row]
        assert torch.equal(stays[row], ~drop)


def test_reaching_a_threshold_exactly_keeps():
    attention = torch.tensor([[[0.25, 0.25, 0.5]]])

    def kept(gamma, alpha):
        return PrefillPruner(global_threshold=gamma, individual_threshold=alpha)(attention).keep[0].tolist()

    assert kept(0.25, 0.26) == [0, 1, 2]
    assert kept(0.26, 0.25) == [0, 1, 2]
    assert kept(0.26, 0.26) == [2]


@examples
@given(seeds, st.integers(1, 6), st.integers(2, 30), st.floats(0.2, 5), st.floats(0.01, 1))
def test_a_budget_ranks_the_way_the_and_rule_drops(seed, text, vision, ratio, cut):
    """Lowering both thresholds by one factor moves a cut through the ranking: n survivors are the n best."""
    gamma, alpha = cut * min(1.0, ratio), cut * min(1.0, 1 / ratio)
    attention = text_to_vision(seed, 1, text, vision)
    by_threshold = PrefillPruner(global_threshold=gamma, individual_threshold=alpha)(attention)
    ranked = PrefillPruner(keep=1, global_threshold=gamma, individual_threshold=alpha)
    by_budget = ranked(attention, count=by_threshold.counts)
    assert torch.equal(by_threshold.mask(vision), by_budget.mask(vision))


@examples
@given(seeds, st.integers(1, 4), st.integers(2, 25), st.integers(1, 25), st.integers(0, 10))
def test_a_budget_keeps_that_many_and_protected_tokens_first(seed, text, vision, count, n_protected):
    attention = text_to_vision(seed, 1, text, vision)
    importance = torch.rand(1, vision, generator=torch.Generator().manual_seed(seed + 1))
    protected = torch.zeros(1, vision, dtype=torch.bool)
    protected[0, torch.randperm(vision, generator=torch.Generator().manual_seed(seed))[:n_protected]] = True
    selection = PrefillPruner(keep=1)(attention, count=count, protected=protected, importance=importance)
    kept = set(selection.keep[0, selection.valid[0]].tolist())
    names = set(protected[0].nonzero()[:, 0].tolist())
    assert len(kept) == min(count, vision)
    if len(names) <= count:
        assert names <= kept
    else:  # the most important protected tokens stay
        assert kept == set(sorted(names, key=lambda n: -importance[0, n].item())[:count])
    g, m = attention[0].sum(0), attention[0].amax(0)
    score = torch.maximum(g / g.sum(), m)
    free = [n for n in range(vision) if n not in names]
    if free and kept & set(free) and set(free) - kept:
        assert min(score[n] for n in kept & set(free)) >= max(score[n] for n in set(free) - kept)


def test_filtering_a_row_in_a_padded_batch_equals_filtering_it_alone():
    attention = text_to_vision(11, 3, 5, 20)
    alive = torch.arange(20)[None] < torch.tensor([20, 13, 0])[:, None]
    attention[1, 3:] = 0  # padding rows of the text
    for pruner, count in (
        (PrefillPruner(keep=0.5), torch.tensor([9, 5, 0])),
        (PrefillPruner(global_threshold=0.05, individual_threshold=0.2), None),
        (PrefillPruner(scale=2.0, bias=1.0), None),
    ):
        together = pruner(attention, alive, count=count)
        alone = pruner(attention[1:2, :3, :13], count=None if count is None else count[1:2])
        assert 0 < alone.counts[0] < 13
        assert torch.equal(together.mask(20)[1, :13], alone.mask(13)[0])
        assert together.counts[2] == 0


@examples
@given(seeds, st.integers(1, 8), st.integers(2, 30), st.floats(0, 4), st.integers(-3, 6))
def test_the_rank_rule_keeps_scale_times_rank_plus_bias(seed, text, vision, scale, bias):
    attention = text_to_vision(seed, 1, text, vision)
    counts = PrefillPruner(scale=scale, bias=bias)(attention).counts
    rank = int(torch.linalg.matrix_rank(attention[0]))
    expected = vision if rank == vision else min(max(1, int(rank * scale + bias)), max(1, vision - 1))
    assert counts.tolist() == [expected]


def test_the_rank_rule_counts_independent_rows_not_rows():
    row = text_to_vision(0, 1, 2, 30)
    attention = torch.cat([row, row, row], 1)  # six text tokens, rank two
    assert PrefillPruner(scale=3.0, bias=1.0)(attention).counts.tolist() == [7]


def test_default_filter_layers_are_the_papers_scaled_to_the_depth():
    pruner = PrefillPruner(keep=0.5)
    assert pruner.filter_layers(32) == (2, 6, 10, 14)
    assert pruner.filter_layers(40) == (3, 8, 13, 18)
    assert pruner.filter_layers(28) == (2, 5, 9, 12)
    assert pruner.filter_layers(4) == (1, 2)
    assert PrefillPruner(keep=0.5, layers=(0, 3)).filter_layers(6) == (0, 3)
    for layers in ((0, 5), (6,), (-1,)):
        with pytest.raises(ConfigError, match="6 decoder layers"):
            PrefillPruner(keep=0.5, layers=layers).filter_layers(6)


# -------------------------------------------------------------------------------------------------------- decode stage


@examples
@given(seeds, st.integers(1, 3), st.integers(1, 40), st.integers(1, 40))
def test_the_least_attended_vision_entries_leave_and_text_stays(seed, batch, n, count):
    draw = torch.Generator().manual_seed(seed)
    attended, vision = torch.rand(batch, n, generator=draw), torch.rand(batch, n, generator=draw) < 0.6
    stays = DecodeCachePruner(keep=count)(attended, vision, count).mask(n)
    for row in range(batch):
        entries = vision[row].nonzero()[:, 0].tolist()
        best = sorted(entries, key=lambda e: -attended[row, e].item())[:count]
        assert set(stays[row].nonzero()[:, 0].tolist()) == set(best) | set((~vision[row]).nonzero()[:, 0].tolist())


@pytest.mark.parametrize(("keep", "expected"), [(None, [36, 100, 0]), (40, [36, 40, 0]), (0.29, [10, 29])])
def test_decode_keep_is_a_count_or_a_share_of_each_prompt(keep, expected):
    totals = torch.tensor([36, 100, 0])[: len(expected)]
    assert DecodeCachePruner(keep=keep).counts(totals).tolist() == expected


def test_entries_leave_every_interval_steps():
    pruner = DecodeCachePruner(keep=4, interval=3)
    assert [step for step in range(1, 14) if pruner.due(step)] == [4, 7, 10, 13]
    assert not any(DecodeCachePruner(interval=3).due(step) for step in range(1, 14))


# ------------------------------------------------------------------------------------------------------ all of them


@pytest.mark.parametrize("pruner", [VisionStagePruner(), PrefillPruner(keep=0.5), DecodeCachePruner()], ids=repr)
def test_a_pruner_is_a_frozen_value(pruner):
    name = next(iter(type(pruner).model_fields))
    with pytest.raises(Exception, match="frozen"):
        setattr(pruner, name, 1)
    assert type(pruner)(**pruner.model_dump()) == pruner


BAD = [
    (VisionStagePruner, {"window": 1}, ConfigError, "window"),
    (VisionStagePruner, {"threshold": 1.5}, ConfigError, "threshold"),
    (VisionStagePruner, {"key_share": -0.1}, ConfigError, "key_share"),
    (VisionStagePruner, {"layer": -1}, ConfigError, "layer"),
    (VisionStagePruner, {"geometry": "centered", "window": None}, ConfigError, "geometry.*window=None"),
    (VisionStagePruner, {"keep": 0}, BudgetError, "keep"),
    (VisionStagePruner, {"keep": 1.5}, BudgetError, "keep"),
    (VisionStagePruner, {"score": "entropy"}, ConfigError, "attention"),
    (VisionStagePruner, {"keep": 8, "compat": "released"}, ConfigError, "released"),
    (VisionStagePruner, {"treshold": 0.5}, UnknownKnobError, "threshold"),
    (PrefillPruner, {}, ConfigError, "keep"),
    (PrefillPruner, {"keep": 0}, BudgetError, "keep"),
    (PrefillPruner, {"keep": -4}, BudgetError, "keep"),
    (PrefillPruner, {"keep": 0.0}, BudgetError, "keep"),
    (PrefillPruner, {"keep": 2.0}, BudgetError, "keep"),
    (PrefillPruner, {"keep": True}, BudgetError, "keep"),
    (PrefillPruner, {"keep": "64"}, BudgetError, "keep"),
    (PrefillPruner, {"keep": float("nan")}, BudgetError, "keep"),
    (PrefillPruner, {"global_threshold": 0.1}, ConfigError, "individual_threshold"),
    (PrefillPruner, {"global_threshold": -0.1, "individual_threshold": 0.1}, ConfigError, "global_threshold"),
    (PrefillPruner, {"global_threshold": 0.1, "individual_threshold": 1.1}, ConfigError, "individual_threshold"),
    (PrefillPruner, {"keep": 0.5, "scale": 1.0}, ConfigError, "scale"),
    (PrefillPruner, {"scale": 1.0, "global_threshold": 0.1, "individual_threshold": 0.1}, ConfigError, "one way"),
    (PrefillPruner, {"scale": -1.0}, ConfigError, "scale"),
    (PrefillPruner, {"keep": 0.5, "layers": ()}, ConfigError, "layers"),
    (PrefillPruner, {"keep": 0.5, "compat": "paperr"}, ConfigError, "paper"),
    (PrefillPruner, {"keeep": 0.5}, UnknownKnobError, "keep"),
    (DecodeCachePruner, {"keep": 0}, BudgetError, "keep"),
    (DecodeCachePruner, {"keep": 1.01}, BudgetError, "keep"),
    (DecodeCachePruner, {"interval": 0}, ConfigError, "interval"),
    (DecodeCachePruner, {"full_layers": -1}, ConfigError, "full_layers"),
    (DecodeCachePruner, {"intervall": 4}, UnknownKnobError, "interval"),
]


@pytest.mark.parametrize(("kind", "knobs", "error", "names"), BAD, ids=lambda value: str(value)[:40])
def test_bad_settings_raise_mustdrops_own_errors_and_name_the_setting(kind, knobs, error, names):
    with pytest.raises(error, match=names) as raised:
        kind(**knobs)
    assert isinstance(raised.value, MustDropError)
    assert isinstance(raised.value, ValueError)


def settings_of(folder):
    """Every class of settings in the modules of a folder of the package."""
    place = Path(mustdrop.__file__).parent / folder
    for module in pkgutil.iter_modules([str(place)], f"mustdrop.{folder}."):
        for kind in vars(importlib.import_module(module.name)).values():
            if isinstance(kind, type) and issubclass(kind, Settings) and kind.__module__ == module.name:
                yield kind


def number_knobs(kind):
    """Names of the settings whose type is written with a number and without a bool."""
    written = {
        name: text
        for base in kind.__mro__
        for name, text in vars(base).get("__annotations__", {}).items()
        if name in kind.model_fields
    }
    return [name for name, text in written.items() if re.search(r"\b(int|float|Budget)\b", text) and "bool" not in text]


@pytest.mark.parametrize("kind", [*settings_of("pruners"), *settings_of("methods")], ids=lambda kind: kind.__name__)
def test_true_is_no_number(kind):
    for name in number_knobs(kind):
        for value in (True, np.bool_(True), (True, False)):
            with pytest.raises(MustDropError, match=rf"{name}\b.* (number|tuple)"):
                kind(**{name: value})


def test_wrong_shapes_are_named():
    with pytest.raises(ConfigError, match="shape"):
        PrefillPruner(keep=0.5)(torch.rand(3, 4))
    with pytest.raises(ConfigError, match="count"):
        PrefillPruner(keep=0.5)(torch.rand(1, 3, 4))
    with pytest.raises(ConfigError, match="6x6"):
        VisionStagePruner().merge(torch.rand(1, 35, 4), (6, 6))


def test_a_selection_moves_with_all_that_it_holds():
    there = torch.device("meta")
    made = replace(Selection.best(torch.rand(2, 5), 3), merge_into=torch.zeros(2, 5, dtype=torch.long)).to(there)
    for name in ("keep", "valid", "merge_into", "score"):
        assert getattr(made, name).device == there, name
    assert Selection(torch.zeros(1, 2, dtype=torch.long)).to(there).score is None


def test_a_selection_that_moved_still_blends():
    """The values are those of before, on the device of the states: what a rule closed over stays where it was."""
    states, into = torch.rand(1, 4, 2), torch.tensor([[0, 0, 1, 1]])
    made = Selection.merged(torch.tensor([[0, 2]]), into, weight=torch.rand(1, 4))
    with Places():
        moved = made.to(FIRST)
        blended = moved.apply(states.to(FIRST))
        assert where(moved.keep) == where(blended) == FIRST
    assert torch.equal(blended, made.apply(states))


def test_pruners_rules_and_reference_kernels_know_no_hugging_face():
    root = Path(mustdrop.__file__).parent
    files = [*root.glob("pruners/*.py"), *root.glob("rules/*.py"), root / "kernels/reference.py", root / "selection.py"]
    assert len(files) > 8
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any("transformers" in name or name.startswith("mustdrop.runtime") for name in names), file
