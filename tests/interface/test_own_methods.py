"""Recipes and methods of one's own, wherever a method is named: by object, by class, by name, by where they lie."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from importlib import metadata

import pytest
import torch

import mustdrop
from mustdrop import Method, Recipe, VisionStagePruner, cli, errors
from mustdrop.bench import Setting, benchmark
from mustdrop.demo.model import load, prompt
from mustdrop.eval.run import evaluate
from mustdrop.eval.settings import Settings
from mustdrop.pruners.base import Budget
from mustdrop.registry import registry, resolve
from support.builders import answer, batch, clone, plain

OWN = '''"""Two recipes, one of them public by a base class that is not."""

from mustdrop import Method, Recipe, VisionStagePruner
from mustdrop.methods.fastv import FastV  # an import is not a method of this file
from mustdrop.pruners.base import Budget


class _Base(Recipe):
    keep: Budget = 0.5

    def build(self):
        return Method(vision=VisionStagePruner(window=None, key_share=0, keep=self.keep))


class FirstOne(_Base):
    """One."""


class SecondOne(_Base):
    """Two."""

    called = "the-second"


DONE = Method(vision=VisionStagePruner(window=None, key_share=0, keep=5), name="done")
'''


class Half(Recipe):
    """Half of the tokens."""

    keep: Budget = 0.5
    seed: int = 0

    def build(self) -> Method:
        return Method(
            vision=VisionStagePruner(window=None, key_share=0, keep=self.keep, score="random", seed=self.seed)
        )


@pytest.fixture(autouse=True)
def _nothing_stays_registered(monkeypatch):
    monkeypatch.setattr("mustdrop.registry._registered", {})


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module that can be imported, `own_recipes`."""
    (tmp_path / "own_recipes.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("own_recipes", None)


def kept(model):
    answer(model, batch(), steps=1)
    return int(mustdrop.last_trace(model).tokens[0, 0])


# ------------------------------------------------------------------------------------------------------------ as it is


@pytest.mark.parametrize(
    ("given", "settings", "tokens"),
    [
        (Half, {}, 18),
        (Half, {"keep": 5}, 5),
        (Half(keep=7), {}, 7),
        (Half(keep=7).build(), {}, 7),
    ],
    ids=["class", "class_and_knobs", "recipe", "method"],
)
def test_patch_and_patched_take_it_as_it_is(given, settings, tokens):
    model = mustdrop.patch(clone(), given, **settings)
    assert kept(model) == tokens
    with mustdrop.patched(mustdrop.unpatch(model), given, **settings):
        assert kept(model) == tokens


def test_it_has_a_name_in_the_trace_and_unknown_knobs_are_named():
    model = mustdrop.patch(clone(), Half(keep=7))
    kept(model)
    assert mustdrop.last_trace(model).method == "half"
    with pytest.raises(errors.UnknownKnobError, match=r"'half' has no knob 'keeep'.*Did you mean 'keep'"):
        mustdrop.patch(model, Half, keeep=3)


@pytest.mark.parametrize(
    ("given", "settings", "says"),
    [
        (Half(), {"keep": 3}, r"complete: give keep to Half\(keep=3\)"),
        (Half().build(), {"keep": 3}, "complete: give keep to its pruners"),
        ({"prefill": 1}, {}, r"dict: write patch\(model, prefill=\.\.\.\)"),
        (VisionStagePruner(), {}, r"VisionStagePruner: write vision=VisionStagePruner\(\.\.\.\)"),
        (7, {}, "expected a method: a name, a Recipe or a Method; got 7"),
        (dict, {}, "the class dict"),
    ],
    ids=["recipe", "method", "dict", "pruner", "int", "class"],
)
def test_what_is_no_method_or_has_too_many_settings_is_told_how_to_write_it(given, settings, says):
    with pytest.raises(errors.ConfigError, match=says):
        mustdrop.patch(clone(), given, **settings)


def test_what_build_returns_is_a_method():
    class Wrong(Recipe):
        def build(self):
            return VisionStagePruner()

    with pytest.raises(
        errors.ConfigError, match=r"Wrong\.build returned a VisionStagePruner.*expected a mustdrop\.Method"
    ):
        mustdrop.patch(clone(), Wrong)


# ---------------------------------------------------------------------------------------------------------- registered


def test_a_registered_recipe_is_known_by_its_name():
    assert mustdrop.register(Half) is Half
    assert "half" in mustdrop.list_methods()
    assert kept(mustdrop.patch(clone(), "half", keep=4)) == 4
    mustdrop.unregister("half")
    assert "half" not in mustdrop.list_methods()


def test_the_decorator_with_a_name_and_without():
    @mustdrop.register
    class OneThing(Half):
        pass

    @mustdrop.register("other-thing")
    class Another(Half):
        pass

    @mustdrop.register(name="third", replace=True)
    class Third(Half):
        called = "not this"

    @mustdrop.register()
    class Fourth(Half):
        called = "by-called"

    found = registry()
    assert (found["one_thing"], found["other-thing"], found["third"], found["by-called"]) == (
        OneThing,
        Another,
        Third,
        Fourth,
    )
    assert resolve(Another).name == "other-thing"


def test_names_that_clash_are_refused_unless_they_are_to_be_replaced():
    class Other(Half):
        pass

    mustdrop.register(Half, "mine")
    mustdrop.register(Half, "mine")  # the same again is no clash
    with pytest.raises(errors.ConfigError, match=r"'mine' is taken by .*:Half"):
        mustdrop.register(Other, "mine")
    with pytest.raises(errors.ConfigError, match=r"'fastv' is taken by mustdrop\.methods\.fastv:FastV"):
        mustdrop.register(Other, "fastv")
    mustdrop.register(Other, "fastv", replace=True)
    assert registry()["fastv"] is Other
    mustdrop.unregister(Other)
    mustdrop.register("before-the-class", Other)
    assert registry()["before-the-class"] is Other
    assert registry()["fastv"].__module__ == "mustdrop.methods.fastv"


def test_a_cell_of_a_notebook_may_run_twice():
    for seed in (1, 2):
        made = type("Cell", (Half,), {"__module__": "__main__", "__qualname__": "Cell", "__doc__": str(seed)})
        mustdrop.register(made)
        assert registry()["cell"] is made


@pytest.mark.parametrize(
    "thing", [Half(), Half().build(), Recipe, dict, 3], ids=["recipe", "method", "base", "dict", "int"]
)
def test_only_classes_with_a_build_are_registered(thing):
    with pytest.raises(errors.ConfigError, match=r"register takes a class derived from mustdrop\.Recipe"):
        mustdrop.register(thing, "name")


@pytest.mark.parametrize("name", ["two words", "module:Class", "  ", 5])
def test_a_name_is_one_word(name):
    with pytest.raises(errors.ConfigError, match="cannot be the name of a method"):
        mustdrop.register(Half, name)


def test_what_was_not_registered_cannot_be_taken_back():
    with pytest.raises(errors.UnknownMethodError, match="'mustdrop' was not registered"):
        mustdrop.unregister("mustdrop")


# --------------------------------------------------------------------------------------------- packages and their files


def announce(folder, **points):
    """An installed package that announces entry points."""
    info = folder / "own_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: own-package\nVersion: 1.0\n")
    lines = [f"{name} = {value}" for name, value in points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[mustdrop.methods]", *lines]) + "\n")


def test_a_package_announces_recipes_in_the_entry_point_group(own):
    announce(own, first="own_recipes:FirstOne", all="own_recipes")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        names = mustdrop.list_methods()
    assert {"first", "first_one", "the-second"} <= set(names)
    assert "fast_v" not in names
    model = mustdrop.patch(clone(), "first", keep=3)
    assert kept(model) == 3
    assert mustdrop.last_trace(model).method == "first"
    assert resolve("the-second", keep=3).name == "the-second"


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("own_recipes:Nothing", "AttributeError"),
        ("no_such_module:Thing", "ModuleNotFoundError"),
        ("own_broken", "ZeroDivisionError"),
        ("own_exits", "SystemExit"),
        ("json", "defines no public Recipe"),
        ("json:dumps", "expected a Recipe class, or a module"),
    ],
)
def test_a_broken_entry_point_is_named_and_left_out(own, value, why):
    (own / "own_broken.py").write_text("1 / 0")
    (own / "own_exits.py").write_text("raise SystemExit(3)")
    announce(own, ill=value, well="own_recipes:FirstOne")
    with pytest.warns(errors.BrokenMethodWarning, match=f"entry point ill = '{value}'.*{why}") as seen:
        names = mustdrop.methods()
    assert {"well", "mustdrop"} <= set(names)
    assert "ill" not in names
    assert seen[0].filename == __file__
    with pytest.warns(errors.BrokenMethodWarning), pytest.raises(errors.UnknownMethodError, match=f"'ill'.*{why}"):
        mustdrop.patch(clone(), "ill")


