"""The bundled model in vLLM answers as well as it does in transformers, at every budget, in float32 and bfloat16."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

import mustdrop
from mustdrop.demo.model import CHECKPOINT, load, prompt
from mustdrop.demo.scenes import SceneMaker
from mustdrop.integrations.vllm import settings
from support import engines

BUDGETS = (576, 192, 128, 64)
METHOD = "divprune"
QUESTIONS = 24
NEW = 6
ARCHITECTURE = "LlavaForConditionalGeneration"


@pytest.fixture(scope="module")
def questions():
    maker, _ = SceneMaker("heldout", 7), torch.manual_seed(0)
    found = []
    for _ in range(QUESTIONS):
        scene = maker.scene()
        asked = maker.question(scene, "region2color")
        found.append((Image.fromarray(scene.image), asked.text, asked.answer))
    return found


@pytest.fixture(scope="module")
def expected(questions):
    """Answers of transformers at each budget."""
    model, processor = load()
    found = {}
    for keep in BUDGETS:
        pruner = settings.parse({"method": METHOD, "keep": keep}).pruner
        found[keep] = []
        for picture, text, _ in questions:
            inputs = processor(text=prompt(processor, text), images=picture, return_tensors="pt")
            with torch.no_grad(), mustdrop.patched(model, vision=pruner):
                out = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
            said = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            found[keep].append(said.strip())
    return found


@pytest.mark.filterwarnings("ignore::mustdrop.errors.NothingDroppedWarning")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_accuracy_is_that_of_the_library(questions, expected, dtype):
    from vllm import SamplingParams

    _, processor = load()
    sampling = SamplingParams(temperature=0, max_tokens=NEW)
    limits = {"image": 1}
    with engines.engine(
        CHECKPOINT, ARCHITECTURE, {"method": METHOD, "keep": 128}, dtype=dtype, limit_mm_per_prompt=limits
    ) as llm:
        for keep in BUDGETS:
            asked = [
                {
                    "prompt": prompt(processor, text),
                    "multi_modal_data": {"image": picture},
                    "mm_processor_kwargs": {"mustdrop_keep": keep},
                }
                for picture, text, _ in questions
            ]
            answered = llm.generate(asked, sampling, use_tqdm=False)
            said = [one.outputs[0].text.strip() for one in answered]
            right = [
                sum(a == one[2] for a, one in zip(some, questions, strict=True)) for some in (said, expected[keep])
            ]
            if dtype == "float32":
                assert said == expected[keep]
            assert abs(right[0] - right[1]) <= (0 if dtype == "float32" else 1)
            assert len(answered[0].prompt_token_ids) == len(answered[-1].prompt_token_ids) < keep + 20
