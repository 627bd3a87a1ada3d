"""`tune` finds the obvious, says so where there is nothing to find, and its config file patches a model."""

from __future__ import annotations

import functools
import json

import pytest
import torch
from typer.testing import CliRunner

import mustdrop
from mustdrop.adapters import registry
from mustdrop.cli import app
from mustdrop.errors import BudgetError, ConfigError, UnknownKnobError, UnknownMethodError, UnsupportedModelError
from mustdrop.tuning import Candidate, Goal
from mustdrop.tuning.search import rungs
from tests.families import build, fixture_of, inputs_of

tune = functools.partial(mustdrop.tune, max_new_tokens=3)  # random models never end


def samples(family, kind, number):
    adapter = registry()[family]
    model = build(adapter)
    generator = torch.Generator().manual_seed(0)
    shape = fixture_of(adapter).sizes(kind)[0]
    return model, [inputs_of(adapter, model, kind, [torch.rand(*shape, generator=generator)]) for _ in range(number)]


@pytest.fixture(scope="module")
def llava():
    return samples("llava", "image", 3)


def test_a_floor_that_only_keeping_all_meets_picks_that(llava):
    model, prompts = llava
    found = tune(model, prompts, agreement=1.0, kl=1e-9, methods=["uniform"], keeps=[0.1, 1.0, 0.5])
    assert (found.best.method, found.best.knobs, found.best.prompts) == ("uniform", {"keep": 1.0}, 3)
    assert (found.best.agreement, found.best.flops) == (1.0, 1.0)
    assert mustdrop.patching._runtime(model) is None


def test_a_floor_that_all_meet_picks_the_cheapest(llava):
    model, prompts = llava
    mustdrop.patch(model, "none")
    found = tune(model, prompts, kl=1e9, methods=["uniform", "random"], keeps=[0.75, 0.1, 0.5])
    assert found.best.knobs == {"keep": 0.1}
    assert mustdrop.patching._runtime(model).method.name == "none"  # as it came
    mustdrop.unpatch(model)


def test_a_ceiling_picks_the_most_faithful_that_is_fast_enough(llava, monkeypatch):
    model, prompts = llava
    times = {0.1: 0.2, 0.5: 0.6, 1.0: 1.0}
    monkeypatch.setattr(
        "mustdrop.tuning.search.prompt_share", lambda model, inputs, method, pairs: times[method.vision.keep]
    )
    found = tune(model, prompts, time=0.7, methods=["uniform"], keeps=list(times))
    usable = [c for c in found.candidates if c.time <= 0.7]
    assert found.best.kl == min(c.kl for c in usable)
    assert found.best.time <= 0.7


def test_times_are_shares_of_the_unpruned_model(llava):
    model, prompts = llava
    found = tune(model, prompts[:1], time=1.0, kl=1e9, methods=["uniform"], keeps=[0.1], timed_pairs=1)
    assert found.candidates[0].time > 0


def test_few_prompts_that_mislead_are_made_up_for(llava, monkeypatch):
    """Looking good on the first prompt does not hide the one candidate that is within the goal on all of them."""
    model, prompts = llava
    prompts = prompts * 3  # nine: rounds of 2, 3, 5 and 9
    monkeypatch.setattr("mustdrop.tuning.search.FINALISTS", 1)
    from mustdrop.tuning import search

    original = search.measure

    def misleading(model, sample, against):
        close = original(model, sample, against)
        keep = mustdrop.patching._runtime(model).method.vision.keep
        early = sample is prompts[0]
        kl = {0.2: 0.0 if early else 9.0, 0.4: 0.0 if early else 9.0, 1.0: 0.1 if early else 0.01}[keep]
        return type(close)(torch.full_like(close.kl, kl), close.agreement, close.same)

    monkeypatch.setattr(search, "measure", misleading)
    found = tune(model, prompts, kl=0.1, methods=["uniform"], keeps=[0.2, 0.4, 1.0])
    assert found.best.knobs == {"keep": 1.0}
    assert found.best.prompts == 9


def test_nothing_within_the_goal_is_said(llava):
    model, prompts = llava
    found = tune(model, prompts, kl=1e-12, methods=["random"], keeps=[0.1, 0.2])
    assert found.chosen is None
    with pytest.raises(ConfigError, match=r"no candidate reaches KL <= 1e-12\. The nearest is random with .*keep"):
        found.save("nowhere.json")


def test_what_a_model_cannot_do_is_left_out_with_the_reason():
    model, prompts = samples("idefics2", "image", 1)
    steps = []
    found = tune(model, prompts, kl=1e9, methods=["uniform", "fastv"], keeps=[0.9], on_step=lambda *x: steps.append(x))
    assert found.best.method == "fastv"
    assert [c.refused.split(":")[0] for c in found.candidates] == ["", "UnsupportedModelError"]
    assert steps[-1][0] == steps[-1][1] == 2
    assert "1 cannot be used here" in str(found)


@pytest.mark.parametrize(("family", "kind"), [("qwen2_vl", "video"), ("gemma3", "image")])
def test_any_family(family, kind, tmp_path):
    model, prompts = samples(family, kind, 2)
    found = tune(model, prompts, kl=1e9, keeps=[0.5])
    assert found.best.kl >= 0
    assert {c.method for c in found.candidates} == {
        n for n, r in mustdrop.method.registry().items() if "keep" in r.model_fields
    }
    found.draw(tmp_path / "tune.png")
    assert (tmp_path / "tune.png").stat().st_size > 0


