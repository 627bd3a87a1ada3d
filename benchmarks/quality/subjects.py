"""What is asked: a bundled model about scenes or pages, or tiny random models of any family about noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from mustdrop.adapters import registry
from mustdrop.demo.model import load, prompt
from mustdrop.demo.scenes import QUESTION_TYPES, SceneMaker
from mustdrop.demo.tasks import ABILITY, LEARNED, Question, Sample, TaskMaker
from mustdrop.demo.tasks import scene as scene_tasks
from mustdrop.demo.tasks.clip import FPS
from mustdrop.errors import UnsupportedModelError, did_you_mean
from tests.families import build, fixture_of, inputs_of

DEMO, PAGES = "bundled", "pages"
WORDS = 8  # length of the answers of random models, which never end
PROMPTS = 4  # per seed, for random models


@dataclass(frozen=True)
class Part:
    """Prompts that are answered together.

    Attributes:
        types: of the question of each prompt.
        scenes: of each prompt, which scene of the batch it is about.
        inputs: the model's inputs for prompts of these numbers, in this order and perhaps repeated.
        truths: the right answers' tokens with the one that ends them; None where nothing is right.
        new_tokens: after how many an answer is cut off.
        right: whether an answer other than the one in `truths` is right too: prompt and tokens -> yes or no.
    """

    types: list[str]
    scenes: list[int]
    inputs: Callable[[Sequence[int]], dict[str, Tensor]]
    truths: list[list[int]] | None
    new_tokens: int
    right: Callable[[int, Sequence[int]], bool] = lambda prompt, tokens: False

    @property
    def everything(self) -> dict[str, Tensor]:
        """The model's inputs for all prompts, each once."""
        return self.inputs(range(len(self.types)))


@dataclass(frozen=True)
class Batch:
    """Some scenes with all their questions.

    Attributes:
        name: unique.
        who: name of the model.
        model: who is asked.
        seed: of its scenes.
        scenes: how many.
        parts: its prompts. Those of one type about scenes have one length, so nothing is padded; those about pages are
            padded on the left.
    """

    name: str
    who: str
    model: Any
    seed: int
    scenes: int
    parts: list[Part]


class Subject(Protocol):
    """Batches, by name.

    Attributes:
        name: for file names.
        setting: for the result file: whatever decides what is measured.
    """

    name: str
    setting: dict[str, Any]

    def names(self) -> list[str]:
        """Names of all batches."""
        ...

    def batches(self, wanted: Sequence[str]) -> Iterator[Batch]:
        """The batches of these names, in the order of `names`."""
        ...


class Scenes:
    """The bundled model on scenes of a split, one question of each type about each."""

    def __init__(self, split: str, seeds: Sequence[int], scenes: int, batch: int, device: str) -> None:
        self.split, self.seeds, self.scenes, self.batch, self.device = split, seeds, scenes, batch, device
        self.name = f"{split}-{scenes}x{len(seeds)}"
        self.setting = {
            "models": [DEMO],
            "split": split,
            "seeds": list(seeds),
            "scenes_per_seed": scenes,
            "batch": batch,
            "types": list(QUESTION_TYPES),
            "abilities": dict(scene_tasks.ABILITY),
        }

    def _starts(self) -> list[tuple[int, int]]:
        return [(seed, start) for seed in self.seeds for start in range(0, self.scenes, self.batch)]

    def names(self) -> list[str]:
        return [f"{seed}:{start}" for seed, start in self._starts()]

    def batches(self, wanted: Sequence[str]) -> Iterator[Batch]:
        model, processor = load()
        model = model.to(self.device)  # type: ignore[arg-type]
        for seed in self.seeds:
            maker = SceneMaker(self.split, seed)
            for start in range(0, self.scenes, self.batch):
                count = min(self.batch, self.scenes - start)
                asked = [(scene.image, maker.questions(scene)) for scene in (maker.scene() for _ in range(count))]
                if f"{seed}:{start}" not in wanted:  # drawn all the same: later questions depend on it
                    continue
                pictures = [Image.fromarray(image) for image, _ in asked]
                by_type = zip(*(questions for _, questions in asked), strict=True)
                parts = [self._part(processor, pictures, questions) for questions in by_type]
                yield Batch(f"{seed}:{start}", DEMO, model, seed, count, parts)

    def _part(self, processor: Any, pictures: list[Image.Image], questions: Sequence[Any]) -> Part:
        texts = [prompt(processor, question.text) for question in questions]
        inputs = processor(text=texts, images=pictures, return_tensors="pt", padding=True).to(self.device)
        types = [question.type for question in questions]
        return Part(types, list(range(len(types))), _rows(dict(inputs)), _truths(processor, questions), new_tokens=12)


def _rows(inputs: dict[str, Tensor]) -> Callable[[Sequence[int]], dict[str, Tensor]]:
    """Rows of inputs that have one for each prompt."""
    return lambda rows: {name: value[list(rows)] for name, value in inputs.items()}


def _truths(processor: Any, questions: Sequence[Any]) -> list[list[int]]:
    words = processor.tokenizer
    return [[*words.convert_tokens_to_ids(q.answer.split()), words.eos_token_id] for q in questions]


