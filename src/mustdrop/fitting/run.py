"""`fit`: the way in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mustdrop.errors import ConfigError
from mustdrop.fitting.settings import FitSettings
from mustdrop.fitting.training import Fitted, Look, Sample, Training


def fit(
    model: Any,
    samples: Sequence[Sample],
    out: str | Path,
    *,
    names: Sequence[str] | None = None,
    about: Mapping[str, Any] | None = None,
    on_step: Callable[[Look], None] | None = None,
    **settings: Any,
) -> Fitted:
    """Train a scorer for a model, or go on where a fit into the same folder was cut off.

    Use it with `mustdrop.patch(model, "learned", importance=out)`, or as `importance=` of any method that has one.

    Args:
        model: a Hugging Face vision-language model of a known family, patched or not; it is left as it came.
        samples: what the processor returned for each prompt, with its picture; or functions that return that, so that
            pictures are decoded when they are needed. One that fails is left out and named in the result.
        out: folder of the scorer (config.json, scorer.safetensors) and of the fit (state.pt, log.jsonl).
        names: of the samples, for messages; default their numbers.
        about: facts that go into the scorer's config.json.
        on_step: called after each step, for a display.
        **settings: see `FitSettings`: `steps`, `batch`, `question`, `seed` and others.

    Returns:
        The scorer of the best look at the held-out part, and how it got there.

    Raises:
        ConfigError: settings out of range, too few samples, none that can be used, or a folder with another fit.
        UnknownKnobError: a setting that there is not.
        UnsupportedModelError: no adapter knows the model, or it has recurrent layers.
        UnsupportedOptionError: an attention implementation without additive masks.
    """
    chosen = FitSettings(**settings)
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"out={str(out)!r} is a file: give the name of a folder.")
    if names is not None and len(names) != len(samples):
        raise ConfigError(f"expected a name for each of {len(samples)} samples, got {len(names)}.")
    return Training(model, samples, folder, chosen, names, about, on_step).run()
