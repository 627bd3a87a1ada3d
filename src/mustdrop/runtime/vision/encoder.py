"""The vision stage inside a running encoder: shrink after one layer, score at another, undo the shrinking at the exit.

What leaves the encoder has its full length again, and so have the projected features: a dropped token is a row of NaN
in them. So everything in transformers that counts features (placeholder checks, beams, chunks) sees nothing unusual,
and the marks survive concatenation, casts and re-grouping.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from mustdrop.adapters.base import Tower
from mustdrop.compat import eager
from mustdrop.constants import every
from mustdrop.errors import ConfigError
from mustdrop.pruners import InnerRule, Read, VisionStagePruner
from mustdrop.runtime import masks_flex, tensor_parallel
from mustdrop.runtime.copied import Copied
from mustdrop.runtime.masks import attended_keys
from mustdrop.runtime.masks_flex import Mask
from mustdrop.runtime.state import Local
from mustdrop.runtime.vision import attention, packed_steps, window_merging
from mustdrop.runtime.vision.encoder_hooks import BlockHook, parameters, takes_mask
from mustdrop.runtime.vision.encoder_run import EncoderRun


class EncoderStage(Copied):
    """Watches one tower, and runs a `VisionStagePruner` in it if there is one."""

    def __init__(
        self,
        pruner: VisionStagePruner | None,
        tower: Tower,
        local: Local,
        key: object,
        read_layer: int,
        lets_in: bool = False,
    ) -> None:
        self.lets_in = lets_in  # whether there is a stage before the encoder
        self.pruner, self.tower, self.local, self.key = pruner, tower, local, key
        self.last = read_layer
        self.reads: dict[int, list[Read]] = {}
        self.compared: set[int] = set()  # layers of which something is read that queries and keys tell
        self.leaves_at: int | None = None  # the layer after which what is not selected leaves a packed tower
        if pruner is None:
            return
        depth = len(tower.blocks)
        self.reads = layers_read(pruner, depth, read_layer, tower.whole)
        self.compared = {i for i, reads in self.reads.items() if any(read.what != "states" for read in reads)}
        self.leaves_at = packed_steps.check_layers(pruner, tower, read_layer, list(self.reads))
        if pruner.window is None or not pruner.inside or (tower.packed and not self.merges_packed):
            return
        if pruner.layer > depth - 2:
            raise ConfigError(
                f"VisionStagePruner.layer={pruner.layer}: merging after it needs a next layer; this "
                f"encoder has layers 0 to {depth - 1}."
            )
        if pruner.needs_attention and pruner.importance.at(depth, read_layer) <= pruner.layer:
            raise ConfigError(
                f"VisionStagePruner.key_layer={pruner.key_layer} must come after the merging layer "
                f"{pruner.layer}: it scores merged tokens."
            )

    def merges_inside(self, pool: int | None, frames: int) -> bool:
        """Whether windows merge inside the encoder, which must see whole windows as squares of patches of one item."""
        pruner = self.pruner
        if pruner is None or pruner.window is None or self.tower.packed or pool is None or not pruner.inside:
            return False
        return frames == 1 or pruner.temporal_window == 1

    @property
    def merges(self) -> bool:
        """Whether windows may merge inside the encoder."""
        pruner = self.pruner
        inside = pruner is not None and pruner.window is not None and pruner.inside
        return inside and (not self.tower.packed or self.merges_packed)

    @property
    def merges_packed(self) -> bool:
        """Whether windows merge inside a packed encoder. The authors' code knows no such encoder."""
        pruner = self.pruner
        merges = pruner is not None and pruner.window is not None and pruner.inside and pruner.compat == "paper"
        return merges and self.tower.cuts

    @property
    def shortens(self) -> bool:
        """Whether patches may leave a packed encoder."""
        return self.tower.cuts and (self.lets_in or self.merges_packed or self.leaves_at is not None)

    @property
    def inner(self) -> InnerRule | None:
        """The rule that merges in the layers, where they can be halved."""
        rule = None if self.pruner is None else self.pruner.rule
        fits = self.tower.halves is not None and not self.tower.packed and not self.tower.suffix
        return rule if isinstance(rule, InnerRule) and fits else None

    @property
    def tapped(self) -> list[int]:
        """Layers whose queries and keys are read."""
        return sorted({*self.compared, *(range(self.last + 1) if self.inner is not None else ())})

    @property
    def stated(self) -> list[int]:
        """Layers whose hidden states are read."""
        return sorted(layer for layer, reads in self.reads.items() if any(read.what == "states" for read in reads))

    @property
    def watched(self) -> list[int]:
        """Layers that something may be done before, or that may see other sequences than the layer before them."""
        every_layer = range(len(self.tower.blocks))
        if self.tower.packed or self.tower.padded or self.inner is not None:
            return list(every_layer)
        pruner = self.pruner
        after = len(every_layer) if pruner is None or not self.merges else pruner.layer + 1
        return [i for i in every_layer if not i or i in self.compared or i >= after]

    def hooks(self) -> list[BlockHook]:
        """What runs before the layers `watched`."""
        places = self.watched
        ends = [*places[1:], len(self.tower.blocks)]
        return [BlockHook(self, i, end - i) for i, end in zip(places, ends, strict=True)]

    def check(self, read_layer: int) -> None:
        """Raise `ConfigError` if merging would come after the layer that the features are read from."""
        pruner = self.pruner
        if pruner is not None and self.merges and pruner.layer >= read_layer:
            raise ConfigError(
                f"VisionStagePruner.layer={pruner.layer}: this model reads its features from "
                f"encoder layer {read_layer}; merge before it (0 to {read_layer - 1})."
            )

    @eager
    def passed(self, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        """Note for the account what enters a layer."""
        run: EncoderRun | None = self.local.encoder
        if run is None:
            return
        run.lengths.append(self._lengths(run, hidden, kwargs))
        if run.packed is not None:
            run.uncut.append(run.lengths[-1])

    @eager
    def before_block(
        self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], layers: int = 1
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Merge on the way into the layer after `layer`; mask padding in all later ones.

        Arm the attention hook where something is read. The next `layers` layers see the same sequences.
        """
        run: EncoderRun | None = self.local.encoder
        if run is None:
            return None
        same = run.even and run.counted is not None and run.inside is None  # it sees what the layer before saw
        if same and index not in self.compared and _given_mask(args, kwargs) is None:
            run.lengths.append(run.lengths[-1])
            return None
        pruner = self.pruner
        if index in self.compared or (run.inside is not None and index <= self.last):
            self.local.capture = (self.key, index)
        if index == 0 and run.inside is not None and masks_flex.hides(_given_mask(args, kwargs)):
            run.inside = None  # padding must not merge with patches: the rule is asked afterwards
        if not run.item and not self.tower.packed and args[0].ndim == 3:
            run.item = args[0].shape[1] - self.tower.prefix - self.tower.suffix
        follows = None
        if run.packed is not None:
            run.uncut.append(self._lengths(run, args[0], kwargs))
            follows = run.packed.before(index, parameters(type(module).forward)[1:], args, kwargs)
            args, kwargs = follows or (args, kwargs)
        merging = pruner if run.grid is not None and pruner is not None and index == pruner.layer + 1 else None
        if merging is not None:
            args = (window_merging.merge(merging, run, args[0]), *args[1:])
        run.lengths += [self._lengths(run, args[0], kwargs)] * layers
        changed = (args, kwargs) if merging is not None or follows else None
        return self.masked(args[0], module, args, kwargs) or changed if takes_mask(module) else changed

    @eager
    def masked(
        self, hidden: Tensor, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The arguments of an encoder layer (or its attention) with the mask that merging asks for; None if none."""
        run: EncoderRun | None = self.local.encoder
        if run is None or run.merged is None:
            return None
        given = _given_mask(args, kwargs)
        if given is None and run.even:
            return None  # all items have as many tokens, and none is padding
        mask = window_merging.mask_of(run, given, hidden, module)
        if len(args) > 1:
            return (args[0], mask, *args[2:]), kwargs
        return args, kwargs if mask is None and given is None else {**kwargs, "attention_mask": mask}

    def _lengths(self, run: EncoderRun, hidden: Tensor, kwargs: dict[str, Any]) -> Sequence[int] | Tensor:
        """Lengths of the sequences that attend to themselves in one layer."""
        if run.inside is not None and run.inside.lengths:
            return run.inside.lengths
        if run.merged is not None and run.windows is not None:
            if run.counted is None:
                size = self._window_size(run)
                left = [hidden.shape[1] - (n - min(run.windows)) * size for n in run.windows]
                run.counted = run.merged, left
            return run.counted[1]
        if run.merged is not None:
            if run.counted is None or run.counted[0] is not run.merged:
                run.counted = run.merged, run.merged.counts + self.tower.prefix
            return run.counted[1]
        borders = kwargs.get("cu_seqlens")
        if isinstance(borders, Tensor):
            if id(borders) not in run.borders:  # holding them keeps their id from being used again
                run.borders[id(borders)] = borders, borders.diff()
            return run.borders[id(borders)][1]
        rows, length = (1, hidden.shape[0]) if hidden.ndim == 2 else hidden.shape[:2]
        return [length] * rows

    def _window_size(self, run: EncoderRun) -> int:
        """Tokens that each merged window takes."""
        assert self.pruner is not None
        assert run.grid is not None
        return self.pruner.window_tokens(run.grid, run.pool) - 1

    @eager
    def capture(self, index: int, module: nn.Module, q: Tensor, k: Tensor, mask: Mask, kwargs: dict[str, Any]) -> None:
        """Read what is wanted of one layer from its queries and keys."""
        run: EncoderRun | None = self.local.encoder
        if run is None:
            return
        scaling = kwargs.get("scaling") or getattr(module, "scale", None) or q.shape[-1] ** -0.5
        group = tensor_parallel.group_of(module)
        q, k = tensor_parallel.side_by_side(q, group), tensor_parallel.side_by_side(k, group)
        if run.inside is not None:
            run.inside.read(k)
        if q.shape[1] > k.shape[1]:
            k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)  # grouped keys
        for read in self.reads.get(index, ()):
            if read.what == "states":
                continue
            pieces = run.readings.setdefault(read, [])
            if not read.what.endswith("keys"):
                of_all = self.tower.packed or read.what == "received" or not self.tower.has_cls
                run.rated[len(run.lengths) - 1, read] = of_all
            if self.tower.packed:
                pieces += attention.of_segments(read, q, k, masks_flex.dense(mask), kwargs, scaling)
                continue
            visible = every((q.shape[0], k.shape[2]), q.device)
            if run.even:
                pass  # none is padding
            elif run.merged is not None:
                visible = nn.functional.pad(run.merged.valid, (self.tower.prefix, 0), value=True).to(q.device)
            elif mask is not None:  # patches that nobody sees are padding
                visible = attended_keys(mask).expand(q.shape[0], -1)
            pieces.append(run.whole(attention.of_items(read, self.tower, q, k, visible, scaling)))

    @eager
    def after_block(self, index: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Read the hidden states of one layer."""
        run: EncoderRun | None = self.local.encoder
        if run is None:
            return
        states = output[0] if isinstance(output, tuple) else output
        for read in self.reads.get(index, ()):
            if read.what == "states":
                run.readings.setdefault(read, []).append(attention.of_states(self.tower, states, run))

    @eager
    def after_tower(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Give every hidden state that is shorter its full length back.

        Each patch gets the value of what it became part of.
        """
        run: EncoderRun | None = self.local.encoder
        if run is None or output is None:
            return output
        if run.packed is not None:
            return run.packed.after_tower(output)
        if run.merged is not None and run.merged.merge_into is not None:
            complete = run.windows is not None or run.inside is not None
            whole = window_merging.Whole(run.merged, run.merged.merge_into, self.tower.prefix, complete)
            for name in ("last_hidden_state", "hidden_states"):
                value = getattr(output, name, None)
                if value is not None:
                    output[name] = tuple(map(whole, value)) if isinstance(value, tuple) else whole(value)
        return output if run.leave is None else run.leave(output)


def layers_read(pruner: VisionStagePruner, depth: int, last: int, whole: Sequence[int] = ()) -> dict[int, list[Read]]:
    """Encoder layer -> what the pruner reads from it.

    Args:
        pruner: the vision stage.
        depth: layers of the encoder.
        last: the layer that its features are read from.
        whole: layers whose patches see the whole frame; empty if all do.

    Raises:
        ConfigError: the encoder has no such layer.
    """
    found: dict[int, list[Read]] = {}
    for read in pruner.reads:
        own = pruner.needs_attention and read == pruner.importance
        name = "VisionStagePruner.key_layer" if own else "Read.layer"
        found.setdefault(read.at(depth, last, whole, name), []).append(read)
    return found


def _given_mask(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Mask:
    return args[1] if len(args) > 1 else kwargs.get("attention_mask")
