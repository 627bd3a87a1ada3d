"""Weights in 8 and 4 bits: pruning does not touch them, so the oracle is the same quantised model, unpatched.

Weight-only methods (quanto, torchao) round the weights once, and the numbers agree as in float32. bitsandbytes also
rounds the activations of each call, to 8 bits or through its 4-bit kernels' working type: another number of rows may
round another way. The tolerance then is a tenth of what hiding the tokens changes.
"""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
import transformers
from PIL import Image

import mustdrop
from mustdrop import DecodeCachePruner, PrefillPruner, VisionStagePruner
from mustdrop.adapters import find
from mustdrop.cost import embedding_flops, linear_flops
from mustdrop.demo.model import CHECKPOINT, load, prompt
from mustdrop.demo.scenes import SceneMaker
from support import families
from support.builders import IMAGE, LLAMA, SIGLIP, Variant, answer, batch, clone, plain
from support.masking_check import TOLERANCE, assert_masking_up_to_rounding, distance, patched
from support.oracle import MaskedOracle, hidden_by
from support.packed import PackedLinear, for_awq, pack, packed_copy

SETUP = {
    "vision": VisionStagePruner(window=None, keep=12),
    "prefill": PrefillPruner(keep=0.2),
    "decode": DecodeCachePruner(),
}


def needs(package):
    missing = importlib.util.find_spec(package.split(".")[0]) is None
    if not missing and "." in package:
        missing = importlib.util.find_spec(package) is None
    if missing:
        pytest.skip(f"{package} is not installed")


def bitsandbytes_8():
    needs("bitsandbytes")
    return transformers.BitsAndBytesConfig(load_in_8bit=True)


def quanto_8():
    needs("optimum.quanto")
    return transformers.QuantoConfig(weights="int8")


def torchao_8():
    needs("torchao")
    from torchao.quantization import Int8WeightOnlyConfig

    return transformers.TorchAoConfig(Int8WeightOnlyConfig())


def quantized(folder, config):
    settings = clone()
    settings.save_pretrained(folder)
    model = type(settings).from_pretrained(folder, quantization_config=config, device_map="cpu").eval()
    model.generation_config = settings.generation_config
    return model


@pytest.fixture
def accelerate():
    return pytest.importorskip("accelerate", reason="transformers loads quantised weights through accelerate")


def assert_pruned_alike(model, oracle, inputs, variant=LLAMA, tolerance=TOLERANCE):
    """Dropping equals masking and makes a difference, the account is that of plain layers, unpatching restores."""
    mustdrop.patch(model, **SETUP)
    both = assert_masking_up_to_rounding(
        model,
        inputs,
        variant,
        vision=SETUP["vision"],
        decode=SETUP["decode"],
        oracle_model=oracle,
        tolerance=tolerance,
    )
    unpruned = answer(oracle, inputs)
    assert distance(both.oracle.logits[:, 0], unpruned.logits[:, 0]) > 0.5
    assert distance(unpruned.logits[:, 0], answer(plain(variant), inputs).logits[:, 0]) > TOLERANCE
    full = patched(variant, **SETUP)
    answer(full, inputs)
    assert mustdrop.trace(model).flops.unpruned == mustdrop.trace(full).flops.unpruned
    mustdrop.unpatch(model)
    assert torch.equal(answer(model, inputs).logits, unpruned.logits)


@pytest.mark.parametrize(
    ("method", "tolerance"),
    [(bitsandbytes_8, 0.1), (quanto_8, TOLERANCE), (torchao_8, TOLERANCE)],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_dropping_equals_masking_and_the_account_counts_the_layers(method, tolerance, tmp_path, accelerate):
    config, inputs = method(), batch(LLAMA, (1, 2), seed=3)
    model, oracle = quantized(tmp_path, config), quantized(tmp_path, method())
    weight = model.model.language_model.layers[0].mlp.up_proj
    assert not (type(weight) is torch.nn.Linear and type(weight.weight) is torch.nn.Parameter), "nothing is quantised"
    assert_pruned_alike(model, oracle, inputs, tolerance=tolerance)


# -- 4 bits as GPTQ and AWQ pack them ---------------------------------------------------------------------------------

WIDE = Variant(width=64, seed=4)  # their kernels take sizes of whole groups of 32
LAYERS, GROUP = "model.language_model.layers", 32
IN_FULL = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]


