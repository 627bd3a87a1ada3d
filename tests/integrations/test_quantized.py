"""Weights in 8 and 4 bits: pruning does not touch them, so the oracle is the same quantised model, unpatched.

Weight-only methods (quanto, torchao) round the weights once, and the numbers agree as in float32. bitsandbytes also
rounds the activations of each call, to 8 bits or through its 4-bit kernels' working type: another number of rows may
round another way. The tolerance then is a tenth of what hiding the tokens changes.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
import transformers
from PIL import Image

import mustdrop
from mustdrop import DecodeCachePruner, PrefillPruner, VisionStagePruner
from mustdrop.demo.model import CHECKPOINT, load, prompt
from mustdrop.demo.scenes import SceneMaker
from support.builders import IMAGE, LLAMA, answer, batch, clone, plain
from support.checks import TOLERANCE, assert_masking_up_to_rounding, distance, patched
from support.oracle import MaskedOracle, hidden_by

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


@pytest.fixture(autouse=True)
def installed():
    pytest.importorskip("accelerate", reason="transformers loads quantised weights through accelerate")


@pytest.mark.parametrize(
    ("method", "tolerance"),
    [(bitsandbytes_8, 0.1), (quanto_8, TOLERANCE), (torchao_8, TOLERANCE)],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_dropping_equals_masking_and_the_account_counts_the_layers(method, tolerance, tmp_path):
    config, inputs = method(), batch(LLAMA, (1, 2), seed=3)
    model, oracle = quantized(tmp_path, config), quantized(tmp_path, method())
    weight = model.model.language_model.layers[0].mlp.up_proj
    assert not (type(weight) is torch.nn.Linear and type(weight.weight) is torch.nn.Parameter), "nothing is quantised"
    mustdrop.patch(model, **SETUP)
    both = assert_masking_up_to_rounding(
        model,
        inputs,
        vision=SETUP["vision"],
        decode=SETUP["decode"],
        oracle_model=oracle,
        tolerance=tolerance,
    )
    unpruned = answer(oracle, inputs)
    assert distance(both.oracle.logits[:, 0], unpruned.logits[:, 0]) > 0.5
    assert distance(unpruned.logits[:, 0], answer(plain(), inputs).logits[:, 0]) > TOLERANCE
    full = patched(LLAMA, **SETUP)
    answer(full, inputs)
    assert mustdrop.trace(model).flops.unpruned == mustdrop.trace(full).flops.unpruned
    mustdrop.unpatch(model)
    assert torch.equal(answer(model, inputs).logits, unpruned.logits)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits_of_bitsandbytes(kind):
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


def test_a_quantised_model_with_adapters(tmp_path):
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
