"""Every benchmark from its files, in the guide's own formats, to its answer file and scores, with the bundled model."""

from __future__ import annotations

import json

import pytest

from eval import folders
from mustdrop.errors import ConfigError, DataFileError
from mustdrop.eval.benchmark import LETTER, LETTER_CN, Answer, Item, Source
from mustdrop.eval.benchmarks import benchmarks, find, refcoco
from mustdrop.eval.result import EvalResult
from mustdrop.eval.run import evaluate
from mustdrop.eval.settings import Settings

# benchmark -> (makes the folder, settings, questions); the bundled model knows no suffix, so few tokens are enough
RUNS = {
    "mme": (folders.mme, {}, 8),
    "textvqa": (folders.textvqa, {}, 4),
    "pope": (folders.pope, {}, 6),
    "gqa": (folders.gqa, {}, 4),
    "scienceqa": (folders.scienceqa, {}, 5),
    "mmbench": (folders.mmbench, {}, 6),
    "mmbench-cn": (lambda root: folders.mmbench(root, 2, "mmbench_dev_cn_20231003", answers=False), {}, 4),
    "vqav2": (folders.vqav2, {}, 3),
    "vqav2 val": (folders.vqav2_val, {"split": "val"}, 3),
    "vizwiz": (folders.vizwiz, {}, 3),
    "vizwiz val": (folders.vizwiz_val, {"split": "val"}, 3),
    "ocrbench": (folders.ocrbench, {}, 3),
    "refcoco": (folders.refcoco, {}, 4),
    "refcoco+": (lambda root: folders.refcoco(root, "refcoco+_testB") / "refcoco", {"split": "testB"}, 4),
    "refcocog": (lambda root: folders.refcoco(root, "refcocog_test") / "refcoco", {"split": "test"}, 4),
}


def run(name, tmp_path, **settings):
    make, more, _ = RUNS[name]
    return evaluate(
        Settings(
            benchmark=name.split()[0],
            data=make(tmp_path / "data"),
            out=tmp_path / "out",
            knobs={"keep": 192},
            workers=0,
            max_new_tokens=6,
            **(more | settings),
        )
    )


@pytest.mark.parametrize("name", RUNS)
def test_from_files_to_result(name, tmp_path):
    if name.startswith("mmbench"):
        pytest.importorskip("openpyxl")
    result = run(name, tmp_path)
    assert result.data.asked == result.data.questions == RUNS[name][2]
    assert result.failed == []
    assert 191 < result.tokens.equal.mean <= 192
    assert (result.score is None) == (name in ("vqav2", "vizwiz", "mmbench-cn"))
    assert EvalResult.read(tmp_path / "out") == result
    first = (tmp_path / "out" / "answers.jsonl").read_text().splitlines()
    assert len(first) == RUNS[name][2]
    questions = [json.loads(line)["question_id"] for line in first]
    source = Source(tmp_path / "data", split=RUNS[name][1].get("split"))
    benchmark = find(name.split()[0])
    items = benchmark.items(source, benchmark.place(source))
    assert questions == [item.id for item in items]
    assert all(item.asked.endswith(benchmark.suffix) for item in items if item.text != item.asked)
    for path in result.answers:
        assert (tmp_path / "out" / path).stat().st_size


def test_every_benchmark_is_tried():
    videos = {"tgif", "msvd", "msrvtt", "activitynet"}
    assert {name.split()[0] for name in RUNS} | videos | {"scenes"} == set(benchmarks())


