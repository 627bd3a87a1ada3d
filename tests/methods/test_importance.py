"""`importance=` of every rule that weighs one: names, modules, folders of scorers, and the scorer of a model."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import mustdrop
from mustdrop import VisionStagePruner
from mustdrop.adapters import find as find_adapter
from mustdrop.adapters import registry
from mustdrop.errors import ConfigError, UnsupportedOptionError
from mustdrop.method import find
from mustdrop.method import registry as recipes
from mustdrop.methods.learned import Important
from mustdrop.pruners import Features, Importance
from mustdrop.pruners.scored import FOLDER, FromModel, Scored
from mustdrop.pruners.scorer import CONFIG, WEIGHTS, Scorer, load, save
from support.builders import answer
from support.edges import share
from support.families import assert_dropping_equals_masking, batch, clone

#: Every method with the knob: nobody edits this to add one.
WEIGHING = [name for name, recipe in recipes().items() if "importance" in recipe.model_fields]
WIDTH = 64  # of the tiny models


class LengthOfFeatures(torch.nn.Module):
    """No weights, no width: a module of one's own."""

    def forward(self, features):
        return features.norm(dim=2)


class LastOnes(Importance):
    """The last features in raster order."""

    def score(self, seen):
        return torch.arange(seen.values.shape[1], device=seen.values.device).float().expand(len(seen.values), -1)


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(5)
    save(Scorer(WIDTH, rank=8), tmp_path / "mine", {"whose": "mine"})
    return tmp_path / "mine"


def test_the_rules_that_weigh_an_importance_are_these():
    assert sorted(WEIGHING) == WEIGHING
    one, two = "cdpruner fastervlm fastvid flashvid hiprune holov learned mmr", "mustdrop mustdrop+ prumerge scope"
    assert [*one.split(), *two.split(), "visionzip", "vispruner", "vscan"] == WEIGHING


def test_a_rule_that_reads_how_important_the_encoder_finds_a_patch_takes_another_importance():
    """Attention of the encoder is the importance of the field; a rule that reads it without the knob is missed."""
    for name, recipe in recipes().items():
        vision = None if "importance" in recipe.model_fields else recipe().build().vision
        read = () if vision is None or vision.rule is None else vision.rule.reads
        assert not {one.what for one in read} & {"attention", "received", "joint_attention"}, name


@pytest.mark.parametrize("method", ["hiprune", "prumerge"])
def test_attention_by_its_name_is_the_paper_s(method):
    assert find(method).vision.rule == find(method, importance="attention").vision.rule


@pytest.mark.parametrize("knobs", [{"method": "hiprune", "alpha": 0}, {"method": "prumerge", "neighbours": 0}])
def test_what_the_importance_ranks_highest_stays(knobs):
    """Without anchors and without samples both keep the highest; the last slot of `prumerge` is the sum of the rest."""
    model = clone("llava")
    inputs = batch(registry()["llava"], model, (("image",),))
    mustdrop.patch(model, keep=7, importance=LastOnes(), **knobs)
    answer(model, inputs, 0)
    kept = mustdrop.trace(model).kept(0).tolist()
    assert kept[-6:] == [*range(30, 36)]
    assert len(kept) == 7


@pytest.mark.parametrize("given", ["module", "folder", "question", "own"])
@pytest.mark.parametrize("method", WEIGHING)
def test_dropping_equals_masking_under_any_importance(method, given, folder):
    importance = {"module": LengthOfFeatures(), "folder": str(folder), "question": "question", "own": LastOnes()}[given]
    knobs = {"importance": importance, **recipes()[method].unmerged()}
    knobs |= {"key_share": 0.2} if "key_share" in recipes()[method].model_fields else {}
    kinds = (("video",),) if method in ("fastvid", "flashvid") else (("image",), ("image", "image"))
    family = "qwen2_5_vl"
    both = assert_dropping_equals_masking(family, kinds, method=method, keep=share(method, family), steps=2, **knobs)
    assert bool((both.trace.equal_tokens <= share(method, family) * both.trace.total + 1e-4).all())


def test_the_module_decides_what_stays():
    model = clone("llava")
    inputs = batch(registry()["llava"], model, (("image",), ("image", "image")))
    with torch.no_grad():
        features = find_adapter(model).base(model).get_image_features(inputs["pixel_values"]).pooler_output
    length = torch.stack(list(features)).norm(dim=2)
    mustdrop.patch(model, "learned", keep=9, importance=LengthOfFeatures())
    answer(model, inputs, 0)
    best = sorted(length[0].argsort(descending=True, stable=True)[:9].tolist())
    assert mustdrop.trace(model).kept(0, 0).tolist() == best


def test_the_key_set_is_the_most_important():
    model = clone("llava")
    inputs = batch(registry()["llava"], model, (("image",),))
    vision = VisionStagePruner(window=None, keep=20, key_share=0.2, key_importance=LastOnes())
    mustdrop.patch(model, vision=vision)
    answer(model, inputs, 0)
    trace = mustdrop.trace(model)
    assert trace.kept(0).tolist() == [*range(16, 36)]
    assert trace.protected(0).tolist() == [*range(32, 36)]
    assert not vision.needs_attention
    assert vision.reads == ()
    with pytest.raises(ConfigError, match="reads features after the encoder"):
        VisionStagePruner(key_importance=LastOnes(), select_layer=1, window=None)


