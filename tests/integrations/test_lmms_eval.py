"""The real lmms-eval runs mustdrop_hf on tasks defined here, over scenes of the bundled model.

`nox -s lmms_eval` installs it; without it these tests are skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
from PIL import Image

pytest.importorskip("lmms_eval")
datasets = pytest.importorskip("datasets")

from lmms_eval import evaluator  # noqa: E402
from lmms_eval.models import get_model  # noqa: E402
from lmms_eval.tasks import TaskManager  # noqa: E402
from loguru import logger  # noqa: E402

import mustdrop  # noqa: E402
from mustdrop import errors  # noqa: E402
from mustdrop.demo.model import load, prompt  # noqa: E402
from mustdrop.demo.scenes import COLOURS, SceneMaker  # noqa: E402

ROWS = 7
MODEL = "pretrained=bundled,device=cpu"
COMMON = """
dataset_path: {data}
dataset_kwargs:
  load_from_disk: true
test_split: test
doc_to_visual: !function functions.visuals
doc_to_text: !function functions.text
doc_to_target: {target}
metric_list:
  - metric: {metric}
    aggregation: mean
    higher_is_better: true
metadata:
  - version: 0.0
"""
GENERATION = """
output_type: generate_until
generation_kwargs:
  until: ["\\n\\n"]
  max_new_tokens: 6
  temperature: 0
  image_aspect_ratio: original
"""
FUNCTIONS = """
def visuals(doc):
    return [] if doc["image"] is None else [doc["image"].convert("RGB")]

def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]

def rounds(doc, *args, **kwargs):
    return doc["question"]
