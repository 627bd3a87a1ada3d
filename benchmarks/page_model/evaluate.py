"""Measures the bundled Qwen3-VL on held-out samples, the way a user runs it: processor, then `generate()`."""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from mustdrop.demo.model import load, prompt
from mustdrop.demo.tasks import ABILITIES, KINDS, Question, Sample, TaskMaker
from mustdrop.demo.tasks.clip import FPS

RESULT = Path(__file__).parent.parent / "results" / "page_model.json"
BEGIN, END = "<!-- begin: accuracy -->", "<!-- end: accuracy -->"


def wilson(right: int, number: int) -> tuple[float, float]:
    """The 95 % Wilson interval of a share."""
    z, share = 1.959964, right / number
    scale = 1 + z * z / number
    middle = (share + z * z / (2 * number)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / number + z * z / (4 * number * number))
    return max(0.0, middle - half), min(1.0, middle + half)


def inputs_of(processor: Any, sample: Sample, questions: Sequence[Question]) -> Any:
    """Model inputs for several questions about one sample."""
    videos = int(sample.video)
    texts = [prompt(processor, q.text, 0 if videos else len(sample.pictures), videos) for q in questions]
    media = {"videos" if videos else "images": [list(sample.pictures)] * len(texts)}
    return processor(text=texts, padding=True, fps=FPS, **media)


@torch.inference_mode()
def measure(kind: str, split: str, seed: int, questions: int) -> list[tuple[Question, str]]:
    """Questions of one kind, one of each type that a sample admits, and what the model says."""
    model, processor = load("pages")
    maker = TaskMaker(kind, split, seed)
    said: list[tuple[Question, str]] = []
    while len(said) < questions:
        sample = maker.sample()
        asked = maker.questions(sample)
        inputs = inputs_of(processor, sample, asked)
        output = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
        said += zip(asked, processor.batch_decode(output, skip_special_tokens=True), strict=True)
    return said


def _row(right: Sequence[bool]) -> dict[str, float]:
    low, high = wilson(sum(right), len(right))
    share = float(np.mean(right))
    return {"questions": len(right), "accuracy": round(share, 4), "low": round(low, 4), "high": round(high, 4)}


def _chance(said: Sequence[Question]) -> float:
    """What always giving the commonest answer of each type would score."""
    kinds = {question.type for question in said}
    best = [Counter(q.answer for q in said if q.type == kind).most_common(1)[0][1] for kind in kinds]
    return round(sum(best) / len(said), 4)


def evaluate(split: str, seed: int, questions: int, threads: int) -> None:
    """Measures every kind; what is held out is written to the result file and into the README beside this file."""
    torch.set_num_threads(threads)
    start, kinds = time.time(), {}
    right_of: dict[str, list[bool]] = {}
    for kind in KINDS:
        said = measure(kind, split, seed, questions)
        types: dict[str, list[bool]] = {}
        for question, answer in said:
            right = question.right(answer)
            types.setdefault(question.type, []).append(right)
            right_of.setdefault(question.ability, []).append(right)
        everything = _row([right for row in types.values() for right in row])
        chance = _chance([question for question, _ in said])
        kinds[kind] = {**everything, "commonest": chance, "types": {name: _row(types[name]) for name in sorted(types)}}
        print(kind, json.dumps(kinds[kind]), flush=True)
    result = {
        "what": "share of right answers of the bundled Qwen3-VL, all vision tokens",
        "split": split,
        "seed": seed,
        "dtype": "float32",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "numpy": np.__version__,
        },
        "host_cores": os.cpu_count(),
        "wall_s": round(time.time() - start, 1),
        "kinds": kinds,
        "abilities": {name: _row(right_of[name]) for name in ABILITIES if name in right_of},
    }
    if split != "heldout":
        return
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    readme = Path(__file__).with_name("README.md")
    before, rest = readme.read_text(encoding="utf-8").split(BEGIN)
    readme.write_text(f"{before}{BEGIN}\n{table(result)}\n{END}{rest.split(END)[1]}", encoding="utf-8")


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = ["| kind | type | right | 95 % interval | questions |", "|--|--|--|--|--|"]
    for kind, row in result["kinds"].items():
        lines.append(_line(f"**{kind}** | all", row))
        lines += [_line(f" | {name}", inner) for name, inner in row["types"].items()]
    lines += ["", "| ability | right | 95 % interval | questions |", "|--|--|--|--|"]
    lines += [_line(name, row) for name, row in result["abilities"].items()]
    versions = result["versions"]
    note = (
        f"The {result['split']} split, seed {result['seed']}: one question of each type that a sample admits; all "
        f"vision tokens, {result['dtype']}, greedy decoding; transformers {versions['transformers']}, torch "
        f"{versions['torch']}."
    )
    return "\n".join([*lines, "", note])


def _line(name: str, row: dict[str, Any]) -> str:
    return f"| {name} | {row['accuracy']:.3f} | {row['low']:.3f} to {row['high']:.3f} | {row['questions']} |"
