"""The demo: questions about images, without and with pruning at several budgets."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import mustdrop
from mustdrop import clock
from mustdrop.budget import Keep
from mustdrop.errors import ConfigError, MustDropError
from mustdrop.loading import check_question, load_model, place
from mustdrop.pictures import read_picture
from mustdrop.trace import Trace

# Held-out scenes of the default demo, one question of each type about each. The first one is shown. Seed 0 was not
# chosen for its answers.
SCENE_SEED, SCENES = 0, 6
TIMED_PAIRS = 9
BASELINE = "none"


@dataclass(frozen=True)
class Row:
    """One setting of the demo.

    Attributes:
        method: name of the method.
        keep: budget as it was asked for; None for the unpruned model.
        answers: one per question.
        correct: how many are right; None where the right answer is not known.
        equal_tokens: mean over decoder layers of vision tokens processed, mean over the questions.
        tokens: per decoder layer, for the first question.
        flops: share of the unpruned model's FLOPs for the prompt, mean over the questions.
        kv_bytes: bytes of keys and values at the end of the first answer.
        kv_ratio: share of the unpruned model's KV bytes for the same answer.
        prefill_ratio: measured time of the whole prompt (encoder, pruning, prefill) over the unpruned model's, median
            of alternating pairs on the first question; None for the unpruned model.
    """

    method: str
    keep: Keep | None
    answers: list[str]
    correct: int | None
    equal_tokens: float
    tokens: list[int]
    flops: float
    kv_bytes: float
    kv_ratio: float
    prefill_ratio: float | None


@dataclass(frozen=True)
class Item:
    """One question about an image, and its answer where it is known."""

    image: Image.Image
    question: str
    truth: str | None = None


@dataclass(frozen=True)
class Subject:
    """What the demo asks: a model with its processor, and questions. Those about the first image are shown."""

    name: str
    model: Any
    processor: Any
    items: tuple[Item, ...]

    def __post_init__(self) -> None:
        for item in self.items:
            check_question(self.processor, item.question)

    @property
    def shown(self) -> tuple[Item, ...]:
        """The questions about the first image."""
        return tuple(item for item in self.items if item.image is self.items[0].image)

    def inputs(self, item: Item) -> Any:
        """The model inputs for one question."""
        content = [{"type": "image"}, {"type": "text", "text": item.question}]
        text = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = self.processor(text=text, images=item.image, return_tensors="pt")
        return inputs.to(self.model.device, self.model.dtype)

    def answer(self, item: Item) -> str:
        """The model's greedy answer."""
        inputs = self.inputs(item)
        out = self.model.generate(**inputs, max_new_tokens=32, do_sample=False)
        text = self.processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return str(text).strip()


def bundled_subject(image: Path | None, questions: Sequence[str], device: str | None = None) -> Subject:
    """The bundled model, on held-out scenes with one question of each type unless given otherwise."""
    from mustdrop.demo.model import load
    from mustdrop.demo.scenes import SceneMaker

    if image is not None and not questions:
        raise ConfigError("--image needs at least one --question: only for the bundled scenes the questions are known.")
    given = None if image is None else read_picture(image)
    model, processor = load()
    model.to(place(device))
    maker = SceneMaker("heldout", SCENE_SEED)
    items: list[Item] = []
    for _ in range(1 if questions else SCENES):
        scene = maker.scene()
        picture = given or Image.fromarray(scene.image)
        asked = (
            [(q.text, q.answer) for q in maker.questions(scene)] if not questions else [(q, None) for q in questions]
        )
        items += [Item(picture, text, truth) for text, truth in asked]
    return Subject("bundled model", model, processor, tuple(items))


def hub_subject(
    name: str, image: Path | None, questions: Sequence[str], dtype: str, device: str | None = None
) -> Subject:
    """A model of a hub or folder, on the user's own image."""
    if image is None or not questions:
        raise ConfigError("--model needs --image FILE and at least one --question TEXT.")
    picture = read_picture(image)
    model, processor = load_model(name, device=device, dtype=dtype)
    return Subject(name, model, processor, tuple(Item(picture, question) for question in questions))


def run(
    subject: Subject, budgets: Sequence[Keep], methods: Sequence[str], advance: Any = None
) -> tuple[list[Row], Trace]:
    """Ask everything at every setting.

    Args:
        subject: model, image, questions.
        budgets: budgets to try.
        methods: methods to try at each budget.
        advance: called with no argument after each setting, for a progress bar.

    Returns:
        One row per setting, the unpruned model first, and the trace of the first method at the smallest budget, first
        question.
    """
    rows, shown = [_row(subject, BASELINE, None)[0]], None
    for keep in budgets:
        for method in methods:
            row, trace = _row(subject, method, keep)
            rows.append(row)
            if method == methods[0]:
                shown = trace
            if advance is not None:
                advance()
    if shown is None:
        raise MustDropError("the demo needs at least one budget and one method.")
    return rows, shown


def _row(subject: Subject, method: str, keep: Keep | None) -> tuple[Row, Trace]:
    settings = {} if keep is None else {"keep": keep}
    answers, traces = [], []
    with mustdrop.patched(subject.model, method, **settings):
        for item in subject.items:
            answers.append(subject.answer(item))
            traces.append(mustdrop.trace(subject.model))
    known = [(a, item.truth) for a, item in zip(answers, subject.items, strict=True) if item.truth is not None]
    first = traces[0]
    return (
        Row(
            method=method,
            keep=keep,
            answers=answers,
            correct=sum(a == t for a, t in known) if known else None,
            equal_tokens=statistics.mean(float(t.equal_tokens[0]) for t in traces),
            tokens=first.tokens[:, 0].tolist(),
            flops=statistics.mean(t.flops.ratio for t in traces),
            kv_bytes=first.kv_bytes.actual,
            kv_ratio=first.kv_bytes.ratio,
            prefill_ratio=None if keep is None else _prefill_ratio(subject, method, settings),
        ),
        first,
    )


def _prefill_ratio(subject: Subject, method: str, settings: dict[str, Any]) -> float:
    """Median over alternating pairs of (patched time / unpatched time) for the whole prompt."""
    inputs = subject.inputs(subject.items[0])

    def once() -> None:
        with torch.inference_mode():
            subject.model(**inputs, logits_to_keep=1)

    def plain() -> float:
        return clock.seconds(subject.model.device, once)

    def pruned() -> float:
        with mustdrop.patched(subject.model, method, **settings):
            return plain()

    return clock.median_ratio(TIMED_PAIRS, plain, pruned)


def record(subject: Subject, rows: Sequence[Row]) -> dict[str, Any]:
    """The result file's content."""
    from mustdrop.provenance import provenance

    return {
        **provenance(SCENE_SEED),
        "model": subject.name,
        "scenes": len({id(item.image) for item in subject.items}),
        "questions": [item.question for item in subject.items],
        "truths": [item.truth for item in subject.items],
        "shown": len(subject.shown),
        "timed_pairs": TIMED_PAIRS,
        "rows": [asdict(row) for row in rows],
    }
