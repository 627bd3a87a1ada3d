"""Following the paint: a picture is changed in one place, and what changes must be what the trace and layout name."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import mustdrop
from mustdrop.adapters import find
from mustdrop.adapters.base import Adapter
from mustdrop.layout import Layout
from mustdrop.pruners.vision_rules import InnerRule, PictureRule
from tests.families import fixture_of

from .families import batch, flat_features, vision_positions


@dataclass(frozen=True)
class Spot:
    """A place of a picture of ``shape`` (C, H, W), or of one frame of (T, C, H, W).

    ``at`` is (row, column), or (frame, row, column), in pixels.
    """

    shape: tuple[int, ...]
    at: tuple[int, ...]

    @classmethod
    def along(cls, shape: Sequence[int], share: float) -> Spot:
        """At the same share of every side."""
        sizes = shape[-2:] if len(shape) == 3 else (shape[0], *shape[-2:])
        return cls(tuple(shape), tuple(int(share * n) for n in sizes))

    @classmethod
    def of(cls, shape: Sequence[int], layout: Layout, token: int) -> Spot:
        """In the middle of what a token shows."""
        cell = int(layout.cells[token])
        grid = max(g for g, start in enumerate(layout.offsets[: len(layout.grids)]) if start <= cell)
        (frames, rows, columns), cell = layout.grids[grid], cell - layout.offsets[grid]
        place = [(cell // columns % rows + 0.5) / rows * shape[-2], (cell % columns + 0.5) / columns * shape[-1]]
        if len(shape) == 4:
            place.insert(0, (cell // (rows * columns) + 0.5) / frames * shape[0])
        return cls(tuple(shape), tuple(int(value) for value in place))

    def paint(self, _: int, picture: Tensor, thickness: float = 5.0) -> Tensor:
        """The picture with the spot painted, so large that no resampling steps over it."""
        changed = picture.clone()
        area = tuple(slice(max(0, at - 1), at + 2) for at in self.at[-2:])
        changed[(self.at[0], slice(None), *area) if len(self.at) == 3 else (slice(None), *area)] += thickness
        return changed

    def assert_named(self, layout: Layout, changed: Tensor) -> None:
        """The tokens ``changed`` lie, by the layout, where the spot lies, in every grid that shows the picture."""
        for (frames, rows, columns), start in zip(layout.grids, layout.offsets, strict=False):
            cells = layout.cells[changed]
            own = cells[(cells >= start) & (cells < start + frames * rows * columns)] - start
            assert len(own), "a grid that shows the picture does not show the paint"
            high, wide = self.shape[-2:]
            at = (self.at[-2] * rows // high, self.at[-1] * columns // wide)
            # resampling and the rounding of tiles may move it by one cell
            assert (own // columns % rows - at[0]).abs().max() <= 1
            assert (own % columns - at[1]).abs().max() <= 1
            if len(self.at) == 3:
                seen = own.div(rows * columns, rounding_mode="floor").unique().tolist()
                assert seen == [self.at[0] * frames // self.shape[0]]


def follow_a_patch(adapter: Adapter, model: Any, kind: str, place: float) -> None:
    """Paint a part of the picture; the features that change must be those that the layout says.

    The encoder's attention gives zeros, so a patch changes nothing but the features that it is part of.
    """
    tower = adapter.tower(model, kind)
    silence(tower.module)
    hush(tower.before)
    spot = Spot.along(fixture_of(adapter).sizes(kind)[0], place)
    seen, features, layouts = [], [], []
    base, (modality,) = adapter.base(model), [m for m in adapter.modalities(model) if m.name == kind]
    handle = tower.blocks[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append([*args, *kwargs.values()][0]), with_kwargs=True
    )
    for how in (None, spot.paint):
        inputs = batch(adapter, model, ((kind,),), paint=how)
        known = inspect.signature(getattr(base, modality.method)).parameters
        arguments = {name: value for name, value in inputs.items() if name in known}
        pixels = [name for name in modality.pixels if name in inputs]
        if not any(name in known for name in pixels):  # older releases name the argument of a video as that of an image
            arguments = {next(iter(known)): inputs[pixels[0]], **arguments}
        if (
            "vision_feature_select_strategy" in known
            and known["vision_feature_select_strategy"].default is inspect._empty
        ):
            arguments["vision_feature_select_strategy"] = model.config.vision_config.vision_feature_select_strategy
        with torch.no_grad():
            made = getattr(base, modality.method)(**arguments)
        layouts.append(adapter.layouts(model, kind, inputs))
        features.append(flat_features(made, layouts[-1]))
    handle.remove()
    ((layout,), _) = layouts
    prefix = 0 if tower.packed else tower.prefix
    end = seen[0].shape[1] - tower.suffix
    before, after = (hidden.flatten(0, -2) if tower.packed else hidden[:, prefix:end].flatten(0, 1) for hidden in seen)
    painted = (before != after).any(-1).nonzero()[:, 0]
    changed = ((features[0] - features[1]).abs().amax(-1) > 1e-6).nonzero()[:, 0]
    assert len(painted), "the paint did not reach the encoder"
    expected = torch.isin(layout.patches, painted).any(-1).nonzero()[:, 0]
    assert changed.tolist() == expected.tolist()
    spot.assert_named(layout, changed)


def silence(tower: Any) -> None:
    """Attention that returns zeros, in every module of an encoder."""
    name = "tests_silent"
    if name not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(
            name, lambda module, q, k, v, *_, **__: (torch.zeros_like(q.transpose(1, 2)), None)
        )
    for module in tower.modules():
        config = getattr(module, "config", None)
        if config is not None:
            config._attn_implementation_internal = name


def hush(blocks: Iterable[nn.Module]) -> None:
    """Attention, linear attention and short convolutions too, that adds nothing: every token is on its own there."""

    def nothing(_: nn.Module, args: object, out: Any) -> Any:
        return (torch.zeros_like(out[0]), *out[1:]) if isinstance(out, tuple) else torch.zeros_like(out)

    for block in blocks:
        names = ("attn", "attention", "conv")
        mixers = [child for name, child in block.named_children() if any(part in name for part in names)]
        kept = [child for child in mixers if "norm" not in type(child).__name__.lower()]
        assert kept, f"{type(block).__name__}: no attention found among {[n for n, _ in block.named_children()]}"
        for mixer in kept:
            mixer.register_forward_hook(nothing)


def by_layer(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """(rows, D) per decoder layer: what it made of the rows that it was given, in a prefill of one prompt."""
    made: list[Tensor] = []
    handles = [
        layer.register_forward_hook(lambda _, args, out: made.append(out[0] if isinstance(out, tuple) else out))
        for layer in find(model).decoder_layers(model)
    ]
    try:
        with torch.no_grad():
            model(**inputs, use_cache=True)
    finally:
        for handle in handles:
            handle.remove()
    return [rows.view(-1, rows.shape[-1]) for rows in made]


def follow_through_the_layers(adapter: Adapter, model: Any, oracle: Any, kind: str) -> None:
    """Every row of every decoder layer of a patched model is that of the patch, or patches, which the trace names.

    No token of ``model`` and of the unpatched ``oracle`` looks at another, so a row holds what it held at the start.
    Then two places are painted, so thinly that nothing is decided otherwise: what two of the tokens show that reach
    the end. Rows change whose patches show the paint, by the trace, and no others (but where a method adds what is gone
    by the trace to what is kept).
    """
    inputs = batch(adapter, model, ((kind,),))
    with Blends(model) as blends:
        rows, trace = by_layer(model, inputs), mustdrop.trace(model)
    whole = by_layer(oracle, inputs)
    where = vision_positions(model, inputs["input_ids"], 0)
    slots, (medium,) = trace.assignment(), trace.media[0]
    together = slots[:, None] == slots[None]  # of two tokens: merged into one
    held = []
    for layer, (got, expected) in enumerate(zip(rows, whole, strict=True)):
        tokens = torch.full((len(expected),), -1)  # of each row its vision token
        tokens[where] = torch.arange(len(where))
        left = tokens < 0
        left[where[trace.kept(layer)]] = True
        held.append(tokens[left])
        assert got.shape == expected[left].shape
        as_they_were = held[-1] < 0 if blends.any else left[left]
        assert (got - expected[left])[as_they_were].abs().max() <= max(1e-5, rounding(got))
    assert trace.dropped_anything
    if "vision" in adapter.lacks:  # features that read the whole picture have no place in it
        return
    followed = 0
    for token in trace.kept(len(rows)).tolist():
        if followed == 2 or medium.layout.structural[token]:
            continue
        spot = Spot.of(fixture_of(adapter).sizes(kind)[0], medium.layout, token)
        painted, ours = painted_thinly(adapter, model, kind, spot, trace)
        if not ours:
            continue
        followed += 1
        changed = (by_layer(oracle, painted)[0] != whole[0]).any(-1)[where]
        spot.assert_named(medium.layout, changed.nonzero()[:, 0])
        assert changed[token]
        for tokens, got, before in zip(held, ours, rows, strict=True):
            shows = (tokens >= 0) & (together & changed).any(1)[tokens]
            effect = (got - before).abs().amax(-1)
            noise = rounding(got)
            assert effect[tokens < 0].max() <= noise
            assert effect[shows].min() > max(1e-4, 2 * noise)
            assert blends.more_than_named or effect[~shows].max() <= noise
    assert followed, "any paint changes what is kept: nothing was followed"


def rounding(rows: Tensor) -> float:
    """What float32 makes of the same rows in another company: experts multiply whatever is sent to them at once."""
    return 1e-6 * max(1.0, float(rows.abs().max()))


def painted_thinly(
    adapter: Adapter, model: Any, kind: str, spot: Spot, trace: Any
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Inputs with a painted spot, and :func:`by_layer` of the patched model if it decides as in ``trace``, else []."""
    for thickness in (1e-1, 1e-2, 1e-3):
        inputs = batch(adapter, model, ((kind,),), paint=functools.partial(spot.paint, thickness=thickness))
        rows, again = by_layer(model, inputs), mustdrop.trace(model)
        same = [torch.equal(trace.kept(layer), again.kept(layer)) for layer in range(len(rows) + 1)]
        if all(same) and torch.equal(trace.assignment(), again.assignment()):
            return inputs, rows
    return inputs, []


class Blends:
    """Whether the vision stage of a patched model gives kept features new values.

    Attributes:
        any: it does.
        more_than_named: it adds features to them that the trace calls gone, or the encoder sees a smaller picture,
            whose pixels are made of those of several places.
    """

    def __init__(self, model: Any) -> None:
        vision = vars(model)["_mustdrop"].method.vision
        self.rule = None if vision is None else vision.rule
        self.any = isinstance(self.rule, InnerRule) or (vision is not None and vision.window is not None)
        self.more_than_named = isinstance(self.rule, PictureRule)

    def __enter__(self) -> Blends:
        if self.rule is not None:
            self.before = type(self.rule).choose
            type(self.rule).choose = self._choose
        return self

    def __exit__(self, *_: object) -> None:
        if self.rule is not None:
            type(self.rule).choose = self.before

    def _choose(self, *args: Any) -> Any:
        chosen = self.before(self.rule, *args)
        self.any |= chosen.blend is not None
        self.more_than_named |= chosen.blend is not None and chosen.merge_into is None
        return chosen
