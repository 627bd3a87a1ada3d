"""`model.generate` of a patched model: what pruning cannot do is refused before any work, and the call is bracketed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mustdrop import kv
from mustdrop.compat import TAKEN_BACK, by_name, cache_of, eager, static_cache
from mustdrop.errors import UnsupportedOptionError
from mustdrop.runtime import guards
from mustdrop.runtime.calls import PrepareWrapper
from mustdrop.runtime.ledger import now
from mustdrop.runtime.state import Call

if TYPE_CHECKING:
    from mustdrop.runtime.session import Runtime

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
        """Generate as before. Inside of another call of this model it is a call of its own."""
        calls, local = self.runtime.calls, self.runtime.local
        kwargs, depth = by_name(self.function, args, kwargs), len(local.aside)
        began, call = now(), None
        try:
            self._check(kwargs)
            call = local.begin(lambda: self._begin(kwargs))
            output = self.function(**kwargs)
        except BaseException as error:
            if call is not None:
                calls.finish(call, depth, error)
            elif not depth:
                self.runtime.ledger.note(began, error=error)
            raise
        calls.finish(call, depth)
        return output

    def _begin(self, kwargs: dict[str, Any]) -> Call:
        runtime, ids = self.runtime, self._prompt(kwargs)
        call = runtime.begin(ids, kwargs)
        call.generates, call.length = True, None if ids is None else ids.shape[1]
        prepare = getattr(runtime.model, "prepare_inputs_for_generation", None)
        call.loose = kwargs.get("custom_generate") is not None or not isinstance(prepare, PrepareWrapper)
        return call

    def _check(self, kwargs: dict[str, Any]) -> None:
        """Refuse what pruning cannot do, however it is asked for: by argument, or in either configuration."""
        configs = (kwargs.get("generation_config"), self.runtime.model.generation_config)

        def option(name: str) -> Any:
            if name in kwargs:
                return kwargs[name]
            for config in configs:
                value = getattr(config, name, None)
                if value is not None:
                    return value
            return None

        implementation = option("cache_implementation")
        if implementation == TAKEN_BACK and kwargs.get("cache_implementation") is None:
            implementation = None
        if option("use_cache") is not False:
            if implementation not in (None, "dynamic", "static"):
                raise UnsupportedOptionError(
                    f"cache_implementation={implementation!r} cannot be pruned; mustdrop refuses "
                    f"{kv.REFUSED_IMPLEMENTATIONS}. "
                    "Leave it out, or use 'dynamic' or 'static'."
                )
            if implementation == "static":
                kv.check(static_cache(self.runtime.text.config, 1), guards.no_static(self.runtime))
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
            guards.cache(self.runtime, cache_of(kwargs))

    @staticmethod
    def _prompt(kwargs: dict[str, Any]) -> Tensor | None:
        """Ids of the part of the prompt that the cache does not hold yet."""
        given: Tensor | None = kwargs.get("input_ids")
        ids: Tensor | None = kwargs.get("inputs") if given is None else given
        cache, mask = cache_of(kwargs), kwargs.get("attention_mask")
        past = int(cache.get_seq_length()) if cache is not None else 0
        if ids is not None and past and ids.shape[1] > past and (mask is None or mask.shape[1] == ids.shape[1]):
            ids = ids[:, past:]
        return ids