def test_where_nothing_waits_and_where_the_host_looks_the_choice_is_the_same():
    """A prompt that ends with its picture is looked at by the host; the same importance, the same features."""
    model = mustdrop.patch(clone("llava"), "mustdrop", keep=0.5, window=None, importance=LastOnes(), key_share=0.5)
    inputs = batch(registry()["llava"], model, (("image",),))
    answer(model, inputs, 0)
    protected = mustdrop.trace(model).protected(0)
    masked = dict(inputs, attention_mask=inputs["attention_mask"].clone())
    place = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[0, 0]
    masked["attention_mask"][0, place] = 0  # the host looks where a mask hides a part of a picture
    answer(model, masked, 0)
    assert mustdrop.trace(model).protected(0)[-9:].tolist() == protected[-9:].tolist() == [*range(27, 36)]


# -- folders ----------------------------------------------------------------------------------------------------------


def test_a_scorer_comes_back_from_its_folder(folder):
    scorer = load(folder)
    features = torch.randn(2, 10, WIDTH)
    torch.manual_seed(5)
    assert (Scorer(WIDTH, rank=8)(features) - scorer(features)).abs().max() < 1e-2  # half precision
    assert json.loads((folder / CONFIG).read_text())["about"] == {"whose": "mine"}
    assert Scorer(4096).token.weight.numel() * 5 < 600_000
    assert sum(weight.numel() for weight in Scorer(4096, asks=True).parameters()) < 600_000


def test_recipes_config_files_and_the_command_line_name_folders(folder, tmp_path):
    recipe = recipes()["learned"](keep=0.25, importance=folder)
    assert json.loads(recipe.model_dump_json())["importance"] == str(folder)
    mustdrop.config.save_config(tmp_path / "c.json", "learned", {"keep": 0.25, "importance": str(folder)})
    method = mustdrop.load_config(tmp_path / "c.json")
    assert method.vision.rule.importance.folder == str(folder)
    # from the folder of the config file, as files of code are
    (tmp_path / "c.json").write_text('{"format": 1, "method": "mmr", "knobs": {"importance": "mine"}}')
    assert mustdrop.load_config(tmp_path / "c.json").vision.rule.importance.folder == str(tmp_path / "mine")
    (tmp_path / "c.json").write_text('{"format": 1, "method": "mmr", "knobs": {"importance": "distinct"}}')
    assert mustdrop.load_config(tmp_path / "c.json").vision.rule.importance.reads == ()
    with pytest.raises(ConfigError, match="cannot be written"):
        mustdrop.config.save_config(tmp_path / "d.json", "learned", {"importance": LengthOfFeatures()})


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda where: (where / CONFIG).unlink(), "there is no scorer at"),
        (lambda where: (where / WEIGHTS).unlink(), "cannot be read: expected scorer.safetensors"),
        (lambda where: (where / CONFIG).write_text("{"), "is not JSON"),
        (lambda where: (where / CONFIG).write_text('{"format": 2}'), "expected format 1"),
        (lambda where: (where / WEIGHTS).write_bytes(b"nothing"), "cannot be read"),
        (lambda where: _spoil(where, torch.nan), "not finite, in token.bias"),
        (lambda where: _shrink(where), "cannot be read"),
    ],
)
def test_broken_folders_are_refused(folder, damage, text):
    damage(folder)
    with pytest.raises(ConfigError, match=text):
        find("learned", importance=str(folder))


def _spoil(where, number):
    weights = load_file(where / WEIGHTS)
    weights["token.bias"][0] = number
    save_file(weights, where / WEIGHTS)


def _shrink(where):
    told = json.loads((where / CONFIG).read_text())
    (where / CONFIG).write_text(json.dumps({**told, "width": WIDTH - 1}))


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("atention", "neither a name nor a folder.*Did you mean 'attention'"),
        ("no/such/folder", "there is no scorer at 'no/such/folder'"),
        (3, "takes 'attention', 'question', 'distinct'.*got 3"),
        (LengthOfFeatures, "the class LengthOfFeatures: make an object"),
    ],
)
def test_what_is_no_importance_is_refused(given, text):
    for method in ("mmr", "learned", "mustdrop"):
        with pytest.raises(ConfigError, match=text):
            find(method, importance=given)


# -- what modules may answer ------------------------------------------------------------------------------------------