def test_mme_scores_what_the_model_says(tmp_path):
    result = run("mme", tmp_path)
    tables = sorted((tmp_path / "out" / "mme").glob("*.txt"))
    assert [path.stem for path in tables] == ["artwork", "existence"]
    cells = [line.split("\t") for path in tables for line in path.read_text().splitlines()]
    assert all(
        len(row) == 4 and row[1].endswith(" Please answer yes or no.") and row[2] in ("Yes", "No") for row in cells
    )
    right = [row[3].lower()[:4].startswith(row[2].lower()) for row in cells]
    pairs = [all(right[i : i + 2]) for i in range(0, len(right), 2)]
    by_hand = sum(
        100 * sum(right[i : i + 4]) / 4 + 100 * sum(pairs[i // 2 : i // 2 + 2]) / 2 for i in range(0, len(right), 4)
    )
    assert result.scores["total"] == pytest.approx(by_hand)
    assert result.scores["total"] > 100  # the bundled model knows its scenes


def test_scienceqa_mixes_questions_with_and_without_a_picture(tmp_path):
    result = run("scienceqa", tmp_path, batch_size=4)
    assert result.tokens.items == 3
    prompts = [json.loads(line)["prompt"] for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert [prompt.startswith("<image>\n") for prompt in prompts] == [True, False, True, False, True]
    assert all(prompt.endswith(LETTER) for prompt in prompts)


def test_mmbench_table(tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    run("mmbench", tmp_path)
    rows = list(openpyxl.load_workbook(tmp_path / "out" / "mmbench_dev_20230712.xlsx").active.values)
    assert rows[0] == ("index", "question", "A", "B", "C", "D", "prediction", "answer", "split")
    said = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert [row[6] or "" for row in rows[1:]] == [line["text"] for line in said]
    assert [row[0] for row in rows[1:]] == [line["question_id"] for line in said]
    assert rows[1][4] is None  # "nan" is no choice
    assert said[0]["prompt"].startswith("Look closely.\n")
    assert said[0]["options"] == ["red", rows[1][3]]
    assert said[2]["option_char"] == ["A", "B", "C"]
    assert '"quote"' in said[2]["prompt"]
    assert not said[0]["prompt"].endswith(LETTER)


def test_mmbench_in_chinese_asks_in_chinese(tmp_path):
    root = folders.mmbench(tmp_path, 1, "mmbench_dev_cn_20231003")
    source = Source(root)
    (first, _) = find("mmbench-cn").items(source, find("mmbench-cn").place(source))
    assert first.asked == first.text + LETTER_CN


def test_the_upload_of_vqav2_has_the_whole_test_set(tmp_path):
    run("vqav2", tmp_path)
    upload = json.loads((tmp_path / "out" / "upload.json").read_text())
    assert [row["question_id"] for row in upload] == [99, 100, 101, 102, 999]
    assert [row["answer"] == "" for row in upload] == [True, False, False, False, True]


def test_pope_labels_go_by_place_without_keys(tmp_path):
    for keys in (True, False):
        root = folders.pope(tmp_path / str(keys), keys=keys)
        benchmark, source = find("pope"), Source(root)
        truths = [item.truth for item in benchmark.items(source, benchmark.place(source))]
        assert truths == [one.answer for one in folders.asked(6)]


def test_pope_of_another_version_is_refused(tmp_path):
    root = folders.pope(tmp_path)
    path = root / "coco" / "coco_pope_random.json"
    path.write_text(path.read_text() + '{"label": "yes"}\n')
    with pytest.raises(DataFileError, match=r"3 labels for 2 questions.*another version"):
        find("pope").items(Source(root), find("pope").place(Source(root)))


def test_videos_are_read(tmp_path):
    root = folders.msvd(tmp_path / "data")
    source = Source(root, frames=3)
    items = find("msvd").items(source, find("msvd").place(source))
    assert [(item.id, item.truth) for item in items] == [
        (f"v_{i}", one.answer) for i, one in enumerate(folders.asked(2, "color2digit"))
    ]
    assert items[0].medium.load().shape == (3, 192, 192, 3)


def test_all_benchmarks_in_one_folder(tmp_path):
    folders.gqa(tmp_path / "gqa")
    source = Source(tmp_path)
    assert len(find("gqa").items(source, find("gqa").place(source))) == 4


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("mme", "llava_mme.jsonl"),
        ("mme", "MME_Benchmark_release_version"),
        ("textvqa", "TextVQA_0.5.1_val.json"),
        ("pope", "coco/coco_pope_popular.json"),
        ("gqa", "data/testdev_balanced_questions.json"),
        ("scienceqa", "pid_splits.json"),
        ("vqav2", "test2015"),
        ("ocrbench", "OCRBench.json"),
    ],
)
def test_a_missing_file_is_named_with_its_place_and_its_guide(name, file, tmp_path):
    root = RUNS[name][0](tmp_path / "data")
    (root / file).rename(tmp_path / "gone")
    with pytest.raises(DataFileError) as caught:
        run_only(name, root)
    message = str(caught.value)
    assert file in message
    assert str(root / file) in message
    assert "Evaluation.md#" in message or "OCRBench/README.md" in message
    assert "--data" in message


def run_only(name, root):
    source = Source(root)
    return find(name).items(source, find(name).place(source))


def test_a_file_in_place_of_its_folder(tmp_path):
    root = folders.gqa(tmp_path)
    with pytest.raises(DataFileError, match="is a file: give the folder"):
        run_only("gqa", root / "llava_gqa_testdev_balanced.jsonl")


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ({"question_id": "9", "image": None, "text": "q"}, "image is a NoneType"),
        ({"question_id": "9", "image": 7, "text": ["q"]}, "image is a int, text is a list"),
        ({"question_id": ["9"], "image": "x", "text": "q"}, "question_id is a list"),
    ],
)
def test_a_line_with_values_of_other_types_is_named(broken, reason, tmp_path):
    root = folders.gqa(tmp_path)
    path = root / "llava_gqa_testdev_balanced.jsonl"
    path.write_text(json.dumps(broken) + "\n" + path.read_text())
    folder = find("gqa").place(Source(root))
    assert len(find("gqa").items(Source(root), folder)) == 4
    assert [(failure.name, failure.reason) for failure in folder.broken] == [(f"{path.name} line 1", reason)]


