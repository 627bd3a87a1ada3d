"""Loads a vision-language model and its processor for the commands and the evaluation tools."""

from __future__ import annotations

from typing import Any

import torch

from mustdrop.errors import ConfigError

BUNDLED = "bundled"  # the name of the model that comes with this package
DTYPES = ("auto", "float32", "bfloat16", "float16")


def place(device: str | None) -> torch.device:
    """The device of this name; without one, or for "auto", a GPU if there is any.

    Raises:
        ConfigError: there is no such device here.
    """
    if device in (None, "auto"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device or "")
        torch.empty(0, dtype=torch.float32, device=found)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {device!r} cannot be used here: {str(error).splitlines()[0]}") from None
    if found.type == "meta":
        raise ConfigError(f"device {device!r} cannot be used here: its tensors hold no numbers.")
    return found


def check_dtype(dtype: str) -> None:
    """Refuse a type of weights that there is not.

    Raises:
        ConfigError: not one of `DTYPES`.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r}: choose one of {', '.join(DTYPES)}.")


def check_question(processor: Any, question: str) -> None:
    """Refuse a question with a word that stands for a picture in a prompt: the picture is put before it anyway.

    Args:
        processor: of the model.
        question: as the user wrote it.

    Raises:
        ConfigError: the word is there.
    """
    for name in ("image_token", "video_token"):
        word = getattr(processor, name, None)
        if isinstance(word, str) and word and word in question:
            raise ConfigError(
                f"the question {question!r} has {word!r} in it, which stands for a picture: leave it out, the picture "
                "is put before the question by itself."
            )


def pad_left(processor: Any) -> None:
    """Let a processor pad prompts on the left, as generation needs, with the end token where it has none for that."""
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is not None:
        tokenizer.padding_side = "left"
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token


def load_model(
    name: str, *, device: str | None = None, dtype: str = "auto", attention: str | None = None, **options: Any
) -> tuple[Any, Any]:
    """A model of a hub or folder and its processor, which pads on the left as generation needs.

    Args:
        name: hub id or folder; "bundled" is the model that comes with this package.
        device: where it runs; without it, a GPU if there is any.
        dtype: one of `DTYPES`.
        attention: attention implementation; without it, what transformers chooses.
        **options: further arguments of `from_pretrained`, such as `revision`; `device_map` takes the place of `device`.

    Returns:
        The model in evaluation mode, and its processor.

    Raises:
        ConfigError: a device or a type that there is not.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from mustdrop.demo.model import CHECKPOINT

    check_dtype(dtype)
    source = name
    if name == BUNDLED:
        source, options = str(CHECKPOINT), {**options, "local_files_only": True}
    if attention is not None:
        options = {**options, "attn_implementation": attention}
    target = None if options.get("device_map") else place(device)
    model: Any = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype, **options)
    shared = {key: options[key] for key in ("revision", "trust_remote_code", "local_files_only") if key in options}
    processor = AutoProcessor.from_pretrained(source, **shared)
    pad_left(processor)
    return (model if target is None else model.to(target)).eval(), processor
