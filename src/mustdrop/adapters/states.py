"""What families whose text models have recurrent layers have in common."""

from __future__ import annotations

from typing import Any

#: What configurations call layers that fold tokens into a state: linear attention, short convolutions.
_FOLDING = ("linear_attention", "conv")

#: `Adapter.lacks` of such families.
STATES = {
    "prefill": (
        "most of its decoder layers fold the tokens into a state (linear attention, short convolutions), and a token "
        "that leaves between two layers has been folded into the states of the earlier ones: what they answer later is "
        "neither that of a prompt with the token nor of one without it."
    ),
    "decode": (
        "most of its decoder layers keep one state for all tokens (linear attention, short convolutions), and no entry "
        "per token that could leave the cache."
    ),
}


def recurrent_layers(config: Any) -> tuple[int, ...]:
    """Indices of the layers of a text model that fold tokens into a state.

    Args:
        config: of the text model.
    """
    return tuple(i for i, kind in enumerate(config.layer_types) if kind in _FOLDING)
