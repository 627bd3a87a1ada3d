"""Video-LLaVA and a video: 8 frames, one budget for all.

Runs offline on a tiny model with random weights;
`--model LanguageBind/Video-LLaVA-7B-hf --video FILE` takes a hub model.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from transformers import (
    AutoProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
)

import mustdrop


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model of the hub, or a folder; a tiny one with random weights if left out")
    parser.add_argument("--video", help="a file or an address; noise if left out")
    parser.add_argument("--question", default="What is happening here?")
    parser.add_argument("--keep", type=float, default=0.25, help="vision tokens, or a share below 1")
    options = parser.parse_args(arguments)
    if bool(options.model) != bool(options.video):
        parser.error("--model and --video go together: a tiny model sees noise, a real one a real video")

    model, inputs = from_hub(options) if options.model else tiny_one()
    mustdrop.patch(model, keep=options.keep if options.keep < 1 else int(options.keep))
    with torch.inference_mode():
        out = model.generate(**inputs, max_new_tokens=64 if options.model else 4, do_sample=False)
    if options.model:
        processor = AutoProcessor.from_pretrained(options.model)
        print(processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0])
    print(mustdrop.last_trace(model))
    for medium in mustdrop.last_trace(model).media[0]:
        grids = ", ".join(f"{frames} x {rows} x {columns}" for frames, rows, columns in medium.layout.grids)
        print(f"{medium.kind}: {medium.layout.size} tokens, frames x rows x columns: {grids}")


def from_hub(options: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    model: Any = VideoLlavaForConditionalGeneration.from_pretrained(options.model, dtype="auto", device_map="auto")
    processor = AutoProcessor.from_pretrained(options.model)
    content = [{"type": "video", "path": options.video}, {"type": "text", "text": options.question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    return model.eval(), inputs.to(model.device, model.dtype)


def tiny_one() -> tuple[Any, dict[str, Any]]:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = VideoLlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, image_size=32, patch_size=4),
        text_config=LlamaConfig(**sizes, vocab_size=512, bos_token_id=1, eos_token_id=None, pad_token_id=0),
        image_token_id=500,
        video_token_id=501,
    )
    torch.manual_seed(0)
    model: Any = VideoLlavaForConditionalGeneration(config).eval()
    frames = torch.randn(1, 8, 3, 32, 32)
    tokens = 8 * (8 * 8 + 1)  # patches and CLS of each frame
    ids = torch.tensor([[1, 20, 21, *[501] * tokens, 30, 31, 32]])
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values_videos": frames}


if __name__ == "__main__":
    main()
