"""From which length of prompt does pruning pay? The first token of one prompt with 1, 4, 8 and 20 small pictures.

One process, one thread, processor time: other work on the machine takes turns with this, and does not count. Each run
with pruning has a run without beside it, in turn before and after; reported are the ratios of neighbours. The weights
of the linear layers are laid out for the processor once (`benchmarks/packed.py`), as in `end_to_end`.
"""

from __future__ import annotations

import argparse
import warnings
from typing import Any

import torch
from torch import Tensor, nn

import mustdrop
from benchmarks import common
from benchmarks.packed import pack

SIDE = 168  # pixels of a picture
EACH = (SIDE // 14) ** 2  # vision tokens of a picture
PICTURES = (1, 4, 8, 20)  # of a prompt: 144, 576, 1152, 2880 vision tokens
KEEPS = (1 / 3, 1 / 9)
OUT = common.RESULTS / "prompt_length.json"


def prompt(pictures: int, seed: int) -> dict[str, Tensor]:
    """Smooth random pictures one after another between 64 text tokens."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(3, 31999, (1, common.BEFORE + common.AFTER), generator=generator)
    places = torch.full((1, pictures * EACH), common.IMAGE)
    ids = torch.cat([words[:, : common.BEFORE], places, words[:, common.BEFORE :]], 1)
    coarse = torch.randn(pictures, 3, 9, 9, generator=generator)
    pixels = nn.functional.interpolate(coarse, size=(SIDE, SIDE), mode="bilinear")
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def measure(model: Any, inputs: dict[str, Tensor], method: str, keep: float, pairs: int) -> dict[str, Any]:
    """One row: times of the first token, the ratio of neighbours beside that of FLOPs, and the share of the cache."""
    plain, pruned = [], []
    for k in range(pairs):
        if k % 2 == 0:
            plain.append(common.first_token(model, inputs))
        with mustdrop.patched(model, method, keep=keep):
            pruned.append(common.first_token(model, inputs))
            trace = mustdrop.trace(model)
        if k % 2:
            plain.append(common.first_token(model, inputs))
    return {
        "seconds_unpatched": common.spread(plain),
        "speed_up": common.ratios(plain, pruned),
        "flops_ratio": common.significant(1 / trace.flops.ratio),
        "kv": common.significant(trace.kv_bytes.actual / trace.kv_bytes.unpruned),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m benchmarks prompt_length`."""
    parser.add_argument("--size", default="small", choices=tuple(common.SIZES))
    parser.add_argument("--method", default="mustdrop")
    parser.add_argument("--pictures", type=int, action="append", help=f"of a prompt (default: {PICTURES})")
    common.add_pairs(parser, OUT)


def run(options: argparse.Namespace) -> int:
    """Measure, print, save."""
    warnings.simplefilter("ignore", mustdrop.errors.NothingDroppedWarning)
    torch.set_num_threads(1)
    device, rows = torch.device("cpu"), []
    came_from = common.origin(device, options.seed)
    model = common.build(options.size, device, options.seed, pixels=SIDE)
    pack(model)
    for pictures in options.pictures or PICTURES:
        inputs = prompt(pictures, options.seed)
        common.first_token(model, inputs)  # the first run of a shape is slower
        for keep in KEEPS:
            measured = measure(model, inputs, options.method, keep, options.pairs)
            row = {"pictures": pictures, "vision_tokens": pictures * EACH, "keep": keep, **measured}
            rows.append(row)
            print({**row, "speed_up": row["speed_up"]["median"]}, flush=True)
    result = {
        "what": "processor time of the first token by length of the prompt, one thread, random weights",
        **came_from,
        "size": options.size,
        "method": options.method,
        "text_tokens": common.BEFORE + common.AFTER,
        "pairs": options.pairs,
        "rows": rows,
    }
    common.save(options.out, result)
    return 0
