"""Vision tokens before and after, as the front end counts them: in the log, and where Prometheus reads."""

from __future__ import annotations

from functools import cache
from typing import Any

NAMES = ("mustdrop:vision_tokens_total", "mustdrop:vision_tokens_kept")


@cache
def _counters() -> tuple[Any, ...]:
    """Two counters in the registry that vLLM's `/metrics` shows; made once per process."""
    from prometheus_client import Counter

    texts = ("Vision tokens of all prompts before pruning.", "Vision tokens of all prompts after pruning.")
    return tuple(Counter(name, text) for name, text in zip(NAMES, texts, strict=True))


def count(kept: int, total: int) -> None:
    """Add one prompt.

    Args:
        kept: its vision tokens that stay.
        total: its vision tokens.
    """
    from vllm.logger import init_logger

    before, after = _counters()
    before.inc(total)
    after.inc(kept)
    init_logger("vllm.plugins.mustdrop").info_once(
        "mustdrop: the first prompt has %d vision tokens, of which %d stay; the sums are in /metrics.", total, kept
    )
