"""The account of the linear layers, of every family, beside what torch counts while the tiny model runs.

Attention is replaced by a function that multiplies nothing, so that every product counted in a layer is one of its
linear layers, experts and routers. The numbers are equal, not close.
"""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from mustdrop.adapters import registry
from mustdrop.adapters.tiny import build
from mustdrop.cost import TextCost, linear_flops
from support.families import batch

NAME = "counts_nothing"
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
KNOWN = [name for name, adapter in registry().items() if adapter.available()]


def no_attention(module: nn.Module, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> tuple[Any, None]:
    return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None


@pytest.fixture(autouse=True, scope="module")
def registered():
    AttentionInterface.register(NAME, no_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


class Counted:
    """Products that torch counts in each module of a list, and the tokens that entered it."""

    def __init__(self, modules: Any) -> None:
        self.modules = list(modules)
        self.flops, self.tokens = [0] * len(self.modules), [0] * len(self.modules)

    def __enter__(self) -> Counted:
        self.forwards = [module.forward for module in self.modules]
        for i, module in enumerate(self.modules):
            module.forward = self._counting(i, module.forward)
        return self

    def _counting(self, i: int, forward: Any) -> Any:
        def counting(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else next(iter(kwargs.values()))
            with FlopCounterMode(display=False) as mode:
                output = forward(*args, **kwargs)
            counts = mode.get_flop_counts()["Global"]
            self.flops[i] += sum(n for op, n in counts.items() if str(op).removeprefix("aten.") in PRODUCTS)
            self.tokens[i] += hidden.numel() // hidden.shape[-1]
            return output

        return counting

    def __exit__(self, *_: object) -> None:
        for module, forward in zip(self.modules, self.forwards, strict=True):
            module.forward = forward


def built(name: str) -> Any:
    model = build(registry()[name], NAME)
    with contextlib.suppress(AttributeError, ValueError):  # products of grouped kernels are not counted
        model.set_experts_implementation("eager")
    return model


def text_cost(adapter: Any, model: Any) -> TextCost:
    return TextCost.of(adapter.decoder_layers(model), adapter.text(model).config, model, adapter.experts_of)


@pytest.mark.parametrize("name", KNOWN)
def test_decoder_layers(name):
    """A text row and one with a medium, with padding: what runs per token does not depend on the others."""
    adapter, model = registry()[name], built(name)
    for kind in adapter.media:
        inputs = batch(adapter, model, ((), (kind,)))
        with torch.no_grad(), Counted(adapter.decoder_layers(model)) as counted:
            model(**inputs)
        cost = text_cost(adapter, model)
        # families with experts for vision tokens say in an argument which tokens those are, markers included
        marks = [inputs[name] for name in adapter.row_arguments if adapter.experts_of]
        vision = int(marks[0].bool().sum()) if marks else 0
        text = inputs["input_ids"].numel() - vision
        assert counted.tokens == [text + vision] * len(cost.linear)
        assert counted.flops == [text * a + vision * b for a, b in zip(cost.linear, cost.vision, strict=True)]


@pytest.mark.parametrize("name", [name for name in KNOWN if "vision" not in registry()[name].lacks])
def test_encoder_layers(name):
    adapter, model = registry()[name], built(name)
    for kind in adapter.media:
        blocks = adapter.tower(model, kind).blocks
        with torch.no_grad(), Counted(blocks) as counted:
            model(**batch(adapter, model, ((kind,),)))
        runs = [linear_flops(block) * n for block, n in zip(blocks, counted.tokens, strict=True)]
        assert sum(runs) > 0
        assert counted.flops == runs
