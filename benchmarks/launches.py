"""What a call of a patched model starts, by place: launches on the device, operations on the host, waits and copies.

A GPU's host queues one launch per operation, and where a prompt is short the queue decides how long a call takes. No
GPU is needed to count: the device is imitated (`benchmarks.imitated_device`), an operation on tensors that claim to be
there is a launch, and the kernels count as their launches in Triton. The model is a LLaVA with the layers of
LLaVA-1.5-7B and tiny widths. Times are not measured.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import mustdrop
from benchmarks.common import AFTER, BEFORE, RESULTS, save
from benchmarks.imitated_device import CPU, FIRST, MOVES, Places, asks, claim, put, where
from mustdrop.kernels.operation import OPERATIONS
from mustdrop.provenance import provenance
from mustdrop.pruners.scorer import Scorer
from mustdrop.registry import registry, resolve

SOURCE = str(Path(mustdrop.__file__).parent)
LAYERS, BLOCKS, SIDE, KEEP = 32, 24, 24, 192  # decoder layers, encoder blocks, patches per side, tokens kept
BATCHES, CACHES = (1, 8), ("growing", "static")
IMAGE = 300  # id of the image's placeholder
STEPS = 2  # whole decode steps that are counted; the highest figure of them is reported
UNTOUCHED = "untouched"

# What makes no launch: views, and memory that nobody fills.
_FREE = frozenset({
    "view", "expand", "slice", "select", "unsqueeze", "squeeze", "transpose", "permute", "t", "detach", "alias",
    "split", "split_with_sizes", "unbind", "as_strided", "_unsafe_view", "diagonal", "unfold", "lift_fresh",
    "_reshape_alias", "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "resize_", "set_",
    "sym_size",
})  # fmt: skip
# What the host learns the result, or the shape of the result, of.
_WAITS = frozenset({
    "_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "_unique", "_unique2", "unique_dim",
    "unique_consecutive", "bincount",
})  # fmt: skip
_INDEXED = frozenset({"index", "index_put", "index_put_", "_index_put_impl_"})  # waits where an index is a mask
_READS = (Tensor.tolist, Tensor.numpy)
_MADE_OF_NUMBERS = (torch.tensor, torch.as_tensor)


class Tally:
    """Counts by place; of each, what mustdrop's own code asked for.

    Attributes:
        total: by "launches", "host", "waits" and "copies".
        own: likewise, of the library.
        sites: (what, file:line function) -> how often, of the library.
    """

    def __init__(self) -> None:
        self.total: Counter[str] = Counter()
        self.own: Counter[str] = Counter()
        self.sites: Counter[tuple[str, str]] = Counter()

    def add(self, what: str, many: int = 1) -> None:
        """Count, and see whose it is."""
        self.total[what] += many
        site = _own_site()
        if site is not None:
            self.own[what] += many
            self.sites[what, site] += many

    def snapshot(self) -> dict[str, int]:
        """Numbers so far: totals by name, own ones by "own_" + name."""
        return {**self.total, **{f"own_{name}": number for name, number in self.own.items()}}


def _own_site() -> str | None:
    """Where in mustdrop the operation was asked for; None where a model's own code did."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(SOURCE):
            return f"{name[len(SOURCE) + 1 :]}:{frame.f_lineno} {frame.f_code.co_name}"
        if "/transformers/" in name:
            return None
        frame = frame.f_back  # type: ignore[assignment]
    return None


class _Operations(TorchDispatchMode):
    """Counts what torch dispatches, at the place that `_Counted` names."""

    def __init__(self, tally: Tally) -> None:
        super().__init__()
        self.tally = tally
        self.place: torch.device | None = CPU  # None: what runs is counted elsewhere

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.place is None:
            return out
        name = func._schema.name.split("::")[1]
        if self.place == CPU:
            self.tally.add("host")
            return out
        if name in _WAITS or (name in _INDEXED and _masks(args[1])):
            self.tally.add("waits")
        if name not in _FREE:
            self.tally.add("launches")
        return out


def _masks(indices: Any) -> bool:
    return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in indices)


