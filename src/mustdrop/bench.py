"""How much faster a model becomes on this machine: prefill, decoding, memory, as ratios within one run.

Every ratio is one of neighbours: the plain and the patched model run one after the other, in turn first and second, so
that what slows the machine down for a while slows down both. The benchmarks behind the figures of the documentation
are in `benchmarks/` of the repository.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

import mustdrop
from mustdrop.budget import Keep
from mustdrop.clock import WARM_UP, now
from mustdrop.provenance import provenance
from mustdrop.registry import MethodLike, described


@dataclass(frozen=True)
class Setting:
    """A method at a budget.

    Attributes:
        method: a name, a recipe class, or an object that is complete.
        keep: its budget; None leaves it as the method has it.
    """

    method: MethodLike
    keep: Keep | None = None

    @property
    def knobs(self) -> dict[str, Any]:
        """What `patch` is given beside the method."""
        return {} if self.keep is None else {"keep": self.keep}


@dataclass
class Times:
    """Seconds of one model, one entry per round.

    Attributes:
        prefill: of the whole prompt: encoder, pruning, first token.
        decode: of one further token.
        peak: bytes that the round took on top of the weights; empty where the device does not count them.
    """

    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    peak: list[int] = field(default_factory=list)


def benchmark(
    model: Any,
    inputs: Any,
    settings: Sequence[Setting],
    *,
    rounds: int = 7,
    new_tokens: int = 32,
    advance: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Measure the plain model beside each setting.

    Args:
        model: unpatched, in evaluation mode.
        inputs: of one prompt or of a batch.
        settings: methods and budgets.
        rounds: pairs of runs per setting, after the warm-up.
        new_tokens: length of the answer; the model may not end it earlier.
        advance: called after each round.

    Returns:
        A result file: versions and hardware, the prompt, and a row per setting with medians and extremes.
    """
    rows = []
    for setting in settings:
        plain, patched = Times(), Times()
        for i in range(-WARM_UP, rounds):
            order: list[tuple[Times, Setting | None]] = [(plain, None), (patched, setting)]
            for times, what in order if i % 2 else reversed(order):
                _measure(model, inputs, what, new_tokens, times if i >= 0 else Times())
            advance()
        rows.append(_row(setting, plain, patched, _kept(model, inputs, setting, new_tokens)))
    ids = inputs["input_ids"]
    return {
        **provenance(0),
        "model": {
            "architecture": type(model).__name__,
            "parameters": sum(p.numel() for p in model.parameters()),
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(model.device),
        },
        "prompt": {"batch": len(ids), "tokens": ids.shape[1], "new_tokens": new_tokens},
        "rounds": rounds,
        "rows": rows,
    }


def _settings(setting: Setting | None) -> dict[str, Any]:
    return {} if setting is None else {"method": setting.method, **setting.knobs}


class _Watch(StoppingCriteria):
    """Never stops; remembers when the first and the last token were there."""

    def __init__(self, model: Any, new_tokens: int) -> None:
        self.model, self.new_tokens, self.seen = model, new_tokens, 0
        self.start = self.first = self.last = now(model.device)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """After each token, for all rows."""
        self.seen += 1
        if self.seen == 1:
            self.first = now(self.model.device)
        if self.seen == self.new_tokens:
            self.last = now(self.model.device)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@torch.inference_mode()
def _measure(model: Any, inputs: Any, setting: Setting | None, new_tokens: int, times: Times) -> None:
    """One answer: time to the first token, and time of each further one."""
    counts = model.device.type == "cuda"
    with nullcontext() if setting is None else mustdrop.patched(model, **_settings(setting)):
        before = 0
        if counts:
            torch.cuda.reset_peak_memory_stats(model.device)
            before = torch.cuda.memory_allocated(model.device)
        watch = _Watch(model, new_tokens)
        model.generate(**inputs, **_answer(new_tokens), stopping_criteria=[watch])
        if counts:
            times.peak.append(torch.cuda.max_memory_allocated(model.device) - before)
    times.prefill.append(watch.first - watch.start)
    times.decode.append((watch.last - watch.first) / (new_tokens - 1))


def _answer(new_tokens: int) -> dict[str, Any]:
    return {"do_sample": False, "num_beams": 1, "max_new_tokens": new_tokens, "min_new_tokens": new_tokens}


@torch.inference_mode()
def _kept(model: Any, inputs: Any, setting: Setting, new_tokens: int) -> mustdrop.Trace:
    with mustdrop.patched(model, **_settings(setting)):
        model.generate(**inputs, **_answer(new_tokens))
        return mustdrop.trace(model)


def _row(setting: Setting, plain: Times, patched: Times, trace: mustdrop.Trace) -> dict[str, Any]:
    name, knobs = described(setting.method, setting.knobs)
    return {
        "method": name,
        "keep": knobs.get("keep"),
        "vision_tokens": trace.total.tolist(),
        "equal_tokens": [round(float(tokens), 3) for tokens in trace.equal_tokens],
        "flops_ratio": trace.flops.ratio,
        "kv_ratio": trace.kv_bytes.ratio,
        "kv_bytes": trace.kv_bytes.actual,
        "prefill_ms": {"plain": _ms(plain.prefill), "patched": _ms(patched.prefill)},
        "decode_ms": {"plain": _ms(plain.decode), "patched": _ms(patched.decode)},
        "prefill_speed_up": _ratios(plain.prefill, patched.prefill),
        "decode_speed_up": _ratios(plain.decode, patched.decode),
        "peak_bytes": {"plain": max(plain.peak), "patched": max(patched.peak)} if plain.peak else None,
    }


def _ms(seconds: Sequence[float]) -> float:
    return 1000 * statistics.median(seconds)


def _ratios(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """Of neighbours: median and extremes."""
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
