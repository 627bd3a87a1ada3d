"""Measures the demo model on held-out scenes, the way a user runs it: processor, then `generate()`.

    python benchmarks/demo_model/evaluate.py

Writes `benchmarks/results/demo_model.json` and the table in the README beside this file.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image

from mustdrop.demo.model import load, prompt
from mustdrop.demo.scenes import QUESTION_TYPES, SPLITS, SceneMaker

HERE = Path(__file__).parent
RESULT = HERE.parent / "results" / "demo_model.json"
BEGIN, END = "<!-- begin: accuracy -->", "<!-- end: accuracy -->"


def wilson(right: int, number: int) -> tuple[float, float]:
    """The 95 % Wilson interval of a share, which stays within 0 to 1 however good the model is."""
    z = 1.959964
    share = right / number
    scale = 1 + z * z / number
    middle = (share + z * z / (2 * number)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / number + z * z / (4 * number * number))
    return max(0.0, middle - half), min(1.0, middle + half)


@torch.inference_mode()
def measure(split: str, seed: int, scenes: int, batch: int) -> np.ndarray:
    """Whether each answer is right, word for word: (scenes, question types)."""
    model, processor = load()
    maker = SceneMaker(split, seed)
    right = []
    for start in range(0, scenes, batch):
        texts, images, answers = [], [], []
        for _ in range(min(batch, scenes - start)):
            scene = maker.scene()
            for question in maker.questions(scene):
                texts.append(prompt(processor, question.text))
                images.append(Image.fromarray(scene.image))
                answers.append(question.answer)
        inputs = processor(text=texts, images=images, return_tensors="pt", padding=True)
        output = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
        given = processor.batch_decode(output, skip_special_tokens=True)
        right += [said == answer for said, answer in zip(given, answers, strict=True)]
        if start % 80 == 0:
            print(f"{start + batch} scenes, {np.mean(right):.3f}", flush=True)
    return np.array(right).reshape(scenes, len(QUESTION_TYPES))


def summary(right: np.ndarray) -> dict[str, dict[str, float]]:
    """Accuracy and interval of each type, and of their mean (from the scatter between scenes)."""
    rows = {}
    for name, column in zip(QUESTION_TYPES, right.T, strict=True):
        low, high = wilson(int(column.sum()), len(column))
        rows[name] = {"accuracy": float(column.mean()), "low": low, "high": high}
    per_scene = right.mean(1)
    mean, half = per_scene.mean(), 1.96 * per_scene.std(ddof=1) / math.sqrt(len(right))
    rows["mean"] = {"accuracy": float(mean), "low": float(mean - half), "high": float(mean + half)}
    return {name: {key: round(value, 4) for key, value in row.items()} for name, row in rows.items()}


def table(result: dict) -> str:
    lines = ["| question type | exact match | 95 % interval |", "|--|--|--|"]
    for name, row in result["types"].items():
        lines.append(f"| {name} | {row['accuracy']:.3f} | {row['low']:.3f} to {row['high']:.3f} |")
    note = (
        f"{result['scenes']} scenes of the {result['split']} split (seed {result['seed']}), one question of "
        f"each type about each; all 576 vision tokens, {result['dtype']}, greedy decoding; transformers "
        f"{result['versions']['transformers']}, torch {result['versions']['torch']}."
    )
    return "\n".join([*lines, "", note])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", choices=SPLITS, default="heldout", help="anything but heldout is printed only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", type=int, default=400)
    parser.add_argument("--batch", type=int, default=8, help="scenes at a time")
    options = parser.parse_args()

    start = time.time()
    right = measure(options.split, options.seed, options.scenes, options.batch)
    result = {
        "what": "exact match of the demo model, all vision tokens",
        "split": options.split,
        "seed": options.seed,
        "scenes": options.scenes,
        "questions": int(right.size),
        "dtype": "float32",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "numpy": np.__version__,
        },
        "host_cores": os.cpu_count(),
        "wall_s": round(time.time() - start, 1),
        "types": summary(right),
    }
    print(json.dumps(result, indent=2))
    if options.split != "heldout":
        return
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    readme = HERE / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    readme.write_text(f"{before}{BEGIN}\n{table(result)}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
