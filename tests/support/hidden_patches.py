"""A packed encoder whose own attention is told not to look at some patches: the reference for patches that leave it.

Nothing is shorter here. From a layer on, some patches are hidden as keys, and some hidden states are replaced by means,
on an unpatched model. What it gives for the patches that are left is what an encoder without the others must give.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import mustdrop
from mustdrop.adapters import find, registry
from mustdrop.pruners import InputRule
from mustdrop.runtime.attention_capture import attention_of
from mustdrop.runtime.vision import packed_steps

from . import families
from .families import batch, clone, plain

NAME = "hiding_eager"
TOLERANCE = 1e-5


@dataclass
class HiddenPatches:
    """``with HiddenPatches(model, hide, means): model.get_image_features(...)``.

    Args:
        hide: layer -> (P,) bool, patches that it and all later layers do not see.
        means: layer -> [(members, names)]: before it, the states of the patches ``names`` become the mean over the
            cells ``members``, (cells, patches of a cell).
    """

    model: Any
    hide: dict[int, Tensor]
    means: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    kind: str = "image"

    def __enter__(self) -> HiddenPatches:
        tower = find(self.model).tower(self.model, self.kind)
        self.handles, self.before, self.gone, self.at = [], [], None, 0
        for i, block in enumerate(tower.blocks):
            self.handles.append(block.register_forward_pre_hook(self._entering(i), with_kwargs=True))
            config = attention_of(block).config
            if all(config is not seen for seen, _ in self.before):
                self.before.append((config, config._attn_implementation))
        for config, _ in self.before:
            config._attn_implementation_internal = NAME
        ALL_ATTENTION_FUNCTIONS.register(NAME, self._attend)
        ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, eager_mask)
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()
        for config, name in self.before:
            config._attn_implementation_internal = name

    def _entering(self, index: int) -> Any:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if index == 0:
                self.gone = None
            self.gone, self.at = self.hide.get(index, self.gone), 0
            if index not in self.means:
                return None
            states = (args[0] if args else kwargs["hidden_states"]).clone()
            flat = states.view(-1, states.shape[-1])
            made = [(names, flat[members].mean(0)) for members, names in self.means[index]]
            for names, mean in made:
                flat[names] = mean
            if args:
                return (states, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": states}

        return hook

    def _attend(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        logits = (q @ k.transpose(2, 3)).float() * (kwargs.get("scaling") or q.shape[-1] ** -0.5)
        if attention_mask is not None:
            logits = (
                logits + attention_mask if attention_mask.is_floating_point() else logits.where(attention_mask, -1e9)
            )
        here = slice(self.at, self.at + k.shape[0] * k.shape[2])  # of a sequence in pieces, or of all items
        self.at = here.stop
        if self.gone is not None:
            gone = torch.nn.functional.pad(self.gone[here], (0, max(0, here.stop - max(len(self.gone), here.start))))
            logits = logits.masked_fill(gone.view(len(k), 1, 1, -1), -1e9)
        return (logits.softmax(-1).to(v.dtype) @ v).transpose(1, 2).contiguous(), None


def rows(features: Any) -> Tensor:
    """(F, C) of what a features method returns in its field."""
    parts: Sequence[Tensor] = [features] if isinstance(features, Tensor) else features
    return torch.cat([part.flatten(0, -2) for part in parts])


def cells_of(layouts: Sequence[Any]) -> Tensor:
    """(F, k) patches of each feature of all media, -1 fills up."""
    width = max(layout.patches.shape[1] for layout in layouts)
    pad = torch.nn.functional.pad
    return torch.cat([pad(layout.patches, (0, width - layout.patches.shape[1]), value=-1) for layout in layouts])


def patches_of(cells: Tensor, features: Tensor, patches: int) -> Tensor:
    """(P,) bool, the patches of some features, (F,) bool."""
    found = torch.zeros(patches, dtype=torch.bool)
    mine = cells[features]
    found[mine[mine >= 0]] = True
    return found


def merged_windows(owner: Tensor, cells: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """(F,) bool, features that became part of another one, and `HiddenPatches.means`; ``owner`` (F,) names that one."""
    itself, means = torch.arange(len(owner)), []
    for place in owner[(owner >= 0) & (owner != itself)].unique().tolist():
        members, real = (owner == place).nonzero()[:, 0], cells[place] >= 0
        means.append((cells[members][:, real], cells[place][real]))
    return (owner >= 0) & (owner != itself), means


@contextlib.contextmanager
def merges(monkeypatch: Any) -> Iterator[list[Tensor]]:
    """What merging inside packed encoders decides: (F,) of each pass."""
    found, merge = [], packed_steps.merge_behind

    def watched(*args: Any) -> Tensor:
        found.append(merge(*args))
        return found[-1]

    monkeypatch.setattr(packed_steps, "merge_behind", watched)
    yield found
    monkeypatch.setattr(packed_steps, "merge_behind", merge)


def assigned(trace: Any) -> Tensor:
    """(F,) what each feature became part of at the end, itself where it is gone."""
    found, start = [], 0
    for row, total in enumerate(trace.total.tolist()):
        slots, own = trace.assignment(row), torch.arange(total)
        for place in trace.kept(0, row).tolist():
            own[slots == slots[place]] = place
        found.append(own + start)
        start += total
    return torch.cat(found)


def alive_in(trace: Any) -> Tensor:
    """(F,) bool, features that entered the language model."""
    parts = [torch.zeros(total, dtype=torch.bool) for total in trace.total.tolist()]
    for row, part in enumerate(parts):
        part[trace.kept(0, row)] = True
    return torch.cat(parts)


class Drawn(InputRule):
    """Lets in cells at random; the same of a picture wherever it comes."""

    share: float = 0.6

    def choose(self, media):
        kept = []
        for picture in media:
            draw = torch.Generator().manual_seed(int(picture.abs().sum() * 100) % 1000)
            mine = torch.rand(picture.shape[:3], generator=draw) < self.share
            mine[0, 0, 0] = True
            kept.append(mine)
        return kept


class Everything(InputRule):
    """Lets in everything."""

    def choose(self, media):
        return [torch.ones(picture.shape[:3], dtype=torch.bool) for picture in media]


def run(model, inputs, kind):
    """((F, C) features, levels of DeepStack) of a forward of the whole model, gone rows NaN."""
    adapter = find(model)
    with families.Recorder(model) as recorder, torch.no_grad():
        model(**inputs)
    output = recorder.outputs[kind]
    levels = [rows(level) for field in adapter.added_features for level in getattr(output, field)]
    return rows(getattr(output, adapter.features)), levels


def layouts_of(model, kind, inputs):
    return find(model).layouts(model, kind, inputs)


def number_of_patches(cells):
    return int(cells.max()) + 1


def without_breaks(features, layouts):
    """Features that stand for a part of the picture: some releases add the others later."""
    total = sum(layout.size for layout in layouts)
    if len(features) < total:
        made = features.new_zeros(total, features.shape[1])
        made[~torch.cat([layout.structural for layout in layouts])] = features
        return made
    return features


def assert_equals_hiding(monkeypatch, name, kind, attention="sdpa", *, rows=None, **settings):
    """The features that are left, against the unpatched encoder under the decisions of the patched one."""
    adapter, model = registry()[name], clone(name, attention)
    mustdrop.patch(model, **settings)
    inputs = batch(adapter, model, rows or ((kind, kind), (), (kind,)), seed=5)
    with merges(monkeypatch) as owners:
        ours, levels = run(model, inputs, kind)
    trace, layouts = mustdrop.trace(model), layouts_of(model, kind, inputs)
    cells = cells_of(layouts)
    count, alive = number_of_patches(cells), alive_in(trace)
    hide, means, hidden = {}, {}, torch.zeros(count, dtype=torch.bool)
    pruner, incoming = settings.get("vision"), settings.get("input")
    if incoming is not None:
        hidden = hidden | patches_of(cells, entered(adapter, model, kind, inputs, incoming).logical_not(), count)
        hide[0] = hidden
    if pruner is not None and pruner.window is not None:
        parts, means[pruner.layer + 1] = merged_windows(owners[0], cells)
        hidden = hidden | patches_of(cells, parts, count)
        hide[pruner.layer + 1] = hidden
    if pruner is not None and pruner.select_layer is not None:
        hide[pruner.select_layer + 1] = hidden | patches_of(cells, ~alive, count)
        if pruner.rule is not None:
            means[pruner.select_layer + 1] = merged_windows(assigned(trace), cells)[1]
    oracle = plain(name, "eager")
    with HiddenPatches(oracle, hide, means, kind):
        theirs, expected = run(oracle, inputs, kind)
    assert 0 < alive.sum() < len(alive)
    for own, other in [(ours, theirs), *zip(levels, expected, strict=True)]:
        own, other = without_breaks(own, layouts), without_breaks(other, layouts)
        assert (own[alive] - other[alive]).abs().max() <= TOLERANCE
    assert without_breaks(ours, layouts)[~alive & ~torch.cat([x.structural for x in layouts])].isnan().all()
    return trace


def entered(adapter, model, kind, inputs, pruner):
    """(F,) bool, features whose cells the input stage lets in, asked for picture by picture."""
    pixels, found = adapter.pixels(model, kind, inputs), []
    for layout in layouts_of(model, kind, inputs):
        picture = pixels[layout.patches].flatten(1).view(*layout.grids[0], -1)
        found.append(pruner([picture])[0].flatten())
    return torch.cat(found)
