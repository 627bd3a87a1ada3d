"""The bundled model's own benchmark: held-out scenes, one question of each type about each. Nothing is downloaded."""

from __future__ import annotations

from collections.abc import Sequence

from mustdrop.errors import ConfigError
from mustdrop.eval.benchmark import Answer, Benchmark, Item, Source, by_category, percent
from mustdrop.eval.data_files import Folder
from mustdrop.eval.media import Drawn

_SCENES = 400  # as many as the bundled model was measured on


class Scenes(Benchmark):
    """Exact match, word for word."""

    name = "scenes"
    title = "Scenes"
    folder = "scenes"
    section = ""
    splits = ("heldout", "selection", "train")
    max_new_tokens = 32
    files_only = "are drawn, not read: leave --data and --dataset out."
    metric = "exact match, mean over eight types of questions"

    def file_items(self, source: Source, folder: Folder) -> list[Item]:
        """Drawn here: the split and the seed decide everything.

        Raises:
            ConfigError: `--data` was given.
        """
        from mustdrop.demo.scenes import QUESTION_TYPES, SceneMaker

        if source.data is not None:
            raise ConfigError(f"{self.name} {self.files_only}")
        maker = SceneMaker(self.split(source), source.seed)
        number = _SCENES * len(QUESTION_TYPES) if source.limit is None else source.limit
        found: list[Item] = []
        while len(found) < number:
            scene, place = maker.scene(), len(found) // len(QUESTION_TYPES)
            found += [
                Item(f"{place}/{asked.type}", asked.text, Drawn(scene.image), asked.text, asked.answer, asked.type)
                for asked in maker.questions(scene)
            ]
        return found[:number]

    def ability(self, item: Item) -> str:
        """What each type of question asks for."""
        from mustdrop.demo.tasks.scene import ABILITY

        return ABILITY[item.category]

    def credit(self, answer: Answer) -> float:
        """Whether the answer is the right one."""
        return float(not answer.failed and answer.text == answer.item.truth)

    def scores(self, answers: Sequence[Answer]) -> dict[str, float]:
        """Accuracy of each type of question, and of all questions."""
        found = {
            name: percent([self.credit(answer) for answer in group]) for name, group in by_category(answers).items()
        }
        return found | {"accuracy": percent([self.credit(answer) for answer in answers])}
