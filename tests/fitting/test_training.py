"""A scorer learns, is the same after an interruption, stops early, and no bad sample costs the run."""

from __future__ import annotations

import json

import pytest
import torch

import mustdrop
import mustdrop.fidelity
from mustdrop.adapters import registry
from mustdrop.errors import ConfigError, UnknownKnobError
from mustdrop.fitting import FitSettings, fit
from mustdrop.fitting.state import LOG, STATE
from mustdrop.pruners.scorer import load
from support.builders import answer
from support.families import batch, clone

FAST = {"steps": 6, "batch": 2, "every": 3, "rank": 8, "max_new_tokens": 3, "most_held_out": 2}


def prompts(model, number=8, family="llava"):
    return [batch(registry()[family], model, (("image",),), seed=seed) for seed in range(number)]


@pytest.fixture(scope="module")
def model():
    return clone("llava")


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_a_fit_writes_a_scorer_that_patch_takes(model, tmp_path):
    seen = []
    fitted = fit(model, prompts(model), tmp_path / "made", on_step=seen.append, about={"whose": "mine"}, **FAST)
    assert [look.step for look in seen] == [1, 2, 3, 4, 5, 6]
    assert all(look.loss >= 0 and look.held >= 0 for look in seen)
    assert [line["step"] for line in fitted.log] == [0, 3, 6]
    assert fitted.log[0]["held"] == pytest.approx(fitted.before)
    assert fitted.ended == "all steps are done"
    told = json.loads((tmp_path / "made" / "config.json").read_text())
    assert told["about"]["whose"] == "mine"
    assert told["about"]["settings"]["steps"] == 6
    lines = (tmp_path / "made" / LOG).read_text().splitlines()
    assert [json.loads(line) for line in lines] == fitted.log
    halves = {name: value.half().float() for name, value in fitted.scorer.state_dict().items()}
    assert all(torch.equal(value, halves[name]) for name, value in load(tmp_path / "made").state_dict().items())
    pruned = mustdrop.patch(clone("llava"), "learned", keep=0.25, importance=str(tmp_path / "made"))
    answer(pruned, prompts(pruned, 1)[0], 2)
    assert mustdrop.trace(pruned).tokens.tolist() == [[9]] * 5


def test_the_coverage_that_did_best_goes_with_the_scorer(model, tmp_path):
    settings = FAST | {"coverages": (0.0, 0.5, 2.0), "held_budgets": (0.3,)}
    fitted = fit(model, prompts(model), tmp_path, **settings)
    assert list(fitted.covered) == ["0", "0.5", "2"]
    best = min(fitted.covered, key=lambda power: fitted.covered[power])
    assert fitted.scorer.coverage == float(best) == load(tmp_path).coverage
    assert fitted.covered["0"][0] == pytest.approx(fitted.held, rel=1e-3)
    # what it says of its best choice is what the patched model does
    inputs = prompts(model)[0]
    reference = mustdrop.fidelity.reference(model, inputs, 3)
    with mustdrop.patched(model, "learned", keep=0.3, importance=fitted.scorer):
        as_found = mustdrop.fidelity.measure(model, inputs, reference).kl
    with mustdrop.patched(model, "learned", keep=0.3, importance=fitted.scorer, coverage=float(best)):
        as_told = mustdrop.fidelity.measure(model, inputs, reference).kl
    assert torch.equal(as_found, as_told)
    with pytest.raises(ConfigError, match="coverages"):
        FitSettings(coverages=(-1.0,))


def test_the_scorer_gets_better_at_what_it_is_held_to(model, tmp_path):
    settings = FAST | {"steps": 40, "every": 10, "held_out": 0.25, "patience": 9, "rate": 5e-3}
    fitted = fit(model, prompts(model, 12), tmp_path, **settings)
    assert min(line["loss"] for line in fitted.log[1:]) < fitted.log[1]["loss"] or fitted.held < fitted.before
    assert fitted.held <= fitted.before


