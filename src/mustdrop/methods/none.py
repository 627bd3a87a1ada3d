"""Baseline: drops nothing. The row every comparison starts from."""

from __future__ import annotations

from mustdrop.method import Method, Recipe


class Nothing(Recipe):
    """No stage does anything; the model runs bit-identically and the trace still counts tokens, FLOPs and bytes."""

    def build(self) -> Method:
        """Leave all sockets empty."""
        return Method()
