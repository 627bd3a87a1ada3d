"""Trains a scorer for a model on one's own pictures and prompts: `fit`, and `mustdrop fit` on the command line.

The model is frozen and answers each prompt with all of its vision tokens. Then a small scorer learns which of them the
answer needs: each token gets a gate between 0 and 1 by its score, the gates of a picture add up to a budget that is
drawn at random, and the scorer moves so that the answer's distributions stay what they were. Nothing of the model is
changed, and no right answers are needed.

Sources: distillation of a scorer under a differentiable selection of the highest scores, as trained scorers of vision
tokens do (docs/fidelity.md); the gates in the attention mask are this package's masked reference.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mustdrop.fitting.run import fit
    from mustdrop.fitting.settings import FitSettings
    from mustdrop.fitting.training import Fitted, Look, Sample

__all__ = ["FitSettings", "Fitted", "Look", "Sample", "fit"]

_HOMES = {"FitSettings": "settings", "Fitted": "training", "Look": "training", "Sample": "training", "fit": "run"}

if not TYPE_CHECKING:  # torch is imported when a name is asked for: the command line starts without it

    def __getattr__(name: str) -> Any:
        """A public name, imported now."""
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
        return value
