"""LLaVA with other towers, several encoder layers side by side, and tiles of which nothing is left."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

import mustdrop
from mustdrop import DecodeCachePruner, PrefillPruner, VisionStagePruner
from mustdrop.adapters import registry
from support.builders import answer
from support.edges import with_sizes
from support.families import assert_dropping_equals_masking, batch, compare, plain
from tests.families import build, fixture_of
from tests.families.base import IMAGE, text

ALL = {
    "vision": VisionStagePruner(window=2, threshold=0.2),
    "prefill": PrefillPruner(keep=0.5),
    "decode": DecodeCachePruner(),
}


def of(model):
    """For `compare`: this model in place of the family's."""
    return lambda _: copy.deepcopy(model)


@pytest.fixture(scope="module")
def pixtral():
    """Images of any size, one after the other in one sequence."""
    tower = {
        "model_type": "pixtral",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 48,
        "patch_size": 4,
        "initializer_range": 0.15,
    }
    config = LlavaConfig(
        vision_config=tower,
        text_config=text("llama"),
        image_token_id=IMAGE,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    model.generation_config.update(pad_token_id=0, bos_token_id=1, eos_token_id=None)
    return model


def of_sizes(*sizes):
    """A prompt per image."""
    canvas = torch.zeros(len(sizes), 3, max(h for h, _ in sizes), max(w for _, w in sizes))
    for i, (height, width) in enumerate(sizes):
        draw = torch.Generator().manual_seed(i)
        canvas[i, :, :height, :width] = torch.randn(3, height, width, generator=draw)
    lines = [[1, 20, *[IMAGE] * (height // 4 * (width // 4)), 30, 31, 32] for height, width in sizes]
    length = max(map(len, lines))
    return {
        "input_ids": torch.tensor([[0] * (length - len(line)) + line for line in lines]),
        "attention_mask": torch.tensor([[0] * (length - len(line)) + [1] * len(line) for line in lines]),
        "pixel_values": canvas,
        "image_sizes": torch.tensor(sizes),
    }


@pytest.mark.parametrize(
    "settings",
    [
        ALL,
        {"prefill": PrefillPruner(keep=0.6)},
        {"method": "random"},
        {"method": "visionzip"},
        {"method": "tome"},
        {"method": "snapkv"},
    ],
    ids=str,
)
def test_a_tower_that_takes_images_of_any_shape(pixtral, settings):
    for sizes in ([(24, 32)], [(24, 32), (4, 40), (8, 4), (48, 48)]):
        inputs = of_sizes(*sizes)
        rows = (("image",),) * len(sizes)
        assert_dropping_equals_masking("llava", rows, inputs=inputs, steps=2, change=of(pixtral), **settings)
    model = mustdrop.patch(copy.deepcopy(pixtral), "none")
    assert torch.equal(answer(model, inputs, 1).logits, answer(pixtral, inputs, 1).logits)


@pytest.mark.parametrize("layers", [[-1, -2], [-3, -1], [2, 4]], ids=str)
@pytest.mark.parametrize("name", ["llava", "llava_next", "llava_onevision", "video_llava"])
def test_encoder_layers_side_by_side(name, layers):
    """Rules that merge in the layers stop before the first that is read, so that all are of the same tokens."""
    adapter = fixture_of(name)
    tiny = adapter.config()
    adapter.config = lambda: {**tiny, "vision_feature_layer": layers}
    model = build(adapter)
    rows = (("image",), ("image", "image"))
    inputs = batch(adapter, model, rows)
    theirs = answer(model, inputs, 1)
    for method in ("tome", "mustdrop", "mustdrop+", "visionzip", "prumerge"):
        assert_dropping_equals_masking(name, rows, inputs=inputs, steps=1, change=of(model), method=method, keep=0.5)
        whole = mustdrop.patch(copy.deepcopy(model), method, keep=1.0)
        assert torch.equal(answer(whole, inputs, 1).logits, theirs.logits)


def test_a_call_may_read_an_earlier_encoder_layer():
    rows, generation = (("image",), ("image", "image")), {"vision_feature_layer": -3}
    for method in ("tome", "visionzip"):
        assert_dropping_equals_masking("llava", rows, steps=1, method=method, keep=0.5, generation=generation)


@pytest.mark.parametrize("size", [(100, 1), (1, 100), (3000, 10), (10, 3000)], ids=str)
@pytest.mark.parametrize("name", ["llava_next", "llava_onevision", "llava_next_video"])
def test_tiles_of_which_nothing_is_left(name, size):
    """So thin that cutting the padding away cuts all columns, or all rows."""
    adapter, rows = registry()[name], (("image",), ("image",))
    thin = with_sizes(adapter, "image", ((3, *size), (3, 48, 40)))
    inputs = batch(thin, plain(name), rows)
    for settings in (ALL, {"method": "pooling"}, {"method": "divprune"}):
        both = compare(name, rows, inputs=inputs, steps=1, **settings)
        assert both.hidden.anything
        assert (both.ours.logits - both.oracle.logits).abs().max() <= 1e-5
    pictures = [torch.zeros(48, 40, 3, dtype=torch.uint8).numpy()]
    pytest.importorskip("matplotlib")
    both.trace.draw(pictures)
