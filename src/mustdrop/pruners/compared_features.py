"""What rules compare features by: what enters the language model, or what the encoder hands over."""

from __future__ import annotations

from torch import Tensor

from mustdrop.pruners.vision_rules import Features, Read
from mustdrop.rules.geometry import Geometry

# Of the encoder's layer that features are read from: in LLaVA, layer 22 of the 23 that run.
LAST = {"layer": 22, "of": 23}
STATES = (Read(what="states", **LAST),)


def compared(seen: Features, geometry: Geometry) -> Tensor:
    """(B, N, C): a rule's features, or for "standardized" the encoder's, averaged over the patches of each feature."""
    return seen.of(STATES[0]) if geometry == "standardized" else seen.values
