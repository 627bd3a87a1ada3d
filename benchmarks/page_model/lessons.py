"""What one step of training sees: samples with questions, and what every vision token is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.page_model.network import (
    MERGE,
    PATCH,
    TEXT_WIDTH,
    TOKEN_ID,
    Grid,
    Prefix,
    grid_of,
    packed_logits,
    pictures_of,
    prefix_of,
    rms_norm,
    to_patches,
    vision_features,
)
from mustdrop.demo.drawing import COLOURS, SHAPES, background, object_mask, to_uint8
from mustdrop.demo.lettering import CHARACTERS, character_mask, number_of_fonts
from mustdrop.demo.scenes import CELLS, REGIONS
from mustdrop.demo.tasks import ABILITY, BINS, TYPES, Question, Sample, TaskMaker
from mustdrop.demo.tasks.common import INKS, PLACES, THINGS, Mark, place, put
from mustdrop.demo.tasks.page import DARK_INKS, Page

IGNORE = -100
UNIT = PATCH * MERGE
END = ("assistant",)

#: The words that each vision token is asked to be close to, in groups of which one is right.
GROUPS = {
    "kind": (*THINGS, "nothing"),
    "ink": (*INKS, "nothing"),
    "x": PLACES[:BINS],
    "y": PLACES[BINS:],
    "region": REGIONS,
}

#: How often each type of question is asked, where it differs from once in each round.
WEIGHT = {
    "read_ink": 5, "read_place": 5, "read_field": 4, "follows": 3, "larger": 4, "cell": 4, "row": 3, "higher": 2,
    "count": 2, "first": 2, "last": 3, "go": 4, "often": 2, "when": 4, "change": 3, "which": 3, "describe": 2,
}  # fmt: skip


class Batch(NamedTuple):
    """Samples of one kind and size, with coded questions."""

    samples: list[Sample]
    ids: Tensor
    target: Tensor
    types: list[list[str]]


def encode(question: Question) -> tuple[list[int], list[int]]:
    """Token ids of the question with its answer, and for each token the next one to predict (answer only)."""
    asked = [TOKEN_ID[word] for word in (*question.text.split(), *END)]
    answer = [TOKEN_ID[word] for word in (*question.answer.split(), "<|im_end|>")]
    return asked + answer, [IGNORE] * (len(asked) - 1) + answer + [IGNORE]


def coded(questions: Sequence[Sequence[Question]]) -> tuple[Tensor, Tensor]:
    """Ids and targets, (B, Q, length), padded to the longest and with questions repeated to the most."""
    rows = [[encode(question) for question in row] for row in questions]
    length = max(len(ids) for row in rows for ids, _ in row)
    ids = torch.full((len(rows), len(rows[0]), length), TOKEN_ID["<|endoftext|>"])
    target = torch.full_like(ids, IGNORE)
    for i, row in enumerate(rows):
        for j, (word, following) in enumerate(row):
            ids[i, j, : len(word)] = torch.tensor(word)
            target[i, j, : len(word)] = torch.tensor(following)
    return ids, target


def ask_many(maker: TaskMaker, sample: Sample, number: int, rng: np.random.Generator) -> list[Question]:
    """So many questions, of all types that the sample admits, in a random order of types."""
    names = [name for name in TYPES[maker.kind] for _ in range(WEIGHT.get(name, 1))]
    asked: list[Question] = []
    while len(asked) < number:
        for index in rng.permutation(len(names)):
            question = maker.question(sample, names[index])
            if question is not None:
                asked.append(question)
    return asked[:number]


def draw(kind: str, split: str, seed: int, *, tokens: int, questions: int, area: int, moments: int | None) -> Batch:
    """A batch of one kind, of about `tokens` vision tokens in all, in pictures of at most `area` tokens each."""
    maker, rng = TaskMaker(kind, split, seed), np.random.default_rng((seed, 5))
    small = [size for size in maker.sizes() if size[0] * size[1] <= area * UNIT**2] or [maker.sizes()[0]]
    size = small[int(rng.integers(len(small)))]
    each = size[0] * size[1] // UNIT**2
    if kind == "videos":
        moments = moments or int(rng.integers(3, 7))
        each *= moments
    each *= 2 if kind == "changes" else 1
    samples = [maker.sample(size, moments) for _ in range(max(3, round(tokens / (each + 12 * questions / 2))))]
    asked = [ask_many(maker, sample, questions, rng) for sample in samples]
    return Batch(samples, *coded(asked), [[question.type for question in row] for row in asked])


def windows(seed: int, number: int, side: int) -> list[Sample]:
    """Square windows with one thing in each, for the vision tower to begin with.

    A window of one vision token (16 pixels) shows its middle, and a larger one all of it.
    """
    rng = np.random.default_rng((seed, 6))
    grounds = [background(rng) for _ in range(4)]
    made = []
    for _ in range(number):
        light = rng.random() < 0.3
        top, left = (int(edge) for edge in rng.integers(0, 192 - 48, 2))
        canvas = grounds[int(rng.integers(4))][top : top + 48, left : left + 48].copy()
        if light:
            canvas = 1.0 - 0.35 * canvas
        names = list(DARK_INKS if light else COLOURS)
        ink = names[int(rng.integers(len(names)))]
        if rng.random() < 0.65:
            kind = CHARACTERS[int(rng.integers(len(CHARACTERS)))]
            font = int(rng.integers(number_of_fonts("train")))
            mask = character_mask(rng, kind, int(rng.integers(13, 18)), font, "train")
        else:
            kinds = (*CHARACTERS[:10], *SHAPES)
            kind = kinds[int(rng.integers(len(kinds)))]
            mask = object_mask(rng, kind, "train")
        size = len(mask)
        middle = (UNIT - size) // 2  # of the token, which begins at 16
        low, high = (middle - 3, middle + 4) if side == UNIT else (0, side - size + 1)
        y, x = (UNIT + int(edge) for edge in rng.integers(low, high, 2))
        mark = put(rng, canvas, mask, ink, y, x) if side == UNIT else None
        if mark is None:
            y, x = y - UNIT, x - UNIT
            mark = put(rng, canvas, mask, ink, y, x)
            picture = canvas[:side, :side]
        else:
            picture = canvas[UNIT : 2 * UNIT, UNIT : 2 * UNIT]
            mark = replace(mark, top=max(0, y - UNIT), left=max(0, x - UNIT), height=UNIT, width=UNIT)
            mark = replace(mark, top=0, left=0)
        made.append(Sample("windows", (to_uint8(picture),), (replace(mark, kind=kind),), None))
    return made


def labels(samples: list[Sample], grid: Grid) -> dict[str, Tensor]:
    """For each group, the right word (N, tokens) of every vision token of every picture."""
    pairs = 2 if samples[0].video else 1
    per = len(samples[0].pictures) // pairs
    shape = (len(samples) * per, grid.rows, grid.columns)
    kind = np.full(shape, GROUPS["kind"].index("nothing"))
    ink = np.full(shape, GROUPS["ink"].index("nothing"))
    before = np.full(shape, IGNORE)
    best = np.full(shape, 0.05)
    height, width = samples[0].size
    x = np.broadcast_to((np.arange(grid.columns) * UNIT + UNIT // 2) * BINS // width, shape).copy()
    y = np.broadcast_to((np.arange(grid.rows)[:, None] * UNIT + UNIT // 2) * BINS // height, shape).copy()
    for index, sample in enumerate(samples):
        known_before = _before(sample)
        for mark in sample.marks:
            if sample.video and mark.picture % 2:
                continue  # the two frames of a patch hardly differ
            picture = index * per + mark.picture // pairs
            rows = slice(mark.top // UNIT, (mark.top + mark.height - 1) // UNIT + 1)
            columns = slice(mark.left // UNIT, (mark.left + mark.width - 1) // UNIT + 1)
            cover = _cover(mark.top, mark.height, rows)[:, None] * _cover(mark.left, mark.width, columns)
            cover /= min(mark.height, UNIT) * min(mark.width, UNIT)
            where = (picture, rows, columns)
            more, clear = cover > best[where], cover >= 0.4
            best[where] = np.maximum(best[where], cover)
            known = np.where(clear, THINGS.index(mark.kind), IGNORE)
            kind[where] = np.where(more, known, kind[where])
            ink[where] = np.where(more, np.where(clear, INKS.index(mark.ink), IGNORE), ink[where])
            earlier = known_before.get(mark, IGNORE)
            before[where] = np.where(more, np.where(clear, earlier, IGNORE), before[where])
            across, down = place(mark, sample.size)
            x[where], y[where] = np.where(more & clear, across, x[where]), np.where(more & clear, down, y[where])
    region = (y * CELLS // BINS) * CELLS + x * CELLS // BINS
    found = {"kind": kind, "ink": ink, "x": x, "y": y, "region": region, "before": before}
    return {name: torch.from_numpy(value).flatten(1) for name, value in found.items()}


def _before(sample: Sample) -> dict[Mark, int]:
    """Of each mark of a page, the kind of the one before it in its line, or "nothing"."""
    if not isinstance(sample.facts, Page):
        return {}
    lines = [(*([key] if key else []), *marks) for key, marks in sample.facts.lines]
    found = {}
    for line in (*lines, sample.facts.columns):
        for earlier, mark in zip((None, *line), line, strict=False):
            found[mark] = GROUPS["kind"].index(earlier.kind if earlier else "nothing")
    return found


def _cover(start: int, size: int, cells: slice) -> np.ndarray:
    """How many pixels of each cell [start, start + size) covers."""
    edge = np.arange(cells.start, cells.stop) * UNIT
    return np.clip(np.minimum(edge + UNIT, start + size) - np.maximum(edge, start), 0, None).astype(float)


class Naming(nn.Module):
    """Asks every vision token which word of each group it is close to: one temperature a group, and no more.

    In the decoder it is asked what stands before it in its line too, of a linear map of its state.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(len(GROUPS)))
        self.maps = nn.ModuleDict({"before": nn.Linear(TEXT_WIDTH, TEXT_WIDTH, bias=False)})
        self._ids = {name: torch.tensor([TOKEN_ID[word] for word in words]) for name, words in GROUPS.items()}

    def forward(
        self, features: Tensor, words: Tensor, target: dict[str, Tensor], places: bool = True
    ) -> tuple[Tensor, dict[str, float]]:
        """The loss, in which tokens that show something weigh as much as all others, and accuracies of the former."""
        normed, total, metrics = rms_norm(features), features.new_zeros(()), {}
        shown = (target["kind"] != IGNORE) & (target["kind"] != GROUPS["kind"].index("nothing"))
        empty = target["kind"] == GROUPS["kind"].index("nothing")
        for index, (name, ids) in enumerate(self._ids.items()):
            logits = F.linear(normed, words[ids]).float() * self.scale[index]
            if places is False and name in ("x", "y", "region"):
                continue
            each = F.cross_entropy(logits.transpose(1, 2), target[name], reduction="none", ignore_index=IGNORE)
            weight = {"kind": 2.0, "ink": 0.7, "x": 0.4, "y": 0.4, "region": 0.3}[name]
            total = total + weight * each[shown].mean()
            if empty.any():
                total = total + 0.5 * weight * each[empty].mean()
            metrics[f"token_{name}"] = (logits.detach().argmax(-1) == target[name])[shown].float().mean().item()
        return total, metrics

    def before(self, states: Tensor, words: Tensor, target: Tensor) -> tuple[Tensor, dict[str, float]]:
        """The same of what stands before each vision token in its line, from its states (B, tokens, width).

        Its next character is then what has this one before it: so a line is read.
        """
        known = target != IGNORE
        if not known.any():
            return states.new_zeros(()), {}
        mapped = rms_norm(self.maps["before"](rms_norm(states[known])))
        logits = F.linear(mapped, words[self._ids["kind"]]).float() * self.scale[0]
        right = (logits.detach().argmax(-1) == target[known]).float().mean().item()
        return F.cross_entropy(logits, target[known]), {"token_before": right}


