"""What every family must pass whatever its weights are: in half types, in 4 bits, over devices, in training.

Nobody edits this file to add a family.
"""

from __future__ import annotations

import pytest
import torch

import mustdrop
from mustdrop import DecodeCachePruner, PrefillPruner, VisionStagePruner
from mustdrop.adapters import find, registry
from mustdrop.cost import linear_flops
from support import families
from support.builders import answer
from support.fake_devices import CPU, FIRST, SECOND, THIRD, Places, eager_experts, spread
from support.families import assert_dropping_equals_masking, batch, cast, clone, plain
from support.masking_check import assert_up_to_rounding, distance
from support.packed import PackedLinear, pack

FAMILIES = families.PAIRS
#: All tests of one family in a row: its model is built once.
each = pytest.mark.parametrize(("name", "kind"), FAMILIES, ids=map("-".join, FAMILIES), scope="module")

ALL = {
    "vision": VisionStagePruner(window=2, threshold=0.2),
    "prefill": PrefillPruner(keep=0.4),
    "decode": DecodeCachePruner(),
}
KEEP_ALL = {
    "vision": VisionStagePruner(window=None, keep=1.0),
    "prefill": PrefillPruner(keep=1.0),
    "decode": DecodeCachePruner(),
}
SELECT = {"vision": VisionStagePruner(window=None, keep=0.6), "prefill": PrefillPruner(keep=0.4)}


def stages(name, setup):
    """A setup, and for a family that lacks a stage what is left of it: filters alone cannot bring a prompt to 0.4."""
    left = families.fitting(name, setup)
    if "vision" in left or setup is KEEP_ALL:
        return left
    return left | {"prefill": PrefillPruner(keep=0.6)}


def ragged(kind):
    """One medium, none, two: rows of different lengths, kept counts and kinds."""
    return ((kind,), (), (kind, kind))


def plainly(run, what):
    """What the unpatched model does; where it fails, a test of the patched one has nothing to say."""
    try:
        return run()
    except (ValueError, RuntimeError, NotImplementedError, AttributeError) as error:
        pytest.skip(f"the unpatched model fails {what}: {error}")


# -- half types -------------------------------------------------------------------------------------------------------


def check_type(name, kind, dtype):
    """Keeping everything changes no bit; dropping equals masking as far as the type rounds."""
    model = clone(name).to(dtype)
    inputs = cast(batch(registry()[name], model, ragged(kind), 0), dtype)
    expected = plainly(lambda: answer(model, inputs, 1), f"in {dtype}")
    with pytest.warns(mustdrop.errors.NothingDroppedWarning):
        got = answer(mustdrop.patch(model, **stages(name, KEEP_ALL)), inputs, 1)
    assert torch.equal(got.logits, expected.logits)
    assert torch.equal(got.sequences, expected.sequences)
    check_dropping(name, kind, dtype, seed=0)


def one_way(model):
    """Routers that send every token to the same experts, whatever it holds.

    A masked pass rounds otherwise than a pruned one, and in half types that alone sends a token to another expert.
    """
    for path, _ in model.named_modules():
        if path.endswith(".experts"):
            parent = model.get_submodule(path.rpartition(".")[0])
            (router,) = [child for name, child in parent.named_children() if name in ("gate", "router")]
            torch.nn.init.zeros_(router.weight)
    return model


def check_dropping(name, kind, dtype, seed):
    options = {"steps": 1, "seed": seed, "change": lambda model: one_way(model).to(dtype)}
    both = families.compare(name, ragged(kind), **options, **stages(name, ALL))
    stored = {layer.keys.dtype for layer in both.ours.cache.layers if getattr(layer, "keys", None) is not None}
    assert stored == {dtype}
    step = torch.finfo(dtype).eps * both.oracle.logits.abs().max().item()
    assert_up_to_rounding(both, 10 * step)
    model = one_way(clone(name)).to(dtype)
    unpruned = answer(model, cast(batch(registry()[name], model, ragged(kind), seed), dtype), 0)
    effect = distance(both.oracle.logits[:, 0], unpruned.logits[:, 0])
    assert effect > 20 * step, "hiding tokens changes no more than rounding does: this proves nothing"


@each
def test_bfloat16(name, kind):
    check_type(name, kind, torch.bfloat16)


@each
def test_float16(name, kind):
    check_type(name, kind, torch.float16)


# -- quantised weights ------------------------------------------------------------------------------------------------


