"""The vision stage on plain tensors chooses what it chooses in a patched model."""

from __future__ import annotations

import pytest
import torch

import mustdrop
from mustdrop.adapters import registry
from mustdrop.errors import ConfigError
from mustdrop.integrations.vllm import settings
from mustdrop.method import find
from mustdrop.plain import PlainStage
from support import families
from tests.families import build, fixture_of, inputs_of

KEEP = 9
FEATURES_ALONE = ("divprune", "pooling", "uniform", "random", "vcast", "gleanvid")


def case(family):
    """A tiny model, a prompt of one picture, and its features with how they lie."""
    adapter = registry()[family]
    model = build(adapter)
    inputs = inputs_of(adapter, model, "image", [families.picture(fixture_of(adapter).sizes("image")[0], 3)])
    arguments = {name: value for name, value in inputs.items() if name.startswith(("pixel", "image"))}
    with torch.no_grad():
        found = model.model.get_image_features(**arguments)
    features = getattr(found, adapter.features)
    features = torch.cat(list(features)) if not isinstance(features, torch.Tensor) else features.flatten(0, -2)
    return adapter, model, inputs, features, adapter.layouts(model, "image", arguments)


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl"])
@pytest.mark.parametrize("method", FEATURES_ALONE)
def test_rules_for_features(family, method):
    adapter, model, inputs, features, layouts = case(family)
    pruner = settings.parse({"method": method, "keep": KEEP}).pruner
    with torch.no_grad(), mustdrop.patched(model, vision=pruner):
        model(**inputs)
        expected = mustdrop.trace(model).kept(0)
    tower = adapter.tower(model)
    stage = PlainStage(pruner, tower, len(tower.blocks) - 1)
    (kept,) = stage.choose(stage.start(), layouts, features, [KEEP])
    assert kept.index.tolist() == expected.tolist()
    assert kept.rows.shape == (KEEP, features.shape[1])
    if method != "pooling":
        assert torch.equal(kept.rows, features[kept.index])


def test_attention_is_read_from_queries_and_keys():
    adapter, model, _, features, layouts = case("llava")
    pruner = settings.parse({"method": "fastervlm", "keep": KEEP}).pruner
    tower = adapter.tower(model)
    stage = PlainStage(pruner, tower, len(tower.blocks) - 1)
    (layer,) = stage.reads
    heads, size, number = 2, 4, layouts[0].size + tower.prefix
    queries, keys = torch.zeros(1, heads, number, size), torch.zeros(1, heads, number, size)
    wanted = torch.arange(5, 5 + KEEP)
    queries[..., 0, 0], keys[..., wanted + tower.prefix, 0] = 1, 1  # what CLS looks at
    run = stage.start(item=layouts[0].size)
    stage.read(run, layer, queries, keys, 1.0, None)
    assert stage.early
    choice = stage.choose_early(run, layouts, features, [KEEP])
    (kept,) = stage.choose(run, layouts, features, [KEEP], choice)
    assert kept.index.tolist() == wanted.tolist()


def test_more_than_there_is_keeps_everything():
    adapter, model, _, features, layouts = case("llava")
    tower = adapter.tower(model)
    stage = PlainStage(settings.parse({"method": "divprune"}).pruner, tower, 3)
    (kept,) = stage.choose(stage.start(), layouts, features, [10**6])
    assert torch.equal(kept.rows, features)


def test_a_rule_that_reads_the_question_is_refused():
    tower = registry()["llava"].tower(build(registry()["llava"]))
    with pytest.raises(ConfigError, match="reads the question"):
        PlainStage(find("cdpruner").vision, tower, 3)
