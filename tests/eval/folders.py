"""Small data sets in exactly the files of the guide. The bundled model's scenes are the pictures."""

from __future__ import annotations

import base64
import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from mustdrop.demo.scenes import SceneMaker

SHORT = "\nAnswer the question using a single word or phrase."


@dataclass(frozen=True)
class Asked:
    image: Image.Image
    text: str
    answer: str


def asked(number: int, kind: str = "exist") -> list[Asked]:
    maker = SceneMaker("heldout", 5)
    found = []
    for _ in range(number):
        scene = maker.scene()
        question = maker.question(scene, kind)
        found.append(Asked(Image.fromarray(scene.image), question.text, question.answer))
    return found


def lines(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def value(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return path


def save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def refcoco(root: Path, name: str = "refcoco_val", number: int = 4) -> Path:
    rows = []
    maker = SceneMaker("heldout", 5)
    for i in range(number):
        scene = maker.scene()
        save(Image.fromarray(scene.image), root / "refcoco" / "coco" / f"{i}.png")
        thing = scene.objects[0]
        box = [thing.left, thing.top, thing.left + thing.size, thing.top + thing.size]
        size = {"width": scene.image.shape[1], "height": scene.image.shape[0]}
        rows.append({"image": f"coco/{i}.png", "sent": f"the {thing.colour} one", "bbox": box} | size)
    lines(root / "refcoco" / f"{name}.jsonl", rows)
    return root


def mme(root: Path, number: int = 4) -> Path:
    """Two categories: one with the texts beside the pictures, one with the two folders of the release."""
    rows = []
    for i, one in enumerate(asked(number)):
        category, place = ("existence", "") if i % 2 else ("artwork", "images/")
        name = f"{i:04}.png"
        save(one.image, root / "MME_Benchmark_release_version" / category / place / name)
        other = one.text.replace("a ", "an imaginary ")
        texts = root / "MME_Benchmark_release_version" / category / ("questions_answers_YN" if place else "")
        texts.mkdir(parents=True, exist_ok=True)
        (texts / f"{i:04}.txt").write_text(
            f"{one.text}  Please answer yes or no.\t{one.answer.capitalize()}\n{other} Please answer yes or no.\tNo\n"
        )
        rows += [
            {
                "question_id": f"{category}/{name}",
                "image": f"{category}/{place}{name}",
                "text": text,
                "category": category,
            }
            for text in (one.text, other + SHORT)
        ]
    lines(root / "llava_mme.jsonl", rows)
    return root


def textvqa(root: Path, number: int = 4) -> Path:
    rows, truths = [], []
    for i, one in enumerate(asked(number, "color2digit")):
        save(one.image, root / "train_images" / f"{i}.jpg")
        text = f"{one.text}\nReference OCR token: {one.answer}, x{SHORT}" if i % 2 else one.text + SHORT
        rows.append({"question_id": f"id{i}", "image": f"{i}.jpg", "text": text, "category": "default"})
        truths.append({"image_id": f"id{i}", "question": one.text.title(), "answers": [one.answer] * 9 + ["other"]})
    lines(root / "llava_textvqa_val_v051_ocr.jsonl", rows)
    value(root / "TextVQA_0.5.1_val.json", {"data": truths})
    return root


def pope(root: Path, number: int = 6, keys: bool = True) -> Path:
    rows, truths = [], {}
    for i, one in enumerate(asked(number)):
        category = ("random", "popular", "adversarial")[i * 3 // number]
        name = f"COCO_val2014_{i:012}.jpg"
        save(one.image, root / "val2014" / name)
        rows.append({"question_id": i, "image": name, "text": one.text, "category": category})
        more = {"question_id": i, "image": name, "text": one.text} if keys else {}
        truths.setdefault(category, []).append(more | {"label": one.answer})
    lines(root / "llava_pope_test.jsonl", rows)
    for category, labels in truths.items():
        lines(root / "coco" / f"coco_pope_{category}.json", labels)
    return root


def gqa(root: Path, number: int = 4) -> Path:
    rows, truths = [], {}
    for i, one in enumerate(asked(number, "locate")):
        save(one.image, root / "data" / "images" / f"n{i}.jpg")
        rows.append({"question_id": str(i), "image": f"n{i}.jpg", "text": one.text, "category": "default"})
        truths[str(i)] = {"answer": one.answer, "types": {"structural": ("query", "verify")[i % 2]}}
    lines(root / "llava_gqa_testdev_balanced.jsonl", rows)
    value(root / "data" / "testdev_balanced_questions.json", truths)
    return root


def scienceqa(root: Path, number: int = 5) -> Path:
    rows, problems = [], {}
    for i, one in enumerate(asked(number)):
        row = {"id": str(i), "conversations": [{"from": "human", "value": one.text}, {"from": "gpt", "value": "A"}]}
        if i % 2 == 0:
            save(one.image, root / "images" / "test" / str(i) / "image.png")
            row["image"] = f"{i}/image.png"
            row["conversations"][0]["value"] = f"<image>\n{one.text}"
        rows.append(row)
        problems[str(i)] = {"answer": i % 3, "choices": ["a", "b", "c"]}
    value(root / "llava_test_CQM-A.json", rows)
    value(root / "problems.json", problems)
    value(root / "pid_splits.json", {"test": [str(i) for i in range(number)]})
    return root


def mmbench(root: Path, number: int = 3, name: str = "mmbench_dev_20230712", answers: bool = True) -> Path:
    head = ["index", "question", "hint", "A", "B", "C", "D", *(["answer"] if answers else []), "category", "image"]
    head += ["source", "l2-category", "comment", "split"]
    root.mkdir(parents=True, exist_ok=True)
    with (root / f"{name}.tsv").open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, head, delimiter="\t", lineterminator="\n")
        table.writeheader()
        for i, one in enumerate(asked(number, "region2color")):
            buffer = io.BytesIO()
            one.image.save(buffer, "JPEG")
            for turn in range(2):
                row = {
                    "index": i + turn * 1_000_000,
                    "question": one.text + ('\nwith a "quote"\tand a tab' if i == 1 else ""),
                    "hint": "Look closely." if i == 0 else "",
                    "A": ("red", one.answer)[turn],
                    "B": (one.answer, "red")[turn],
                    "C": "none of these" if i else "nan",
                    "answer": "BA"[turn],
                    "category": "object",
                    "image": base64.b64encode(buffer.getvalue()).decode(),
                    "source": "scenes",
                    "l2-category": "attribute",
                    "split": "dev",
                }
                table.writerow({key: row.get(key, "") for key in head})
    return root


def vqav2(root: Path, number: int = 3) -> Path:
    rows = []
    for i, one in enumerate(asked(number, "count")):
        save(one.image, root / "test2015" / f"COCO_test2015_{i:012}.jpg")
        rows.append({"question_id": 100 + i, "image": f"COCO_test2015_{i:012}.jpg", "text": one.text})
    lines(root / "llava_vqav2_mscoco_test-dev2015.jsonl", rows)
    whole = [{"question_id": n, "image": "x.jpg", "text": "?"} for n in (99, *range(100, 100 + number), 999)]
    lines(root / "llava_vqav2_mscoco_test2015.jsonl", whole)
    return root


def vqav2_val(root: Path, number: int = 3) -> Path:
    questions, truths = [], []
    for i, one in enumerate(asked(number, "count")):
        save(one.image, root / "val2014" / f"COCO_val2014_{i:012}.jpg")
        questions.append({"question_id": 100 + i, "image_id": i, "question": one.text})
        truths.append({"question_id": 100 + i, "answers": [{"answer": one.answer, "answer_id": k} for k in range(10)]})
    value(root / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": questions})
    value(root / "v2_mscoco_val2014_annotations.json", {"annotations": truths})
    return root


def vizwiz(root: Path, number: int = 3) -> Path:
    rows = []
    for i, one in enumerate(asked(number, "count")):
        save(one.image, root / "test" / f"VizWiz_test_{i:08}.jpg")
        rows.append({"question_id": i, "image": f"VizWiz_test_{i:08}.jpg", "text": one.text})
    lines(root / "llava_test.jsonl", rows)
    return root


def vizwiz_val(root: Path, number: int = 3) -> Path:
    rows = []
    for i, one in enumerate(asked(number, "count")):
        save(one.image, root / "val" / f"VizWiz_val_{i:08}.jpg")
        said = [{"answer": one.answer, "answer_confidence": "yes"}] * 10
        rows.append({"image": f"VizWiz_val_{i:08}.jpg", "question": one.text, "answers": said})
    value(root / "val.json", rows)
    return root


def ocrbench(root: Path, number: int = 3) -> Path:
    rows = []
    for i, one in enumerate(asked(number, "color2digit")):
        save(one.image, root / "OCRBench_Images" / "scenes" / f"{i}.png")
        rows.append(
            {
                "dataset_name": "HME100k" if i == 2 else "IIIT5K",
                "id": 7,  # not unique in the real file either
                "image_path": f"scenes/{i}.png",
                "question": one.text,
                "answers": [one.answer, "x y"] if i % 2 else one.answer,
                "type": "Regular Text Recognition" if i < 2 else "Handwritten Mathematical Expression Recognition",
            }
        )
    value(root / "OCRBench.json", rows)
    return root


def msvd(root: Path, number: int = 2) -> Path:
    questions, truths = [], []
    for i, one in enumerate(asked(number, "color2digit")):
        frames = [one.image, *[other.image for other in asked(3)]]
        path = root / "videos" / f"vid{i}.gif"
        path.parent.mkdir(parents=True, exist_ok=True)
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=100)
        questions.append({"video_name": f"vid{i}", "question": one.text, "question_id": f"v_{i}"})
        truths.append({"answer": one.answer, "question_id": f"v_{i}"})
    value(root / "test_q.json", questions)
    value(root / "test_a.json", truths[::-1])
    return root
