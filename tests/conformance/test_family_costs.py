"""The account of the linear layers, of every family, beside what torch counts while the tiny model runs.

Attention is replaced by a function that multiplies nothing, so that every product counted in a layer is one of its
linear layers, experts and routers. The numbers are equal, not close.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
)
from transformers.masking_utils import sdpa_mask

import mustdrop
from mustdrop import PrefillPruner, VisionStagePruner
from mustdrop.adapters import registry
from mustdrop.cost import TextCost, causal_pairs, linear_flops
from mustdrop.runtime.vision import attention
from support import families
from support.builders import answer
from support.families import batch, clone
from tests.families import build

NAME = "counts_nothing"
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
KNOWN = list(families.AVAILABLE)


def no_attention(module: nn.Module, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> tuple[Any, None]:
    return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None


@pytest.fixture(autouse=True, scope="module")
def registered():
    AttentionInterface.register(NAME, no_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


class Counted:
    """Products that torch counts in each module of a list, and the tokens that entered it."""

    def __init__(self, modules: Any, products: Sequence[str] = PRODUCTS) -> None:
        self.modules, self.products = list(modules), products
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
            self.flops[i] += sum(n for op, n in counts.items() if str(op).removeprefix("aten.") in self.products)
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
    layers, config = adapter.decoder_layers(model), adapter.text(model).config
    return TextCost.of(layers, config, model, adapter.experts_of, adapter.recurrent(model))


@pytest.mark.parametrize("name", KNOWN)
def test_decoder_layers(name):
    """A text row and one with a medium, with padding: what runs per token does not depend on the others.

    Linear attention multiplies in batches, and is left out.
    """
    adapter, model = registry()[name], built(name)
    products = ("mm", "addmm") if adapter.recurrent(model) else PRODUCTS
    for kind in adapter.media:
        inputs = batch(adapter, model, ((), (kind,)))
        with torch.no_grad(), Counted(adapter.decoder_layers(model), products) as counted:
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


@pytest.mark.parametrize("name", [name for name in KNOWN if registry()[name].experts_of])
def test_the_trace_counts_the_experts_of_vision_tokens(name):
    """Rows of text only, with one medium and with two, before and after pruning."""
    adapter, model = registry()[name], clone(name)
    inputs = batch(adapter, model, ((), ("image",), ("image", "image")))
    cost = text_cost(adapter, model)
    assert all(cost.vision[i] < cost.linear[i] for i in range(1, len(cost.linear)))  # tiny: narrower for vision
    mustdrop.patch(model, prefill=PrefillPruner(keep=0.6))
    answer(model, inputs, 0)
    trace = mustdrop.trace(model)
    depth, text = len(cost.linear), (inputs["attention_mask"].sum(1) - trace.total).tolist()
    assert (trace.tokens[-1] < trace.total)[1:].all()
    for counted, vision in (("actual", trace.tokens), ("unpruned", trace.total.expand(depth, -1))):
        expected = 0
        for b, words in enumerate(text):
            for i, seen in enumerate(vision[:, b].tolist()):
                pairs = 4 * cost.widths[i] * causal_pairs(words + seen, 0)
                expected += cost.linear[i] * words + cost.vision[i] * seen + pairs
        assert getattr(trace.flops.parts["prefill"], counted) == expected + cost.head * len(text)


# -- text models that no tiny configuration has -----------------------------------------------------------------------

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "head_dim": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "top_k_experts": 2,
    "shared_expert_intermediate_size": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
GEMMA = {"enable_moe_block": True, "global_head_dim": 16, "hidden_size_per_layer_input": 0}
OTHERS = ("mixtral", "gpt_oss", "gemma4_text", "granitemoe", "qwen2_moe", "qwen3_5_moe_text")


def other(kind: str) -> Any:
    settings = SIZES | (GEMMA if kind == "gemma4_text" else {})
    try:
        config = AutoConfig.for_model(kind, **settings)
    except ValueError:
        pytest.skip(f"this transformers has no {kind}")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=NAME).eval().float()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.05)
    model.set_experts_implementation("eager")
    return model


@pytest.mark.parametrize("kind", OTHERS)
def test_other_text_models(kind):
    """Routers and experts as other text models hold them. Linear attention multiplies in batches, and is left out."""
    layers = (model := other(kind)).get_decoder().layers
    products = PRODUCTS if kind in OTHERS[:-1] else ("mm", "addmm")
    with torch.no_grad(), Counted(layers, products) as counted:
        model(torch.randint(3, 100, (2, 7)))
    assert counted.flops == [linear_flops(layer) * 14 for layer in layers]


class Block(nn.Module):
    """Two of eight experts, which are modules of their own, and one that all tokens share."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.config = PretrainedConfig(num_experts_per_tok=2)
        self.gate = nn.Linear(16, 8, bias=False)
        self.experts = experts
        self.shared_experts = nn.ModuleList([mlp()])


class Dense(nn.ModuleList):
    """Experts that are handed hidden states sorted by expert, all of them for each."""

    def forward(self, hidden_states):
        raise NotImplementedError


class Packed(nn.Module):
    """Fused experts in four bits, two numbers in a byte: as parameters, or as something else."""

    def __init__(self, parameters: bool) -> None:
        super().__init__()
        self.num_experts, self.hidden_size, self.intermediate_size = 8, 16, 24
        for name, high, wide in (("gate_up_proj", 48, 8), ("down_proj", 16, 12)):
            packed = torch.zeros(8, high, wide, dtype=torch.uint8)
            if parameters:
                self.register_parameter(name, nn.Parameter(packed, requires_grad=False))
                self.register_parameter(f"{name}_scale", nn.Parameter(torch.ones(8, high, 1)))
            else:
                setattr(self, name, (packed,))

    def forward(self, hidden_states, top_k_index, top_k_weights):
        raise NotImplementedError


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 48), nn.Linear(24, 16))


@pytest.mark.parametrize(
    ("experts", "running"),
    [
        (nn.ModuleList([mlp() for _ in range(8)]), 2),
        (nn.ModuleDict({str(i): mlp() for i in range(8)}), 2),
        (Dense([mlp() for _ in range(8)]), 8),
        (Packed(True), 2),
        (Packed(False), 2),
    ],
    ids=["list", "dictionary", "told nothing", "packed", "packed, no parameters"],
)
def test_experts_in_other_shapes(experts, running):
    one = 2 * (16 * 48 + 24 * 16)
    assert linear_flops(Block(experts)) == 2 * 16 * 8 + one * (running + 1)


@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "video_llama_3"])
def test_reading_the_attention_of_an_encoder_is_counted(name, monkeypatch):
    """The products of its logits: of the CLS token, or of all patches of what attends to itself."""
    flops, received, of_rows = [], attention.received_attention, attention.row_probabilities

    def received_attention(q, k, *rest):
        flops.append(2 * q.numel() * k.shape[2])
        return received(q, k, *rest)

    def row_probabilities(q, k, rows, *rest):
        flops.append(2 * k.numel() * rows.shape[1])
        return of_rows(q, k, rows, *rest)

    monkeypatch.setattr(attention, "received_attention", received_attention)
    monkeypatch.setattr(attention, "row_probabilities", row_probabilities)
    adapter, model = registry()[name], clone(name)
    mustdrop.patch(model, vision=VisionStagePruner(window=None, key_share=0, keep=0.5))
    with torch.no_grad():
        model(**batch(adapter, model, (("image",), ("image",))))
    assert mustdrop.trace(model).flops.parts["scoring"].actual == sum(flops) > 0