@pytest.fixture
def stand_in():
    """The plain model with packed layers, which need no package."""
    return packed_copy(plain(WIDE), LAYERS, group=GROUP)


def test_packed_layers_without_a_weight(stand_in):
    layer = stand_in.model.language_model.layers[0].mlp.up_proj
    assert not hasattr(layer, "weight")
    assert_pruned_alike(packed_copy(plain(WIDE), LAYERS, group=GROUP), stand_in, batch(WIDE, (1, 2), seed=3), WIDE)


def test_an_encoder_and_its_projector_of_packed_layers():
    """The tower's patch embedding is a convolution, and stays."""
    parts = ("model.vision_tower", "model.multi_modal_projector", LAYERS, "lm_head")
    model, oracle = (packed_copy(plain(SIGLIP), *parts) for _ in range(2))
    assert sum(isinstance(module, PackedLinear) for module in model.model.vision_tower.modules()) > 8
    setup = {"vision": VisionStagePruner(window=None, keep=12), "prefill": PrefillPruner(keep=0.2)}
    inputs = batch(SIGLIP, (1, 2), seed=3)
    assert_masking_up_to_rounding(
        mustdrop.patch(model, **setup),
        inputs,
        SIGLIP,
        vision=setup["vision"],
        oracle_model=oracle,
        tolerance=TOLERANCE,
    )
    full = patched(SIGLIP, **setup)
    answer(full, inputs)
    assert mustdrop.trace(model).flops.parts.keys() >= {"vision", "projector"}
    assert mustdrop.trace(model).flops.unpruned == mustdrop.trace(full).flops.unpruned


def test_a_packed_patch_embedding_counts_like_the_linear_layer_that_it_replaces():
    model = families.clone("llama4")  # its encoder unfolds pixels and projects them with a linear layer
    tower = find(model).tower(model)
    before = embedding_flops(tower.module, tower.blocks)
    inside = sum(map(linear_flops, tower.blocks))
    assert before > 0
    assert pack(model, (tower.module,)) > 1
    assert isinstance(tower.module.patch_embedding.linear, PackedLinear)
    assert embedding_flops(tower.module, tower.blocks) == before
    assert sum(map(linear_flops, tower.blocks)) == inside


def checkpoint(folder, model, state, config):
    """A checkpoint as the Hub has them: the tensors, and what they are in `config.json`."""
    model.save_pretrained(folder, state_dict=state)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"quantization_config": config}))
    return [reloaded(folder, model) for _ in range(2)]


def reloaded(folder, model):
    loaded = type(model).from_pretrained(folder, device_map="cpu", dtype=torch.float32).eval()
    loaded.generation_config = model.generation_config
    return loaded


def assert_quantised_like(stand_in, models, kind, tolerance):
    model, oracle = models
    layer, inputs = model.model.language_model.layers[0].mlp.up_proj, batch(WIDE, (1, 2), seed=3)
    assert kind in type(layer).__module__
    assert "qweight" in dict(layer.named_buffers())
    assert distance(answer(oracle, inputs, 0).logits, answer(stand_in, inputs, 0).logits) < 0.01
    assert_pruned_alike(model, oracle, inputs, WIDE, tolerance)


@pytest.mark.parametrize(("backend", "tolerance"), [("torch", TOLERANCE), ("auto", 0.01)], ids=["torch", "auto"])
def test_gptq(backend, tolerance, stand_in, tmp_path, accelerate):
    """A GPTQ checkpoint through transformers, optimum and gptqmodel's kernels: plain torch, and what suits this CPU."""
    needs("gptqmodel")
    needs("optimum.gptq")
    config = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": GROUP,
        "desc_act": False,
        "sym": False,
        "checkpoint_format": "gptq_v2",
        "block_name_to_quantize": LAYERS,
        "backend": backend,
    }
    models = checkpoint(tmp_path, stand_in, stand_in.state_dict(), config)
    assert_quantised_like(stand_in, models, "gptqmodel", tolerance)


@pytest.mark.parametrize("backend", ["torch_awq", "auto"])
def test_awq(backend, stand_in, tmp_path, accelerate):
    """An AWQ checkpoint through transformers and the CPU kernels of gptqmodel."""
    needs("gptqmodel")
    config = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": GROUP,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": IN_FULL,
        "backend": backend,
    }
    models = checkpoint(tmp_path, stand_in, for_awq(stand_in), config)
    assert_quantised_like(stand_in, models, "gptqmodel", 0.01)


