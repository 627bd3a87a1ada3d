"""VLMEvalKit's own base class and its own inference loop run our wrapper.

`nox -s vlmevalkit` installs the package; without it these tests are skipped. Importing all of VLMEvalKit imports every
benchmark and every model that it knows, and needs what they need. So three of its modules are empty here: the package's
own `__init__`, `dataset` and `config`. `smp`, `utils`, `vlm/base.py` and `inference.py` are the real ones.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from PIL import Image

import mustdrop
from mustdrop.demo.model import load, prompt
from mustdrop.demo.scenes import SceneMaker

pandas = pytest.importorskip("pandas")
FOUND = importlib.util.find_spec("vlmeval")
if FOUND is None:
    pytest.skip("VLMEvalKit is not installed", allow_module_level=True)
ROOT = Path(FOUND.submodule_search_locations[0])
EMPTY = {
    "vlmeval": {},
    "vlmeval.dataset": {"DATASET_TYPE": lambda name, **_: "VQA"},
    "vlmeval.vlm": {},
    "vlmeval.config": {"supported_VLM": {}},
}


@pytest.fixture(scope="module")
def kit():
    """The inference loop, and our wrapper on the real base class."""
    patch = pytest.MonkeyPatch()
    for name, content in EMPTY.items():
        module = ModuleType(name)
        module.__path__ = [str(ROOT.joinpath(*name.split(".")[1:]))]
        vars(module).update(content)
        patch.setitem(sys.modules, name, module)
    yield SimpleNamespace(
        inference=importlib.import_module("vlmeval.inference"),
        wrapper=importlib.import_module("mustdrop.integrations.vlmevalkit"),
        config=sys.modules["vlmeval.config"],
    )
    patch.undo()
    for name in [
        name for name in sys.modules if name.startswith("vlmeval") or name.endswith("integrations.vlmevalkit")
    ]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Image files and questions; the last one has no image."""
    folder, maker, found = tmp_path_factory.mktemp("images"), SceneMaker("heldout", 5), []
    for i in range(5):
        scene = maker.scene()
        asked = maker.question(scene, "region2color")
        Image.fromarray(scene.image).save(folder / f"{i}.png")
        found.append({"index": i, "image": str(folder / f"{i}.png"), "question": asked.text, "answer": asked.answer})
    return [*found[:4], {**found[4], "image": ""}]


class Scenes:
    """As much of a benchmark as the loop asks for."""

    dataset_name = "Scenes"

    def __init__(self, rows):
        self.data = pandas.DataFrame(rows)

    def __len__(self):
        return len(self.data)

    def dump_image(self, line):
        return [line["image"]]

    def build_prompt(self, line):
        image = [{"type": "image", "value": line["image"]}] if line["image"] else []
        return [*image, {"type": "text", "value": line["question"]}]


def by_hand(questions, keep):
    model, processor = load()
    answers = {}
    with mustdrop.patched(model, "mustdrop", keep=keep):
        for row in questions:
            text = prompt(processor, row["question"])
            text = text if row["image"] else text.replace("<image> ", "")
            images = {"images": Image.open(row["image"])} if row["image"] else {}
            given = processor(text=text, return_tensors="pt", **images)
            out = model.generate(**given, max_new_tokens=6, do_sample=False)
            said = processor.decode(out[0, given["input_ids"].shape[1] :], skip_special_tokens=True).strip()
            answers[row["index"]] = said
    return answers


def test_its_loop_gets_the_answers_of_single_calls(kit, questions, tmp_path):
    import pickle

    kit.config.supported_VLM["bundled-64"] = lambda: kit.wrapper.MustDropVLM(
        "bundled", keep=64, max_new_tokens=6, device="cpu"
    )
    file = tmp_path / "out.pkl"
    model = kit.inference.infer_data("bundled-64", "bundled-64", str(tmp_path), Scenes(questions), str(file))
    assert pickle.loads(file.read_bytes()) == by_hand(questions, 64)
    assert model.answerer.kept.prompts == 4
    assert model.answerer.kept.equal / 4 == pytest.approx(64, abs=1)


def test_every_form_of_a_prompt(kit, questions):
    model = kit.wrapper.MustDropVLM("bundled", "none", max_new_tokens=6, device="cpu")
    first = questions[0]
    parts = [{"type": "image", "value": first["image"]}, {"type": "text", "value": first["question"]}]
    assert model.generate(parts) == first["answer"]
    assert model.generate([first["image"], first["question"]], dataset="Scenes") == first["answer"]
    assert model.chat([{"role": "user", "content": [first["image"], first["question"]]}]) == first["answer"]
    assert isinstance(model.generate(first["question"]), str)
    turns = kit.wrapper._turns([{"type": "text", "value": "be short", "role": "system"}, *parts])
    assert [turn["role"] for turn in turns] == ["system", "user"]
    assert [part["type"] for part in turns[1]["content"]] == ["image", "text"]


def test_wrong_settings_are_named(kit):
    with pytest.raises(mustdrop.errors.UnknownKnobError, match="window"):
        kit.wrapper.MustDropVLM("bundled", keep=64, windo=3, device="cpu")
    for limits in ({"min_pixels": 4096}, {"max_pixels": 4096}, {"total_pixels": 4096}, {"fps": 2}):
        with pytest.raises(mustdrop.errors.UnsupportedOptionError, match=f"{next(iter(limits))}[=:]"):
            kit.wrapper.MustDropVLM("bundled", device="cpu", **limits)
