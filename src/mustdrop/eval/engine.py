"""The model under evaluation: loaded, patched, asked one batch at a time, and timed."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

import mustdrop
from mustdrop import clock
from mustdrop.adapters import find as find_adapter
from mustdrop.errors import ConfigError, MustDropError, UnsupportedModelError
from mustdrop.eval.batches import Batch
from mustdrop.eval.journal import digest
from mustdrop.eval.processes import share
from mustdrop.fidelity import lengths_of
from mustdrop.loading import BUNDLED, load_model, pad_left, place
from mustdrop.registry import MethodLike
from mustdrop.trace import Trace

if TYPE_CHECKING:
    from mustdrop.method_time import TimeSpent


@dataclass
class Said:
    """What one call gave.

    Attributes:
        texts: answers, row by row.
        trace: what was kept.
        vision: seconds in the vision tower.
        first: seconds to the first token, vision tower included.
        decode: seconds of all further tokens.
        lengths: (rows,) tokens of each answer, with the one that ends it.
        prompts: (rows,) tokens of each prompt, before anything is dropped.
    """

    texts: list[str]
    trace: Trace
    vision: float
    first: float
    decode: float
    lengths: list[int]
    prompts: list[int]

    @property
    def steps(self) -> int:
        """Tokens of the longest answer."""
        return max(self.lengths)


class Engine:
    """A patched model that answers batches.

    Args:
        name: hub id or folder; None is the bundled model.
        method: what `patch` takes.
        knobs: its settings.
        device: "auto", "cpu", "cuda", "cuda:1", ...
        dtype: "auto", "float32", "bfloat16" or "float16".
        attention: attention implementation; None leaves the choice to transformers.
        loaded: the model and its processor, unpatched, where they are loaded already (see `load`).
    """

    def __init__(
        self,
        name: str | None,
        method: MethodLike,
        knobs: dict[str, Any],
        device: str = "auto",
        dtype: str = "auto",
        attention: str | None = None,
        loaded: tuple[Any, Any] | None = None,
    ) -> None:
        self.name = BUNDLED if name is None else name
        self.device = device_of(device)
        self.model, self.processor = loaded or load(name, dtype, attention)
        self.model = self.model.to(self.device).eval()
        pad_left(self.processor)
        mustdrop.patch(self.model, method, **knobs)
        self.method = method
        self.times = StageTimes(self.model, self.device)

    def close(self) -> None:
        """Leave the model as it was before, for the next engine."""
        self.times.close()
        mustdrop.unpatch(self.model)

    def identity(self) -> dict[str, Any]:
        """What decides the answers: name, configuration, weights, dtype, attention."""
        return {
            "model": self.name,
            "model_config": self.config_hash(),
            "model_weights": _weights(self.model),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "attention": self.attention,
        }

    @property
    def attention(self) -> str:
        """Attention implementation of the text model."""
        return str(self.model.config.get_text_config()._attn_implementation or "eager")

    @property
    def media(self) -> tuple[str, ...]:
        """Kinds of media that the model takes: "image", "video" or both."""
        return tuple(modality.name for modality in find_adapter(self.model).modalities(self.model))

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return len(find_adapter(self.model).decoder_layers(self.model))

    def config_hash(self) -> str:
        """Hash of the configuration without what depends on the place and the library."""
        plain = self.model.config.to_dict()
        return digest(
            {key: value for key, value in plain.items() if key not in ("_name_or_path", "transformers_version")}
        )

    def ask(self, batch: Batch, limit: int) -> Said:
        """The greedy answers to a batch.

        Args:
            batch: with inputs.
            limit: tokens of an answer.

        Raises:
            ConfigError: the device ran out of memory.
        """
        inputs, options = self._inputs(batch), self._options(limit)
        self.times.start()
        output: Any = None
        short = ""
        try:
            with torch.inference_mode():
                output = self.model.generate(**inputs, generation_config=options)
        except torch.OutOfMemoryError as error:
            short = str(error).partition(". ")[0]
        finally:
            vision, first, whole = self.times.stop()
        if output is None:  # outside of `except`: the error would hold the tensors that took the memory
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            rows = len(batch.places)
            less = "give a smaller --batch-size" if rows > 1 else "it does not fit; less --keep or --dtype may help"
            raise ConfigError(f"out of memory with {rows} question{'s' if rows > 1 else ''}: {less} ({short}).")
        new = output[:, inputs["input_ids"].shape[1] :]
        lengths = lengths_of(new.cpu(), self.model).tolist()
        mask = inputs.get("attention_mask")
        prompts = [inputs["input_ids"].shape[1]] * len(new) if mask is None else mask.sum(1).tolist()
        texts = [text.strip() for text in self.processor.tokenizer.batch_decode(new, skip_special_tokens=True)]
        return Said(texts, mustdrop.trace(self.model), vision, first, whole - first, lengths, prompts)

    def method_time(self, batch: Batch) -> TimeSpent:
        """What the method took of the time to the first token of a batch.

        It is asked twice: the first call of a shape does for later ones what belongs to none of them.

        Args:
            batch: with inputs.
        """
        from mustdrop.method_time import timed  # here: most runs measure nothing

        inputs, options = self._inputs(batch), self._options(1)
        with torch.inference_mode():
            self.model.generate(**inputs, generation_config=options)
            with timed(self.model) as spent:
                self.model.generate(**inputs, generation_config=options)
        return spent

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        """The inputs of a batch on the device."""
        if batch.inputs is None:
            raise ConfigError("this batch has no inputs.")
        return {key: self._moved(value) for key, value in batch.inputs.items()}

    def _options(self, limit: int) -> Any:
        """Greedy decoding of at most `limit` tokens, whatever else the model's own configuration says."""
        options = copy.deepcopy(self.model.generation_config)
        options.update(do_sample=False, num_beams=1, max_new_tokens=limit, max_length=None, repetition_penalty=1.0)
        options.update(temperature=None, top_p=None, top_k=None, pad_token_id=self.processor.tokenizer.pad_token_id)
        return options

    def _moved(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(self.device, self.model.dtype if value.is_floating_point() else None)

    def peak_memory(self) -> int:
        """Most bytes in use so far: on the CUDA device, else of this process."""
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        try:
            import resource
        except ImportError:  # not a Unix
            return 0
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return int(peak) if os.uname().sysname == "Darwin" else int(peak) * 1024


class StageTimes:
    """Seconds in the vision tower, to the first token, and in all, of one call of `generate`."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self.device = device
        self.vision, self.first, self.began, self.entered = 0.0, 0.0, 0.0, 0.0
        adapter = find_adapter(model)
        towers: list[Any] = []
        for modality in adapter.modalities(model):
            try:
                module = adapter.tower(model, modality.name).module
            except UnsupportedModelError:  # its time is then part of the prefill's
                continue
            if not any(module is tower for tower in towers):
                towers.append(module)
        self.handles = [adapter.text(model).register_forward_hook(self._step)]
        for tower in towers:
            self.handles.append(tower.register_forward_pre_hook(self._enter))
            self.handles.append(tower.register_forward_hook(self._leave, always_call=True))

    def close(self) -> None:
        """Stop measuring."""
        for handle in self.handles:
            handle.remove()

    def start(self) -> None:
        """Begin a call."""
        self.vision, self.first = 0.0, 0.0
        self.began = clock.now(self.device)

    def stop(self) -> tuple[float, float, float]:
        """End a call: seconds of vision tower, to the first token, in all."""
        whole = clock.now(self.device) - self.began
        return self.vision, self.first or whole, whole

    def _enter(self, *_: Any) -> None:
        self.entered = clock.now(self.device)

    def _leave(self, *_: Any) -> None:
        self.vision += clock.now(self.device) - self.entered

    def _step(self, *_: Any) -> None:
        if not self.first:
            self.first = clock.now(self.device) - self.began


def device_of(wanted: str) -> torch.device:
    """The device of this process: of several on one machine, each has a GPU of its own.

    Raises:
        ConfigError: there is no such device here.
    """
    try:
        device = place(wanted)
        return place(f"cuda:{share().local}") if device == torch.device("cuda") else device
    except ConfigError as error:
        raise ConfigError(f"--{error}") from None


def load(name: str | None, dtype: str, attention: str | None) -> tuple[Any, Any]:
    """A model and its processor; None is the bundled one.

    Raises:
        ConfigError: it cannot be loaded.
    """
    source = BUNDLED if name is None else name
    try:
        return load_model(source, device="cpu", dtype=dtype, attention=attention)
    except MustDropError:
        raise
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"--model {source}: cannot be loaded ({error}).") from None


def _weights(model: Any) -> str:
    """A hash of the names, shapes and first elements of all weights: not proof of equality, but of most differences."""
    marks = [
        (name, tuple(weight.shape), weight.detach().flatten()[0].item())
        for name, weight in model.named_parameters()
        if weight.numel() and not weight.is_meta
    ]
    return digest(marks)