@pytest.mark.parametrize("scheme", ["int4", "W8A8"])
def test_compressed_tensors(scheme, tmp_path, accelerate):
    """What llm-compressor writes: weights in 4 bits, or weights and activations in 8.

    The layers hold packed weights until their first call, and what they stand for from then on.
    """
    needs("compressed_tensors")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams

    four = {"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "group", "group_size": 16}}
    groups = {"group_0": four} if scheme == "int4" else {scheme: ["Linear"]}
    source, inputs = clone(), batch(LLAMA, (1, 2), seed=3)
    apply_quantization_config(source, QuantizationConfig(config_groups=groups, ignore=[f"re:{n}.*" for n in IN_FULL]))
    for module in source.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            arguments, scales = module.quantization_scheme.weights, module.weight_scale
            grouped = module.weight.unflatten(1, (scales.shape[1], -1))
            made, zeros = calculate_qparams(grouped.amin(-1), grouped.amax(-1), arguments)
            scales.data.copy_(made)
            module.weight_zero_point.data.copy_(zeros)
    compressor = ModelCompressor.from_pretrained_model(source)
    compressor.compress_model(source)
    source.save_pretrained(tmp_path)
    compressor.update_config(tmp_path)
    model, oracle = (reloaded(tmp_path, source) for _ in range(2))
    layer = model.model.language_model.layers[0].mlp.up_proj
    packed = layer.weight_packed if scheme == "int4" else layer.weight
    assert not packed.is_floating_point()
    assert_pruned_alike(model, oracle, inputs, tolerance=TOLERANCE if scheme == "int4" else 0.1)


# -- bitsandbytes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits_of_bitsandbytes(kind, accelerate):
    """The bundled model, since the CPU kernels want rows of whole 64-entry blocks. So have the
    layers of its language model, but for one kind; the tower has none."""
    needs("bitsandbytes")
    skipped = ["model.vision_tower", "model.multi_modal_projector", "lm_head", "down_proj"]

    def four_bits():
        config = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=kind,
            bnb_4bit_compute_dtype=torch.float32,
            llm_int8_skip_modules=skipped,
        )
        kind_of_model = transformers.LlavaForConditionalGeneration
        return kind_of_model.from_pretrained(CHECKPOINT, quantization_config=config, device_map="cpu").eval()

    full, processor = load()
    image = Image.fromarray(SceneMaker("heldout", seed=7).scene().image)
    inputs = processor(text=prompt(processor, "where is the magenta one ?"), images=image, return_tensors="pt")
    model, oracle = mustdrop.patch(four_bits(), keep=64, window=None), four_bits()
    assert type(model.model.language_model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    ours = answer(model, inputs, steps=2)
    trace = mustdrop.trace(model)
    ids = inputs["input_ids"]
    ids = ids.masked_fill(ids == model.config.image_token_id, IMAGE)
    hidden = hidden_by(trace, ids, 8, cascade_from=2)
    with MaskedOracle(oracle, hidden):
        theirs = answer(oracle, inputs, steps=2)
    effect = distance(theirs.logits[:, 0], answer(oracle, inputs, steps=0).logits[:, 0])
    assert distance(ours.logits[:, 0], theirs.logits[:, 0]) <= effect / 10
    assert torch.equal(ours.sequences, theirs.sequences)
    mustdrop.patch(full, keep=64, window=None)
    answer(full, inputs, steps=2)
    assert trace.flops.unpruned == mustdrop.trace(full).flops.unpruned


def test_a_quantised_model_with_adapters(tmp_path, accelerate):
    """QLoRA: adapters in full precision over weights in few bits."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    needs("bitsandbytes")
    inputs, models = batch(LLAMA, (1,), seed=4), []
    for _ in range(2):
        wrapped = peft.get_peft_model(
            quantized(tmp_path, bitsandbytes_8()), peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"])
        ).eval()
        draw = torch.Generator().manual_seed(3)
        for name, parameter in sorted(wrapped.named_parameters()):
            if "lora_" in name:
                parameter.data.normal_(0, 0.1, generator=draw)
        models.append(wrapped)
    ours, oracle = models
    mustdrop.patch(ours, **SETUP)
    assert_masking_up_to_rounding(
        ours.get_base_model(),
        inputs,
        vision=SETUP["vision"],
        decode=SETUP["decode"],
        oracle_model=oracle.get_base_model(),
        tolerance=0.1,
    )