def test_a_package_never_takes_the_name_of_another_method(own):
    announce(own, fastv="own_recipes:FirstOne")
    with pytest.warns(
        errors.BrokenMethodWarning, match=r"names a method 'fastv', and mustdrop\.methods\.fastv\.FastV has"
    ):
        assert registry()["fastv"].__module__ == "mustdrop.methods.fastv"
    with pytest.raises(errors.ConfigError, match="'fastv' is taken"):
        mustdrop.register(Half, "fastv")


def test_a_registered_recipe_may_take_the_place_of_a_packages(own):
    announce(own, first="own_recipes:FirstOne")
    with pytest.raises(errors.ConfigError, match="'first' is taken by own_recipes:FirstOne"):
        mustdrop.register(Half, "first")
    mustdrop.register(Half, "first", replace=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert registry()["first"] is Half
        mustdrop.unregister("first")
        assert registry()["first"].__name__ == "FirstOne"
    import own_recipes

    mustdrop.register(own_recipes.FirstOne, "first")  # the package's own class is no clash


def test_names_that_need_no_package_import_none(own):
    (own / "own_broken.py").write_text("1 / 0")
    announce(own, ill="own_broken")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mustdrop.patch(clone(), "random", keep=3)
    assert metadata.entry_points(group="mustdrop.methods")


FILES = """
import sys, warnings
from pathlib import Path
import mustdrop.methods
package = sys.modules["mustdrop.methods"]
package.__path__.append(sys.argv[1])
import mustdrop
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    names = mustdrop.methods()
print(sorted(set(names) & {"first_one", "the-second", "alone", "ill", "clash", "fastv"}))
print([str(w.message).split(" cannot")[0] for w in seen])
print(mustdrop.registry.resolve("fastv").name)
"""


def test_files_with_several_recipes_or_none_that_works(tmp_path):
    (tmp_path / "several.py").write_text(OWN)
    (tmp_path / "alone.py").write_text(OWN.split("class SecondOne")[0])
    (tmp_path / "ill.py").write_text("def f(:")
    (tmp_path / "clash.py").write_text(OWN.split("class SecondOne")[0] + "    called = 'fastv'\n")
    run = subprocess.run([sys.executable, "-c", FILES, str(tmp_path)], capture_output=True, text=True, check=True)
    names, told, fastv = run.stdout.splitlines()
    assert names == "['alone', 'fastv', 'first_one', 'the-second']"
    assert "the file ill.py of mustdrop.methods" in told
    assert "the file clash.py of mustdrop.methods names a method 'fastv'" in told
    assert fastv == "fastv"


# ---------------------------------------------------------------------------------------------- config and addresses


def config(path, method, **knobs):
    path.write_text(json.dumps({"format": 1, "method": method, "knobs": knobs}))
    return path


def test_a_config_file_says_where_the_recipe_is(own, tmp_path):
    (tmp_path / "beside.py").write_text(OWN)
    for place in ("own_recipes:FirstOne", "beside.py:FirstOne", f"{tmp_path / 'beside.py'}:FirstOne"):
        method = mustdrop.load_config(config(tmp_path / "config.json", place, keep=5))
        assert kept(mustdrop.patch(clone(), method)) == 5
    assert mustdrop.load_config(config(tmp_path / "config.json", "own_recipes:DONE")).name == "done"


def test_an_address_is_taken_like_a_name(own):
    assert kept(mustdrop.patch(clone(), "own_recipes:SecondOne", keep=5)) == 5
    assert kept(mustdrop.patch(clone(), f"{own / 'own_recipes.py'}:SecondOne", keep=5)) == 5


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("no_such_module:Thing", r"'no_such_module' cannot be imported.*write no_such_module\.py:Thing"),
        ("own_recipes:Nothing", "no 'Nothing' in 'own_recipes'"),
        ("nowhere/file.py:Thing", "there is no file"),
    ],
)
def test_an_address_where_nothing_is_says_so(own, address, says):
    with pytest.raises(errors.UnknownMethodError, match=says):
        mustdrop.patch(clone(), address)


