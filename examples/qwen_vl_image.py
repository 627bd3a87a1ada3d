"""A Qwen-VL and an image of any size: a budget in its own tokens, each 2 x 2 patches.

Runs offline on the bundled tiny Qwen3-VL, which reads a page drawn for it;
`--model Qwen/Qwen2.5-VL-7B-Instruct --image FILE` takes a hub model.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.image_utils import load_image

import mustdrop
from mustdrop.demo.model import load
from mustdrop.demo.tasks import LEARNED, TaskMaker


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model of the hub, or a folder; the bundled one if left out")
    parser.add_argument("--image", help="a file or an address; a drawn page if left out")
    parser.add_argument("--question", help="about the image; one about the drawn page if left out")
    parser.add_argument("--keep", type=float, default=0.25, help="vision tokens, or a share below 1")
    options = parser.parse_args(arguments)
    if bool(options.model) != bool(options.image):
        parser.error("--model and --image go together: the bundled model knows drawn pages alone")

    model, processor, image, question = from_hub(options) if options.model else bundled()
    content = [{"type": "image"}, {"type": "text", "text": options.question or question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=[text], images=[image], return_tensors="pt").to(model.device, model.dtype)

    mustdrop.patch(model, keep=options.keep if options.keep < 1 else int(options.keep))
    with torch.inference_mode():
        out = model.generate(**inputs, max_new_tokens=64, do_sample=False)
    print(options.question or question)
    print(processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0])
    trace = mustdrop.last_trace(model)
    print(trace)
    for medium in trace.media[0]:
        grids = ", ".join(f"{frames} x {rows} x {columns}" for frames, rows, columns in medium.layout.grids)
        print(f"{medium.kind}: {medium.layout.size} tokens, frames x rows x columns: {grids}")


def from_hub(options: argparse.Namespace) -> tuple[Any, Any, Any, str]:
    model: Any = AutoModelForImageTextToText.from_pretrained(options.model, dtype="auto", device_map="auto")
    processor = AutoProcessor.from_pretrained(options.model)
    image = load_image(options.image)
    return model.eval(), processor, image, "What is happening here?"


def bundled() -> tuple[Any, Any, Any, str]:
    model, processor = load("pages")
    maker = TaskMaker("pages", "selection", seed=0)
    page = maker.sample()
    asked = next(question for question in maker.questions(page) if question.type in LEARNED["pages"])
    return model, processor, page.pictures[0], asked.text


if __name__ == "__main__":
    main()
