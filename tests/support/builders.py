"""Tiny random LLaVA models and their inputs. Everything is a pure function of its arguments and a seed."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

from .copies import copy_of
from .scorers import given
from .versions import CACHE

PAD, BOS, IMAGE, VOCAB = 0, 1, 200, 208


@dataclass(frozen=True)
class Variant:
    """Which text model and which tower, and how large."""

    text: str = "llama"
    tower: str = "clip"
    n_layers: int = 6
    grid: int = 6
    seed: int = 0
    width: int = 48

    @property
    def n_vision(self) -> int:
        """Vision tokens per image."""
        return self.grid * self.grid

    def __str__(self) -> str:
        return f"{self.text}-{self.tower}-{self.grid}x{self.grid}"


LLAMA = Variant()
MISTRAL = Variant(text="mistral", n_layers=4, seed=1)
QWEN2 = Variant(text="qwen2", grid=8, n_layers=5, seed=2)
SIGLIP = Variant(tower="siglip", grid=8, n_layers=5, seed=3)
VARIANTS = (LLAMA, MISTRAL, QWEN2, SIGLIP)


def _text_config(variant: Variant) -> dict[str, Any]:
    config: dict[str, Any] = {
        "model_type": variant.text,
        "vocab_size": VOCAB,
        "hidden_size": variant.width,
        "intermediate_size": 64,
        "num_hidden_layers": variant.n_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": None,
        "initializer_range": 0.15,
        "tie_word_embeddings": False,
    }
    if variant.text == "mistral":
        config["sliding_window"] = None
    return config


def _tower_config(variant: Variant) -> dict[str, Any]:
    config: dict[str, Any] = {
        "model_type": f"{variant.tower}_vision_model",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": 4 * variant.grid,
        "patch_size": 4,
        "initializer_range": 0.15,
    }
    if variant.tower == "siglip":
        config["vision_use_head"] = False
    else:
        config |= {"projection_dim": 32, "initializer_factor": 4.0}
    return config


def fresh(variant: Variant = LLAMA, attn: str = "sdpa") -> Any:
    """A new plain model in float32 and eval mode; its attention is peaky, so decisions have margins."""
    torch.manual_seed(1000 + variant.seed)
    config = transformers.LlavaConfig(
        vision_config=_tower_config(variant),
        text_config=_text_config(variant),
        image_token_id=IMAGE,
        image_seq_length=variant.n_vision,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default" if variant.tower == "clip" else "full",
    )
    config._attn_implementation = attn
    model = transformers.LlavaForConditionalGeneration(config).eval().float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.05)
            if "position_embedding" in name:
                parameter.mul_(0.4)
            if "q_proj.weight" in name or "k_proj.weight" in name:
                parameter.mul_(1.15 if "language_model" in name else 0.8)
        # features and logits of about one half: 1e-5 is above the noise of float32 and far below any effect
        model.model.multi_modal_projector.linear_2.weight.mul_(0.1)
        model.lm_head.weight.mul_(0.5)
    model.generation_config.pad_token_id = PAD
    model.generation_config.bos_token_id = BOS
    model.generation_config.eos_token_id = None
    return model


@functools.cache
def plain(variant: Variant = LLAMA, attn: str = "sdpa") -> Any:
    """The shared plain model of a variant. It is never patched: patch a :func:`clone`."""
    return given(fresh(variant, attn))


def clone(variant: Variant = LLAMA, attn: str = "sdpa") -> Any:
    """An independent copy of :func:`plain`, made to be patched."""
    return copy_of(plain(variant, attn))


def image(variant: Variant, seed: int) -> Tensor:
    """(3, size, size): a coarse scene of flat and of noisy areas, so that some windows merge and others do not."""
    draw = torch.Generator().manual_seed(seed)
    cells = max(2, variant.grid // 3)
    size = 4 * variant.grid
    colour = torch.randn(1, 3, cells, cells, generator=draw)
    noise = torch.rand(1, 1, cells, cells, generator=draw).pow(2)
    resize = functools.partial(torch.nn.functional.interpolate, size=(size, size), mode="nearest")
    return (resize(colour) + resize(noise) * torch.randn(1, 3, size, size, generator=draw))[0]


def batch(
    variant: Variant = LLAMA,
    images: tuple[int, ...] = (1,),
    seed: int = 0,
    before: tuple[int, ...] | None = None,
    after: tuple[int, ...] | None = None,
) -> dict[str, Tensor]:
    """Inputs for ``generate``: row r holds ``images[r]`` images; shorter rows are padded on the left.

    Row r depends on (seed, r) only: the same row has the same tokens and pixels in every batch. ``before`` and
    ``after`` are the counts of text tokens around the images.
    """
    rows, pixels = [], []
    for r, count in enumerate(images):
        draw = torch.Generator().manual_seed(7919 * seed + r)

        def words(n: int, draw: torch.Generator = draw) -> list[int]:
            return torch.randint(2, IMAGE, (n,), generator=draw).tolist()

        row = [BOS, *words(before[r] if before else 2 + r)]
        for k in range(count):
            row += [IMAGE] * variant.n_vision + (words(2) if k + 1 < count else [])
            pixels.append(image(variant, 104729 * seed + 100 * r + k))
        rows.append(row + words(after[r] if after else 5 - r % 2))
    length = max(map(len, rows))
    ids = torch.tensor([[PAD] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    inputs = {"input_ids": ids, "attention_mask": mask}
    if pixels:
        inputs["pixel_values"] = torch.stack(pixels)
    return inputs


def row_alone(inputs: dict[str, Tensor], row: int, variant: Variant = LLAMA) -> dict[str, Tensor]:
    """Row ``row`` of a batch without its padding, with only its own pixels."""
    valid = inputs["attention_mask"][row].bool()
    counts = ((inputs["input_ids"] == IMAGE).sum(1) // variant.n_vision).tolist()
    first = sum(counts[:row])
    alone = {"input_ids": inputs["input_ids"][row, valid][None], "attention_mask": valid[valid].long()[None]}
    if counts[row]:
        alone["pixel_values"] = inputs["pixel_values"][first : first + counts[row]]
    return alone


def vision_positions(ids: Tensor, row: int) -> Tensor:
    """(N,) sequence positions of the vision tokens of one row, ascending."""
    return (ids[row] == IMAGE).nonzero()[:, 0]


@dataclass(frozen=True)
class Answer:
    """What one ``generate`` gave."""

    sequences: Tensor  # (B, S + steps + 1)
    logits: Tensor  # (B, steps + 1, V): row 0 is the prefill, then one per decode step
    cache: Any
    scores: Tensor | None = None  # (B,) of the returned beams


def answer(model: Any, inputs: dict[str, Any], steps: int = 8, **options: Any) -> Answer:
    """One prefill and ``steps`` decode steps, greedy unless the options say otherwise."""
    given = {"do_sample": False, **inputs, **options}
    if "past_key_values" in given:
        given[CACHE] = given.pop("past_key_values")
    with torch.no_grad():
        out = model.generate(
            max_new_tokens=steps + 1,
            return_dict_in_generate=True,
            output_logits=True,
            output_scores=given.get("num_beams", 1) > 1,  # the scores of whole beams come with them
            **given,
        )
    scores = getattr(out, "sequences_scores", None)
    return Answer(out.sequences, torch.stack(out.logits, 1), getattr(out, CACHE), scores)


@contextlib.contextmanager
def defaults(which: str) -> Iterator[None]:
    """Another default type of the process ("dtype"), or another default device ("device", or as a "context")."""
    if which == "context":
        with torch.device("meta"):
            yield
        return
    set_default: Any = torch.set_default_dtype if which == "dtype" else torch.set_default_device
    set_default(torch.float64 if which == "dtype" else "meta")
    try:
        yield
    finally:
        set_default(torch.float32 if which == "dtype" else None)


def anatomy(model: Any) -> dict[str, Any]:
    """Everything that patching could leave behind, module by module: equal before and after means untouched."""
    return {
        name: {
            "class": type(module),
            "attributes": {key: id(value) for key, value in vars(module).items() if not key.startswith("_")},
            "names": list(vars(module)),
            "config": id(getattr(module, "config", None)),
            "hooks": {k: list(v) for k, v in vars(module).items() if "hook" in k and hasattr(v, "keys")},
            "children": [(key, id(child)) for key, child in module.named_children()],
            "parameters": [(key, p.data_ptr(), p._version) for key, p in module.named_parameters(recurse=False)],
            "buffers": [(key, b.data_ptr(), b._version) for key, b in module.named_buffers(recurse=False)],
        }
        for name, module in model.named_modules()
    } | {"generation": model.generation_config.to_json_string(), "config": model.config.to_json_string()}
