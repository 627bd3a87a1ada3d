"""Ray: a model that answers about a data set, one class for `Dataset.map_batches`. See docs/serving.md.

Ray shards, retries and holds back; the class below only answers, so that Ray is not imported here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch

from mustdrop.errors import ConfigError
from mustdrop.integrations import answering
from mustdrop.integrations import conversations as chats
from mustdrop.integrations.conversations import Conversation
from mustdrop.integrations.generation import NEW_TOKENS
from mustdrop.loading import check_question
from mustdrop.media_limits import MediaLimits
from mustdrop.pictures import is_array, read_picture

Batch = dict[str, Any]
T = TypeVar("T")
NUMBERS = ("num_input_tokens", "num_generated_tokens", "num_vision_tokens")
SHARES = ("num_equal_tokens",)
TEXTS = ("generated_text", "error")
ADDED = (*TEXTS, *NUMBERS, *SHARES)  # where Ray's own class for vLLM has a column like one of these, with its name


class Answer:
    """Loads a model, patches it, and answers row by row: `map_batches(Answer, fn_constructor_kwargs={...})`.

    A row has a question, and images or a video or neither. All columns stay, and these are added: `generated_text`;
    `num_input_tokens` and `num_generated_tokens`; `num_vision_tokens` and, of them, `num_equal_tokens` after pruning,
    averaged over the decoder layers; `error`, empty, or why this row has no answer. A row that cannot be read or
    answered costs only itself: it has an error, and 0 tokens.

    Args:
        pretrained: hub id or folder; "bundled" is the tiny model that comes with mustdrop.
        method: name of the method (`mustdrop methods` lists them); "none" is the unpruned model.
        keep: average retained tokens per layer, tokens or share.
        knobs: further settings of the method.
        question: name of the column with the question.
        image: name of the column with the image: array, encoded bytes, path, a dict with `bytes` or `path` as data sets
            of Hugging Face have them, a sequence of these for several images, or None.
        video: name of the column with the video: path, (frames, rows, columns, 3) array, or None.
        frames: how many frames of a video the model sees.
        generation: arguments of `model.generate`; greedy by default.
        **loading: `device`, `dtype`, `attention`, and further arguments of `from_pretrained`.

    Raises:
        MustDropError: settings that are wrong, before any row is read: what `patch` raises, and what a first question
            without a picture raises.
    """

    def __init__(
        self,
        pretrained: str,
        method: str = "mustdrop",
        keep: int | float | None = None,
        *,
        knobs: dict[str, Any] | None = None,
        question: str = "question",
        image: str = "image",
        video: str = "video",
        frames: int | None = None,
        generation: dict[str, Any] | None = None,
        **loading: Any,
    ) -> None:
        self.question, self.image, self.video = question, image, video
        self.generation = {"do_sample": False, "num_beams": 1, "max_new_tokens": NEW_TOKENS, **(generation or {})}
        self.answerer = answering.Answerer(pretrained, method, keep, knobs, MediaLimits(frames=frames), **loading)
        try:
            self.answerer.answer([chats.user([], "?")], **self.generation | {"max_new_tokens": 1})
        except Exception as error:  # of any library: the same would happen to every row
            raise ConfigError(f"{pretrained} cannot answer with {self.generation}: {error}") from error

    def __call__(self, batch: Batch) -> Batch:
        """The batch with the columns that are added.

        Args:
            batch: columns by name, as long as each other (`batch_format="numpy"`, which is Ray's default).

        Raises:
            ConfigError: no such batch, or its columns have other names.
            torch.AcceleratorError: the device is lost, and with it this process: no row is to blame.
        """
        self._check(batch)
        found: dict[int, answering.Answer | Exception] = {}
        asked: list[tuple[int, Conversation]] = []
        for i, question in enumerate(batch[self.question]):
            made = _alone(self._conversation, batch, i, question)
            if isinstance(made, Exception):
                found[i] = made
            else:
                asked.append((i, made))
        answers = answering.batches(asked, max(1, len(asked)), lambda one: chats.kinds(one[1]), self._answers)
        found |= {asked[place][0]: answer for place, answer in answers}
        return {**batch, **_columns([found[i] for i in range(len(batch[self.question]))])}

    def _answers(self, asked: Sequence[tuple[int, Conversation]]) -> list[answering.Answer | Exception]:
        """All at once, and where that fails one by one: what failed is one of them, or all together were too large."""
        whole = _alone(self.answerer.answer, [conversation for _, conversation in asked], **self.generation)
        if not isinstance(whole, Exception):
            return list(whole)
        if len(asked) == 1:
            return [whole]
        return [one for own in asked for one in self._answers([own])]

    def _check(self, batch: Batch) -> None:
        if not isinstance(batch, Mapping):
            raise ConfigError(f'expected a dict of columns (batch_format="numpy"), got {type(batch).__name__}.')
        if self.question not in batch:
            raise ConfigError(f"expected a column {self.question!r} with questions, found {', '.join(batch)}.")
        if self.image not in batch and self.video not in batch:
            raise ConfigError(
                f"expected a column {self.image!r} or {self.video!r}, found {', '.join(batch)}: name it with image= or "
                "video=."
            )
        taken = [name for name in ADDED if name in batch]
        if taken:
            raise ConfigError(f"the columns {', '.join(taken)} would be overwritten: rename them before.")

    def _conversation(self, batch: Batch, i: int, question: Any) -> Conversation:
        """One row as a chat.

        Raises:
            MustDropError: what is wrong with it.
        """
        if not isinstance(question, str):
            raise ConfigError(f"expected a text in {self.question!r}, got {type(question).__name__}.")
        check_question(self.answerer.processor, question)
        images = [read_picture(one) for one in _cells(batch[self.image][i])] if self.image in batch else []
        conversation = chats.user(images, question)
        video = batch[self.video][i] if self.video in batch else None
        if not _missing(video):
            part = {"type": "video", "video": video if is_array(video) else str(video)}
            conversation[0]["content"].insert(len(images), part)
        return conversation


def _alone(run: Callable[..., T], *args: Any, **options: Any) -> T | Exception:
    """What `run` returns, or the exception that it raises; a device that is lost is lost for all rows."""
    try:
        return run(*args, **options)
    except torch.AcceleratorError:
        raise
    except Exception as error:  # decoders, processors and models of others raise anything
        return error


def _missing(cell: Any) -> bool:
    return cell is None or (isinstance(cell, float) and cell != cell)


def _cells(cell: Any) -> list[Any]:
    """The images of a cell, each as `read_picture` takes it."""
    if _missing(cell):
        return []
    if isinstance(cell, list | tuple) or (isinstance(cell, np.ndarray) and cell.dtype == object):
        return [one for part in cell for one in _cells(part)]
    if isinstance(cell, np.ndarray) and cell.ndim == 4:
        return list(cell)
    if isinstance(cell, Mapping):
        return [cell["bytes"] if cell.get("bytes") is not None else cell.get("path")]
    return [str(cell) if isinstance(cell, np.str_) else cell]


def _columns(found: Sequence[answering.Answer | Exception]) -> Batch:
    """One type per column, also where all rows failed or none did."""
    rows = [_row(one) for one in found]
    kinds = dict.fromkeys(TEXTS, object) | dict.fromkeys(NUMBERS, np.int64) | dict.fromkeys(SHARES, np.float64)
    return {name: np.array([row[i] for row in rows], dtype=kinds[name]) for i, name in enumerate(ADDED)}


def _row(one: answering.Answer | Exception) -> tuple[Any, ...]:
    """In the order of `ADDED`."""
    if isinstance(one, Exception):
        return "", f"{type(one).__name__}: {one}", 0, 0, 0, 0.0
    return one.text, "", one.prompt_tokens, one.tokens, one.vision_tokens, one.equal_tokens