class Samples:
    """The bundled Qwen3-VL on samples of every kind, one question of each type that it has learned and they admit."""

    def __init__(self, split: str, seeds: Sequence[int], samples: int, batch: int, device: str) -> None:
        self.split, self.seeds, self.samples, self.batch, self.device = split, seeds, samples, batch, device
        self.kinds = [kind for kind, types in LEARNED.items() if types]
        self.name = f"{PAGES}-{split}-{samples}x{len(seeds)}"
        self.setting = {
            "models": [PAGES],
            "split": split,
            "seeds": list(seeds),
            "scenes_per_seed": samples,  # of each kind
            "batch": batch,
            "types": [f"{kind}.{name}" for kind in self.kinds for name in LEARNED[kind]],
            "abilities": {f"{kind}.{name}": ABILITY[kind][name] for kind in self.kinds for name in LEARNED[kind]},
        }

    def names(self) -> list[str]:
        starts = range(0, self.samples, self.batch)
        return [f"{kind}:{seed}:{start}" for kind in self.kinds for seed in self.seeds for start in starts]

    def batches(self, wanted: Sequence[str]) -> Iterator[Batch]:
        model, processor = load(PAGES)
        model = model.to(self.device)
        for kind in self.kinds:
            for seed in self.seeds:
                maker = TaskMaker(kind, self.split, seed)
                for start in range(0, self.samples, self.batch):
                    count = min(self.batch, self.samples - start)
                    asked = [(sample, maker.questions(sample)) for sample in (maker.sample() for _ in range(count))]
                    name = f"{kind}:{seed}:{start}"
                    if name in wanted:  # all are drawn: later questions depend on it
                        yield Batch(name, PAGES, model, seed, count, [self._part(processor, kind, asked)])

    def _part(self, processor: Any, kind: str, asked: Sequence[tuple[Sample, Sequence[Question]]]) -> Part:
        rows = [(i, q) for i, (_, questions) in enumerate(asked) for q in questions if q.type in LEARNED[kind]]

        def inputs(wanted: Sequence[int]) -> dict[str, Tensor]:
            chosen = [(asked[rows[row][0]][0], rows[row][1]) for row in wanted]
            videos = int(chosen[0][0].video)
            texts = [prompt(processor, q.text, 0 if videos else len(sample.pictures), videos) for sample, q in chosen]
            media = {"videos" if videos else "images": [list(sample.pictures) for sample, _ in chosen]}
            return dict(processor(text=texts, padding=True, fps=FPS, **media).to(self.device))

        def right(row: int, tokens: Sequence[int]) -> bool:
            return rows[row][1].right(processor.decode(list(tokens), skip_special_tokens=True))

        questions = [question for _, question in rows]
        types = [f"{kind}.{question.type}" for question in questions]
        return Part(types, [i for i, _ in rows], inputs, _truths(processor, questions), new_tokens=12, right=right)


class Families:
    """Tiny models with random weights: fidelity alone, one prompt at a time."""

    def __init__(self, families: Sequence[str], seeds: Sequence[int], device: str) -> None:
        known = {name: adapter for name, adapter in registry().items() if adapter.available()}
        chosen = sorted(known) if "all" in families else list(families)
        for name in chosen:
            if name not in known:
                raise UnsupportedModelError(
                    f"there is no family {name!r} with the installed transformers. {did_you_mean(name, known)}"
                )
        self.adapters = {name: known[name] for name in chosen}
        self.seeds, self.device = seeds, device
        self.kinds = [(name, kind) for name, adapter in self.adapters.items() for kind in adapter.media]
        self.name = "all-families" if "all" in families else "-".join(chosen)
        self.setting = {
            "models": [f"{name}-{kind}" for name, kind in self.kinds],
            "seeds": list(seeds),
            "prompts_per_seed": PROMPTS,
            "types": ["noise"],
        }

    def names(self) -> list[str]:
        return [f"{name}-{kind}:{seed}" for name, kind in self.kinds for seed in self.seeds]

    def batches(self, wanted: Sequence[str]) -> Iterator[Batch]:
        for name, kind in self.kinds:
            left = [seed for seed in self.seeds if f"{name}-{kind}:{seed}" in wanted]
            if not left:
                continue
            adapter = self.adapters[name]
            model = build(adapter).to(self.device)
            for seed in left:
                parts = [self._part(adapter, model, kind, seed * PROMPTS + n) for n in range(PROMPTS)]
                yield Batch(f"{name}-{kind}:{seed}", f"{name}-{kind}", model, seed, PROMPTS, parts)

    def _part(self, adapter: Any, model: Any, kind: str, seed: int) -> Part:
        inputs = inputs_of(adapter, model, kind, [self._picture(fixture_of(adapter).sizes(kind)[0], seed)])
        inputs = {key: value.to(self.device) for key, value in inputs.items()}
        return Part(["noise"], [0], lambda rows: inputs, None, WORDS)

    @staticmethod
    def _picture(shape: tuple[int, ...], seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        coarse = torch.rand(*shape[:-3], 3, 3, 3, generator=generator).reshape(-1, 3, 3, 3)
        smooth = torch.nn.functional.interpolate(coarse, size=shape[-2:], mode="bilinear")
        return smooth.reshape(shape) + 0.1 * torch.rand(shape, generator=generator)
