"""vLLM engines inside this process, and what transformers answers to the same requests."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import mustdrop
from support import tiny_checkpoints as tiny

QUIET = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
NEW = 8  # tokens of an answer


@dataclass(frozen=True)
class Request:
    """One prompt.

    Attributes:
        words: of the text behind the media.
        images: pictures.
        videos: (frames, height, width, 3) each.
        keep: of this request, or None.
        lead: the text before the media.
    """

    words: str
    images: Sequence[Image.Image] = field(default_factory=tuple)
    videos: Sequence[np.ndarray] = field(default_factory=tuple)
    keep: float | None = None
    lead: str = "w5"

    def prompt(self, family: str) -> str:
        """The text, with words between the media."""
        _, image, video = tiny.FAMILIES[family]
        media = [*(f"w{20 + i} {image}" for i in range(len(self.images)))]
        media += [f"w{30 + i} {video}" for i in range(len(self.videos))]
        return " ".join([self.lead, *media, self.words])

    def data(self, family: str) -> dict[str, Any]:
        """As vLLM takes it."""
        found: dict[str, Any] = {"prompt": self.prompt(family)}
        media: dict[str, Any] = {}
        if self.images:
            media["image"] = list(self.images)
        if self.videos:
            named = family.startswith("qwen")
            media["video"] = [(video, metadata(video)) if named else video for video in self.videos]
        if media:
            found["multi_modal_data"] = media
        if self.keep is not None:
            found["mm_processor_kwargs"] = {"mustdrop_keep": self.keep}
        return found


def metadata(video: np.ndarray) -> dict[str, Any]:
    """Of a video of two frames per second."""
    n = len(video)
    return {
        "fps": 2.0,
        "duration": n / 2,
        "total_num_frames": n,
        "frames_indices": list(range(n)),
        "video_backend": "x",
    }


@contextmanager
def engine(folder: Path | str, architecture: str, settings: dict[str, Any] | None, **options: Any) -> Iterator[Any]:
    """An engine that prunes as `settings` say; None: vLLM's own model."""
    os.environ.update(QUIET)
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    overrides: dict[str, Any] = {}
    if settings is not None:
        overrides = {"architectures": [f"MustDrop{architecture}"], "mustdrop": settings}
    defaults: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": 1024,
        "max_num_seqs": 8,
        "enforce_eager": True,
        "limit_mm_per_prompt": {"image": 3, "video": 2},
    }
    made = LLM(str(folder), hf_overrides=overrides, **defaults | options)
    try:
        yield made
    finally:
        made.llm_engine.engine_core.shutdown()
        del made
        cleanup_dist_env_and_memory()
        gc.collect()


def answers(llm: Any, family: str, requests: Sequence[Request], new: int = NEW) -> list[Any]:
    """Greedy answers, all requests at once."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, logprobs=1)
    return llm.generate([request.data(family) for request in requests], sampling, use_tqdm=False)


def tokens(answered: Sequence[Any]) -> list[list[int]]:
    """Ids of the answers."""
    return [list(one.outputs[0].token_ids) for one in answered]


def inputs(processor: Any, family: str, request: Request) -> Any:
    """The request as a model in transformers takes it."""
    found = {"text": [request.prompt(family)], "return_tensors": "pt"}
    if request.images:
        found["images"] = list(request.images) if family.startswith(("qwen", "llava")) else [list(request.images)]
    if request.videos:
        found["videos"] = list(request.videos)
        found |= {"do_sample_frames": False}
        if family.startswith("qwen"):
            found["video_metadata"] = [metadata(video) for video in request.videos]
    made = processor(**found)
    made.pop("token_type_ids", None)  # vLLM's attention for CPUs does not let Gemma's images see both ways
    return made


@torch.no_grad()
def reference(
    model: Any, processor: Any, family: str, request: Request, pruner: Any, new: int = NEW
) -> tuple[list[int], int, int]:
    """What a patched transformers model answers, its vision tokens, and those that entered the language model."""
    made = inputs(processor, family, request)
    options = {"max_new_tokens": new, "do_sample": False}
    if pruner is None or not (request.images or request.videos):
        out = model.generate(**made, **options)
        return out[0, made["input_ids"].shape[1] :].tolist(), made["input_ids"].shape[1], 0
    with mustdrop.patched(model, vision=pruner):
        out = model.generate(**made, **options)
        trace = mustdrop.trace(model)
    return out[0, made["input_ids"].shape[1] :].tolist(), int(trace.total[0]), int(trace.tokens[0][0])


@torch.no_grad()
def log_probabilities(
    model: Any, processor: Any, family: str, request: Request, pruner: Any, answer: Sequence[int]
) -> torch.Tensor:
    """(answer, vocabulary) in float32: what a patched transformers model expects at each token of a given answer."""
    made = inputs(processor, family, request)
    given = torch.tensor([list(answer)], dtype=torch.long)
    shape, filled = made["input_ids"].shape, {"input_ids": given, "attention_mask": torch.ones_like(given)}
    for name, value in list(made.items()):
        if isinstance(value, torch.Tensor) and value.shape == shape:  # of the tokens
            made[name] = torch.cat([value, filled.get(name, torch.zeros_like(given)).to(value)], 1)
        elif name.startswith("pixel_values"):
            made[name] = value.to(model.dtype)
    if pruner is None or not (request.images or request.videos):
        logits = model(**made).logits
    else:
        with mustdrop.patched(model, vision=pruner):
            logits = model(**made).logits
    return logits[0, -len(answer) - 1 : -1].float().log_softmax(-1)
