"""RefCOCO, RefCOCO+ and RefCOCOg: where is what a phrase describes? What pruning does to positions shows here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from mustdrop.errors import ConfigError, did_you_mean
from mustdrop.eval.benchmark import Answer, Benchmark, Item, Source, percent, write_answers, write_json
from mustdrop.eval.data_files import Folder
from mustdrop.eval.media import Picture

_ASKED = "Please provide the bounding box coordinate of the region this sentence describes: {}"
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_SIDES = 4
_ENOUGH = 0.5  # of the union that both boxes share
#: What an answer's numbers count: shares of the sides (LLaVA), thousandths (InternVL, Qwen3-VL), pixels (Qwen2.5-VL).
COORDINATES: Mapping[str, float | None] = {"shares": 1.0, "thousandths": 1000.0, "pixels": None}
AUTO = "auto"

Box = tuple[float, float, float, float]


def predicted(text: str, size: tuple[float, float], coordinates: str = AUTO) -> Box | None:
    """The box in an answer, in pixels: its first four numbers are left, top, right, bottom.

    Args:
        text: what the model said.
        size: width and height of the picture.
        coordinates: what the numbers count, of `COORDINATES`; "auto" takes numbers up to 1 for shares, others for
            thousandths.

    Returns:
        None where there are not four numbers.
    """
    numbers = [float(number) for number in _NUMBER.findall(text.replace("bbox_2d", ""))][:_SIDES]
    if len(numbers) < _SIDES:
        return None
    if coordinates == AUTO:
        coordinates = "shares" if max(numbers) <= 1 else "thousandths"
    whole = COORDINATES[coordinates]
    left, top, right, bottom = (n * size[i % 2] / (whole or size[i % 2]) for i, n in enumerate(numbers))
    return min(left, right), min(top, bottom), max(left, right), max(top, bottom)


def overlap(one: Box, other: Box) -> float:
    """Intersection over union of two boxes."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(0.0, width) * max(0.0, height)
    union = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)) - shared
    return shared / union if union > 0 else 0.0


class RefCOCO(Benchmark):
    """A box is right where it shares half of the union with the true one."""

    name = "refcoco"
    title = "RefCOCO"
    folder = "refcoco"
    section = "data-preparation"
    guide = "https://github.com/QwenLM/Qwen-VL/blob/master/eval_mm/EVALUATION.md"
    splits: ClassVar[tuple[str, ...]] = ("val", "testA", "testB")
    max_new_tokens = 64
    general = "position"
    metric = "share of boxes with an intersection over union of at least 0.5"

    def file_items(self, source: Source, folder: Folder) -> list[Item]:
        """From one line for each phrase: `image`, `sent`, `bbox` (left, top, right, bottom), `width`, `height`.

        Raises:
            ConfigError: coordinates that there are not.
        """
        if source.coordinates not in (AUTO, *COORDINATES):
            known = (AUTO, *COORDINATES)
            raise ConfigError(f"--coordinates {source.coordinates}: {did_you_mean(source.coordinates, known)}")
        file = folder.find(f"{self.name}_{self.split(source)}.jsonl", what="phrases and boxes")
        found = []
        for number, row in enumerate(folder.jsonl(file, ("image", "sent", "bbox", "width", "height"))):
            try:
                left, top, right, bottom = map(float, row["bbox"])
                size = float(row["width"]), float(row["height"])
            except (TypeError, ValueError):
                reason = f"bbox should be four numbers, width and height one each; got {row['bbox']!r}"
                folder.reject(f"{file.name} {row['image']}", reason)
                continue
            asked = _ASKED.format(row["sent"])
            truth = (left, top, right, bottom), size, source.coordinates
            found.append(Item(number, asked, Picture(self._picture(folder, file, str(row["image"]))), asked, truth))
        return found

    def _picture(self, folder: Folder, file: Path, name: str) -> Path:
        """Files name their pictures from the folder of all data (`data/coco/...`) or from their own."""
        places = [root / name for root in (file.parent, *folder.roots, *(root.parent for root in folder.roots))]
        return next((place for place in places if place.is_file()), places[0])

    def credit(self, answer: Answer) -> float:
        """Whether the box is the right one."""
        truth, size, coordinates = answer.item.truth
        box = None if answer.failed else predicted(answer.text, size, coordinates)
        return float(box is not None and overlap(box, truth) >= _ENOUGH)

    def scores(self, answers: Sequence[Answer]) -> dict[str, float]:
        """The share of right boxes, and of answers without a box."""
        credits, missing = [self.credit(answer) for answer in answers], []
        for answer in answers:
            _, size, coordinates = answer.item.truth
            missing.append(float(answer.failed or predicted(answer.text, size, coordinates) is None))
        return {"accuracy": percent(credits), "without a box": percent(missing)}

    def write(self, answers: Sequence[Answer], out: Path, model: str) -> list[Path]:
        """LLaVA's answer file, and the boxes in pixels beside the true ones."""
        rows: list[dict[str, Any]] = []
        for answer in answers:
            truth, size, coordinates = answer.item.truth
            rows.append({"answer": predicted(answer.text, size, coordinates), "gt_bbox": truth})
        return [write_answers(answers, out, model), write_json(out / "boxes.json", rows)]


class RefCOCOPlus(RefCOCO):
    """Phrases without words for places."""

    name = "refcoco+"
    title = "RefCOCO+"


class RefCOCOg(RefCOCO):
    """Longer phrases."""

    name = "refcocog"
    title = "RefCOCOg"
    splits: ClassVar[tuple[str, ...]] = ("val", "test")
