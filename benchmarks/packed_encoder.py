"""Does a prompt get as much faster as its FLOPs say, where patches leave a packed encoder before its layers or inside?

One process, one thread, processor time: other work on the machine takes turns with this, and does not count. Each run
with pruning has a run without beside it; reported are the ratios of neighbours. Both have the weights of the linear
layers laid out for the processor once (`benchmarks/packed.py`), as in `end_to_end`.
"""

from __future__ import annotations

import argparse
import time
import warnings
from typing import Any

import torch
from torch import Tensor

import mustdrop
from benchmarks import common, models, packed
from mustdrop import VisionStagePruner

KEEPS = (1 / 3, 1 / 9)
OUT = common.RESULTS / "packed-encoder.json"


def settings(keep: float) -> dict[str, dict[str, Any]]:
    """What is measured at one share: name -> settings of `patch`.

    Random weights know no similar windows: all of them may merge, down to what the budget asks for.
    """
    merging = {"method": "mustdrop", "keep": keep, "threshold": -1.0}
    inside = VisionStagePruner(window=None, key_layer=0, select_layer=0, keep=keep)
    return {
        "selected after layer 0": {"vision": inside},
        "pixelprune": {"method": "pixelprune"},
        "mustdrop, windows merge inside": merging,
        "mustdrop, windows merge behind": {**merging, "inside": False},
        "divprune, after the encoder": {"method": "divprune", "keep": keep},
    }


def document(pixels: Tensor, share: float, side: int) -> Tensor:
    """A page: a share of its cells, in the rows at the top, is written on, and the others are empty."""
    cells = pixels.clone().unflatten(0, (-1, 4))
    cells[round(share * side * side / 4) :] = 0
    return cells.flatten(0, 1)


def measure(model: Any, inputs: dict[str, Tensor], patch: dict[str, Any], pairs: int) -> dict[str, Any]:
    """One row: the ratios of processor time and of FLOPs of the first token, whole and of the encoder alone."""
    tower, spent = model.model.visual, {"encoder": 0.0}
    handles = [
        tower.register_forward_pre_hook(lambda *_: spent.update(start=time.process_time()), prepend=True),
        tower.register_forward_hook(lambda *_: spent.update(encoder=time.process_time() - spent["start"])),
    ]

    def once() -> tuple[float, float]:
        return common.first_token(model, inputs), spent["encoder"]

    whole, encoder = [], []
    for _ in range(pairs):
        plain = once()
        with mustdrop.patched(model, **patch):
            pruned = once()
            trace = mustdrop.trace(model)
        whole.append(plain[0] / pruned[0])
        encoder.append(plain[1] / pruned[1])
    for handle in handles:
        handle.remove()
    parts = {name: trace.flops.parts[name] for name in ("vision", "projector")}
    own = sum(part.unpruned for part in parts.values()) / sum(part.actual for part in parts.values())
    return {
        "entering": len(trace.kept(0)),
        "tokens": int(trace.total[0]),
        "speed_up": common.spread(whole),
        "flops_ratio": common.significant(1 / trace.flops.ratio),
        "share_of_it": common.significant(common.spread(whole)["median"] * trace.flops.ratio),
        "encoder_speed_up": common.spread(encoder),
        "encoder_flops_ratio": common.significant(own),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m benchmarks packed_encoder`."""
    parser.add_argument("--model", default="qwen2.5-vl-wide", choices=tuple(models.QWEN_SIZES))
    parser.add_argument("--weights", choices=("packed", "plain"), default="packed", help="packed: laid out once")
    common.add_pairs(parser, OUT)


def run(options: argparse.Namespace) -> int:
    """Measure, print, save."""
    warnings.simplefilter("ignore", mustdrop.errors.NothingDroppedWarning)
    torch.set_num_threads(1)
    device = torch.device("cpu")
    subject = models.subject(options.model, device, "sdpa", options.seed)
    if options.weights == "packed":
        packed.pack(subject.model)
    inputs, rows = subject.prompt(options.seed, 1), []
    side = models.QWEN_SIZES[options.model][2]
    measure(subject.model, inputs, {"method": "none"}, 1)  # the first run of a process is slower
    for name in settings(1.0):
        for keep in KEEPS:
            patch = settings(keep)[name]
            own = inputs
            if name == "pixelprune":
                own = {**inputs, "pixel_values": document(inputs["pixel_values"], keep, side)}
            row = {"method": name, "keep": keep, **measure(subject.model, own, patch, options.pairs)}
            rows.append(row)
            print({**row, "speed_up": row["speed_up"]["median"]}, flush=True)
            result = {
                "what": "processor time and FLOPs of the first token, one thread, random weights, the same run without",
                **common.origin(device, options.seed),
                "model": options.model,
                "patches": side * side,
                "pairs": options.pairs,
                "weights": options.weights,
                "rows": rows,
            }
            common.save(options.out, result)
    return 0
