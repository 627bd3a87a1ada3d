"""Questions from data sets of `datasets`, with the columns of the sets on the hub."""

from __future__ import annotations

import pytest

from eval import folders
from mustdrop.errors import ConfigError, DataFileError
from mustdrop.eval.benchmarks import find
from mustdrop.eval.result import EvalResult
from mustdrop.eval.run import evaluate
from mustdrop.eval.settings import Settings

datasets = pytest.importorskip("datasets")


def rows(kind, **columns):
    """Column name -> function of (place, question)."""
    return [{name: make(i, one) for name, make in columns.items()} for i, one in enumerate(folders.asked(3, kind))]


def image(i, one):
    return one.image


def text(i, one):
    return one.text


# the columns of the sets as they lie on the hub
HUB = {
    "mme": ("exist", {"question_id": lambda i, o: f"count/{i}.png", "image": image, "question": text,
                      "answer": lambda i, o: o.answer.title(), "category": lambda i, o: "count"}),
    "textvqa": ("color2digit", {"image_id": lambda i, o: f"id{i}", "question_id": lambda i, o: i, "question": text,
                                "image": image, "ocr_tokens": lambda i, o: ["a", "b"],
                                "answers": lambda i, o: [o.answer] * 10}),
    "pope": ("exist", {"id": lambda i, o: str(i), "question_id": lambda i, o: str(i), "question": text,
                       "answer": lambda i, o: o.answer, "image": image, "category": lambda i, o: "random"}),
    "gqa": ("locate", {"id": lambda i, o: str(i), "question": text, "answer": lambda i, o: o.answer, "image": image}),
    "scienceqa": ("exist", {"image": lambda i, o: o.image if i else None, "question": text,
                            "hint": lambda i, o: "", "choices": lambda i, o: ["yes", "no"], "answer": lambda i, o: 1}),
    "mmbench": ("exist", {"index": lambda i, o: i, "question": text, "hint": lambda i, o: "nan",
                          "answer": lambda i, o: "A", "A": lambda i, o: "x", "B": lambda i, o: "y",
                          "C": lambda i, o: "nan", "D": lambda i, o: "nan",
                          "category": lambda i, o: "c", "image": image, "source": lambda i, o: "s",
                          "L2-category": lambda i, o: "l", "comment": lambda i, o: "nan", "split": lambda i, o: "dev"}),
    "vqav2": ("count", {"question_id": lambda i, o: i, "question": text, "image": image,
                        "answers": lambda i, o: [{"answer": o.answer, "answer_id": k} for k in range(10)]}),
    "vizwiz": ("count", {"question_id": lambda i, o: f"{i}.jpg", "question": text, "image": image,
                         "answers": lambda i, o: [o.answer] * 10}),
    "ocrbench": ("color2digit", {"dataset": lambda i, o: "IIIT5K", "question": text, "image": image,
                                 "question_type": lambda i, o: "Regular Text Recognition",
                                 "answer": lambda i, o: [o.answer]}),
}  # fmt: skip


@pytest.mark.parametrize("name", HUB)
def test_from_rows_to_result(name, tmp_path):
    if name == "mmbench":
        pytest.importorskip("openpyxl")
    kind, columns = HUB[name]
    features = None
    data = datasets.Dataset.from_list(rows(kind, **columns))
    if not isinstance(data.features["image"], datasets.Image):
        features = data.features.copy()
        features["image"] = datasets.Image()
        data = datasets.Dataset.from_list(rows(kind, **columns), features=features)
    datasets.DatasetDict({"test": data}).save_to_disk(str(tmp_path / "set"))
    result = evaluate(
        Settings(
            name, dataset=str(tmp_path / "set"), out=tmp_path / "run", knobs={"keep": 192}, workers=0, max_new_tokens=5
        )
    )
    assert result.failed == []
    assert result.data.asked == 3
    assert result.data.split == "test"
    assert result.score is not None
    assert EvalResult.read(tmp_path / "run") == result


def test_splits_and_columns_are_named(tmp_path):
    both = {"a": datasets.Dataset.from_list([{"x": 1}]), "b": datasets.Dataset.from_list([{"x": 1}])}
    datasets.DatasetDict(both).save_to_disk(str(tmp_path))
    with pytest.raises(ConfigError, match="has the splits a, b: say which with --split"):
        evaluate(Settings("mme", dataset=str(tmp_path)))
    with pytest.raises(ConfigError, match="needs a column question, and the data set has x"):
        evaluate(Settings("mme", dataset=str(tmp_path), split="a"))
    with pytest.raises(DataFileError, match="cannot be loaded"):
        evaluate(Settings("mme", dataset=str(tmp_path / "nowhere" / "at" / "all")))
    with pytest.raises(ConfigError, match="give one"):
        evaluate(Settings("mme", dataset="x", data=tmp_path))


def test_every_benchmark_with_columns_is_tried():
    from mustdrop.eval.benchmarks import benchmarks

    assert {name for name in benchmarks() if find(name).columns} == set(HUB) | {"mmbench-cn"}
