"""Batches: which questions go together, and their inputs, made off the main process."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from torch.utils.data import DataLoader, Dataset

from mustdrop.errors import ConfigError
from mustdrop.eval.benchmark import Item
from mustdrop.eval.media import MediaError
from mustdrop.eval.prompts import Prompter

_AHEAD = 2  # batches that every loading process has ready


@dataclass
class Batch:
    """The inputs of one call.

    Attributes:
        places: places of the items, row by row.
        inputs: what the processor made of them; None if it takes them one by one alone, or if every item failed.
        failed: place -> what went wrong.
    """

    places: list[int]
    inputs: dict[str, Any] | None
    failed: dict[int, str] = field(default_factory=dict)


def plan(items: Sequence[Item], size: int) -> list[list[int]]:
    """Places of the items of each batch: all with a picture, all with a video, or all with neither.

    The plan depends on the questions and the size alone, not on the processes nor on what is answered already.
    """
    open_batches: dict[str | None, list[int]] = {}
    full = []
    for place, item in enumerate(items):
        kind = None if item.medium is None else item.medium.kind
        batch = open_batches.setdefault(kind, [])
        batch.append(place)
        if len(batch) == size:
            full.append(open_batches.pop(kind))
    return full + list(open_batches.values())


class Inputs(Dataset[Batch]):
    """Places of a batch -> its inputs. Runs in the loading processes."""

    def __init__(self, items: Sequence[Item], prompter: Prompter) -> None:
        self.items, self.prompter = items, prompter

    def __getitem__(self, places: list[int]) -> Batch:
        """Decode the media and run the processor; what cannot be decoded or processed leaves the batch by name."""
        failed: dict[int, str] = {}
        media: dict[int, Any] = {}
        for place in places:
            medium = self.items[place].medium
            try:
                loaded = None if medium is None else medium.load(self.prompter.upright)
                media[place] = self.prompter.picture(loaded) if isinstance(loaded, Image.Image) else loaded
            except MediaError as error:
                failed[place] = str(error)
            except Exception as error:  # a data set, a disk, a picture larger than the memory
                failed[place] = f"cannot be loaded: {type(error).__name__}: {error}"
        try:
            return self._batch(media, failed)
        except Exception:  # any library may be behind a processor
            self._fail_alone(media, failed)
        try:
            return self._batch(media, failed)
        except Exception:  # each alone is well
            return Batch(list(media), None, failed)

    def _fail_alone(self, media: dict[int, Any], failed: dict[int, str]) -> None:
        """Move the items that the processor refuses from `media` to `failed`."""
        for place in list(media):
            try:
                self._batch({place: media[place]}, {})
            except Exception as error:
                failed[place] = f"the processor refuses it: {type(error).__name__}: {error}"
                del media[place]

    def _batch(self, media: dict[int, Any], failed: dict[int, str]) -> Batch:
        places = list(media)
        if not places:
            return Batch([], None, failed)
        texts = [self.prompter.text(self.items[place]) for place in places]
        kinds = {None if (medium := self.items[place].medium) is None else medium.kind for place in places}
        arguments: dict[str, Any] = {"text": texts, "return_tensors": "pt", "padding": True}
        processor, limits = self.prompter.processor, self.prompter.limits
        if kinds == {"image"}:
            arguments["images"] = [[media[place]] for place in places]
            if size := limits.pictures(processor):
                arguments["images_kwargs"] = size
        elif kinds == {"video"}:
            arguments["videos"] = [media[place] for place in places]
            if takes(processor, "do_sample_frames"):
                arguments["do_sample_frames"] = False  # they are chosen already
            if size := limits.videos(processor):
                arguments["videos_kwargs"] = size
        if not self.prompter.special_tokens(texts[0]):
            arguments["add_special_tokens"] = False
        return Batch(places, dict(processor(**arguments)), failed)


def takes(processor: Any, name: str) -> bool:
    """Whether a processor may be called with an argument of this name; those of older families take few."""
    known = inspect.signature(processor).parameters
    return name in known or any(one.kind is inspect.Parameter.VAR_KEYWORD for one in known.values())


def batches(inputs: Inputs, wanted: Sequence[list[int]], workers: int) -> Iterator[Batch]:
    """The batches, in order, loaded ahead by other processes.

    Args:
        inputs: makes them.
        wanted: places of each batch.
        workers: loading processes; 0 loads in this one.
    """
    workers = min(workers, len(wanted))
    if workers:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # threads of the tokenizer do not survive a fork
    loader: Iterable[Batch] = DataLoader(
        inputs,
        batch_size=None,
        sampler=wanted,
        num_workers=workers,
        prefetch_factor=_AHEAD if workers else None,
    )
    try:
        yield from loader
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise ConfigError(
            f"a loading process died, perhaps for want of memory: give fewer --workers or a smaller --batch-size. What "
            f"was answered is kept. ({str(error).splitlines()[0]})"
        ) from None