def see(model: nn.Module, samples: list[Sample]) -> tuple[Tensor, list[Tensor], Grid]:
    """Features of every picture of some samples of one size."""
    grid = grid_of(samples[0])
    return *vision_features(model.model.visual, to_patches(pictures_of(samples)), grid), grid


def answer(
    model: nn.Module, batch: Batch, features: Tensor, deep: list[Tensor], grid: Grid
) -> tuple[Tensor, Tensor, Tensor, Prefix]:
    """Logits for all questions of a batch, what they attend to in the first layer, states of vision tokens, the prefix.

    The states (B, vision tokens, width) are those after `STATES` decoder layers, in the order of the features.
    """
    first = batch.samples[0]
    pictures = len(first.pictures) // (2 if first.video else 1)
    prefix = prefix_of(grid, pictures, first.video)
    number = len(batch.samples)
    deep = [level.reshape(number, -1, level.shape[-1]) for level in deep]
    features = features.reshape(number, -1, features.shape[-1])
    logits, shares, states = packed_logits(model, features, deep, batch.ids, prefix)
    vision = prefix.source >= 0
    return logits, shares, states[:, vision][:, prefix.source[vision].argsort()], prefix


class Pointing:
    """Asks words to attend to what they name, in two heads of the first decoder layer.

    This stands in for the alignment of words and pictures that a real model brings with it: without it, to find
    something by its colour or its place stays at chance for long.
    """

    THING_HEAD, REGION_HEAD = 0, 2

    def __init__(self) -> None:
        self._kind = torch.full((len(TOKEN_ID),), -1)
        self._ink, self._region = self._kind.clone(), self._kind.clone()
        for table, words in ((self._kind, THINGS), (self._ink, INKS), (self._region, REGIONS)):
            table[[TOKEN_ID[word] for word in words]] = torch.arange(len(words))

    def __call__(self, batch: Batch, shares: Tensor, prefix: Prefix, target: dict[str, Tensor]) -> Tensor:
        """Mean of minus the log share of attention on what is meant."""
        number, ids = len(batch.samples), batch.ids.flatten(1)
        seen = {name: value.reshape(number, -1)[:, None] for name, value in target.items()}
        shown = (seen["kind"] >= 0) & (seen["kind"] != GROUPS["kind"].index("nothing"))
        kind, ink, region = (table[ids][..., None] for table in (self._kind, self._ink, self._region))
        meant = ((seen["kind"] == kind) & (kind >= 0)) | ((seen["ink"] == ink) & (ink >= 0))
        losses = [self._missed(shares[:, self.THING_HEAD], meant, prefix)]
        losses.append(self._absent(shares[:, self.THING_HEAD], (kind[..., 0] >= 0) & ~meant.any(-1)))
        if batch.samples[0].kind == "scenes":
            meant = (seen["region"] == region) & (region >= 0) & shown
            losses.append(self._missed(shares[:, self.REGION_HEAD], meant, prefix))
        return torch.stack(losses).sum()

    @staticmethod
    def _missed(shares: Tensor, meant: Tensor, prefix: Prefix) -> Tensor:
        vision = shares[..., prefix.source >= 0]
        asked = meant.any(-1)
        found = vision.masked_fill(~meant, float("-inf"))[asked].logsumexp(-1)
        return -found.mean() if asked.any() else shares.new_zeros(())

    @staticmethod
    def _absent(shares: Tensor, absent: Tensor) -> Tensor:
        """What names nothing in the picture attends to the prompt's first token, which tells that it is not there."""
        return -shares[..., 0][absent].mean() if absent.any() else shares.new_zeros(())


def exact(logits: Tensor, target: Tensor) -> Tensor:
    """Whether every token of an answer is right (B, Q): the same as greedy decoding giving that answer."""
    return ((logits.argmax(-1) == target) | (target == IGNORE)).all(-1)


def by_type(right: Tensor, types: list[list[str]]) -> dict[str, list[float]]:
    """The answers of each type, right (1) or wrong (0)."""
    found: dict[str, list[float]] = {}
    for row, names in zip(right.tolist(), types, strict=True):
        for value, name in zip(row, names, strict=True):
            found.setdefault(name, []).append(float(value))
    return found


__all__ = ["ABILITY"]