"""


@pytest.fixture(scope="module")
def rows():
    """Questions for a colour about one scene each; the last but one has no image."""
    maker = SceneMaker("heldout", 3)
    found = []
    for i in range(ROWS):
        scene = maker.scene()
        question = maker.question(scene, "region2color")
        image = None if i == ROWS - 2 else Image.fromarray(scene.image)
        found.append({"image": image, "question": question.text, "answer": question.answer})
    return found


@pytest.fixture(scope="module")
def tasks(rows, tmp_path_factory):
    """A folder of task files, as `--include_path` takes it."""
    folder = tmp_path_factory.mktemp("tasks")
    colours = list(COLOURS)
    given = [{**row, "gold": colours.index(row["answer"])} for row in rows]
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "question": datasets.Value("string"),
            "answer": datasets.Value("string"),
            "gold": datasets.Value("int64"),
        }
    )
    table = datasets.Dataset.from_list(given, features=features)
    datasets.DatasetDict({"test": table}).save_to_disk(str(folder / "data"))
    (folder / "functions.py").write_text(textwrap.dedent(FUNCTIONS))
    data = folder / "data"
    written = COMMON.format(data=data, target="answer", metric="exact_match")
    (folder / "scenes.yaml").write_text(f"task: scenes\n{GENERATION}{written}")
    several = GENERATION.replace("generate_until", "generate_until_multi_round")
    (folder / "scenes_rounds.yaml").write_text(f"task: scenes_rounds\n{several}{written}")
    chosen = COMMON.format(data=data, target="gold", metric="acc")
    choice = f"output_type: multiple_choice\ndoc_to_choice: {json.dumps(colours)}\n"
    (folder / "scenes_choice.yaml").write_text(f"task: scenes_choice\n{choice}{chosen}")
    return folder


def evaluate(tasks, name, arguments, **options):
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return evaluator.simple_evaluate(
        model="mustdrop_hf", model_args=f"{MODEL},{arguments}", tasks=[name], task_manager=manager, **options
    )


def said(result, name):
    samples = sorted(result["samples"][name], key=lambda sample: sample["doc_id"])
    return [sample["filtered_resps"][0] for sample in samples]


def by_hand(rows, keep):
    """What the patched model answers, one question at a time."""
    model, processor = load()
    answers = []
    with mustdrop.patched(model, "mustdrop", keep=keep):
        for row in rows:
            text = prompt(processor, row["question"])
            text = text if row["image"] is not None else text.replace("<image> ", "")
            images = {} if row["image"] is None else {"images": row["image"]}
            given = processor(text=text, return_tensors="pt", **images)
            out = model.generate(**given, max_new_tokens=6, do_sample=False)
            answers.append(processor.decode(out[0, given["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return answers


@pytest.mark.parametrize("simple", [False, True])
def test_generation_in_batches_gives_the_answers_of_single_calls_in_order(simple, rows, tasks):
    result = evaluate(tasks, "scenes", "method=mustdrop,keep=64", batch_size=3, force_simple=simple)
    assert said(result, "scenes") == by_hand(rows, 64)
    right = sum(a == row["answer"] for a, row in zip(said(result, "scenes"), rows, strict=True))
    assert result["results"]["scenes"]["exact_match,none"] == pytest.approx(right / ROWS)
    assert right >= ROWS - 3  # the one without an image is a guess


def test_unpruned_and_pruned_runs_count_their_tokens(tasks):
    kind = get_model("mustdrop_hf")
    for arguments, low, high in (("method=none", 576, 576), ("method=mustdrop,keep=64", 63, 64)):
        model = kind.create_from_arg_string(f"{MODEL},{arguments}", {"batch_size": 2})
        evaluator.simple_evaluate(
            model=model,
            tasks=["scenes"],
            task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        )
        kept = model.answerer.kept
        assert kept.prompts == ROWS - 1
        assert low <= kept.equal / kept.prompts <= high
        assert not hasattr(model.answerer, "model")  # given back before scoring


def test_multiple_choice_by_loglikelihood(rows, tasks):
    result = evaluate(tasks, "scenes_choice", "method=mustdrop,keep=128", batch_size=4, force_simple=True)
    assert result["results"]["scenes_choice"]["acc,none"] >= (ROWS - 3) / ROWS


def test_tasks_of_several_rounds_are_refused_by_name(tasks):
    with pytest.raises(errors.UnsupportedOptionError, match="generate_until_multi_round"):
        evaluate(tasks, "scenes_rounds", "method=none", batch_size=1, force_simple=True)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "text"),
    [
        ("method=mustdorp", {}, errors.UnknownMethodError, "'mustdrop'"),
        ("method=fastv,windows=3", {}, errors.UnknownKnobError, "windows"),
        ("keep=0", {}, errors.BudgetError, "positive"),
        ("layers=[2,4", {}, errors.ConfigError, "in brackets"),
        ("dtype=float8", {}, errors.ConfigError, "bfloat16"),
        ("min_pixels=4096", {}, errors.UnsupportedOptionError, "min_pixels: the"),
        ("max_pixels=4096", {}, errors.UnsupportedOptionError, "max_pixels: the"),
        ("total_pixels=4096", {}, errors.UnsupportedOptionError, "total_pixels: the"),
        ("max_pixels=0", {}, errors.ConfigError, "max_pixels=0"),
        ("fps=2", {}, errors.UnsupportedOptionError, "fps=2"),
        ("keep=64", {"batch_size": "auto"}, errors.ConfigError, "batch_size='auto'"),
    ],
)
def test_wrong_arguments_are_named(arguments, options, error, text):
    with pytest.raises(error, match=text):
        get_model("mustdrop_hf").create_from_arg_string(f"{MODEL},{arguments}", options)


def test_knobs_that_are_lists_or_none():
    model = get_model("mustdrop_hf").create_from_arg_string(f"{MODEL},keep=200,layers=[2,4],window=none", {})
    method = model.model._mustdrop.method
    assert method.prefill.layers == (2, 4)
    assert method.vision.window is None


def test_settings_that_generate_does_not_know_are_left_out_aloud():
    kind = get_model("mustdrop_hf", force_simple=True)
    model = kind.create_from_arg_string(f"{MODEL},method=none", {})
    given = {"until": "stop", "image_aspect_ratio": "original"}
    said = []
    sink = logger.add(said.append, format="{message}")
    for _ in range(2):
        options, until = model._options(SimpleNamespace(args=("", given)))
    logger.remove(sink)
    assert options == {"do_sample": False, "max_new_tokens": 1024, "num_beams": 1}
    assert until == ("stop",)
    assert "image_aspect_ratio='original'" in said[0]
    assert len(said) == 1  # once


@pytest.mark.parametrize("launcher", [(), ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2")])
def test_its_own_command_line_in_one_process_and_in_two(launcher, tasks, tmp_path):
    command = [sys.executable, *launcher, "-m", "lmms_eval", "--model", "mustdrop_hf", "--tasks", "scenes"]
    command += ["--model_args", f"{MODEL},method=mustdrop,keep=64", "--include_path", str(tasks)]
    command += ["--output_path", str(tmp_path), "--limit", "5", "--batch_size", "2"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "tokens per layer of 576.0" in done.stderr + done.stdout
    (written,) = tmp_path.rglob("*_results.json")
    assert json.loads(written.read_text())["results"]["scenes"]["exact_match,none"] > 0.5
