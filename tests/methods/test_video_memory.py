"""Sixty-four frames: the video methods make nothing larger than the model itself does, and no attention maps of frames.

What is counted are bytes of tensors, not the process's memory: so it holds on every machine.
"""

from __future__ import annotations

import pytest
import torch

import mustdrop
from mustdrop.adapters import registry
from support import families
from support.families import clone, picture, plain
from support.largest import Largest
from tests.families import fixture_of

METHODS = ("vcast", "gleanvid", "flashvid", "fastvid")
FRAMES = 64
FAMILIES = [
    name for name, adapter in families.AVAILABLE.items() if "video" in adapter.media and "vision" not in adapter.lacks
]
#: Frames as a batch, with and without a CLS token, and padded; packed, with and without windows, DeepStack.
FEW = ("llava_onevision", "video_llava", "llava_next_video", "gemma4", "qwen2_5_vl", "qwen3_vl", "video_llama_3")


def pytest_generate_tests(metafunc):
    """With ``--breadth more`` every family with videos, else one of each sort of tower."""
    if "name" in metafunc.fixturenames:
        few = metafunc.config.getoption("--breadth") == "turns"
        metafunc.parametrize("name", [name for name in FAMILIES if name in FEW or not few])


def video(name, frames):
    """A prompt with one video of so many frames."""
    adapter, model = registry()[name], plain(name)
    fixture = fixture_of(adapter)
    shape = (frames, *fixture.sizes("video")[0][-3:])
    arguments, ((*run,),) = fixture.media(model, "video", [picture(shape, 0)])
    token = next(medium.token for medium in adapter.modalities(model) if medium.name == "video")
    ids = torch.tensor([[1, 21, 22, *run, 23, 24, 25]])
    inputs = {**fixture.rows(arguments, [1]), "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return inputs | fixture.types(2 * (ids == token))


def patched(name, method):
    """A model with a quarter of its tokens; of `flashvid` its selection alone, where there is no other stage."""
    knobs = {"taper": None} if method == "flashvid" and "prefill" in registry()[name].lacks else {}
    return mustdrop.patch(clone(name), method, keep=0.25, **knobs)


def largest(model, inputs):
    """The largest tensor of a prefill."""
    with torch.no_grad(), Largest() as found:
        model(**inputs, logits_to_keep=1)
    return found


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_larger_than_what_the_model_makes(name, method):
    model = patched(name, method)
    few, many = (largest(model, video(name, frames)) for frames in (FRAMES // 4, FRAMES))
    own = largest(plain(name), video(name, FRAMES))
    assert bool((mustdrop.trace(model).tokens[0] < mustdrop.trace(model).total).all())
    assert many.nbytes <= own.nbytes, many.made_by
    assert many.nbytes <= 4.2 * few.nbytes, many.made_by


def test_attention_maps_of_all_frames_would_be_seen(name):
    """They are larger than anything that the model makes, so the test above would find them."""
    model, seen = plain(name), []
    tower = registry()[name].tower(model, "video")

    def entering(_, args, kwargs):
        seen.append((args[0] if args else kwargs["hidden_states"]).shape[:-1].numel())

    handle = tower.blocks[0].register_forward_pre_hook(entering, with_kwargs=True)
    inputs = video(name, FRAMES)
    own = largest(model, inputs)
    handle.remove()
    (layout,) = registry()[name].layouts(model, "video", inputs)
    frames = sum(grid[0] for grid in layout.grids)  # a packed encoder may make one of two
    patches, heads, float32 = sum(seen), 4, 4
    assert heads * patches * (patches // frames) * float32 > own.nbytes
