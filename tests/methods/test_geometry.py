"""Cen-Prune's coordinates and distinctiveness, written out, and what they change in every method that has them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import mustdrop
from mustdrop import VisionStagePruner
from mustdrop.adapters import registry
from mustdrop.errors import ConfigError
from mustdrop.method import find
from mustdrop.method import registry as recipes
from mustdrop.methods import cdpruner, divprune, mustdrop_plus, scope
from mustdrop.methods.cdpruner import ConditionalDeterminant
from mustdrop.methods.dart import Duplication
from mustdrop.methods.divprune import MaxMinDiversity
from mustdrop.methods.mustdrop_plus import AttendedAndDiverse
from mustdrop.methods.tome import SoftMatching
from mustdrop.methods.vispruner import ImportantAndDiverse
from mustdrop.pruners import Features, Seen, vision_rules
from mustdrop.rules.geometry import around_mean, distinctiveness
from mustdrop.rules.scores import min_max
from support.builders import answer
from support.edges import share
from support.families import assert_dropping_equals_masking, batch, clone, plain


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


@pytest.mark.parametrize(("family", "kind"), [("qwen2_5_vl", "image"), ("internvl", "image")])
@pytest.mark.parametrize("method", ["divprune", "cdpruner", "scope", "mmr", "vispruner"])
def test_dropping_equals_masking(family, kind, method):
    assert_dropping_equals_masking(
        family, ((kind,), (), (kind, kind)), method=method, keep=0.4, geometry="standardized"
    )


# -- every method that has the knob ------------------------------------------------------------------------------------

RECIPES = {name: recipe for name, recipe in recipes().items() if name in mustdrop.methods()}
KNOWN = sorted(name for name, recipe in RECIPES.items() if "geometry" in recipe.model_fields)
PLACES = [("llava", "image", "centered"), ("qwen3_vl", "video", "standardized")]
every = pytest.mark.parametrize("method", KNOWN)
somewhere = pytest.mark.parametrize(("family", "kind", "geometry"), PLACES, ids=[place[0] for place in PLACES])


def knobs(method, family, geometry):
    recipe = RECIPES[method]
    return {"method": method, "keep": share(method, family), "geometry": geometry} | recipe.unmerged()


@every
@somewhere
def test_dropping_equals_masking_everywhere(method, family, kind, geometry):
    rows = ((kind,), (), (kind, kind))
    assert_dropping_equals_masking(family, rows, steps=2, **knobs(method, family, geometry))


@every
@somewhere
@pytest.mark.filterwarnings("ignore::mustdrop.errors.NothingDroppedWarning")
def test_keeping_everything_changes_no_bit(method, family, kind, geometry):
    model = mustdrop.patch(clone(family), **knobs(method, family, geometry) | {"keep": 1.0})
    inputs = batch(registry()[family], model, ((kind,), (kind, kind)))
    assert torch.equal(answer(model, inputs, 1).logits, answer(plain(family), inputs, 1).logits)


@every
@somewhere
def test_a_padded_row_is_the_row_alone(method, family, kind, geometry):
    adapter, model = registry()[family], mustdrop.patch(clone(family), **knobs(method, family, geometry))
    together = answer(model, batch(adapter, model, ((kind,), (kind, kind))), 1)
    kept = mustdrop.trace(model)
    alone = answer(model, batch(adapter, model, ((kind,),)), 1)
    trace = mustdrop.trace(model)
    assert trace.dropped_anything
    assert all(torch.equal(trace.kept(layer), kept.kept(layer, 0)) for layer in range(len(kept.tokens) + 1))
    assert (alone.logits[0] - together.logits[0]).abs().max() <= 1e-5


def test_a_method_has_the_knob_or_the_document_says_why_not():
    page = (Path(__file__).parents[2] / "docs" / "fidelity.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ") and "no `geometry=`" in line]
    named = [name for row in rows for name in re.findall(r"`([^`]+)`", row[0])]
    assert sorted(named) == sorted(set(RECIPES) - set(KNOWN))


# -- what it changes, on plain tensors ---------------------------------------------------------------------------------

#: Not among them: `mustdrop` compares windows, `dart` and the filter of `mustdrop+` hidden states (see below), and
#: what `gleanvid` calls local is likeness with means.
RULES = [name for name in KNOWN if name not in ("mustdrop", "mustdrop+", "dart", "gleanvid")]


WIDE = 24
OFFSET = 4 * random(WIDE, seed=5)
SCALE = 2.0 ** (torch.arange(WIDE) % 5)
COUNTS = (5, 9, 14, 20)


def rule_of(method, geometry):
    weighs = {"importance": "attention"} if "importance" in RECIPES[method].model_fields else {}
    more = {"learned": {"coverage": 1.0}, "prumerge": {"neighbours": 4}}.get(method, {})
    return find(method, keep=0.5, geometry=geometry, **weighs, **more).vision.rule


def seen_by(rule, offset=0.0, scale=1.0):
    """Twelve features in each of three frames that change slowly, all moved or stretched alike."""
    x = (random(2, 1, 12, WIDE) + 0.7 * random(2, 3, 12, WIDE, seed=1)).flatten(1, 2)
    moved = x * scale + offset
    read = {}
    for number, one in enumerate(rule.reads):
        vector = one.what in ("states", "keys", "joint_keys")
        read[one] = moved.flip(2) if vector else random(2, 36, seed=7 + number).sigmoid()
    inside = any(one.what == "states" for one in rule.reads)
    return Features.of_grid(x if inside and torch.is_tensor(scale) else moved, (3, 3, 4), read, (x[0, :0], x[1, :0]))


def same(a, b):
    """Whether two selections keep the same features, and merge the same ones into them in the same way."""
    merged = [x.blend(torch.eye(36).expand(2, -1, -1)) for x in (a, b) if x.blend is not None]
    return torch.equal(a.keep, b.keep) and (not merged or torch.allclose(*merged, atol=1e-4))


@pytest.fixture
def alike(monkeypatch):
    """All features are equally distinct: what is left is how they are compared."""
    for module in (vision_rules, divprune, cdpruner, scope, mustdrop_plus):
        monkeypatch.setattr(module, "distinctiveness", lambda x, *_: torch.ones_like(x[..., 0]))


@pytest.mark.parametrize("method", RULES)
def test_a_common_offset_changes_what_is_compared_raw_and_not_what_is_centred(method, alike):
    for geometry, unchanged in (("raw", False), ("centered", True)):
        rule = rule_of(method, geometry)
        found = [same(rule(seen_by(rule), n), rule(seen_by(rule, OFFSET), n)) for n in COUNTS]
        assert all(found) == unchanged


@pytest.mark.parametrize("method", [*RULES, "gleanvid"])
def test_the_scale_of_a_channel_changes_what_is_compared_raw_and_not_what_is_standardized(method):
    for geometry, unchanged in (("raw", False), ("standardized", True)):
        rule = rule_of(method, geometry)
        found = [same(rule(seen_by(rule), n), rule(seen_by(rule, scale=SCALE), n)) for n in COUNTS]
        assert all(found) == unchanged


def test_novelty_is_told_around_the_mean_and_what_is_local_is_not():
    x = random(1, 16, WIDE) + OFFSET
    cell = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]).flatten()
    own = torch.stack([x[0, cell == i].mean(0) for i in range(4)])[cell]
    cosine = torch.nn.functional.cosine_similarity
    local = torch.nn.functional.softplus(4 * (cosine(x[0], own) - cosine(x[0], x[0].mean(0), dim=1))) / 4
    centred = x[0] - x[0].mean(0)
    direction = torch.linalg.svd(centred).Vh[0]
    novel = (centred - (centred @ direction)[:, None] * direction).norm(dim=1)
    score = min_max(local[None]) + min_max(novel[None])
    rule = rule_of("gleanvid", "centered")
    for count in (3, 7):
        kept = rule(Features.of_grid(x, (4, 4), {}), count).keep
        assert kept.tolist() == [sorted(score[0].argsort(descending=True)[:count].tolist())]


def test_an_importance_is_multiplied_with_distinctiveness_wherever_one_is_weighed():
    for method in set(RULES) - {"divprune", "cdpruner", "scope", "mmtok", "dycoke", "tome"}:
        rule = rule_of(method, "centered")
        seen = seen_by(rule)
        attention = random(2, 36, seed=3).sigmoid()
        expected = min_max(attention) * distinctiveness(seen.values, "centered")
        torch.testing.assert_close(rule.weighed(attention, seen), expected)
        assert rule_of(method, "raw").weighed(attention, seen) is attention


def hidden(offset=0.0, padding=0.0):
    """States and keys of two rows of eighteen tokens: three that stand for nothing, twelve of vision, three of text."""
    states = random(2, 18, WIDE) + offset
    states[:, :3] = padding
    alive = (torch.arange(18) >= 3) & (torch.arange(18) < 15)
    text = torch.arange(18) >= 15
    attention = random(2, 3, 18, seed=2).softmax(2)
    return Seen(attention, alive.expand(2, -1), text.expand(2, -1), keys=random(2, 18, 4, seed=3), hidden=states)


@pytest.mark.parametrize("scorer", [Duplication, AttendedAndDiverse])
def test_hidden_states_are_compared_around_the_mean_of_the_vision_tokens(scorer, alike):
    counts = [torch.tensor([n, n]) for n in (4, 6, 9)]
    for geometry, unchanged in (("raw", False), ("centered", True), ("standardized", True)):
        rule = scorer(geometry=geometry)
        found = [torch.equal(rule.choose(hidden(), n), rule.choose(hidden(OFFSET), n)) for n in counts]
        assert all(found) == unchanged
        # what stands beside the vision tokens says nothing of their mean
        assert all(torch.equal(rule.choose(hidden(), n), rule.choose(hidden(padding=1e6), n)) for n in counts)


def test_distinctiveness_of_some_is_that_of_the_rest_left_out():
    x = random(2, 11, 6) + 1
    real = (torch.arange(11) % 3 > 0).expand(2, -1)
    for geometry in ("centered", "standardized"):
        some = distinctiveness(x, geometry, real)[real].view(2, -1)
        torch.testing.assert_close(some, distinctiveness(x[real].view(2, -1, 6), geometry))
        around = around_mean(x, geometry, real)[real].view(2, -1, 6)
        torch.testing.assert_close(around, around_mean(x[real].view(2, -1, 6), geometry))


def test_keys_of_an_encoder_layer_are_compared_around_the_mean_of_those_that_may_merge():
    keys = random(2, 3, 13, WIDE)
    raw, centred = SoftMatching(), SoftMatching(geometry="centered")
    moved = keys + OFFSET
    assert torch.equal(centred.join(keys, 4, 1)[0], centred.join(moved, 4, 1)[0])
    assert not torch.equal(raw.join(keys, 4, 1)[0], raw.join(moved, 4, 1)[0])
    moved[:, :, 0] = 1e4  # CLS, which does not merge
    assert torch.equal(centred.join(keys, 4, 1)[0], centred.join(moved, 4, 1)[0])
    lengths, numbers = torch.tensor([13, 9]), torch.tensor([4, 3])
    uneven = centred.join_uneven(keys, numbers, lengths, 1)
    assert torch.equal(uneven[1:, :9], centred.join(keys[1:, :, :9], 3, 1)[0])


def test_windows_are_compared_around_the_mean_of_the_picture():
    x, gone = random(1, 36, WIDE), torch.zeros(36, dtype=torch.bool)
    for geometry, unchanged in (("raw", False), ("centered", True), ("standardized", True)):
        pruner = VisionStagePruner(window=3, geometry=geometry)
        likeness, moved = (pruner.similarity(y, (6, 6)) for y in (x, x + OFFSET))
        assert torch.allclose(likeness, moved, atol=1e-4) == unchanged
    gone[0] = True
    moved = x.clone()
    moved[0, 0] = 1e4  # no part of the picture that the encoder sees
    pruner = VisionStagePruner(window=3, geometry="centered")
    torch.testing.assert_close(pruner.similarity(x, (6, 6), gone=gone), pruner.similarity(moved, (6, 6), gone=gone))


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
