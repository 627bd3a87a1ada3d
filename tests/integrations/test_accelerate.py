"""accelerate's hooks and mustdrop's do not know of each other: offloaded weights give the numbers of loaded ones."""

from __future__ import annotations

import pytest
import torch

import mustdrop
from mustdrop import DecodeCachePruner, PrefillPruner, VisionStagePruner, errors
from support.builders import LLAMA, answer, batch, clone, plain
from support.masking_check import assert_dropping_equals_masking, patched

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
hooks = pytest.importorskip("accelerate.hooks", reason="accelerate is not installed")

MERGING = {"vision": VisionStagePruner(window=3), "prefill": PrefillPruner(keep=1 / 3), "decode": DecodeCachePruner()}
EVICTING = {"prefill": PrefillPruner(keep=0.6), "decode": DecodeCachePruner(keep=6, interval=2)}
CPU = torch.device("cpu")
PLACES = {
    "model.vision_tower": "disk",
    "model.multi_modal_projector": "cpu",
    "model.language_model.embed_tokens": "cpu",
    "model.language_model.layers": "disk",
    "model.language_model.norm": "cpu",
    "model.language_model.rotary_emb": "cpu",
    "lm_head": "disk",
}


def on_cpu(model, folder):
    accelerate.cpu_offload(model, execution_device=CPU)
    return model


def on_disk(model, folder):
    accelerate.disk_offload(model, str(folder), execution_device=CPU)
    return model


def mapped(model, folder):
    return accelerate.dispatch_model(model, dict(PLACES), main_device="cpu", offload_dir=str(folder))


def mapped_by_size(model, folder):
    half = sum(parameter.nbytes for parameter in model.parameters()) // 2
    places = accelerate.infer_auto_device_map(model, max_memory={"cpu": half})
    assert set(places.values()) == {"cpu", "disk"}
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(folder))


def loaded(model, folder):
    """What `from_pretrained(device_map=...)` makes of the weights."""
    model.save_pretrained(folder / "saved")
    settings = model.generation_config
    model = type(model).from_pretrained(
        folder / "saved", device_map=dict(PLACES), offload_folder=str(folder / "offload"), dtype="auto"
    )
    model.generation_config = settings
    return model.eval()


WAYS = pytest.mark.parametrize("place", [on_cpu, on_disk, mapped, mapped_by_size], ids=lambda place: place.__name__)


def check(model, setup):
    assert any(parameter.device.type == "meta" for parameter in model.parameters()), "nothing was offloaded"
    assert_dropping_equals_masking(
        model, batch(LLAMA, (1, 2), seed=3), vision=setup.get("vision"), decode=setup["decode"]
    )


@pytest.mark.parametrize("setup", [MERGING, EVICTING], ids=["merging", "evicting"])
@pytest.mark.parametrize("first", ["patch", "offload"])
@WAYS
def test_offloaded_weights_give_the_same_numbers_and_unpatching_leaves_them_offloaded(place, first, setup, tmp_path):
    if first == "patch":
        model = place(mustdrop.patch(clone(), **setup), tmp_path)
    else:
        model = mustdrop.patch(place(clone(), tmp_path), **setup)
    check(model, setup)
    mustdrop.unpatch(model)
    inputs = batch(LLAMA, (1, 2), seed=4)
    assert torch.equal(answer(model, inputs).logits, answer(plain(), inputs).logits)
    assert hasattr(model.model.language_model.layers[0].mlp.up_proj, "_hf_hook")
    assert any(parameter.device.type == "meta" for parameter in model.parameters())


def test_a_model_that_was_loaded_offloaded(tmp_path):
    model = mustdrop.patch(loaded(clone(), tmp_path), **MERGING)
    check(model, MERGING)


def test_taking_accelerates_hooks_out_leaves_the_patch(tmp_path):
    model = on_cpu(mustdrop.patch(clone(), **MERGING), tmp_path)
    check(model, MERGING)
    hooks.remove_hook_from_submodules(model)
    assert not any(parameter.device.type == "meta" for parameter in model.parameters())
    assert_dropping_equals_masking(
        model, batch(LLAMA, (1, 2), seed=5), vision=MERGING["vision"], decode=MERGING["decode"]
    )


def test_an_accelerator_prepares_a_patched_model():
    """`unwrap_model` gives back the patched model; here nothing needs wrapping."""
    inputs = batch(LLAMA, (1,), seed=6)
    accelerator = accelerate.Accelerator(cpu=True)
    model = accelerator.prepare(patched(LLAMA, **MERGING))
    with torch.no_grad():
        got = model(**inputs).logits
        expected = patched(LLAMA, **MERGING)(**inputs).logits
    assert torch.equal(got, expected)
    assert mustdrop.trace(accelerator.unwrap_model(model)).dropped_anything


def test_a_wrapper_names_what_to_patch():
    with pytest.raises(errors.UnsupportedModelError, match=r"wraps a LlavaForConditionalGeneration.*\.module"):
        mustdrop.patch(torch.nn.DataParallel(clone()))
