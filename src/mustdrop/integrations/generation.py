"""From the generation settings of a task to arguments of `model.generate`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NEW_TOKENS = 1024  # where a task says nothing
_ALWAYS = (
    "max_new_tokens",
    "min_new_tokens",
    "num_beams",
    "length_penalty",
    "repetition_penalty",
    "no_repeat_ngram_size",
)
_SAMPLING = ("temperature", "top_p", "top_k")
_OTHER_NAMES = {"max_gen_toks": "max_new_tokens", "max_tokens": "max_new_tokens"}


def arguments(settings: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...], dict[str, Any]]:
    """Greedy unless the task samples at a temperature above zero.

    Args:
        settings: of the task; None counts as not given.

    Returns:
        Arguments of `generate`; stop words; settings that `generate` does not know, which are left out.
    """
    given = {_OTHER_NAMES.get(name, name): value for name, value in settings.items() if value is not None}
    until = given.pop("until", ())
    asked = bool(given.pop("do_sample", False))
    temperature = given.get("temperature")
    sample = asked if temperature is None else temperature > 0  # some tasks "sample" at temperature 0
    known = (*_ALWAYS, *_SAMPLING) if sample else _ALWAYS
    options = {"do_sample": sample, "max_new_tokens": NEW_TOKENS, "num_beams": 1}
    options |= {name: value for name, value in given.items() if name in known}
    unknown = {name: value for name, value in given.items() if name not in (*_ALWAYS, *_SAMPLING)}
    return options, tuple([until] if isinstance(until, str) else until), unknown
