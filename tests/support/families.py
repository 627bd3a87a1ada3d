"""Inputs for the tiny model of any family, and the masked oracle for it. No family is named here."""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import mustdrop
from mustdrop import VisionStagePruner
from mustdrop.adapters import find, registry
from mustdrop.adapters.base import Adapter
from mustdrop.compat import attention_function
from mustdrop.layout import Layout
from mustdrop.runtime.attention_capture import attention_of
from tests.families import build, fixture_of
from tests.families.base import Family

from . import eager_flex, fake_flash
from .builders import Answer, anatomy, answer
from .copies import copy_of
from .fake_devices import eager_experts
from .oracle import Beams, CacheWatch, Hidden, MaskedOracle, _gone
from .scorers import given
from .shorter import ShorterOracle
from .versions import BEAMS_MIX_IMAGES

PAD, BOS = 0, 1

#: The families that the installed transformers has: name -> adapter, and with each kind of media.
AVAILABLE = {name: adapter for name, adapter in registry().items() if adapter.available()}
PAIRS = [(name, kind) for name, adapter in AVAILABLE.items() for kind in adapter.media]

#: Backends whose kernels do not run everywhere -> what takes their place.
STAND_INS = {fake_flash.NAME: fake_flash, eager_flex.NAME: eager_flex}

Row = tuple[str, ...]


@functools.cache
def plain(name: str, attention: str = "sdpa") -> Any:
    """The shared unpatched tiny model of a family; patch a :func:`clone`."""
    return given(build(registry()[name], attention))


def clone(name: str, attention: str = "sdpa") -> Any:
    """An independent copy of :func:`plain`; the backends with a stand-in need the fixture that installs it."""
    if attention in STAND_INS:
        return STAND_INS[attention].use(copy_of(plain(name)))
    return copy_of(plain(name, attention))


def oracles(attention: str) -> str:
    """The backend of the oracle: a stand-in is compared with torch's own attention."""
    return "sdpa" if attention in STAND_INS else attention