class _Counted(Places):
    """The imitated device, with a count of what moves."""

    def __init__(self, tally: Tally, operations: _Operations) -> None:
        super().__init__()
        self.tally, self.operations = tally, operations

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READS and where(args[0]) != CPU:
            self.tally.add("waits")
        name = getattr(getattr(func, "_schema", None), "name", "")
        if name.startswith("mustdrop::"):
            return self._kernel(name.split("::")[1], func, args, kwargs or {})
        if asks(func):  # a transposed view among them
            return self._at(where(args[0]), lambda: super(_Counted, self).__torch_function__(func, types, args, kwargs))
        if func not in MOVES:
            self._copies(func, args, kwargs or {})
        return super().__torch_function__(func, types, args, kwargs)

    def _copies(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Host tensors and numbers that an operation on the device takes."""
        if func in _MADE_OF_NUMBERS:  # an empty one copies nothing
            if torch.device(kwargs.get("device") or CPU) != CPU and not (isinstance(args[0], list) and not args[0]):
                self.tally.add("copies")
            return
        if func not in (Tensor.copy_, Tensor.__setitem__, Tensor.__getitem__):
            return
        others = [t for t in _tensors(args[1:]) if t.dim() and where(t) != where(args[0])]
        for other in others:
            self.tally.add("copies" if where(other) == CPU else "waits")

    def _kernel(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        tensors = _tensors((args, tuple(kwargs.values())))
        here = where(tensors[0])
        if here == CPU:
            self.tally.add("host")
        else:
            self.tally.add("launches", OPERATIONS[name].launches(*args, **kwargs))
            for _ in [t for t in tensors if t.dim() and where(t) == CPU]:
                self.tally.add("copies")
        return self._at(None, lambda: claim(func(*args, **kwargs), here))

    def _move(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        before = where(args[0])
        out = self._at(None, lambda: super(_Counted, self)._move(func, args, kwargs))
        after = where(out)
        if before != after:
            self.tally.add("copies" if before == CPU else "waits")
        elif out is not args[0] and out.dtype != args[0].dtype:
            self.tally.add("host" if after == CPU else "launches")
        return out

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any], here: torch.device) -> Any:
        return self._at(here, lambda: super(_Counted, self)._run(func, args, kwargs, here))

    def _at(self, place: torch.device | None, call: Callable[[], Any]) -> Any:
        before, self.operations.place = self.operations.place, place
        try:
            return call()
        finally:
            self.operations.place = before


def _tensors(values: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(values) if isinstance(t, Tensor)]


def build(layers: int = LAYERS, blocks: int = BLOCKS, side: int = SIDE) -> LlavaForConditionalGeneration:
    """A LLaVA with tiny widths whose weights claim to be on the device."""
    text = LlamaConfig(vocab_size=320, max_position_embeddings=4096, hidden_size=32, intermediate_size=32,
                       num_hidden_layers=layers, num_attention_heads=2)  # fmt: skip
    vision = CLIPVisionConfig(image_size=14 * side, patch_size=14, hidden_size=16, intermediate_size=16,
                              num_hidden_layers=blocks, num_attention_heads=2)  # fmt: skip
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration._from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    put(model, FIRST)
    return model.eval()


def prompt(batch: int, side: int = SIDE) -> dict[str, Tensor]:
    """Prompts of one image between 64 text tokens; their tensors claim to be on the device."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(3, IMAGE - 1, (batch, BEFORE + AFTER), generator=generator)
    ids = torch.cat([words[:, :BEFORE], torch.full((batch, side * side), IMAGE), words[:, BEFORE:]], 1)
    coarse = torch.randn(batch, 3, 9, 9, generator=generator)
    pixels = torch.nn.functional.interpolate(coarse, size=(14 * side, 14 * side), mode="bilinear")
    return claim({"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}, FIRST)  # type: ignore[no-any-return]


@contextmanager
def _marks(model: Any, tally: Tally) -> Iterator[list[dict[str, int]]]:
    """What had been counted when each forward began."""
    marks: list[dict[str, int]] = []
    handle = model.register_forward_pre_hook(lambda *_: marks.append(tally.snapshot()), prepend=True)
    try:
        yield marks
    finally:
        handle.remove()


def count(model: Any, inputs: dict[str, Tensor], cache: str) -> tuple[dict[str, Any], Tally]:
    """One `generate`: all up to where the second forward begins is the prompt's; of the decode steps, the highest."""
    options: dict[str, Any] = {"cache_implementation": "static", "disable_compile": True} if cache == "static" else {}

    def run(new: int, tally: Tally) -> None:
        operations = _Operations(tally)
        given = {name: claim(value.clone(), FIRST) for name, value in inputs.items()}
        with torch.no_grad(), operations, _Counted(tally, operations):
            model.generate(**given, max_new_tokens=new, min_new_tokens=new, do_sample=False, **options)

    run(2, Tally())  # what is built at the first call is not counted
    tally = Tally()
    with _marks(model, tally) as marks:
        run(STEPS + 2, tally)
    steps = [_difference(marks[i + 1], marks[i]) for i in range(1, STEPS + 1)]
    return {
        "prefill": _difference(marks[1], {}),
        "step": {name: max(step[name] for step in steps) for name in steps[0]},
    }, tally


_NAMES = ("launches", "host", "waits", "copies")


def _difference(now: dict[str, int], before: dict[str, int]) -> dict[str, int]:
    names = [*_NAMES, *(f"own_{name}" for name in _NAMES)]
    return {name: now.get(name, 0) - before.get(name, 0) for name in names}


def measure(
    model: Any, methods: tuple[str, ...], batches: tuple[int, ...] = BATCHES, caches: tuple[str, ...] = CACHES,
    keep: int = KEEP, side: int = SIDE,
) -> list[dict[str, Any]]:  # fmt: skip
    """One row per batch, cache and method, the untouched model first."""
    rows = []
    for batch in batches:
        inputs = prompt(batch, side)
        for cache in caches:
            untouched: dict[str, Any] = {}
            for method in (UNTOUCHED, *methods):
                row: dict[str, Any] = {"method": method, "batch": batch, "cache": cache}
                rows.append(row)
                try:
                    with _patched(model, method, keep):
                        figures, tally = count(model, inputs, cache)
                except mustdrop.errors.MustDropError as error:  # a method that does not go with this cache
                    row["refused"] = str(error)
                    continue
                untouched = untouched or figures
                row |= {part: figures[part] | _more(figures[part], untouched[part]) for part in figures}
                row["sites"] = [[*key, many] for key, many in tally.sites.most_common(5)]
    return rows


def _more(figures: dict[str, int], untouched: dict[str, int]) -> dict[str, int]:
    return {"more_launches": figures["launches"] - untouched["launches"]}


def _patched(model: Any, method: str, keep: int) -> Any:
    if method == UNTOUCHED:
        return nullcontext()
    recipe = registry()[method]
    settings: dict[str, Any] = {"keep": keep} if "keep" in recipe.model_fields else {}
    if recipe.trained:  # an untrained scorer starts what a trained one does
        scorer = Scorer(model.config.text_config.hidden_size).eval()
        put(scorer, FIRST)
        settings["importance"] = scorer
    return mustdrop.patched(model, method, **settings)


def every_method() -> tuple[str, ...]:
    """The names of all methods that the model can have: its encoder takes no packed patches."""
    return tuple(sorted(name for name in mustdrop.methods() if resolve(name).input is None))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m benchmarks launches`."""
    parser.add_argument("--method", action="append", help="default: every method")
    parser.add_argument("--batch", type=int, action="append", help=f"default: {BATCHES}")
    parser.add_argument("--cache", choices=CACHES, action="append", help="default: both")
    parser.add_argument("--keep", type=int, default=KEEP, help="tokens kept, of 576 (default: %(default)s)")
    parser.add_argument("--sites", action="store_true", help="print where in mustdrop each figure comes from")
    parser.add_argument("--out", type=Path, help="result file (default: benchmarks/results/launches.json)")


def run(options: argparse.Namespace) -> int:
    """Count, print, save."""
    warnings.simplefilter("ignore", mustdrop.errors.NothingDroppedWarning)
    methods = tuple(options.method or every_method())
    batches, caches = tuple(options.batch or BATCHES), tuple(options.cache or CACHES)
    rows = measure(build(), methods, batches, caches, options.keep)
    for row in rows:
        print(
            row["method"], row["batch"], row["cache"], *(json.dumps(row.get(p)) for p in ("prefill", "step", "refused"))
        )
        if options.sites:
            print(*row.get("sites", ()), sep="\n")
    whole = not (options.method or options.batch or options.cache) and options.keep == KEEP
    out = options.out or (RESULTS / "launches.json" if whole else None)
    if out is not None:
        what = "operations of a prompt's pass and of a decode step on an imitated device; no time was measured"
        size = {"layers": LAYERS, "blocks": BLOCKS, "vision": SIDE**2, "text": BEFORE + AFTER, "keep": options.keep}
        save(out, {"what": what, **provenance(seed=0), **size, "rows": rows})
    return 0
