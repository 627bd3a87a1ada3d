"""One line makes a model drop vision tokens: the same question with and without it.

Runs offline on the bundled model. `--model llava-hf/llava-1.5-7b-hf --image cat.png --question "..."` takes a
model from the hub instead.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

import mustdrop
from mustdrop.demo import model as bundled
from mustdrop.demo.scenes import SceneMaker


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a LLaVA model of the hub, or a folder; the bundled model if left out")
    parser.add_argument("--image", type=Path, help="a picture; a made-up scene if left out")
    parser.add_argument("--question", default="where is the magenta one ?")
    parser.add_argument("--keep", type=float, default=64, help="vision tokens, or a share below 1")
    parser.add_argument("--picture", type=Path, help="write the kept patches here")
    options = parser.parse_args(arguments)
    keep = options.keep if options.keep < 1 else int(options.keep)

    model: Any
    processor: Any
    if options.model:
        model = LlavaForConditionalGeneration.from_pretrained(options.model, dtype="auto", device_map="auto").eval()
        processor = AutoProcessor.from_pretrained(options.model)
    else:
        model, processor = bundled.load()
    image = Image.open(options.image) if options.image else Image.fromarray(SceneMaker("heldout", seed=7).scene().image)
    text = bundled.prompt(processor, options.question)
    inputs = processor(text=text, images=image, return_tensors="pt").to(model.device, model.dtype)

    print("unpruned:", answer(model, processor, inputs))
    mustdrop.patch(model, keep=keep)  # the one line
    print("pruned:  ", answer(model, processor, inputs))
    print(mustdrop.last_trace(model))
    if options.picture:
        mustdrop.last_trace(model).draw(image, options.picture)


def answer(model: Any, processor: Any, inputs: Any) -> str:
    with torch.inference_mode():
        out = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    return str(processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0])


if __name__ == "__main__":
    main()