def picture(shape: Sequence[int], seed: int) -> Tensor:
    """A scene of flat and of noisy areas, so that some windows merge and others do not; frames change slowly."""
    draw = torch.Generator().manual_seed(seed)
    frames = shape[0] if len(shape) == 4 else 1
    height, width = shape[-2:]
    cells = (max(2, height // 12), max(2, width // 12))
    colour = torch.randn(1, 3, *cells, generator=draw)
    noise = torch.rand(1, 1, *cells, generator=draw).pow(2)
    resize = functools.partial(torch.nn.functional.interpolate, size=(height, width), mode="nearest")
    made = [
        resize(colour) + 0.05 * t + resize(noise) * torch.randn(1, 3, height, width, generator=draw)
        for t in range(frames)
    ]
    return torch.cat(made) if len(shape) == 4 else made[0][0]


def batch(
    of: Adapter | Family,
    model: Any,
    rows: Sequence[Row],
    seed: int = 0,
    first: int = 0,
    paint: Callable[[int, Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """Inputs for ``generate``: row r holds the media ``rows[r]``; shorter rows are padded on the left.

    Row r depends on (seed, first + r) alone, so it is the same in every batch. ``paint`` changes the k-th picture.
    """
    fixture = fixture_of(of)
    adapter = fixture.adapter
    pictures: dict[str, list[Tensor]] = {kind: [] for kind in adapter.media}
    number = 0
    for r, row in enumerate(rows):
        for k, kind in enumerate(row):
            sizes = fixture.sizes(kind)
            made = picture(sizes[(first + r + k) % len(sizes)], 104729 * seed + 100 * (first + r) + k)
            pictures[kind].append(made if paint is None else paint(number, made))
            number += 1
    inputs: dict[str, Tensor] = {}
    runs: dict[str, list[list[int]]] = {}
    for kind, made in pictures.items():
        if made:
            arguments, runs[kind] = fixture.media(model, kind, made)
            inputs |= fixture.rows(arguments, [row.count(kind) for row in rows])
    ids, types = [], []
    placeholder = {modality.name: modality.token for modality in adapter.modalities(model)}
    for r, row in enumerate(rows):
        draw = torch.Generator().manual_seed(7919 * seed + first + r)

        def words(n: int, draw: torch.Generator = draw) -> list[int]:
            return torch.randint(20, 400, (n,), generator=draw).tolist()

        line = [BOS, *words(2 + (first + r) % 3)]
        marks = [0] * len(line)
        for kind in row:
            run = runs[kind].pop(0)
            marks += [(1 if kind == "image" else 2) * (token == placeholder[kind]) for token in run] + [0] * 2
            line += [*run, *words(2)]
        ids.append(line + words(4 - (first + r) % 2))
        types.append(marks + [0] * (len(ids[-1]) - len(marks)))
    length = max(map(len, ids))
    inputs["input_ids"] = torch.tensor([[PAD] * (length - len(line)) + line for line in ids])
    inputs["attention_mask"] = torch.tensor([[0] * (length - len(line)) + [1] * len(line) for line in ids])
    kinds = torch.tensor([[0] * (length - len(line)) + line for line in types])
    return inputs | fixture.types(kinds)


def fitting(name: str, setup: dict[str, Any]) -> dict[str, Any]:
    """Of a setup, the pruners whose stages the family has; one that selects in the vision stage where none is left."""
    left = {stage: pruner for stage, pruner in setup.items() if stage not in registry()[name].lacks}
    return left or {"vision": VisionStagePruner(window=None, keep=0.6)}


def new_cache(model: Any) -> DynamicCache:
    """A growing cache that never forgets; recurrent layers need one that knows of them."""
    adapter = find(model)
    return DynamicCache(config=adapter.text(model).config) if adapter.recurrent(model) else DynamicCache()


def vision_positions(model: Any, ids: Tensor, row: int) -> Tensor:
    """(N,) positions of the vision tokens of one row."""
    tokens = torch.tensor([modality.token for modality in find(model).modalities(model)])
    return torch.isin(ids[row], tokens).nonzero()[:, 0]


def hidden_by(model: Any, trace: Any, ids: Tensor, cascade_from: int | None = None) -> Hidden:
    """What a trace says was dropped, per decoder layer, as positions in ``ids``."""
    layers = len(find(model).decoder_layers(model))
    prefill = torch.zeros(layers, *ids.shape, dtype=torch.bool)
    decode = prefill.clone()
    for row in range(len(ids)):
        where = vision_positions(model, ids, row)
        for layer in range(layers):
            cached = layers if cascade_from is not None and layer >= cascade_from else layer
            prefill[layer, row, _gone(where, trace.kept(layer, row))] = True
            decode[layer, row, _gone(where, trace.kept(cached, row))] = True
    return Hidden(prefill, decode)


class Recorder:
    """What the features methods of a (patched) model returned: kind -> list of outputs."""

    def __init__(self, model: Any) -> None:
        self.base, self.outputs, self.inside = find(model).base(model), {}, False
        self._methods = {m.name: m.method for m in find(model).modalities(model)}

    def __enter__(self) -> Recorder:
        self._before = {}
        for kind, method in self._methods.items():
            self._before[method] = vars(self.base).get(method)
            object.__setattr__(self.base, method, self._recording(kind, getattr(self.base, method)))
        return self

    def _recording(self, kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            outermost, self.inside = not self.inside, True
            try:
                output = function(*args, **kwargs)
            finally:
                self.inside = self.inside and not outermost
            if outermost:  # the method of one kind may call that of another
                self.outputs[kind] = copy.deepcopy(output)
            return output

        return wrapper

    def __exit__(self, *_: object) -> None:
        for method, before in self._before.items():
            if before is None:
                object.__delattr__(self.base, method)
            else:
                object.__setattr__(self.base, method, before)


class FamilyOracle:
    """As :class:`MaskedOracle`, or where no mask hides a token, :class:`ShorterOracle`.

    The features that the patched model made stand in for the model's own. Rows that the vision stage dropped hold
    zeros, which nobody sees: those tokens are hidden from layer 0 on.
    """

    def __init__(self, model: Any, hidden: Hidden, outputs: dict[str, Any] | None = None) -> None:
        kind = ShorterOracle if find(model).recurrent(model) else MaskedOracle
        self.hiding: Any = kind(model, hidden)
        self.model, self.outputs = model, outputs or {}

    @property
    def prompt_keys(self) -> dict[int, Tensor]:
        """What :class:`MaskedOracle` has remembered."""
        return self.hiding.prompt_keys

    def __enter__(self) -> FamilyOracle:
        self.hiding.__enter__()
        base = find(self.model).base(self.model)
        for modality in find(self.model).modalities(self.model):
            if modality.name in self.outputs:
                function = getattr(base, modality.method)
                object.__setattr__(base, modality.method, self._replaying(modality.name, function))
        return self

    def _replaying(self, kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            output, field = copy.deepcopy(self.outputs[kind]), find(self.model).features
            made = getattr(output, field)
            if isinstance(made, Tensor):
                setattr(output, field, made.nan_to_num(0.0))
            else:
                setattr(output, field, type(made)(part.nan_to_num(0.0) for part in made))
            return output

        return wrapper

    def __exit__(self, *_: object) -> None:
        self.hiding.__exit__()
        base = find(self.model).base(self.model)
        for modality in find(self.model).modalities(self.model):
            vars(base).pop(modality.method, None)


@dataclass(frozen=True)
class Compared:
    """Both sides of one comparison."""

    ours: Answer
    oracle: Answer
    hidden: Hidden
    trace: Any


def cast(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The same inputs for a model of another type."""
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}


def compare(
    name: str,
    rows: Sequence[Row],
    attention: str = "sdpa",
    *,
    change: Callable[[Any], Any] | None = None,
    steps: int = 8,
    seed: int = 0,
    inputs: dict[str, Tensor] | None = None,
    generation: dict[str, Any] | None = None,
    **settings: Any,
) -> Compared:
    """``generate`` on the patched model and on the oracle; ``settings`` go to ``mustdrop.patch``.

    ``change`` is done to the weights of both: it takes an unpatched model and returns it.
    """
    flash = attention == fake_flash.NAME
    oracle_model, model = plain(name, oracles(attention)), clone(name, attention)
    if change is not None:
        model, oracle_model = change(model), change(copy.deepcopy(oracle_model))
    mustdrop.patch(model, **settings)
    adapter, options = registry()[name], generation or {}
    inputs = cast(batch(adapter, model, rows, seed), model.dtype) if inputs is None else inputs
    decode = vars(model)["_mustdrop"].method.decode
    repeat = max(options.get("num_beams", 1), options.get("num_return_sequences", 1))
    ids = inputs["input_ids"].repeat_interleave(repeat, 0)
    with Beams() as beams, Recorder(model) as recorder, CacheWatch(model) as watch:
        torch.manual_seed(seed)
        ours = answer(model, inputs, steps, **options)
    trace = mustdrop.trace(model)
    hidden = hidden_by(model, trace, ids, decode.full_layers if decode and decode.cascade else None)
    hidden.beams = beams  # where tokens tie, copies of a prompt may have kept different ones
    if decode is not None and decode.keep is not None:
        with FamilyOracle(oracle_model, Hidden(hidden.prefill, hidden.prefill), recorder.outputs) as oracle:
            answer(oracle_model, inputs, 0, past_key_values=new_cache(oracle_model), **options)
        where = functools.partial(vision_positions, model)
        hidden = watch.hidden_while_decoding(oracle.prompt_keys, ids, hidden, where)
    with fake_flash.exact_sdpa(flash), FamilyOracle(oracle_model, hidden, recorder.outputs):
        torch.manual_seed(seed)
        # a cache that never forgets: what a sliding layer may not see, the mask says
        if options.get("use_cache") is not False:
            options = {name: value for name, value in options.items() if name != "cache_implementation"}
            options["past_key_values"] = new_cache(oracle_model)
        theirs = answer(oracle_model, inputs, steps, **options)
    return Compared(ours, theirs, hidden, trace)


def assert_dropping_equals_masking(*args: Any, tolerance: float = 1e-5, **settings: Any) -> Compared:
    """Logits at the prefill and at every decode step, equal tokens, and something was dropped.

    Of two beams with one score up to ``tolerance`` either may come first, and either may be returned.
    """
    both = compare(*args, **settings)
    assert both.hidden.anything, "nothing was dropped: this comparison proves nothing"
    beams = (settings.get("generation") or {}).get("num_beams", 1)
    difference = apart(both.ours.logits, both.oracle.logits, beams)
    if tolerance < difference.max() < 10 * tolerance and "change" not in settings:
        # sums in another order may differ by that much in float32; in float64 they may not
        return assert_dropping_equals_masking(*args, tolerance=1e-3 * tolerance, change=in_double, **settings)
    assert difference.max() <= tolerance, f"largest difference of the logits per step: {difference.tolist()}"
    if both.ours.scores is not None:
        assert (both.ours.scores - both.oracle.scores).abs().max() <= tolerance
    else:
        assert torch.equal(both.ours.sequences, both.oracle.sequences)
    return both


def in_double(model: Any) -> Any:
    """A model in float64, with experts one by one: torch has no grouped product of doubles."""
    return eager_experts(model).double()


@contextmanager
def double_throughout() -> Iterator[None]:
    """What transformers computes in float32 in any model, as in recurrent layers, in float64 as well."""
    plain_to, plain_float = torch.Tensor.to, torch.Tensor.float

    def theirs() -> bool:
        return "transformers" in Path(sys._getframe(2).f_code.co_filename).parts

    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if theirs():
            args = tuple(torch.float64 if value is torch.float32 else value for value in args)
            kwargs = {name: torch.float64 if value is torch.float32 else value for name, value in kwargs.items()}
        return plain_to(self, *args, **kwargs)

    torch.Tensor.to = to
    torch.Tensor.float = lambda self, **kwargs: self.double() if theirs() else plain_float(self, **kwargs)
    try:
        yield
    finally:
        torch.Tensor.to, torch.Tensor.float = plain_to, plain_float


def apart(ours: Tensor, oracle: Tensor, beams: int) -> Tensor:
    """(steps,) largest difference of two (B, steps, V), each row from the nearest one of the same prompt's beams."""
    a, b = (logits.unflatten(0, (-1, beams)).movedim(2, 0) for logits in (ours, oracle))  # steps, prompts, beams, V
    pairs = (a[:, :, :, None] - b[:, :, None]).abs().amax(-1)
    return torch.maximum(pairs.amin(-1), pairs.amin(-2)).amax((1, 2))


def for_beams(name: str, kind: str) -> tuple[Row, ...]:
    """Rows whose prompts are expanded: with one medium each where transformers mixes media of rows up.

    It does where the unpatched model gives the copies of one prompt different logits.
    """
    rows = ((kind,), (kind, kind))
    if BEAMS_MIX_IMAGES:
        return ((kind,), (kind,))
    first = answer(plain(name), batch(registry()[name], plain(name), rows), 0, num_beams=2).logits
    alike = (first.view(2, 2, -1).diff(dim=1).abs() < 1e-4).all()
    return rows if bool(alike) else ((kind,), (kind,))


def skip_where_transformers_fails(name: str, kind: str, **options: Any) -> None:
    """Skip a test of prompts that are expanded where the unpatched model raises."""
    try:
        answer(plain(name), batch(registry()[name], plain(name), for_beams(name, kind)), 1, **options)
    except (ValueError, RuntimeError) as error:
        pytest.skip(f"the unpatched model raises: {error}")


def counts_padding(name: str, kind: str) -> bool:
    """Whether padding counts in the positions that the unpatched model's decoder works with.

    It does where a model hands no positions on, or those of the padded row as they are.
    """
    model, given = plain(name), []
    handle = (
        find(model)
        .text(model)
        .register_forward_pre_hook(lambda _, args, kwargs: given.append(kwargs.get("position_ids")), with_kwargs=True)
    )
    for rows in (((), (kind,)), ((),)):
        answer(model, batch(registry()[name], model, rows), 0)
    handle.remove()
    padded, alone = given
    return padded is None or not torch.equal(padded[..., :1, -1], alone[..., :1, -1])


def lasting(model: Any, run: Callable[[], object] | None = None) -> dict[str, Any]:
    """The anatomy of a model without what a plain run changes by itself (positions that are remembered)."""
    before = anatomy(model)
    if run is not None:
        run()
        after = anatomy(model)
        model.tests_changing = {name for name in before if before[name] != after[name]}
    return {name: value for name, value in anatomy(model).items() if name and name not in model.tests_changing}


class MergedTower:
    """A plain encoder made to compute what an encoder with merged tokens must compute, at full length.

    After ``layer`` every patch takes the mean of its window; from then on only one patch per window is seen. So all
    patches of a window hold what the merged token would hold.
    """

    def __init__(self, tower: Any, layer: int, merged: Any) -> None:
        self.tower, self.layer, self.merged = tower, layer, merged
        self._handles: list[Any] = []

    def __enter__(self) -> MergedTower:
        if self.merged is None:
            return self
        blocks = list(self.tower.blocks)[self.layer + 1 :]
        self._handles.append(blocks[0].register_forward_pre_hook(self._spread))
        for block in blocks:
            takes = "attention_mask" in inspect.signature(type(block).forward).parameters
            module = block if takes else attention_of(block)
            self._handles.append(module.register_forward_pre_hook(self._hide, with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _spread(self, _: object, args: tuple[Any, ...]) -> tuple[Any, ...]:
        prefix = self.tower.prefix
        patches = args[0][:, prefix:]
        means = self.merged.expand(self.merged.apply(patches), patches.shape[1])
        return (torch.cat([args[0][:, :prefix], means], 1), *args[1:])

    def _hide(self, _: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        n = self.merged.merge_into.shape[1]
        seen = torch.nn.functional.pad(self.merged.mask(n), (self.tower.prefix, 0), value=True)
        mask = torch.zeros(len(seen), 1, seen.shape[1], seen.shape[1])
        mask = mask.masked_fill(~seen[:, None, None], torch.finfo(torch.float32).min)
        if len(args) > 1:
            return (args[0], mask, *args[2:]), kwargs
        return args, {**kwargs, "attention_mask": mask}


def flat_features(output: Any, layouts: Sequence[Layout]) -> Tensor:
    """(F, C) features of one call, of all media; structural rows that the model adds only later are zeros."""
    made = getattr(output, "pooler_output", None)
    made = output.last_hidden_state if made is None else made
    flat = made.flatten(0, -2) if isinstance(made, Tensor) else torch.cat([part.flatten(0, -2) for part in made])
    picture = ~torch.cat([layout.structural for layout in layouts])
    if len(flat) == len(picture):
        return flat
    return flat.new_zeros(len(picture), flat.shape[1]).masked_scatter(picture[:, None], flat)


def encoder_attention(adapter: Adapter, model: Any, kind: str, inputs: dict[str, Tensor]) -> Tensor:
    """(patches,) what the last encoder layer gives each patch, from the attention weights of an eager model.

    With a CLS token its attention, else the mean received; in a packed sequence times the length of the segment.
    """
    tower, found = adapter.tower(model, kind), []
    name, attention = "tests_eager", attention_of(tower.blocks[-1])
    real = attention_function(attention, "eager")

    def recording(module: Any, *args: Any, **kwargs: Any) -> Any:
        if "scaling" in kwargs and kwargs["scaling"] is None:
            kwargs["scaling"] = args[0].shape[-1] ** -0.5
        out = real(module, *args, **kwargs)
        if module is attention:
            weights, mask = out[1].mean(1), args[3] if len(args) > 3 else None
            real_queries = torch.ones(weights.shape[:2]) if mask is None else (mask[:, 0] == 0).any(1).float()
            found.append((weights, real_queries))
        return out

    if name not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(name, lambda *args, **kwargs: recording_of[0](*args, **kwargs))
    recording_of[:] = [recording]
    attention.config = copy.copy(attention.config)
    attention.config._attn_implementation_internal = name
    with torch.no_grad():
        model(**inputs)
    if tower.packed:
        return torch.cat([weights.sum(1).flatten() for weights, _ in found])
    cls = 0 if tower.prefix else -1
    scores = [w[:, cls] if tower.has_cls else (w * q[..., None]).sum(1) / q.sum(1, keepdim=True) for w, q in found]
    return torch.cat([score[:, tower.prefix : score.shape[1] - tower.suffix].flatten() for score in scores])


recording_of: list[Any] = []
