"""Cen-Prune's coordinates and distinctiveness, written out, and what they change in DivPrune and CDPruner."""

from __future__ import annotations

import pytest
import torch

import mustdrop
from mustdrop.adapters import registry
from mustdrop.errors import ConfigError
from mustdrop.method import find
from mustdrop.methods.cdpruner import ConditionalDeterminant
from mustdrop.methods.divprune import MaxMinDiversity
from mustdrop.methods.vispruner import ImportantAndDiverse
from mustdrop.pruners import Features
from mustdrop.rules.geometry import around_mean, distinctiveness
from mustdrop.rules.scores import min_max
from support.builders import answer
from support.families import assert_dropping_equals_masking, batch, clone


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unlike(x):
    """Minus the mean cosine with all others, pair by pair."""
    cosines = torch.nn.functional.cosine_similarity(x[:, None].double(), x[None].double(), dim=2)
    n = len(x)
    return torch.stack([-(cosines[i].sum() - cosines[i, i]) / (n - 1) for i in range(n)])


def test_centering_takes_the_mean_of_each_picture_off():
    x = random(2, 9, 5) + 3
    made = around_mean(x, "centered")
    torch.testing.assert_close(made.mean(1), torch.zeros(2, 5), atol=1e-6, rtol=0)
    assert around_mean(x, "raw") is x
    standard = around_mean(x * torch.tensor([1.0, 100, 0.1, 7, 1]), "standardized")
    torch.testing.assert_close(standard.var(1, correction=0), torch.ones(2, 5), atol=0.2, rtol=0)


def test_distinctiveness_is_the_formula_per_picture():
    x = random(2, 11, 6) + 1
    made = distinctiveness(x, "centered")
    for row, one in zip(x, made, strict=True):
        g = unlike(row)
        torch.testing.assert_close(one.double(), (g - g.min()) / (g.max() - g.min()), atol=1e-5, rtol=0)
    scale = x / (x.var(1, correction=0, keepdim=True) + 1e-6).sqrt()
    made = distinctiveness(x, "standardized")
    for row, one in zip(scale, made, strict=True):
        g = unlike(row)
        expected = torch.sigmoid((g - g.mean()) / (g.std(correction=0) + 1e-6))
        torch.testing.assert_close(one.double(), expected, atol=1e-5, rtol=0)
    assert distinctiveness(x, "raw").eq(1).all()


def test_equal_features_are_equally_distinct():
    for geometry in ("centered", "standardized"):
        assert distinctiveness(torch.ones(1, 4, 3), geometry).unique().numel() == 1


def by_hand(x, count):
    """Weighted max-min diversity on centred features, in float64."""
    g = unlike(x)
    g = (g - g.min()) / (g.max() - g.min())
    c = torch.nn.functional.normalize((x - x.mean(0)).double(), dim=1)
    far = 1 - c @ c.T
    picks = [int((far + 9 * torch.eye(len(x))).amin(1).argmax())]
    while len(picks) < count:
        worth = g * far[:, picks].amin(1)
        worth[picks] = -1
        picks.append(int(worth.argmax()))
    return sorted(picks)


def test_divprune_multiplies_centred_distances_with_distinctiveness():
    x = random(2, 40, 8) + 2
    seen = Features.of_grid(x, (5, 8), {})
    for count in (1, 2, 9, 30):
        kept = MaxMinDiversity(geometry="centered")(seen, count).keep.tolist()
        assert kept == [by_hand(row, count) for row in x]


def test_a_shared_mean_changes_what_raw_features_choose_and_not_what_centred_distances_are():
    x = random(1, 30, 6)
    moved = x + 50
    torch.testing.assert_close(around_mean(x, "centered"), around_mean(moved, "centered"), atol=1e-4, rtol=0)


def test_cdpruner_multiplies_relevance_with_distinctiveness():
    x, words = random(1, 30, 8) + 1, random(4, 8, seed=1)
    seen = Features.of_grid(x, (5, 6), {}, (words,))
    rule = ConditionalDeterminant(geometry="centered")
    mean = torch.nn.functional.cosine_similarity(x[0][:, None], words[None], dim=2).mean(1)[None]
    quality = (rule.quality(mean) * distinctiveness(x, "centered"))[0].double()
    c = torch.nn.functional.normalize((x[0] - x[0].mean(0)).double(), dim=1)
    kernel = quality[:, None] * (c @ c.T) * quality
    picks = []
    for _ in range(6):
        others = [i for i in range(30) if i not in picks]
        volumes = [float(torch.linalg.det(kernel[[*picks, i]][:, [*picks, i]])) for i in others]
        picks.append(others[volumes.index(max(volumes))])
    assert rule(seen, 6).keep.tolist() == [sorted(picks)]