def test_the_config_file_patches_a_model(llava, tmp_path):
    model, prompts = llava
    knobs = {"mustdrop": {"window": None, "layers": [1, 3]}}
    found = tune(model, prompts, kl=1e9, methods=["mustdrop"], keeps=[0.5], knobs=knobs)
    path = tmp_path / "config.json"
    found.save(path)
    content = json.loads(path.read_text())
    assert content["knobs"] == {"keep": 0.5, "window": None, "layers": [1, 3]}
    assert content["measured"]["prompts"] == 3
    assert {"versions", "goal", "model"} <= set(content)
    method = mustdrop.load_config(path)
    assert method == found.method
    with mustdrop.patched(model, method):
        model.generate(**prompts[0], max_new_tokens=2)
        assert mustdrop.trace(model).equal_tokens[0] <= 0.5 * mustdrop.trace(model).total[0]


@pytest.mark.parametrize(
    ("text", "error", "match"),
    [
        ("{", ConfigError, "is not JSON"),
        ("[1]", ConfigError, 'expected {"format": 1'),
        ('{"format": 2, "method": "random", "knobs": {}}', ConfigError, "got format 2"),
        ('{"format": 1, "method": "random"}', ConfigError, "knobs None"),
        ('{"format": 1, "method": "randm", "knobs": {}}', UnknownMethodError, "'random'"),
        ('{"format": 1, "method": "random", "knobs": {"kep": 1}}', UnknownKnobError, "'keep'"),
        ('{"format": 1, "method": "random", "knobs": {"keep": 2.5}}', BudgetError, "share"),
    ],
)
def test_config_files_that_say_nothing_useful_are_refused(text, error, match, tmp_path):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(error, match=match):
        mustdrop.load_config(tmp_path / "c.json")


def test_a_config_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        mustdrop.load_config(tmp_path / "c.json")


def test_goals_and_samples_that_make_no_sense_are_refused(llava):
    model, prompts = llava
    for settings, match in (
        ({}, "tune needs a goal"),
        ({"agreement": 1.2}, r"agreement=1.2: expected a number that is in \(0, 1\]"),
        ({"kl": 0.0}, "kl=0.0: expected a number that is positive"),
        ({"kl": 1.0, "methods": []}, "at least one method"),
        ({"kl": 1.0, "methods": ["random"], "knobs": {"uniform": {}}}, r"knobs are given for \['uniform'\]"),
    ):
        with pytest.raises(ConfigError, match=match):
            tune(model, prompts, **settings)
    for wrong in ([], prompts[0], ["text"]):
        with pytest.raises(ConfigError, match="samples is a list"):
            tune(model, wrong, kl=1.0)
    with pytest.raises(UnknownMethodError):
        tune(model, prompts, kl=1.0, methods=["randm"])
    with pytest.raises(UnsupportedModelError):
        tune(torch.nn.Linear(2, 2), prompts, kl=1.0)


def test_ranks():
    cheap = Candidate("a", {}, 1, agreement=0.9, kl=0.2, flops=0.2)
    good = Candidate("b", {}, 1, agreement=1.0, kl=0.1, flops=0.5, time=0.6)
    assert sorted([good, cheap], key=Goal(agreement=0.8).rank) == [cheap, good]
    assert sorted([cheap, good], key=Goal(agreement=0.95).rank) == [good, cheap]
    assert sorted([cheap, good], key=Goal(time=0.7).rank) == [good, cheap]
    assert sorted([good, cheap], key=Goal(time=0.5).rank) == [cheap, good]
    assert [rungs(n) for n in (1, 2, 3, 8, 20)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4, 8], [3, 5, 10, 20]]


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from PIL import Image

    from mustdrop.demo.scenes import SceneMaker

    Image.fromarray(SceneMaker("selection", 1).scene().image).save("scene.png")
    lines = [{"image": "scene.png", "question": text} for text in ("how many digits are there ?", "is there a 7 ?")]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, lines)))
    tried = ["--method", "uniform", "--keep", "0.5", "--keep", "1.0"]
    done = CliRunner().invoke(app, ["tune", "--kl", "1e-9", "--samples", "mine.jsonl", *tried])
    assert done.exit_code == 0, done.output
    assert "uniform" in done.output
    assert mustdrop.load_config("mustdrop-tune/config.json").vision.keep == 1.0
    assert (tmp_path / "mustdrop-tune" / "tune.png").exists()
    for arguments, match in (
        (["--kl", "1", "--image", "scene.png"], "come together"),
        (["--kl", "1", "--samples", "mine.jsonl", "--image", "scene.png"], "not both"),
        (["--kl", "1", "--samples", "none.jsonl"], "cannot be read"),
        (["--kl", "1", "--image", "none.png", "--question", "what ?"], "there is no image none.png"),
        (["--kl", "1", "--method", "uniform", "--keep", "half"], "neither a number of tokens"),
        ([], "needs a goal"),
    ):
        failed = CliRunner().invoke(app, ["tune", *arguments])
        assert isinstance(failed.exception, BudgetError if match.startswith("neither") else ConfigError)
        assert match in str(failed.exception)
