"""Down-sampling: where the encoder takes any size it gets the smaller picture, elsewhere the detail of one."""

from __future__ import annotations

import pytest
import torch

import mustdrop
from mustdrop import InputPruner, VisionStagePruner
from mustdrop.adapters import registry
from mustdrop.errors import ConfigError, UnsupportedModelError
from mustdrop.methods.downsample import LowResolution
from support.builders import answer
from support.families import batch, clone, plain


def test_the_smaller_grid_has_the_shape_of_the_picture_and_enough_tokens():
    rule = LowResolution()
    assert rule.reduced((1, 24, 24), 64) == (8, 8)
    assert rule.reduced((1, 10, 40), 100) == (5, 20)
    assert rule.reduced((4, 8, 8), 64) == (4, 4)
    assert rule.reduced((8, 5, 5), 3) == (1, 1)
    for rows, columns in ((24, 24), (3, 50), (50, 3), (1, 9), (7, 11)):
        for count in range(1, rows * columns + 1):
            high, wide = rule.reduced((1, rows, columns), count)
            assert high <= rows
            assert wide <= columns
            assert count <= high * wide < count + max(high, wide)


def test_detail_goes_and_flat_areas_stay():
    rule = LowResolution()
    flat = torch.full((1, 3, 16, 16), 0.4)
    torch.testing.assert_close(rule.blurred(flat, 0.25), flat)
    board = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).repeat(8, 8).expand(1, 3, -1, -1)
    made = rule.blurred(board, 0.25)
    assert made.shape == board.shape
    assert (made - 0.5).abs().max() < 0.05


def resized_by_hand(pixels, grid, high, wide):
    """A picture of one Qwen patch sequence at another size, pixel by pixel."""
    t, h, w = grid
    x = pixels.view(t, h // 2, w // 2, 2, 2, 3, 2, 4, 4)
    x = x.permute(0, 6, 5, 1, 3, 7, 2, 4, 8).reshape(t * 2, 3, h * 4, w * 4)
    x = torch.nn.functional.interpolate(x, (high * 8, wide * 8), mode="bilinear", antialias=True)
    x = x.view(t, 2, 3, high, 2, 4, wide, 2, 4).permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return x.reshape(t * high * wide * 4, -1), torch.tensor([[t, high * 2, wide * 2]])


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v"])
def test_the_encoder_gets_the_smaller_picture(family):
    """What enters the language model is what the unpatched model makes of the resized picture, and nothing else."""
    adapter, oracle = registry()[family], plain(family)
    inputs = batch(adapter, oracle, (("image",),))
    grid = inputs["image_grid_thw"][0].tolist()
    rows, columns = grid[1] // 2, grid[2] // 2
    high, wide = rows // 2, columns // 2
    pixels, small = resized_by_hand(inputs["pixel_values"], grid, high, wide)
    expected = oracle.get_image_features(pixels, image_grid_thw=small).pooler_output
    expected = torch.cat(list(expected)) if not isinstance(expected, torch.Tensor) else expected
    model = mustdrop.patch(clone(family), "downsample", keep=high * wide)
    made = model.get_image_features(inputs["pixel_values"], image_grid_thw=inputs["image_grid_thw"]).pooler_output
    made = torch.cat(list(made)) if not isinstance(made, torch.Tensor) else made
    kept = made[~made[:, 0].isnan()]
    assert made.shape[0] == rows * columns
    assert rows % high == columns % wide == 0  # so that no token is a mean of two
    torch.testing.assert_close(kept, expected, atol=1e-5, rtol=1e-5)


def test_the_encoder_runs_on_fewer_patches():
    model = mustdrop.patch(clone("qwen2_5_vl"), "downsample", keep=0.25)
    entered = []
    model.model.visual.blocks[0].register_forward_pre_hook(lambda _, args: entered.append(args[0].shape[0]))
    inputs = batch(registry()["qwen2_5_vl"], model, (("image",), ("image", "image")))
    answer(model, inputs, 1)
    assert entered[0] < len(inputs["pixel_values"]) / 2
    trace = mustdrop.trace(model)
    assert trace.tokens[0].tolist() == [int(total * 0.25) for total in trace.total.tolist()]


def test_an_encoder_of_one_size_sees_what_a_smaller_picture_shows():
    model = mustdrop.patch(clone("llava"), "downsample", keep=0.25)
    inputs = batch(registry()["llava"], model, (("image",),))
    seen = []
    model.model.vision_tower.register_forward_pre_hook(lambda _, args, kw: seen.append(args[0]), with_kwargs=True)
    answer(model, inputs, 1)
    expected = LowResolution().blurred(inputs["pixel_values"], 0.5)
    torch.testing.assert_close(seen[0], expected)
    mustdrop.unpatch(model)
    answer(model, inputs, 1)
    assert torch.equal(seen[1], inputs["pixel_values"])


@pytest.mark.parametrize("family", ["gemma4", "molmo2", "video_llama_3"])
def test_pictures_that_cannot_be_resized_are_refused_with_what_works(family):
    if not registry()[family].available():
        pytest.skip("this release of transformers has no such family")
    with pytest.raises(UnsupportedModelError, match=r"resizes pictures.*processor.*\"pooling\""):
        mustdrop.patch(clone(family), "downsample", keep=0.5)


def test_an_input_stage_is_refused_beside_it():
    """It would choose cells of a picture that the encoder does not get."""
    stage = VisionStagePruner(window=None, key_share=0, keep=0.3, score=LowResolution())
    with pytest.raises(ConfigError, match="resizes pictures"):
        mustdrop.patch(clone("qwen2_vl"), input=InputPruner(), vision=stage)
