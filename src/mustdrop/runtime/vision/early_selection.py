"""A `VisionRule` that works on what leaves the encoder: its values are written before the model maps them on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mustdrop.adapters.base import Tower
from mustdrop.constants import sent
from mustdrop.runtime.vision.feature_tables import owners, plain, stacked
from mustdrop.runtime.vision.selection import PlacedSelections, VisionSelector


@dataclass
class EarlySelection:
    """Asks the rule as the features leave the encoder.

    Where a feature is not one patch of the encoder's only batch, nothing happens: the rule is asked afterwards.

    Attributes:
        chooser: asks the rule.
        tower: the encoder.
        layers: the encoder layers that features are read from.
        choice: what was decided, or None.
        whole: whether the features are all patches of all items, in their order.
    """

    chooser: VisionSelector
    tower: Tower
    layers: Sequence[int]
    choice: PlacedSelections | None = None
    whole: bool = False

    def __call__(self, output: Any) -> Any:
        """The encoder's output with the rule's values in the patches that stay."""
        run, final = self.chooser.run, output.last_hidden_state
        table = stacked(self.chooser.plan.layouts)
        if not run.item or table.shape[1] > 1 or int(table.max()) >= len(final) * run.item:
            return output
        as_read = plain(table)
        self.whole = as_read and len(table) == len(final) * run.item
        patches = sent(table[:, 0], final.device)
        states = getattr(output, "hidden_states", None)
        read = [final if states is None else states[k + 1] for k in self.layers]
        parts = [self._features(state, patches) for state in read]
        seen = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        self.choice = self.chooser(seen, None if run.merged is None else owners(run, patches[:, None], as_read))
        if states is not None:
            wanted = {k + 1 for k in self.layers}
            output["hidden_states"] = tuple(
                self._written(s, patches, self.choice) if i in wanted else s for i, s in enumerate(states)
            )
        if states is None or len(self.tower.blocks) - 1 in self.layers:
            output["last_hidden_state"] = self._written(final, patches, self.choice)
        return output

    def _rows(self, state: Tensor) -> Tensor:
        """(items * patches, C) of a hidden state (items, tokens, C)."""
        prefix = self.tower.prefix
        return state[:, prefix : prefix + self.chooser.run.item].flatten(0, 1)

    def _features(self, state: Tensor, patches: Tensor) -> Tensor:
        """(F, C) of a hidden state."""
        return self._rows(state) if self.whole else self._rows(state)[patches.clamp(min=0)]

    def _written(self, state: Tensor, patches: Tensor, choice: PlacedSelections) -> Tensor:
        """A hidden state with the rule's values in the rows of the features that stay."""
        flat = self._features(state, patches)
        made = choice.blend(flat)
        if made is flat:
            return state
        if self.whole:
            whole = made
        else:
            changed = choice.keep.to(patches.device) & (patches >= 0)
            whole = self._rows(state).clone()
            whole[patches[changed]] = made[changed]
        first, item = self.tower.prefix, self.chooser.run.item
        return torch.cat([state[:, :first], whole.view(len(state), item, -1), state[:, first + item :]], 1)
