"""The front half of a pruned model: its processor announces as few tokens as will be kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from vllm.multimodal.parse import DictEmbeddingItems, EmbeddingItems
from vllm.multimodal.processing import PromptUpdateDetails

from mustdrop.budget import Keep
from mustdrop.errors import ConfigError, MustDropError
from mustdrop.integrations.vllm import engine, metrics, settings
from mustdrop.integrations.vllm.versions import Version

FIELD = "mustdrop"  # rides with an image or video to the worker, see `Announced`
KINDS = ("image", "video")
T = TypeVar("T")


@dataclass(frozen=True)
class Announced:
    """What the processor has said about one image or video, for the worker that will prune it.

    Attributes:
        kind: "image" or "video".
        kept: its tokens that stay.
        total: its tokens.
        woven: where text stands among its tokens (line breaks, names of tiles, times of frames), the ids of both, from
            the first to the last vision token; else empty. Such text becomes part of what the worker hands over, since
            where it stands among the kept tokens is not known before the encoder has run.
        vision: (len(woven),) bool, which of them are vision tokens.
    """

    kind: str
    kept: int
    total: int
    woven: Tensor
    vision: Tensor

    @property
    def rows(self) -> int:
        """Rows that the worker hands over."""
        return self.whole - self.total + self.kept

    @property
    def whole(self) -> int:
        """Rows that it would hand over if all stayed."""
        return len(self.woven) if len(self.woven) else self.total

    def tensor(self) -> Tensor:
        """All of it in one tensor: vision tokens are written as -1 - id."""
        ids = torch.where(self.vision, -1 - self.woven, self.woven)
        return torch.cat(
            [torch.tensor([KINDS.index(self.kind), self.kept, self.total], dtype=torch.long, device="cpu"), ids]
        )

    @classmethod
    def of(cls, data: Tensor) -> Announced:
        """From `tensor`, with or without a first dimension of 1."""
        data = data.reshape(-1).cpu()
        kind, kept, total = data[:3].tolist()
        vision = data[3:] < 0
        return cls(KINDS[kind], kept, total, torch.where(vision, -1 - data[3:], data[3:]), vision)


@dataclass(frozen=True)
class Span:
    """Which of an announcement's tokens are rows of the worker: those from `first` on, `rows` of them.

    It also remembers what was announced: the announcement lies in the processor's cache, the tensors do not.
    """

    first: int
    rows: int
    kept: int
    total: int

    def __call__(self, full: list[int]) -> Tensor:
        """(len(full),) bool."""
        index = torch.arange(len(full), dtype=torch.long, device="cpu")
        return (index >= self.first) & (index < self.first + self.rows)


def shorten(
    details: PromptUpdateDetails, kind: str, count: Callable[[int], int]
) -> tuple[PromptUpdateDetails, Announced]:
    """The tokens that stand for one image or video in the prompt, without those that will be dropped.

    Args:
        details: all of them.
        kind: "image" or "video".
        count: how many of so many tokens stay.
    """
    full = torch.tensor(details.full, dtype=torch.long, device="cpu")
    vision = (
        torch.ones(len(full), dtype=torch.bool, device="cpu")
        if details.is_embed is None
        else details.is_embed(details.full)
    )
    places = vision.nonzero()[:, 0]
    if not len(places):
        raise ConfigError(f"expected tokens of an {kind} in {len(full)} tokens of its placeholder, found none.")
    first, end = int(places[0]), int(places[-1]) + 1
    total, token = len(places), int(full[first])
    inside = vision[first:end]
    woven = full[first:end] if not bool(inside.all()) else full[:0]
    found = Announced(kind, count(total), total, woven, inside[: len(woven)])
    tokens = [*details.full[:first], *[token] * found.rows, *details.full[end:]]
    return PromptUpdateDetails(tokens, Span(first, found.rows, found.kept, found.total)), found


_ASKED: ContextVar[Keep | None] = ContextVar("mustdrop_asked", default=None)
_DUMMY: ContextVar[bool] = ContextVar("mustdrop_dummy", default=False)


class PrunedProcessor:
    """Mixed into a processor class (first)."""

    mustdrop: settings.Serving
    mustdrop_apart: bool

    def apply(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As the model's own, with a request's `mustdrop_keep` taken out of what the Hugging Face processor is given.

        Raises:
            BudgetError, ConfigError: the request's fault; its client gets HTTP 400.
        """
        given = dict(inputs.hf_processor_mm_kwargs)
        with _for_now(_ASKED, settings.asked(given.pop(settings.REQUEST)) if settings.REQUEST in given else None):
            inputs = replace(inputs, hf_processor_mm_kwargs=given)
            try:
                return super().apply(inputs, *args, **kwargs)  # type: ignore[misc]
            except MustDropError:
                self._forget(inputs)
                raise

    def _forget(self, inputs: Any) -> None:
        """Let the cache of processed media know that the engine is not given those of a refused prompt.

        It has noted them as sent, so that the next prompt with one of them would come without its pixels.
        """
        if inputs.cache is not None:
            for keys in self._get_mm_hashes(inputs).values():
                for key in keys:
                    inputs.cache.invalidate(key)

    def get_dummy_mm_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own: what vLLM measures and warms up with is no prompt, neither counted nor checked as one."""
        with _for_now(_DUMMY, True):
            return super().get_dummy_mm_inputs(*args, **kwargs)  # type: ignore[misc]

    def _get_mm_hashes(self, inputs: Any) -> Any:
        keep = _ASKED.get()
        found: Mapping[str, list[str]] = super()._get_mm_hashes(inputs)  # type: ignore[misc]
        return {
            kind: [self.mustdrop.key(key, keep) for key in keys] if kind in KINDS else keys
            for kind, keys in found.items()
        }

    def _get_mm_prompt_updates(self, mm_items: Any, hf_kwargs: Any, out_mm_kwargs: Any) -> Any:
        keep = _ASKED.get()
        updates = super()._get_mm_prompt_updates(mm_items, hf_kwargs, out_mm_kwargs)  # type: ignore[misc]
        for kind in KINDS:
            if isinstance(mm_items.get(kind), EmbeddingItems | DictEmbeddingItems):
                raise ConfigError(f"expected {kind}s, got their embeddings: mustdrop prunes what the encoder sees.")
            for i, item in enumerate(updates.get(kind, ())):
                for j, update in enumerate(item):
                    content, found = shorten(update.content, kind, lambda n: self.mustdrop.count(n, keep))
                    item[j] = replace(update, content=content)
                    out_mm_kwargs[kind][i][FIELD] = Version.element(kind, found.tensor())
        return updates

    def _maybe_apply_prompt_updates(self, mm_items: Any, mm_res: Any) -> Any:
        prompt, places = super()._maybe_apply_prompt_updates(mm_items, mm_res)  # type: ignore[misc]
        spans = [
            update.content.is_embed
            for kind in KINDS
            for item in mm_res.prompt_updates.get(kind, ())
            for update in item[:1]
        ]
        kept, total = sum(span.kept for span in spans), sum(span.total for span in spans)
        if not _DUMMY.get():  # whose media stand side by side, and whose positions nobody reads
            self._check_length(total - kept)
            if self.mustdrop_apart:
                _check_apart(places)
            if spans:
                metrics.count(kept, total)
        return prompt, places

    def _check_length(self, dropped: int) -> None:
        """Positions go on as if nothing were dropped: see that the text model has them."""
        config = self.info.ctx.model_config  # type: ignore[attr-defined]
        most = engine.positions(config.hf_text_config)
        if most is not None and dropped + config.max_model_len > most:
            raise ConfigError(
                f"this prompt drops {dropped} tokens, whose positions stay empty, so that an answer could pass "
                f"position {most}, the last that the model has: start the server with --max-model-len {most - dropped} "
                "or less."
            )


def _check_apart(places: Mapping[str, Any]) -> None:
    """See that text stands before every image and video: its rows are found by that."""
    ends = set()
    for own in places.values():
        ends |= {place.start_idx + place.length for place in own}
    for kind, own in places.items():
        for place in own:
            if place.start_idx in ends:
                raise ConfigError(
                    f"expected text (a marker of its start) before every {kind} of the prompt, found none before the "
                    f"{kind} at token {place.start_idx}: use the chat template of the model."
                )


@contextmanager
def _for_now(variable: ContextVar[T], value: T) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def pruned(factory: Callable[..., Any], apart: bool) -> Callable[..., Any]:
    """The factory of a model's processor -> one that gives it with `PrunedProcessor` mixed in.

    Args:
        factory: of the processor.
        apart: whether text must stand before every image and video.
    """

    def make(info: Any, dummy_inputs: Any, **kwargs: Any) -> Any:
        own = _sized(Version.without_video_pruning(info))
        dummy_inputs.info = own
        made = factory(own, dummy_inputs, **kwargs)
        processor = _as(made, type("Pruned" + type(made).__name__, (PrunedProcessor, type(made)), {}))
        processor.mustdrop_apart = apart
        processor.mustdrop = settings.of(own.get_hf_config())
        return processor

    return make


def _sized(info: Any) -> Any:
    """A description of a model whose largest image counts as the tokens that stay of it."""
    inner = type(info).get_mm_max_tokens_per_item
    serving = settings.of(info.get_hf_config())

    def largest(self: Any, seq_len: int, mm_counts: Mapping[str, int]) -> Any:
        found = inner(self, seq_len, mm_counts)
        if found is None:  # vLLM processes dummies, which come out pruned
            return None
        # a video's frames have their times between them, which are rows too: it counts with all its tokens
        return {kind: serving.count(n) if kind == "image" else n for kind, n in found.items()}

    return _as(info, type(type(info).__name__, (type(info),), {"get_mm_max_tokens_per_item": largest}))


def _as(made: Any, cls: type[Any]) -> Any:
    """An object of a subclass with what `made` holds."""
    found = object.__new__(cls)
    vars(found).update(vars(made))
    return found
