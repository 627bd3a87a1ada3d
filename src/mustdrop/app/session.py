"""What the app does, without what it looks like: asks with and without pruning, and reports the outcome."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

import mustdrop
from mustdrop import trace_page
from mustdrop.app.requests import Limits, Request, read
from mustdrop.budget import Keep, check_keep
from mustdrop.demo import model as bundled
from mustdrop.errors import ConfigError, MustDropError, did_you_mean
from mustdrop.explain import compare
from mustdrop.loading import load_model, place
from mustdrop.trace_page import MethodRun
from mustdrop.trace_table import quantity

BASELINE = "none"  # the unpruned model, whose tokens are counted too


@dataclass(frozen=True)
class Row:
    """One answer and its price.

    Attributes:
        name: method and budget, or "all tokens".
        answer: text.
        tokens: average retained tokens per layer.
        total: vision tokens of the prompt.
        seconds: of the whole answer.
        flops: of the prompt, as a share of the unpruned model's.
        stored: KV cache at the end, in words.
        peak: working memory in words; empty where nothing counts it.
    """

    name: str
    answer: str
    tokens: float
    total: int
    seconds: float
    flops: float
    stored: str
    peak: str


@dataclass(frozen=True)
class Outcome:
    """What came out.

    Attributes:
        rows: the unpruned model, then each method.
        page: the page that shows what each method keeps.
    """

    rows: list[Row]
    page: str


@dataclass
class Watch:
    """Clocks calls, and counts the memory that they take on a GPU."""

    device: torch.device
    seconds: list[float] = field(default_factory=list)
    peaks: list[int | None] = field(default_factory=list)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Around one call."""
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device) if cuda else 0
        start = time.perf_counter()
        yield
        if cuda:
            torch.cuda.synchronize(self.device)
        self.seconds.append(time.perf_counter() - start)
        self.peaks.append(torch.cuda.max_memory_allocated(self.device) - before if cuda else None)


class Session:
    """The models that an app offers, and one question at a time: patching concerns the whole model.

    Args:
        models: hub ids or folders beside the bundled models.
        device: name of a device, None for a GPU if there is any.
        dtype: weights of `models`.
        limits: what a question may bring.
        loader: replaces `mustdrop.loading.load_model`.
    """

    def __init__(
        self,
        models: Sequence[str] = (),
        *,
        device: str | None = None,
        dtype: str = "auto",
        limits: Limits | None = None,
        loader: Callable[..., tuple[Any, Any]] = load_model,
    ) -> None:
        self.names = [*models, *(f"bundled: {name}" for name in _bundled())]
        self.device, self.dtype, self.limits = place(device), dtype, limits or Limits()
        self._loader = loader
        self._lock = threading.Lock()
        self._loaded: tuple[str, Any, Any] | None = None

    def methods(self) -> list[str]:
        """Names of the methods, the default one first."""
        return sorted(
            (name for name in mustdrop.list_methods() if name != BASELINE), key=lambda n: (n != "mustdrop", n)
        )

    def ask(self, name: str, request: Request) -> Outcome:
        """Ask a model with all of its vision tokens, then with each method.

        Args:
            name: one of `names`.
            request: the question, and how to answer it.

        Raises:
            MustDropError: a file that is too large or cannot be read, too many of something, or what the model or a
                method does not support. The message names files without their folder.
        """
        prompt, settings = read(request, self.limits), self.settings(request)
        with self._lock:
            model, processor, fresh = self._model(name)
            watch = Watch(self.device)
            if fresh:  # the first call of a model takes longer, whatever it is
                compare(model, processor, prompt, settings[:1], new_tokens=1)
            runs = compare(model, processor, prompt, settings, new_tokens=request.new_tokens, watch=watch)
        rows = [_row(*found) for found in zip(runs, watch.seconds, watch.peaks, strict=True)]
        page = trace_page.page(trace_page.facts(prompt.media, runs[1:], prompt.question))
        return Outcome(rows, page)

    def settings(self, request: Request) -> list[tuple[str, Keep | None]]:
        """Methods with budgets, the unpruned model first.

        Raises:
            MustDropError: no method, too many, or one that there is not.
        """
        if not request.methods:
            raise ConfigError("choose at least one method.")
        if len(request.methods) > self.limits.methods:
            raise ConfigError(f"{len(request.methods)} methods at once: choose {self.limits.methods} at most.")
        unknown = [name for name in request.methods if name not in self.methods()]
        if unknown:
            raise ConfigError(f"there is no method {unknown[0]!r}. {did_you_mean(unknown[0], self.methods())}")
        return [(BASELINE, None), *((name, check_keep(request.keep)) for name in request.methods)]

    def _model(self, name: str) -> tuple[Any, Any, bool]:
        """A model, its processor, and whether it was loaded just now. One is held at a time."""
        if name not in self.names:
            raise ConfigError(f"this app does not offer {name!r}. {did_you_mean(name, self.names)}")
        if self._loaded is not None and self._loaded[0] == name:
            return *self._loaded[1:], False
        self._loaded = None  # before the next one is loaded: two may not fit
        kind, _, own = name.partition("bundled: ")
        if own and not kind:
            model, processor = bundled.load(own)
            model = model.to(self.device)
        else:
            model, processor = self._loader(name, device=str(self.device), dtype=self.dtype)
        self._loaded = (name, model, processor)
        return model, processor, True


def _bundled() -> list[str]:
    """The bundled models that this version has."""
    return [
        name for name in bundled.NAMES if name != "pages" or (bundled.PAGE_CHECKPOINT / "model.safetensors").exists()
    ]


def scene(seed: int) -> tuple[Image.Image, str]:
    """A picture that the bundled model knows how to read, and a question about it."""
    from mustdrop.demo.scenes import SceneMaker

    maker = SceneMaker("heldout", seed=seed)
    drawn = maker.scene()
    return Image.fromarray(drawn.image), maker.questions(drawn)[0].text


def _row(run: MethodRun, seconds: float, peak: int | None) -> Row:
    trace = run.trace
    kv = trace.kv_bytes
    return Row(
        name="all tokens" if trace.method == BASELINE else run.name,
        answer=run.answer,
        tokens=float(trace.equal_tokens[0]),
        total=int(trace.total[0]),
        seconds=seconds,
        flops=trace.flops.ratio,
        stored=f"{quantity(kv.actual, 'B')} ({kv.ratio:.0%})" if kv.unpruned else "",
        peak="" if peak is None else quantity(peak, "B"),
    )


def message(error: Exception) -> str:
    """One line for whoever asked; what is no fault of the question is said without details of the machine."""
    if isinstance(error, MustDropError):
        return str(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "out of memory: a smaller picture, fewer frames or another model needs less."
    return f"this could not be answered ({type(error).__name__}); the log of the app has the details."