def test_a_config_file_with_an_unknown_name_says_how_to_name_an_own_one(tmp_path):
    with pytest.raises(errors.UnknownMethodError, match="register it first, or write module:Class"):
        mustdrop.load_config(config(tmp_path / "config.json", "half"))
    mustdrop.register(Half)
    assert mustdrop.load_config(tmp_path / "config.json").name == "half"


# ------------------------------------------------------------------------------------------------- tune, bench and eval


def test_tune_takes_names_classes_recipes_and_methods(own, tmp_path):
    import own_recipes

    given = ["random", Half, Half(seed=3), Half(keep=9), Half(keep=8).build(), own_recipes.FirstOne]
    found = mustdrop.tune(plain(), [batch()], kl=100.0, methods=given, keeps=[0.5, 1.0], max_new_tokens=2)
    tried = sorted(
        (c.method, c.knobs.get("keep"), c.knobs.get("seed")) for c in found.candidates if c.method != "custom"
    )
    assert tried == sorted(
        [("random", k, None) for k in (0.5, 1.0)]
        + [("half", k, None) for k in (0.5, 1.0)]
        + [("half #2", k, 3) for k in (0.5, 1.0)]
        + [("half #3", 9, None)]
        + [("first_one", k, None) for k in (0.5, 1.0)]
    )
    assert sum(c.method == "custom" for c in found.candidates) == 1
    assert "keep=50%" in str(found)
    assert "keep=100%" in str(found)
    assert not any(c.refused for c in found.candidates)

    best = mustdrop.tune(plain(), [batch()], kl=100.0, methods=[own_recipes.FirstOne], keeps=[0.5], max_new_tokens=2)
    best.save(tmp_path / "config.json")
    assert json.loads((tmp_path / "config.json").read_text())["method"] == "own_recipes:FirstOne"
    assert mustdrop.load_config(tmp_path / "config.json") == best.method