class Answers(torch.nn.Module):
    """Answers what it is made with."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, features):
        return self.answer(features)


@pytest.mark.parametrize(
    ("answer_of", "text"),
    [
        (lambda x: x, r"expected a float tensor of shape \(1, 36\).*got a tensor of shape \(1, 36, 64\)"),
        (lambda x: x.norm(dim=2)[:, 1:], r"got a tensor of shape \(1, 35\)"),
        (lambda x: x.norm(dim=2).long(), "int64"),
        (lambda x: None, "got None"),
        (lambda x: x.norm(dim=2) / 0 * 0, "expected finite numbers, and 36 of 36 are not"),
        (lambda x: x @ torch.ones(3), r"failed on features of shape \(1, 36, 64\).*mustdrop fit"),
    ],
)
def test_wrong_answers_of_a_module_are_named_and_the_model_goes_on(answer_of, text):
    model = mustdrop.patch(clone("llava"), "learned", keep=0.5, importance=Answers(answer_of))
    inputs = batch(registry()["llava"], model, (("image",),))
    with pytest.raises(ConfigError, match=text):
        answer(model, inputs, 0)
    mustdrop.patch(model, "learned", keep=0.5, importance=LengthOfFeatures())
    answer(model, inputs, 0)


def test_a_scorer_of_another_model_says_so(tmp_path):
    save(Scorer(48, rank=8), tmp_path)
    model = mustdrop.patch(clone("llava"), "scope", keep=0.5, importance=tmp_path)
    with pytest.raises(
        ConfigError, match=r"reads features \(B, N, 48\), got \(1, 36, 64\).*another model.*mustdrop fit"
    ):
        answer(model, batch(registry()["llava"], model, (("image",),)), 0)


def test_modules_of_half_precision_and_in_training_mode_are_left_as_they_are():
    module = torch.nn.Sequential(torch.nn.Linear(WIDTH, 1), torch.nn.Flatten(1)).bfloat16().train()
    model = mustdrop.patch(clone("llava"), "learned", keep=0.5, importance=module)
    answer(model, batch(registry()["llava"], model, (("image",),)), 0)
    assert module.training
    assert module[0].weight.dtype == torch.bfloat16
    assert module[0].weight.requires_grad


def test_a_scorer_that_asks_gets_the_question():
    torch.manual_seed(0)
    scorer = Scorer(WIDTH, rank=8, asks=True)
    rule = Important(importance=Scored(module=scorer))
    assert rule.asks
    x, words = torch.randn(1, 12, WIDTH), torch.randn(3, WIDTH)
    seen = Features.of_grid(x, (3, 4), {}, (words,))
    with torch.no_grad():
        best = scorer(x, words.mean(0)[None])[0].argsort(descending=True)[:5].sort().values
    assert rule(seen, 5).keep.tolist() == [best.tolist()]
    with pytest.raises(ConfigError, match="expected embeddings of a question"):
        rule(Features.of_grid(x, (3, 4), {}), 5)
    with pytest.raises(ConfigError, match="reads the question: pass question="):
        scorer(x)
    model = mustdrop.patch(clone("llava"), "learned", keep=0.5, importance=scorer)
    inputs = batch(registry()["llava"], model, (("image",),))
    answer(model, inputs, 0)
    with pytest.raises(UnsupportedOptionError, match="reads the question, and this call"):
        find_adapter(model).base(model).get_image_features(inputs["pixel_values"])


# -- the method -------------------------------------------------------------------------------------------------------


def test_a_model_without_a_scorer_says_how_to_get_one(tmp_path):
    model = clone("llava")
    model.name_or_path = str(tmp_path)
    with pytest.raises(ConfigError, match=r"comes without a scorer \(looked for .*mustdrop fit --model"):
        mustdrop.patch(model, "learned")
    model.name_or_path = ""
    with pytest.raises(ConfigError, match=r"comes without a scorer\. Train one"):
        mustdrop.patch(model, "learned")
    answer(model, batch(registry()["llava"], model, (("image",),)), 0)
    with pytest.raises(ConfigError, match="no scorer was given"):
        Important(importance=FromModel())(Features.of_grid(torch.randn(1, 4, 8), (2, 2), {}), 2)


def test_a_model_comes_with_the_scorer_in_its_folder(tmp_path):
    model = clone("llava")
    save(Scorer(WIDTH, rank=8), tmp_path / FOLDER)
    model.name_or_path = str(tmp_path)
    mustdrop.patch(model, "learned", keep=0.25)
    answer(model, batch(registry()["llava"], model, (("image",),)), 0)
    assert mustdrop.trace(model).method == "learned"
    assert mustdrop.trace(model).tokens[0].tolist() == [9]


def test_coverage_spreads_what_importance_alone_takes_from_one_place():
    x = torch.eye(3)[[0, 0, 0, 1, 2]][None]

    class Falling(torch.nn.Module):
        def forward(self, features):
            return torch.arange(features.shape[1], 0, -1.0)[None]

    seen = Features.of_grid(x, (1, 5), {})
    importance = Scored(module=Falling())
    assert Important(importance=importance)(seen, 2).keep.tolist() == [[0, 1]]
    assert Important(importance=importance, coverage=1.0)(seen, 2).keep.tolist() == [[0, 3]]
    importance.module.coverage = 1.0  # a scorer knows
    assert Important(importance=importance)(seen, 2).keep.tolist() == [[0, 3]]
    assert Important(importance=importance, coverage=0.0)(seen, 2).keep.tolist() == [[0, 1]]
