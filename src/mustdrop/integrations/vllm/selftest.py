"""`python -m mustdrop.integrations.vllm.selftest`: the bundled model in vLLM, asked with all tokens and with few."""

from __future__ import annotations

import os
import sys
from typing import Any

QUIET = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
KEEP = 64


def main() -> None:
    """Ask one question twice, and print what the prompts and answers were.

    Raises:
        AssertionError: a wrong answer, or a prompt of the wrong length.
    """
    os.environ.update({name: os.environ.get(name, value) for name, value in QUIET.items()})
    from PIL import Image
    from transformers import AutoProcessor
    from vllm import LLM, SamplingParams

    from mustdrop.demo.model import CHECKPOINT, prompt
    from mustdrop.demo.scenes import SceneMaker

    maker = SceneMaker("heldout", 7)
    scene = maker.scene()
    asked = maker.question(scene, "region2color")
    processor: Any = AutoProcessor.from_pretrained(CHECKPOINT)
    request = {
        "prompt": prompt(processor, asked.text),
        "multi_modal_data": {"image": Image.fromarray(scene.image)},
    }
    overrides = {
        "architectures": ["MustDropLlavaForConditionalGeneration"],
        "mustdrop": {"method": "divprune", "keep": KEEP},
    }
    engine = LLM(
        str(CHECKPOINT), dtype="float32", max_model_len=1024, enforce_eager=True, max_num_seqs=2, hf_overrides=overrides
    )
    sampling = SamplingParams(temperature=0, max_tokens=6)
    found = []
    for keep in (1.0, KEEP):
        own: Any = request | {"mm_processor_kwargs": {"mustdrop_keep": keep}}
        (answer,) = engine.generate([own], sampling, use_tqdm=False)
        found.append((len(answer.prompt_token_ids or ()), answer.outputs[0].text.strip()))
    (whole, first), (pruned, second) = found
    assert whole - pruned == 576 - KEEP, f"prompts of {whole} and {pruned} tokens, expected {576 - KEEP} fewer"
    assert first == second == asked.answer, f"answers {first!r} and {second!r}, expected {asked.answer!r}"
    sys.stdout.write(f"prompts of {whole} and {pruned} tokens, both answered {second!r}\n")


if __name__ == "__main__":
    main()
