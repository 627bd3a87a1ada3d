"""What a user could install instead of mustdrop, one adapter per package: to add a peer, add it to `PEERS`.

A peer is imported only when the benchmark asks for it. Where it is not installed, does not import, or has no way to
prune a LLaVA, `Skipped` says why in words that the result file keeps.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.common import AFTER, BEFORE, VISION
from mustdrop.compat import cache_of

TEXT = BEFORE + AFTER
Apply = Callable[[Any, nn.Module, int], AbstractContextManager[None]]  # (imported module, model, vision tokens to keep)


class Skipped(Exception):  # noqa: N818 - a row that is left out, not an error
    """A peer that this run cannot measure, and why."""


@dataclass(frozen=True)
class Peer:
    """A package that drops tokens of the prompt or entries of the cache.

    Attributes:
        name: of its rows.
        package: the name that pip knows.
        module: what is imported.
        prunes: which entries may go.
        stage: where they go: "prefill" or "cache".
        apply: prunes the model while the context is open; None where there is nothing that could be called.
        remark: what a reader must know to compare the row, and whoever meets the cause of a skipped one.
    """

    name: str
    package: str
    module: str
    prunes: str
    stage: str
    apply: Apply | None = None
    remark: str = ""

    @property
    def version(self) -> str | None:
        """The installed version; None where there is none."""
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return None

    def load(self) -> Any:
        """Import it; `Skipped` with the cause where that does not work."""
        if self.version is None:
            raise Skipped(f"{self.package} is not installed")
        installed = f"{self.package} {self.version} is installed, but"
        try:
            module = importlib.import_module(self.module)
        except Exception as error:  # a peer may fail in any way; the run goes on and says how
            raise Skipped(f"{installed} `import {self.module}` fails: {cause(error)}") from error
        if self.apply is None:
            raise Skipped(f"{installed} this benchmark has no adapter for it")
        return module


def cause(error: Exception) -> str:
    """An exception in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


@contextmanager
def cache_positions(model: Any) -> Iterator[None]:
    """Hand `cache_position` to every attention module of the text model, as older versions of transformers do.

    kvpress reads it to tell the prompt from decode steps. It is made on the CPU, so that reading it never waits for a
    GPU: the bridge costs less than what it stands for.
    """

    def add(module: Any, arguments: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        past = cache_of(named).get_seq_length(module.layer_idx)
        return arguments, {**named, "cache_position": torch.arange(past, past + named["hidden_states"].shape[1])}

    layers = model.model.language_model.layers
    handles = [layer.self_attn.register_forward_pre_hook(add, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def attention(model: Any, implementation: str) -> Iterator[None]:
    """The model with another implementation of attention, then with its own again."""
    before = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def press(name: str, eager: bool = False) -> Apply:
    """The press of this name, with as many cache entries as mustdrop's cache stage leaves: all text and `keep`."""

    @contextmanager
    def apply(kvpress: Any, model: Any, keep: int) -> Iterator[None]:
        whole = TEXT + VISION
        logging.getLogger("kvpress").setLevel(logging.ERROR)  # else a warning per run: no LLaVA is on its list
        made = getattr(kvpress, name)(compression_ratio=1 - (TEXT + keep + 0.5) / whole)  # it rounds down
        try:
            with cache_positions(model), attention(model, "eager") if eager else nullcontext(), made(model):
                yield
        finally:
            for layer in model.model.language_model.layers:  # kvpress leaves a submodule behind in each
                layer.self_attn._modules.pop("rotary_emb", None)

    return apply


@contextmanager
def sparsevlm_hooks(sparsevlm: Any, model: Any, keep: int) -> Iterator[None]:
    """The hooks of the package's quick start, which ask for eager attention."""
    with attention(model, "eager"):
        state = sparsevlm.apply_sparsevlm(model, n_vis=VISION, min_keep=keep)
        try:
            yield
        finally:
            sparsevlm.remove_hooks(state)


@contextmanager
def adaptive_cache(adaptivekv: Any, model: Any, keep: int) -> Iterator[None]:
    """Its cache in every `generate`, evicting to the budget and storing whole numbers, since bits are not compared."""
    _, cache = adaptivekv.apply_adaptive_kv(
        model, enable_token_eviction=True, max_cache_tokens=TEXT + keep, enable_quantization=False
    )
    model.generate = functools.partial(model.generate, past_key_values=cache)
    try:
        yield
    finally:
        del model.generate


@contextmanager
def proactive_cache(package: Any, model: Any, keep: int) -> Iterator[None]:
    """Its `generate` in place of the model's, without prototypes: the first and the last entries stay."""
    package.ProactiveCache.apply(model, budget=TEXT + keep)
    try:
        yield
    finally:
        package.ProactiveCache.remove(model)
        vars(model).pop("generate", None)


BRIDGE = (
    "kvpress 0.5.5 reads `cache_position`, which transformers 5.4 and later do not pass: the benchmark hands it in. It "
    "requires transformers < 5.3, so that pip installs it beside mustdrop only with --no-deps"
)


def kvpress(name: str, remark: str = "", eager: bool = False) -> Peer:
    """A peer of kvpress."""
    remark = f"{BRIDGE}. {remark}" if remark else BRIDGE
    return Peer(
        f"kvpress {name}", "kvpress", "kvpress", "text and vision, per head", "cache", press(name, eager), remark
    )


PEERS = (
    kvpress("SnapKVPress"),
    kvpress("ObservedAttentionPress", "It needs eager attention, which is part of its time", eager=True),
    kvpress("ExpectedAttentionPress"),
    kvpress("KnormPress"),
    Peer(
        "adaptivekv",
        "adaptivekv",
        "adaptivekv",
        "text and vision",
        "cache",
        adaptive_cache,
        remark="it takes text models of seven families",
    ),
    Peer(
        "proactive-cache",
        "proactive-cache",
        "proactive_cache",
        "text and vision",
        "cache",
        proactive_cache,
        remark="its prefill gets the token ids and not the picture",
    ),
    Peer(
        "angelslim token compressor",
        "angelslim",
        "angelslim.compressor.token_compressor.adapter",
        "vision",
        "prefill",
        remark="its repository has the token compressor; the wheel of 0.5.0 lacks it, and other modules it imports",
    ),
    Peer(
        "sparsevlm",
        "sparsevlm",
        "sparsevlm",
        "vision",
        "prefill",
        sparsevlm_hooks,
        remark="written for Qwen2-VL and Qwen2.5-VL; its hooks wait for decoder layers that return attention weights, "
        "as those of transformers 5 do not, and its generate function reads an attribute that a LLaVA lacks",
    ),
    Peer(
        "visionzip",
        "visionzip",
        "visionzip",
        "vision",
        "prefill",
        remark="the wheels on PyPI up to 0.1.3 hold a licence and a description, and no module",
    ),
)
