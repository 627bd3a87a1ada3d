"""What cannot be patched, each with its reason and what to pass in its place. `find` says so instead of guessing."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from mustdrop.errors import nearest

EXAMPLE = "LlavaForConditionalGeneration"
#: What a class name says beside the family.
_KIND = re.compile(r"(For[A-Z]\w*|Model|Config|(Image|Video)?Processor(Fast)?|Tokenizer(Fast)?)$")

#: Attributes in which wrappers hold the model: data parallel, DeepSpeed and FSDP; torch.compile; pipelines.
_INSIDE_OF = ("module", "_orig_mod", "model")
_DEPTH = 4  # wrappers in wrappers

_CROSS = (
    "its vision tokens are no part of the sequence: decoder layers read them by cross-attention, so nothing in the "
    "prompt or in the cache of the text could be dropped."
)
_QUERIES = (
    "a Q-Former makes a few dozen queries of every image, which lie nowhere in it, and the text model has learned "
    "positions or is an encoder-decoder."
)
_SEQ2SEQ = "its text model is an encoder-decoder; mustdrop works in decoder-only models with one prefill."
_WORDS = (
    "its images are words of the vocabulary, made by a tokenizer: there are no encoder features to score or to merge."
)
_INSIDE = "its text model encodes the images itself, so there is no place between encoder and text model to work at."
_INDEXED = "its sparse attention chooses entries of the cache by an index of its own, which has no pruned form."
_HYBRID = (
    "each of its decoder layers keeps convolution states beside its keys and values, in a kind of cache layer that has "
    "no pruned form."
)
_TIMM = "its vision tower comes from the timm package, whose layers do not go through transformers' attention."

#: Class name -> (family, why).
UNSUPPORTED: dict[str, tuple[str, str]] = {
    "MllamaForConditionalGeneration": ("Llama 3.2 Vision", _CROSS),
    "IdeficsForVisionText2Text": ("IDEFICS", _CROSS),
    "Gemma3nForConditionalGeneration": (
        "Gemma 3n",
        "its decoder layers carry four versions of every hidden state in front of the batch dimension (AltUp), and the "
        "last of them read keys and values of earlier ones, so they have no cache of their own.",
    ),
    "Granite4VisionForConditionalGeneration": (
        "Granite 4 Vision",
        "its text model adds image features to hidden states of full length inside its own forward, between decoder "
        "layers, where a shorter sequence does not fit.",
    ),
    "MistralLarge4ForConditionalGeneration": ("Mistral Large 4", _INDEXED),
    "Glm5NextForConditionalGeneration": ("GLM-5 Next", _INDEXED),
    "Qwen4ExpForConditionalGeneration": ("Qwen4-Exp", _INDEXED),
    "InklingForConditionalGeneration": ("Inkling", _HYBRID),
    "Inkling2ForConditionalGeneration": ("Inkling 2", _HYBRID),
    "Phi4MultimodalForCausalLM": ("Phi-4 multimodal", _INSIDE),
    "FuyuForCausalLM": ("Fuyu", "it has no vision encoder: raw patches enter through one linear layer."),
    "ChameleonForConditionalGeneration": ("Chameleon", _WORDS),
    "Emu3ForConditionalGeneration": ("Emu3", _WORDS),
    "Blip2ForConditionalGeneration": ("BLIP-2", _QUERIES),
    "InstructBlipForConditionalGeneration": ("InstructBLIP", _QUERIES),
    "InstructBlipVideoForConditionalGeneration": ("InstructBLIP-Video", _QUERIES),
    "Florence2ForConditionalGeneration": ("Florence-2", _SEQ2SEQ),
    "PerceptionLMForConditionalGeneration": ("Perception LM", _TIMM),
    "FastVlmForConditionalGeneration": ("FastVLM", _TIMM),
    "Qwen2_5OmniForConditionalGeneration": (
        "Qwen2.5-Omni as a whole",
        "it is several models. Its thinker is the one that sees: mustdrop.patch(model.thinker).",
    ),
    "Qwen3OmniMoeForConditionalGeneration": (
        "Qwen3-Omni as a whole",
        "it is several models. Its thinker is the one that sees: mustdrop.patch(model.thinker).",
    ),
}


def reason(names: list[str]) -> str | None:
    """A sentence on the first of `names` (a class and its bases) that was looked at and cannot be patched, or None."""
    for name in names:
        if name in UNSUPPORTED:
            family, why = UNSUPPORTED[name]
            return f"{family} ({name}) cannot be patched: {why}"
    return None


def inside(model: Any) -> Any:
    """The model that peft has wrapped and runs; any other model is itself.

    Told by the package of its class, since peft need not be installed.
    """
    while isinstance(model, nn.Module) and any(kind.__module__.startswith("peft.") for kind in type(model).__mro__):
        children = dict(model.named_children())  # attributes that peft's classes lack are looked up in the model inside
        inner = children.get("base_model", children.get("model"))
        if inner is None:
            break
        model = inner
    return model


def unwrapped(thing: Any) -> Iterator[tuple[str, Any]]:
    """What lies inside of wrappers, from the outermost on: (".module", model), (".module._orig_mod", model), ..."""
    path = ""
    for _ in range(_DEPTH):
        name = next((name for name in _INSIDE_OF if isinstance(getattr(thing, name, None), nn.Module)), None)
        if name is None:
            return
        path, thing = f"{path}.{name}", getattr(thing, name)
        yield path, thing


def refusal(thing: object, known: Sequence[str]) -> str:
    """Why something cannot be patched, and what to do.

    Args:
        thing: what came in the place of a model.
        known: names of the supported classes.
    """
    names = [kind.__name__ for kind in type(thing).__mro__]
    why = reason(names) or f"mustdrop has no adapter for {names[0]}."
    return f"{why} {_instead(thing, names, known)} docs/add-a-model.md shows how to add one."


def _instead(thing: object, names: list[str], known: Sequence[str]) -> str:
    """What to pass."""
    for path, inner in unwrapped(thing):
        kinds = [kind.__name__ for kind in type(inside(inner)).__mro__]
        if set(kinds) & set(known):
            outside = "wrap it afterwards" if isinstance(thing, nn.Module) else "the pipeline goes on with it"
            return f"It wraps a {type(inner).__name__}: pass that, {path} of what you passed; {outside}."
    if isinstance(thing, str):
        return (
            f"Load the model first, transformers.AutoModelForImageTextToText.from_pretrained({thing!r}), and pass what "
            f"that returns, a {EXAMPLE} or the like."
        )
    near = like(names[0], known)
    if not isinstance(thing, nn.Module):
        kind = " or ".join(near[:1] if EXAMPLE in near[:1] else [*near[:1], EXAMPLE])
        return f"Pass the model itself, not its processor, config, checkpoint or pipeline: a {kind} or the like."
    whole = [other for other in near if stem(other) == stem(names[0])] if names[0].endswith("Model") else []
    if whole:
        return f"A {names[0]} has no head: pass the {whole[0]} that holds it."
    for path, part in thing.named_modules():  # a module of somebody's own, with the model as a part
        if path and {kind.__name__ for kind in type(part).__mro__} & set(known):
            return f"It holds a {type(part).__name__}: pass that, .{path} of what you passed."
    what, near = _lacks(thing, near)
    hint = f" Did you mean {', '.join(map(repr, near))}?" if near else ""
    return f"{what}Pass a model such as {EXAMPLE}; mustdrop.list_adapters() names the families.{hint}"


def _lacks(thing: nn.Module, near: list[str]) -> tuple[str, list[str]]:
    """What a module lacks of a vision-language model, as a sentence; and the classes that it may stand for."""
    config = getattr(thing, "config", None)
    if config is None:
        return "It is no model of transformers. ", near if "For" in type(thing).__name__ else []
    if getattr(thing, "main_input_name", "") == "pixel_values":
        return "It encodes images, and holds no language model that reads them. ", []
    if not any(hasattr(config, name) for name in ("vision_config", "image_token_id", "image_token_index")):
        return "It reads no images, so it has no vision tokens to drop. ", near
    return "", near


def stem(name: str) -> str:
    """What the classes of one family share: `LlavaForConditionalGeneration`, `LlavaProcessor` -> `Llava`."""
    return _KIND.sub("", name)


def like(name: str, known: Sequence[str], most: int = 3) -> list[str]:
    """The known classes whose families have names most like that of `name`, best first."""
    families: dict[str, list[str]] = {}
    for other in known:
        families.setdefault(stem(other), []).append(other)
    return [other for family in nearest(stem(name), families, most) for other in families[family]][:most]
