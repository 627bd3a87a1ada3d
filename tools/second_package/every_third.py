"""A method of somebody else's package: every third vision token enters the language model."""

from __future__ import annotations

from mustdrop import Method, Recipe, VisionStagePruner


class EveryThird(Recipe):
    """Keep a third, evenly spread."""

    def build(self) -> Method:
        """Only the vision socket is filled."""
        return Method(vision=VisionStagePruner(window=None, key_share=0, keep=1 / 3, score="uniform"))
