"""Tiny models of every family with random weights, and prompts for them. A new family is one file here.

A fixture belongs to an adapter class (`Family.of`) and is found by it; nobody lists the files.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from typing import Any

import torch
from torch import Tensor

from mustdrop.adapters import registry
from mustdrop.adapters.base import Adapter
from tests.families.base import Family


@functools.cache
def _fixtures() -> dict[type[Adapter], type[Family]]:
    """Adapter class -> its fixture, of all files of this folder."""
    waiting, found = [Family], {}
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    while waiting:
        kind = waiting.pop()
        waiting += kind.__subclasses__()
        if "of" in vars(kind):
            found[kind.of] = kind
    return found


def fixture_of(which: str | Adapter | Family) -> Family:
    """The fixture of a family by its name or adapter; a fixture is itself.

    Raises:
        LookupError: the adapter has none.
    """
    if isinstance(which, Family):
        return which
    adapter = registry()[which] if isinstance(which, str) else which
    for kind in type(adapter).__mro__:
        if kind in _fixtures():
            return _fixtures()[kind](adapter)
    raise LookupError(f"{adapter.name} has no tiny model: write tests/families/{adapter.name}.py with a Family.")


def build(of: str | Adapter | Family, attention: str = "sdpa", seed: int = 0) -> Any:
    """A tiny model with random weights, in float32 and eval mode.

    Its attention is peaky, so that decisions have margins; parameters that start at zero are random too, so that
    every path matters.

    Args:
        of: the family.
        attention: attention implementation.
        seed: of the weights.
    """
    import transformers

    made = fixture_of(of)
    settings = made.config()
    del settings["model_type"]
    kind = next(getattr(transformers, name) for name in made.adapter.classes if hasattr(transformers, name))
    config = kind.config_class(**settings)
    config._attn_implementation = attention
    torch.manual_seed(seed)
    model = kind(config).eval().float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and name.endswith("bias"):
                parameter.normal_(0, 0.05)
            elif not bool(parameter.any()):
                parameter.normal_(0, 0.1)
        # logits of about a quarter: 1e-5 is above the noise of float32 and far below any effect
        model.get_output_embeddings().weight.mul_(0.25)
    model.generation_config.update(pad_token_id=0, bos_token_id=1, eos_token_id=None)
    return model


def inputs_of(
    of: str | Adapter | Family, model: Any, modality: str, pictures: list[Tensor], words: int = 6
) -> dict[str, Tensor]:
    """Inputs of one prompt for a tiny model: a few words, the media, a few words.

    Args:
        of: the family.
        model: made by `build`.
        modality: "image" or "video".
        pictures: of shapes that `Family.sizes` names.
        words: text tokens after the media, which ask.
    """
    made = fixture_of(of)
    arguments, runs = made.media(model, modality, pictures)
    line = [1, 20, 21, *(token for run in runs for token in run), *range(30, 30 + words)]
    inputs = dict(made.rows(arguments, [len(pictures)]))
    inputs |= {
        "input_ids": torch.tensor([line], dtype=torch.long, device="cpu"),
        "attention_mask": torch.ones(1, len(line), dtype=torch.long, device="cpu"),
    }
    (token,) = (m.token for m in made.adapter.modalities(model) if m.name == modality)
    kinds = (inputs["input_ids"] == token).long() * (1 if modality == "image" else 2)
    return inputs | made.types(kinds)