def test_tune_says_why_a_file_cannot_name_what_it_chose(tmp_path):
    class Inside(Half):
        pass

    for given in (Inside, Half(keep=0.5).build()):
        found = mustdrop.tune(plain(), [batch()], kl=100.0, methods=[given], keeps=[0.5], max_new_tokens=2)
        assert kept(mustdrop.patch(clone(), found.method)) == 18
        with pytest.raises(errors.ConfigError, match=r"a file cannot name .*register it"):
            found.save(tmp_path / "config.json")


def test_bench_takes_a_recipe():
    settings = [Setting(Half, 9), Setting(Half(keep=7)), Setting(Half(keep=6).build())]
    rows = benchmark(clone(), batch(), settings, rounds=1, new_tokens=2)["rows"]
    assert [(row["method"], row["keep"], row["equal_tokens"]) for row in rows] == [
        ("half", 9, [9.0]),
        ("half", 7, [7.0]),
        ("custom", None, [6.0]),
    ]


@pytest.mark.parametrize(
    ("settings", "name", "knobs", "folder"),
    [
        ({"method": Half, "knobs": {"keep": 48}}, "half", {"keep": 48}, "half-48"),
        ({"method": Half(keep=48, seed=2)}, "half", {"keep": 48, "seed": 2}, "half-48-seed=2"),
        ({"method": Half(keep=48).build()}, "custom", None, None),
    ],
    ids=["class", "recipe", "method"],
)
def test_an_evaluation_takes_it_and_names_it(settings, name, knobs, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = Settings("scenes", limit=2, workers=0, **settings)
    result = evaluate(made)
    assert (result.method, result.tokens.equal.mean) == (name, 48.0)
    if knobs is not None:
        assert (result.knobs, made.folder.name) == (knobs, folder)
    assert json.loads((made.folder / "result.json").read_text())["method"] == name
    assert ":" not in made.folder.name
    assert evaluate(made).score == result.score  # what is there already fits


# ---------------------------------------------------------------------------------------------------------------- names


def test_the_documented_names_and_the_old_ones_are_the_same():
    assert mustdrop.methods() == mustdrop.list_methods()
    assert mustdrop.adapters() == mustdrop.list_adapters()
    assert mustdrop.trace is mustdrop.last_trace
    for name in ("Recipe", "register", "unregister", "list_methods", "list_adapters", "last_trace"):
        assert name in mustdrop.__all__
    assert mustdrop.method.find("random", keep=3) == resolve("random", keep=3)


def test_a_method_for_the_bundled_model_as_in_the_documents():
    model, processor = load()
    inputs = processor(text=prompt(processor, "where is the red one ?"), images=_image(), return_tensors="pt")
    with mustdrop.patched(model, Half(keep=64)):
        model.generate(**inputs, max_new_tokens=2)
        assert mustdrop.last_trace(model).tokens[:, 0].unique().tolist() == [64]
    assert torch.is_tensor(inputs["pixel_values"])


def _image():
    from PIL import Image

    from mustdrop.demo.scenes import SceneMaker

    return Image.fromarray(SceneMaker("heldout", seed=7).scene().image)


# ------------------------------------------------------------------------------------------------------------- commands


@pytest.fixture
def run(monkeypatch, capsys):
    """Exit code, output and errors of a command."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["mustdrop", *map(str, arguments)])
        for console in (cli.common.console, cli.common.errors):
            monkeypatch.setattr(console, "_width", 200)
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        return code, *capsys.readouterr()

    return call


def test_commands_take_the_address_of_a_recipe(own, run, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run("eval", "scenes", "--method", "own_recipes.py:FirstOne", "--keep", "8.334%", "--limit", 2)
    assert code == 0
    assert "own_recipes.py:FirstOne keep=8.334%" in out
    assert "48.00 ± 0.00" in out
    (folder,) = (tmp_path / "mustdrop-eval" / "scenes" / "bundled").iterdir()
    assert folder.name.startswith("own_recipes.py_FirstOne-0.0833")

    code, out, _ = run("tune", "--kl", 100, "--method", "own_recipes:FirstOne", "--keep", "50%", "--tokens", 2)
    assert code == 0
    assert "keep=50%" in out
    written = json.loads((tmp_path / "mustdrop-tune" / "config.json").read_text())
    assert (written["method"], written["knobs"]) == ("own_recipes:FirstOne", {"keep": 0.5})

    code, _, err = run("eval", "scenes", "--method", "own_recipes.py:Nothing")
    assert code == 2
    assert "there is no 'Nothing'" in err


def test_the_list_of_methods_shows_own_ones_and_what_is_broken(own, run):
    (own / "own_strange.py").write_text(
        "from mustdrop import Method, PrefillPruner, Recipe\n"
        "class Strange(Recipe):\n"
        "    needed: int\n"
        "    prefill: PrefillPruner = PrefillPruner(keep=0.5)\n"
        "    def build(self):\n"
        "        return Method(prefill=self.prefill)\n"
    )
    announce(own, strange="own_strange:Strange", ill="own_nothing")
    for arguments in (["methods"], ["methods", "--json"]):
        with pytest.warns(errors.BrokenMethodWarning, match="entry point ill"):
            code, out, _ = run(*arguments)
        assert code == 0
        assert "strange" in out
    assert json.loads(out)["strange"]["knobs"]["needed"] == "required"