def test_scienceqa_names_an_answer_that_is_no_choice(tmp_path):
    root = folders.scienceqa(tmp_path)
    problems = json.loads((root / "problems.json").read_text())
    problems["1"]["answer"], problems["2"]["answer"] = 7, "B"
    folders.value(root / "problems.json", problems)
    folder = find("scienceqa").place(Source(root))
    assert [item.id for item in find("scienceqa").items(Source(root), folder)] == ["0", "3", "4"]
    assert [failure.name for failure in folder.broken] == ["1", "2"]


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_a_limit_takes_what_is_scored_as_one_together(seed, tmp_path):
    pytest.importorskip("openpyxl")
    result = run("mme", tmp_path / "mme", limit=5, seed=seed)
    said = [json.loads(line)["question_id"] for line in (tmp_path / "mme/out/answers.jsonl").read_text().splitlines()]
    assert said[0::2] == said[1::2]  # two pictures, each with both of its questions
    assert result.data.asked == len(said) == 4
    run("mmbench", tmp_path / "bench", limit=4, seed=seed)
    lines = [json.loads(line) for line in (tmp_path / "bench/out/answers.jsonl").read_text().splitlines()]
    turns = [line["question_id"] % 1_000_000 for line in lines]
    assert len(turns) == 4
    assert len(set(turns)) == 2
    assert run("mme", tmp_path / "one", limit=1, seed=seed).data.asked == 1  # no picture has less than two


def test_no_such_split_or_benchmark(tmp_path):
    with pytest.raises(ConfigError, match="no split 'dev'"):
        run("vqav2", tmp_path, split="dev")
    with pytest.raises(ValueError, match="Did you mean 'textvqa'"):
        find("textvqua")


@pytest.mark.parametrize(
    ("text", "coordinates", "box"),
    [
        ("[0.1, 0.25, 0.5, 0.75]", "auto", (20, 25, 100, 75)),
        ("[[100, 250, 500, 750]]", "auto", (20, 25, 100, 75)),
        ('{"bbox_2d": [20, 25, 100, 75], "label": "the 2nd one"}', "pixels", (20, 25, 100, 75)),
        ("from 0.5, 0.75 to 0.1, 0.25", "shares", (20, 25, 100, 75)),
        ("[0, 0, 1, 1]", "thousandths", (0, 0, 0.2, 0.1)),
        ("it is on the left", "auto", None),
        ("0.1, 0.2", "auto", None),
    ],
)
def test_boxes_are_read_from_answers(text, coordinates, box):
    found = refcoco.predicted(text, (200, 100), coordinates)
    assert found == (None if box is None else pytest.approx(box))


def test_a_box_is_right_from_half_of_the_union_on():
    assert refcoco.overlap((0, 0, 10, 10), (0, 0, 10, 10)) == 1
    assert refcoco.overlap((0, 0, 10, 10), (20, 0, 30, 10)) == refcoco.overlap((5, 5, 5, 5), (5, 5, 5, 5)) == 0
    assert refcoco.overlap((0, 0, 10, 10), (0, 0, 10, 20)) == 0.5
    item = Item(0, "", None, "", ((0, 0, 10, 20), (100, 100), "auto"))
    benchmark = find("refcoco")
    texts = {"[0, 0, 0.1, 0.1]": 1.0, "[0, 0, 0.09, 0.1]": 0.0, "nowhere": 0.0, "": 0.0}
    answers = [Answer(item, text) for text in texts]
    assert [benchmark.credit(answer) for answer in answers] == list(texts.values())
    assert benchmark.scores(answers) == {"accuracy": 25.0, "without a box": 50.0}


def test_what_refcoco_cannot_use_is_said(tmp_path):
    make = Source(folders.refcoco(tmp_path), coordinates="percent")
    benchmark = find("refcoco")
    with pytest.raises(ConfigError, match="--coordinates percent"):
        benchmark.items(make, benchmark.place(make))
    file = tmp_path / "refcoco" / "refcoco_val.jsonl"
    file.write_text(file.read_text() + '{"image": "x", "sent": "y", "bbox": [1, 2], "width": 3, "height": 4}\n')
    source = Source(tmp_path)
    folder = benchmark.place(source)
    assert len(benchmark.items(source, folder)) == 4
    assert "four numbers" in folder.broken[0].reason