@pytest.mark.parametrize("question", [False, True])
def test_an_interrupted_fit_ends_as_one_that_was_not(model, tmp_path, question):
    whole = fit(model, prompts(model), tmp_path / "whole", question=question, **FAST)

    def stop(look):
        if look.step == 4:  # one step after a look: that step is made again
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(model, prompts(model), tmp_path / "cut", question=question, on_step=stop, **FAST)
    again = fit(model, prompts(model), tmp_path / "cut", question=question, **FAST)
    assert equal(whole.scorer, again.scorer)
    assert whole.log == again.log
    states = [torch.load(tmp_path / name / STATE, weights_only=True)["weights"] for name in ("whole", "cut")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    steps = []
    done = fit(model, prompts(model), tmp_path / "cut", question=question, on_step=steps.append, **FAST)
    assert equal(done.scorer, whole.scorer)
    assert steps == [], "a fit that is over is not gone on with"


def test_the_seed_decides(model, tmp_path):
    made = [fit(model, prompts(model), tmp_path / str(i), **FAST | {"seed": seed}) for i, seed in enumerate((0, 0, 1))]
    assert equal(made[0].scorer, made[1].scorer)
    assert not equal(made[0].scorer, made[2].scorer)


def test_it_stops_where_nothing_gets_better(model, tmp_path):
    fitted = fit(model, prompts(model), tmp_path, **FAST | {"steps": 50, "every": 1, "patience": 2, "rate": 1e-12})
    assert fitted.ended == "2 looks at the held-out part without a better result"
    assert [line["step"] for line in fitted.log] == [0, 1, 2]
    assert fitted.step == 0


def test_bad_samples_are_left_out_by_name(model, tmp_path):
    good = prompts(model)

    def broken():
        raise OSError("no such picture\nand more")

    text = batch(registry()["llava"], model, ((),))
    samples = [*good, broken, text, {"pixel_values": torch.ones(1)}]
    names = [f"line {i}" for i in range(len(samples))]
    settings = FAST | {"steps": 12, "held_out": 0.2}
    fitted = fit(model, samples, tmp_path, names=names, **settings)
    assert set(fitted.skipped) == {"line 8", "line 9", "line 10"}
    assert fitted.skipped["line 8"] == "OSError: no such picture"
    assert "without" in fitted.skipped["line 9"]
    assert "expected what the processor returns" in fitted.skipped["line 10"]
    with pytest.raises(ConfigError, match=r"none of the .* can be used.*no such picture"):
        fit(model, [broken] * 20, tmp_path / "hopeless", **FAST)


def test_the_model_is_left_as_it_came(tmp_path):
    model = mustdrop.patch(clone("llava"), "fastv", keep=0.5)
    inputs = prompts(model, 1)[0]
    before = answer(model, inputs, 2).logits
    fit(model, prompts(model, 4), tmp_path, **FAST)
    assert torch.equal(answer(model, inputs, 2).logits, before)
    assert mustdrop.trace(model).method == "fastv"


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"steps": 0}, ConfigError, "steps"),
        ({"budgets": (0.5, 0.1)}, ConfigError, "smallest <= largest"),
        ({"held_budgets": (1.5,)}, ConfigError, "between 0 and 1"),
        ({"temperature": (0.0, 1.0)}, ConfigError, "above 0"),
        ({"step": 3}, UnknownKnobError, "Did you mean 'steps'"),
    ],
)
def test_settings_are_checked(settings, error, text):
    with pytest.raises(error, match=text):
        FitSettings(**settings)


def test_folders_and_samples_are_checked(model, tmp_path):
    with pytest.raises(ConfigError, match="at least two prompts"):
        fit(model, prompts(model, 1), tmp_path, **FAST)
    with pytest.raises(ConfigError, match="a name for each of 4 samples, got 1"):
        fit(model, prompts(model, 4), tmp_path, names=["one"], **FAST)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is a file"):
        fit(model, prompts(model, 4), tmp_path / "file", **FAST)
    fit(model, prompts(model, 4), tmp_path / "fit", **FAST)
    with pytest.raises(ConfigError, match=r"another fit: seed=0 \(now 3\)"):
        fit(model, prompts(model, 4), tmp_path / "fit", **FAST | {"seed": 3})
    (tmp_path / "fit" / STATE).write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="cannot be read"):
        fit(model, prompts(model, 4), tmp_path / "fit", **FAST)
