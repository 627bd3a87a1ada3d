"""`model.generate` of a patched model: what pruning cannot do is refused before any work, and the call is bracketed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mustdrop import kv
from mustdrop.compat import cache_of, eager, static_cache
from mustdrop.errors import UnsupportedOptionError
from mustdrop.runtime import checks

if TYPE_CHECKING:
    from mustdrop.runtime.core import Runtime

_READING_LAYERS = {"dola_layers": "DoLa", "penalty_alpha": "contrastive search"}
_DRAFTING = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")


class GenerateWrapper:
    """Stands in for `model.generate`.

    Refuses what pruning cannot do before any work, and brackets the call for the trace.
    """

    def __init__(self, runtime: Runtime, function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function)
        self.runtime, self.function = runtime, function

    @eager
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as before."""
        runtime = self.runtime
        if runtime.local.call is not None:  # generate inside a call of this model, e.g. by an assisted decoder
            return self.function(*args, **kwargs)
        self._check(args, kwargs)
        ids = self._prompt(args, kwargs)
        call = runtime.begin(self, ids, kwargs)
        call.length = None if ids is None else ids.shape[1]
        failed = True
        try:
            output = self.function(*args, **kwargs)
            failed = False
        finally:
            runtime.end(self, failed)
        return output

    def _check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        config = kwargs.get("generation_config") or self.runtime.model.generation_config

        def option(name: str) -> Any:
            return kwargs[name] if name in kwargs else getattr(config, name, None)

        implementation = option("cache_implementation")
        if option("use_cache") is not False:
            if implementation not in (None, "dynamic", "static"):
                raise UnsupportedOptionError(
                    f"cache_implementation={implementation!r} cannot be pruned; mustdrop refuses "
                    f"{kv.REFUSED_IMPLEMENTATIONS}. "
                    "Leave it out, or use 'dynamic' or 'static'."
                )
            if implementation == "static":
                kv.check(static_cache(self.runtime.text.config, 1), checks.no_static(self.runtime))
        if option("prefill_chunk_size"):
            raise UnsupportedOptionError(
                "prefill_chunk_size cuts the prompt before the text has been seen, so vision tokens "
                "cannot be scored: leave it out."
            )
        for name, what in _READING_LAYERS.items():
            if option(name):
                raise UnsupportedOptionError(
                    f"{name}={option(name)!r} asks for {what}, which reads the hidden states of single layers: in a "
                    "patched model these have the length of their layer. Leave it out (greedy, sampling, beam search "
                    "and assisted decoding work), or unpatch the model for this call."
                )
        decode = self.runtime.method.decode
        drafts = [name for name in _DRAFTING if option(name)]
        if drafts and decode is not None and decode.reads_steps:
            raise UnsupportedOptionError(
                f"{drafts[0]} drafts tokens that may be taken back, and their attention would decide what leaves "
                "the cache. Leave it out, or use a method without decode_keep (DecodeCachePruner.keep=None), or one "
                "whose entries leave at the end of the prefill (DecodeCachePruner.after_prefill)."
            )
        if cache_of(kwargs) is not None:
            checks.cache(self.runtime, cache_of(kwargs))

    def _prompt(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """Ids of the part of the prompt that the cache does not hold yet."""
        ids: Tensor | None = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        cache, mask = cache_of(kwargs), kwargs.get("attention_mask")
        past = int(cache.get_seq_length()) if cache is not None else 0
        if ids is not None and past and ids.shape[1] > past and (mask is None or mask.shape[1] == ids.shape[1]):
            ids = ids[:, past:]
        return ids
