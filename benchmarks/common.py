"""What benchmarks share: where a result comes from, a clock, statistics of pairs, a model, the result file."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from mustdrop.clock import now
from mustdrop.provenance import provenance

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEFORE, VISION, AFTER = 5, 576, 59  # tokens of the prompt: text, image, text
IMAGE = 32000  # id of the image's placeholder
SIZES: dict[str, tuple[dict[str, int], dict[str, int]]] = {  # the text model, the vision tower (336 / 14 pixels)
    "tiny": (
        {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8, "num_attention_heads": 4},
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2},
    ),
    "small": (
        {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24, "num_attention_heads": 16},
        {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8},
    ),
    "llava-1.5-7b": (
        {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
        {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
    ),
}


def origin(device: torch.device, seed: int) -> dict[str, Any]:
    """Versions, hardware, seed and commit, as in every result file, and how busy the machine was."""
    load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    return provenance(seed) | {"hardware": hardware(device), "load_average": load}


def hardware(device: torch.device) -> str:
    """The processor in words, without naming the machine."""
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory / 2**30
        return f"{torch.cuda.get_device_name(device)} ({memory:.0f} GiB)"
    name, memory = platform.processor() or platform.machine(), ""
    information = Path("/proc/cpuinfo")
    if information.exists():
        names = [line.split(":", 1)[1].strip() for line in information.read_text().splitlines() if "model name" in line]
        name = names[0] if names else name
        memory = f", {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    instructions = torch.backends.cpu.get_cpu_capability()
    return f"{name}, {instructions}, {os.cpu_count()} cores{memory}"


class Clock:
    """Seconds, after everything that was queued on the device has finished."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self) -> float:
        """Now."""
        return now(self.device)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and extremes."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    numbers = {"median": statistics.median(values), "q1": low, "q3": high, "min": min(values), "max": max(values)}
    return {name: significant(number) for name, number in numbers.items()}


def ratios(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """`spread` of the ratios of neighbours: what ran side by side is compared, so slow drifts cancel."""
    return spread([a / b for a, b in zip(above, below, strict=True)])


def significant(number: float, digits: int = 5) -> float:
    """Rounded for a file that people read."""
    return float(f"{number:.{digits}g}")


def build(size: str, device: torch.device, seed: int, pixels: int = 336) -> LlavaForConditionalGeneration:
    """A LLaVA for square pictures of so many pixels, with random weights: float32 on a CPU, bfloat16 on a GPU."""
    text, vision = SIZES[size]
    config = LlavaConfig(
        text_config=LlamaConfig(vocab_size=32064, max_position_embeddings=4096, **text),
        vision_config=CLIPVisionConfig(image_size=pixels, patch_size=14, **vision),
        image_token_index=IMAGE,
    )
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(seed)
    with device:
        model = LlavaForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def prompt(model: LlavaForConditionalGeneration, seed: int, batch: int = 1) -> dict[str, Tensor]:
    """576 vision tokens of a smooth random image between 64 text tokens, `batch` different prompts."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(3, 31999, (batch, BEFORE + AFTER), generator=generator)
    image = torch.full((batch, VISION), IMAGE)
    ids = torch.cat([words[:, :BEFORE], image, words[:, BEFORE:]], 1)
    coarse = torch.randn(batch, 3, 9, 9, generator=generator)
    pixels = nn.functional.interpolate(coarse, size=(336, 336), mode="bilinear")
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels.to(model.dtype)}
    return {name: value.to(model.device) for name, value in inputs.items()}


@contextmanager
def text_times(model: LlavaForConditionalGeneration, clock: Clock) -> Iterator[list[float]]:
    """Start and end of every forward of the language model, around whatever `patch` hooked on it."""
    times: list[float] = []
    module = model.model.language_model
    handles = [
        module.register_forward_pre_hook(lambda *_: times.append(clock()), prepend=True),
        module.register_forward_hook(lambda *_: times.append(clock())),
    ]
    try:
        yield times
    finally:
        for handle in handles:
            handle.remove()


def measure(model: LlavaForConditionalGeneration, inputs: dict[str, Tensor], clock: Clock, new: int) -> dict[str, Any]:
    """One `generate`: seconds of the prefill, of the call, per decode step; bytes of the cache."""
    with text_times(model, clock) as times:
        start = clock()
        output = model.generate(
            **inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False, return_dict_in_generate=True
        )
        end = clock()
    layers = output.past_key_values.layers
    return {
        "text": times[1] - times[0],
        "prompt": end - start,
        "decode": (times[-1] - times[1]) / max(1, new - 1),
        "stored": sum(t.untyped_storage().nbytes() for layer in layers for t in (layer.keys, layer.values)),
    }


def first_token(model: Any, inputs: dict[str, Tensor]) -> float:
    """Processor seconds of one `generate` of one token."""
    start = time.process_time()
    with torch.inference_mode():
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
    return time.process_time() - start


def add_pairs(parser: argparse.ArgumentParser, out: Path) -> None:
    """The options of a benchmark that runs with pruning and without, side by side."""
    parser.add_argument("--pairs", type=int, default=3, help="runs with and without, side by side")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=out)


def save(path: Path, result: dict[str, Any]) -> None:
    """Write a result file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
