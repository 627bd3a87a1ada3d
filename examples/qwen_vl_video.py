"""A Qwen-VL and a video: one budget for all frames, DeepStack features go with their tokens.

Runs offline on the bundled tiny Qwen3-VL, which watches digits come and go;
`--model Qwen/Qwen3-VL-8B-Instruct --video FILE` takes a hub model.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import mustdrop
from mustdrop.demo.model import load, prompt
from mustdrop.demo.tasks import LEARNED, TaskMaker


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model of the hub, or a folder; the bundled one if left out")
    parser.add_argument("--video", help="a file or an address; a drawn one if left out")
    parser.add_argument("--question", help="about the video of a file")
    parser.add_argument("--keep", type=float, default=0.25, help="vision tokens, or a share below 1")
    options = parser.parse_args(arguments)
    if bool(options.model) != bool(options.video):
        parser.error("--model and --video go together: the bundled model knows drawn videos alone")

    model, processor, inputs, question = from_hub(options) if options.model else bundled()
    print(question)

    mustdrop.patch(model, keep=options.keep if options.keep < 1 else int(options.keep))
    with torch.inference_mode():
        out = model.generate(**inputs, max_new_tokens=64, do_sample=False)
    print(processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0])
    trace = mustdrop.last_trace(model)
    print(trace)
    for medium in trace.media[0]:
        grids = ", ".join(f"{frames} x {rows} x {columns}" for frames, rows, columns in medium.layout.grids)
        print(f"{medium.kind}: {medium.layout.size} tokens, frames x rows x columns: {grids}")


def from_hub(options: argparse.Namespace) -> tuple[Any, Any, Any, str]:
    model: Any = AutoModelForImageTextToText.from_pretrained(options.model, dtype="auto", device_map="auto")
    processor = AutoProcessor.from_pretrained(options.model)
    question = options.question or "What is happening here?"
    content = [{"type": "video", "path": options.video}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    return model.eval(), processor, inputs.to(model.device, model.dtype), question


def bundled() -> tuple[Any, Any, Any, str]:
    model, processor = load("pages")
    maker = TaskMaker("videos", "selection", seed=0)
    video = maker.sample()
    (asked, *_) = (question for question in maker.questions(video) if question.type in LEARNED["videos"])
    text = prompt(processor, asked.text, images=0, videos=1)
    return model, processor, processor(text=[text], videos=[list(video.pictures)], return_tensors="pt"), asked.text


if __name__ == "__main__":
    main()
