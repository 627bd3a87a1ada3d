"""What an evaluation needs before the first question: the questions, the model, the prompts."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mustdrop.errors import ConfigError
from mustdrop.eval.benchmark import Benchmark, Item, Source
from mustdrop.eval.benchmarks import find
from mustdrop.eval.data_files import Folder
from mustdrop.eval.engine import Engine, device_of
from mustdrop.eval.journal import digest
from mustdrop.eval.prompts import Prompter, check_template, prompter
from mustdrop.eval.result_parts import DataInfo, PromptInfo
from mustdrop.eval.settings import Settings
from mustdrop.extras import install
from mustdrop.loading import check_dtype
from mustdrop.registry import resolve


@dataclass(frozen=True)
class Prepared:
    """Ready to ask.

    Attributes:
        settings: what to do.
        benchmark: the benchmark.
        items: the questions to ask.
        folder: where they come from, with the broken lines.
        data: the same for the result.
        engine: the patched model.
        prompter: makes the prompts.
        prompt: the same for the result.
    """

    settings: Settings
    benchmark: Benchmark
    items: list[Item]
    folder: Folder
    data: DataInfo
    engine: Engine
    prompter: Prompter
    prompt: PromptInfo

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that decides an answer. The batch size and the number of processes do not, by design."""
        name, knobs = self.settings.described
        return {
            "benchmark": self.benchmark.name,
            "data": self.data.sha256,
            "limit": self.settings.limit,
            "seed": self.settings.seed,
            "frames": self.settings.frames,
            "template": self.prompt.template,
            "prompt": self.prompt.example,
            "pictures": self.prompt.pictures,
            "max_new_tokens": self.prompt.max_new_tokens,
            "method": name,
            "knobs": knobs,
            **self.engine.identity(),
        }

    @property
    def setup(self) -> str:
        """Hash of all settings but the method and its knobs."""
        return digest({key: value for key, value in self.identity.items() if key not in ("method", "knobs")})


def prepare(settings: Settings, loaded: tuple[Any, Any] | None = None) -> Prepared:
    """Read the questions, load and patch the model.

    Args:
        settings: what to do.
        loaded: the model and its processor, unpatched, where they are loaded already.

    Raises:
        DataFileError: a file is missing or broken.
        ConfigError: the settings do not fit the benchmark or the model.
        MustDropError: what the model or the method does not support.
    """
    benchmark = find(settings.benchmark)
    _require(benchmark)
    resolve(settings.method, **settings.knobs)  # a mistake in there should show before a large model is loaded
    device_of(settings.device)
    check_dtype(settings.dtype)
    check_template(settings.template)
    items, data, folder = _questions(settings, benchmark)
    engine = Engine(
        settings.model,
        settings.method,
        dict(settings.knobs),
        settings.device,
        settings.dtype,
        settings.attention,
        loaded,
    )
    try:
        return _ready(settings, benchmark, items, folder, data, engine)
    except BaseException:
        engine.close()
        raise


def _ready(
    settings: Settings, benchmark: Benchmark, items: list[Item], folder: Folder, data: DataInfo, engine: Engine
) -> Prepared:
    _check_media(benchmark, items, engine)
    ask = prompter(engine.processor, engine.model.config, settings.template, settings.upright, settings.limits())
    for kind in {item.medium.kind for item in items if item.medium is not None}:  # not question by question, later
        (ask.limits.pictures if kind == "image" else ask.limits.videos)(ask.processor)
    prompt = PromptInfo(
        template=ask.name,
        suffix=benchmark.suffix if items[0].asked.endswith(benchmark.suffix) else "",
        example=ask.text(items[0]),
        max_new_tokens=settings.max_new_tokens or benchmark.max_new_tokens,
        pictures=ask.pictures,
    )
    return Prepared(settings, benchmark, items, folder, data, engine, ask, prompt)


def _require(benchmark: Benchmark) -> None:
    for module in benchmark.requires:  # its absence should not show after hours, when the answers are written
        if importlib.util.find_spec(module) is None:
            raise ConfigError(f"{benchmark.name} needs {module}: {install('eval')}.")


def _check_media(benchmark: Benchmark, items: Sequence[Item], engine: Engine) -> None:
    """Processors leave out media that their model does not know, and it would answer without having seen them."""
    foreign = sorted({item.medium.kind for item in items if item.medium is not None} - set(engine.media))
    if foreign:
        raise ConfigError(
            f"{benchmark.name} asks about {' and '.join(foreign)}s, and --model {engine.name} "
            f"({type(engine.model).__name__}) takes {' and '.join(engine.media) or 'no medium'}s: give a model that "
            "takes them. `python -m mustdrop adapters` lists which families do."
        )


def _questions(settings: Settings, benchmark: Benchmark) -> tuple[list[Item], DataInfo, Folder]:
    """The questions to ask, what the result says about them, and the folder with what was broken."""
    rows, split = None, ""
    if settings.dataset is not None:
        from mustdrop.eval.dataset_rows import load_rows

        rows, split = load_rows(settings.dataset, settings.split)
    source = Source(
        settings.data,
        rows,
        settings.split,
        settings.seed or 0,
        settings.limit,
        settings.frames,
        settings.coordinates,
    )
    folder = benchmark.place(source)
    every = benchmark.items(source, folder)
    chosen = _chosen(settings, benchmark, every)
    if not chosen:
        broken = f" {folder.broken[0].name}: {folder.broken[0].reason}." if folder.broken else ""
        raise ConfigError(f"{benchmark.name}: no question is left to ask, {len(folder.broken)} are broken.{broken}")
    items = [every[i] for i in chosen]
    drawn = not benchmark.section
    data = DataInfo(
        source="drawn by mustdrop.demo.scenes" if drawn else settings.dataset or str(settings.data or folder.roots[0]),
        split=split or benchmark.split(source),
        sha256=digest({"files": folder.hashes, "asked": [(item.id, item.asked, item.truth) for item in items]}),
        files=folder.hashes,
        questions=len(every),
        asked=len(items),
        limit=settings.limit,
        seed=settings.seed,
    )
    return items, data, folder


def _chosen(settings: Settings, benchmark: Benchmark, every: Sequence[Item]) -> Sequence[int]:
    """Places of the questions that `--limit` leaves; what is scored as one stays together where the limit allows it."""
    if settings.limit is None or settings.limit >= len(every):
        return range(len(every))
    units: dict[Any, list[int]] = {}
    for place, item in enumerate(every):
        units.setdefault(benchmark.unit(item, place), []).append(place)
    order = list(units.values())
    if settings.seed is not None:
        random.Random(settings.seed).shuffle(order)
    chosen: list[int] = []
    for unit in order:
        if len(chosen) + len(unit) > settings.limit:
            break
        chosen += unit
    return sorted(chosen or order[0][: settings.limit])