def test_a_saliency_is_multiplied_with_distinctiveness():
    x, attention = random(1, 30, 8) + 1, torch.rand(1, 30, generator=torch.Generator().manual_seed(1))
    rule = ImportantAndDiverse(important=1.0, geometry="centered")
    seen = Features.of_grid(x, (5, 6), {rule.reads[0]: attention})
    worth = min_max(attention) * distinctiveness(x, "centered")
    assert rule(seen, 9).keep.tolist() == [sorted(worth[0].argsort(descending=True)[:9].tolist())]
    diverse = ImportantAndDiverse(important=0.0, geometry="centered")
    centred = Features.of_grid(around_mean(x, "centered"), (5, 6), {rule.reads[0]: worth})
    assert torch.equal(diverse(seen, 9).keep, ImportantAndDiverse(important=0.0)(centred, 9).keep)


def test_standardized_compares_what_the_encoder_hands_over():
    rule = MaxMinDiversity(geometry="standardized")
    states = random(1, 20, 7)
    seen = Features.of_grid(torch.ones(1, 20, 3), (4, 5), {rule.reads[0]: states})
    other = Features.of_grid(torch.ones(1, 20, 3), (4, 5), {rule.reads[0]: states.flip(1)})
    kept, flipped = rule(seen, 6).keep, rule(other, 6).keep
    assert kept.tolist() == [sorted(19 - i for i in flipped[0].tolist())]
    with pytest.raises(ConfigError, match="states"):
        rule(Features.of_grid(torch.ones(1, 20, 3), (4, 5), {}), 6)


@pytest.mark.parametrize(
    ("family", "kind"), [("llava", "image"), ("qwen2_5_vl", "image"), ("qwen3_vl", "video"), ("internvl", "image")]
)
@pytest.mark.parametrize("method", ["divprune", "cdpruner", "scope", "mmr", "vispruner"])
def test_dropping_equals_masking(family, kind, method):
    assert_dropping_equals_masking(
        family, ((kind,), (), (kind, kind)), method=method, keep=0.4, geometry="standardized"
    )


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_states_are_the_encoders_own(family, monkeypatch):
    """Of Qwen's windows in their order, of LLaVA without CLS: the rule sees what the projector or merger gets."""
    model, adapter = clone(family), registry()[family]
    found = []

    def watched(self, seen, count):
        found.append(seen)
        return chosen(self, seen, count)

    chosen = MaxMinDiversity.choose
    monkeypatch.setattr(MaxMinDiversity, "choose", watched)
    mustdrop.patch(model, "divprune", keep=0.5, geometry="standardized")
    entered = []
    module = model.model.multi_modal_projector if family == "llava" else model.model.visual.merger
    handle = module.register_forward_pre_hook(lambda _, args: entered.append(args[0].detach().clone()))
    answer(model, batch(adapter, model, (("image",),)), 0)
    handle.remove()
    (seen,) = found
    states = seen.of(seen_read := MaxMinDiversity(geometry="standardized").reads[0])
    assert seen_read.what == "states"
    rows = entered[0].reshape(-1, entered[0].shape[-1])
    if family == "llava":
        torch.testing.assert_close(states[0], rows)
    else:  # the merger gets windows' order: as a set, the means of its groups of four are what the rule sees
        means = rows.view(-1, 4, rows.shape[-1]).mean(1)
        nearest = torch.cdist(states[0], means).amin(1)
        assert nearest.max() <= 1e-4
        values = model.model.visual.merger(entered[0])
        order = torch.cdist(states[0], means).argmin(1)
        torch.testing.assert_close(values[order], seen.values[0], atol=1e-4, rtol=1e-4)


def test_another_geometry_is_refused():
    with pytest.raises(ConfigError, match="geometry"):
        find("divprune", geometry="round")