def packed(model):
    """4-bit layers without a `weight` in the decoder and in the encoders, as those of GPTQ and AWQ."""
    adapter = find(model)
    towers = [] if "vision" in adapter.lacks else [adapter.tower(model, kind).blocks for kind in adapter.media]
    assert pack(model, (adapter.decoder_layers(model), *towers)), "nothing was packed"
    return model


@each
def test_packed_weights(name, kind):
    model, inputs = clone(name), batch(registry()[name], plain(name), ((kind,),))
    layers = find(model).decoder_layers(model)
    before = [linear_flops(layer) for layer in layers]
    packed(model)
    assert any(isinstance(module, PackedLinear) for module in layers.modules())
    assert [linear_flops(layer) for layer in layers] == before
    expected = plainly(lambda: answer(model, inputs, 1), "with packed weights")
    both = assert_dropping_equals_masking(name, ragged(kind), steps=1, change=packed, **stages(name, ALL))
    assert both.trace.flops.actual < both.trace.flops.unpruned
    mustdrop.unpatch(mustdrop.patch(model, **stages(name, ALL)))
    assert torch.equal(answer(model, inputs, 1).logits, expected.logits)


# -- several devices and offloading -----------------------------------------------------------------------------------


@each
def test_several_devices(name, kind):
    """Encoder, layers and head where a `device_map` puts them, on imitated devices: the numbers of one, bit for bit."""
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    inputs = batch(registry()[name], plain(name), ragged(kind))
    model = spread(clone(name))
    with Places() as places:
        given = {key: value.to(FIRST) for key, value in inputs.items()}
        plainly(lambda: answer(model, given, 1), "over several devices")
        got = answer(mustdrop.patch(model, **stages(name, ALL)), given, 1)
    assert places.seen >= {FIRST, SECOND, THIRD}
    expected = answer(mustdrop.patch(eager_experts(clone(name)), **stages(name, ALL)), inputs, 1)
    assert mustdrop.trace(model).dropped_anything
    assert torch.equal(got.logits, expected.logits)
    assert torch.equal(got.sequences, expected.sequences)


@each
def test_offloaded_weights(name, kind):
    """accelerate loads the weights of each module when it runs; the kernels of experts then sum in another order."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    inputs = batch(registry()[name], plain(name), ragged(kind))
    model = accelerate.cpu_offload(clone(name), execution_device=CPU)
    plainly(lambda: answer(model, inputs, 1), "with offloaded weights")
    assert any(parameter.device.type == "meta" for parameter in model.parameters())
    got = answer(mustdrop.patch(model, **stages(name, ALL)), inputs, 1)
    expected = answer(mustdrop.patch(clone(name), **stages(name, ALL)), inputs, 1)
    assert mustdrop.trace(model).dropped_anything
    assert distance(got.logits, expected.logits) <= 1e-5
    assert torch.equal(got.sequences, expected.sequences)


# -- training ---------------------------------------------------------------------------------------------------------


def training(model):
    """Training mode without what is drawn anew at each call."""
    model.train()
    for module in model.modules():
        if "drop" in type(module).__name__.lower():
            module.eval()
    return model


@each
def test_gradients(name, kind):
    """Of every parameter, in training mode, with an encoder whose features are selected: those of the masked model."""
    setup = stages(name, SELECT)
    model, oracle = mustdrop.patch(training(clone(name)), **setup), training(clone(name))
    inputs = batch(registry()[name], model, ragged(kind))
    labels = inputs["input_ids"].clone()
    labels[:, :-2] = -100
    ours = model(**inputs, labels=labels).loss
    ours.backward()
    hidden = families.hidden_by(model, mustdrop.trace(model), inputs["input_ids"])
    assert hidden.anything
    with families.FamilyOracle(oracle, hidden):
        theirs = oracle(**inputs, labels=labels).loss
    theirs.backward()
    assert distance(ours, theirs) <= 1e-5
    reached = 0
    for (parameter_name, parameter), (_, other) in zip(
        model.named_parameters(), oracle.named_parameters(), strict=True
    ):
        expected = torch.zeros_like(other) if other.grad is None else other.grad
        got = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        scale = max(1.0, expected.abs().max().item())
        assert distance(got, expected) <= 1e-5 * scale, parameter_name
        reached += bool(expected.any())
    assert reached > 10
    if "vision" not in registry()[name].lacks:
        weights = registry()[name].tower(oracle, kind).blocks.parameters()
        assert any(parameter.grad is not None and parameter.grad.any() for parameter in weights)
