"""A patched model that answers chats and scores given answers, and counts what it kept on the way."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

import mustdrop
from mustdrop.errors import ConfigError
from mustdrop.fidelity import forced_logits
from mustdrop.integrations import conversations as chats
from mustdrop.integrations.conversations import Conversation
from mustdrop.loading import load_model
from mustdrop.media_limits import MediaLimits

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Answer:
    """What the model said.

    Attributes:
        text: without special tokens, cut at the first stop word.
        prompt_tokens: tokens of the prompt, vision tokens included.
        tokens: tokens of the answer, the end token included.
        vision_tokens: vision tokens of the prompt.
        equal_tokens: the same after pruning: mean over the decoder layers of those that a layer processed.
    """

    text: str
    prompt_tokens: int
    tokens: int
    vision_tokens: int
    equal_tokens: float


@dataclass
class Kept:
    """What was kept, over all prompts with an image or a video so far.

    Attributes:
        prompts: how many.
        equal: sum of their equal tokens.
        total: sum of their vision tokens.
        flops: sum of the FLOPs of their prompts.
        flops_unpruned: the same without pruning.
        answered: tokens of all answers, with and without media.
        seconds: time in the model.
    """

    prompts: int = 0
    equal: float = 0.0
    total: int = 0
    flops: float = 0.0
    flops_unpruned: float = 0.0
    answered: int = field(default=0)
    seconds: float = 0.0

    def add(self, trace: mustdrop.Trace) -> None:
        """Count one batch."""
        seen = trace.total > 0
        self.prompts += int(seen.sum())
        self.equal += float(trace.equal_tokens[seen].sum())
        self.total += int(trace.total.sum())
        self.flops += trace.flops.actual
        self.flops_unpruned += trace.flops.unpruned

    def __str__(self) -> str:
        """In one sentence."""
        if not self.prompts:
            return "no prompt with an image or a video"
        share = self.flops / self.flops_unpruned if self.flops_unpruned else 1.0
        return (
            f"{self.prompts} prompts with vision tokens, {self.equal / self.prompts:.1f} tokens per layer of "
            f"{self.total / self.prompts:.1f} on average, {share:.1%} of the FLOPs of the prompts"
        )


class Answerer:
    """A model of the hub, patched, with its processor.

    Args:
        pretrained: hub id or folder; "bundled" is the model that comes with this package.
        method: name of the method; "none" leaves the model unpruned, and still counts.
        keep: average retained tokens per layer.
        knobs: further settings of the method.
        limits: how large pictures, and how many and how large frames of a video the model sees; None leaves it to the
            processor.
        **loading: see `mustdrop.loading.load_model`.
    """

    def __init__(
        self,
        pretrained: str,
        method: str = "mustdrop",
        keep: int | float | None = None,
        knobs: dict[str, Any] | None = None,
        limits: MediaLimits | None = None,
        **loading: Any,
    ) -> None:
        from mustdrop.registry import resolve

        settings = dict(knobs or {}) | ({} if keep is None else {"keep": keep})
        chosen = resolve(method, **settings)  # a wrong name fails before weights are loaded
        self.model, self.processor = load_model(pretrained, **loading)
        self.limits = limits or MediaLimits()
        self.limits.check(self.processor)
        self.kept = Kept()
        mustdrop.patch(self.model, chosen)

    @torch.inference_mode()
    def answer(self, batch: Sequence[Conversation], until: Sequence[str] = (), **generation: Any) -> list[Answer]:
        """Answer a batch of conversations, all with the same kinds of media.

        Args:
            batch: the conversations.
            until: stop words; the answer ends before the first of them.
            **generation: arguments of `model.generate`.
        """
        given = self._inputs(batch)
        start = time.perf_counter()
        out = self.model.generate(**given, **generation)
        self.kept.seconds += time.perf_counter() - start
        trace = self._count()
        ends = _ends(self.model.generation_config.eos_token_id)
        prompts = given["attention_mask"].sum(1).tolist()
        said = out[:, given["input_ids"].shape[1] :]
        if len(said) != len(prompts):
            raise ConfigError(f"expected one answer per prompt, got {len(said)} for {len(prompts)} prompts.")
        beams = len(trace.total) // len(prompts)
        counts = [row[::beams].tolist() for row in (trace.total, trace.equal_tokens)]
        answers = []
        for ids, prompt, total, equal in zip(said, prompts, *counts, strict=True):
            text = self.processor.tokenizer.decode(ids, skip_special_tokens=True)
            for stop in until:
                text = text.split(stop)[0] if stop else text
            answers.append(Answer(str(text).strip(), int(prompt), _length(ids.tolist(), ends), total, equal))
        self.kept.answered += sum(answer.tokens for answer in answers)
        return answers

    @torch.inference_mode()
    def score(self, batch: Sequence[Conversation], answers: Sequence[str]) -> list[tuple[float, bool]]:
        """How likely given answers are. They are forced token by token: what is dropped follows from the prompts alone.

        Args:
            batch: conversations, all with the same kinds of media.
            answers: one for each.

        Returns:
            For each, the mean negative log-likelihood of its tokens, and whether greedy decoding would give it.

        Raises:
            ConfigError: an empty answer.
        """
        tokenizer = self.processor.tokenizer
        ids = [tokenizer(answer, add_special_tokens=False, return_tensors="pt")["input_ids"][0] for answer in answers]
        for text, own in zip(answers, ids, strict=True):
            if not len(own):
                raise ConfigError(f"the answer {text!r} has no tokens, so it cannot be scored.")
        tokens = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True).long()
        logits = forced_logits(self.model, self._inputs(batch), tokens)
        self._count()
        scores = []
        for row, own in zip(logits, ids, strict=True):
            likely = row[: len(own)].log_softmax(-1)
            loss = -likely.gather(1, own.long()[:, None]).mean()
            scores.append((float(loss), bool((likely.argmax(-1) == own).all())))
        return scores

    def release(self) -> None:
        """Let the model go; what was kept stays known."""
        del self.model

    def _inputs(self, batch: Sequence[Conversation]) -> Any:
        return chats.inputs(self.processor, batch, self.limits).to(self.model.device, self.model.dtype)

    def _count(self) -> mustdrop.Trace:
        trace = mustdrop.trace(self.model)
        self.kept.add(trace)
        return trace


def batches(
    items: Sequence[T], size: int, key: Callable[[T], Hashable], run: Callable[[list[T]], Sequence[R]]
) -> Iterator[tuple[int, R]]:
    """Run items in batches of equal keys.

    Args:
        items: what to run.
        size: of a batch.
        key: items with other keys never share a batch.
        run: from a batch to its results, in order.

    Returns:
        Index of the item and its result, as they come; sort them to have the order of the items.
    """
    groups: dict[Hashable, list[int]] = {}
    for i, item in enumerate(items):
        groups.setdefault(key(item), []).append(i)
    for indices in groups.values():
        for first in range(0, len(indices), size):
            chunk = indices[first : first + size]
            yield from zip(chunk, run([items[i] for i in chunk]), strict=True)


def _ends(end: int | Sequence[int] | None) -> set[int]:
    return set() if end is None else {end} if isinstance(end, int) else set(end)


def _length(ids: list[int], ends: set[int]) -> int:
    """Tokens up to the first end token, which counts."""
    before = len(list(itertools.takewhile(lambda token: token not in ends, ids)))
    return min(before + 1, len(ids))
