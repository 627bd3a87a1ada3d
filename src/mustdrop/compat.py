"""What differs between transformers versions. The only file that may look at a version.

Supported: transformers >= 5.4, where `cache_position` is gone, a cache layer owns its length and `generate` carries the
positions. Up to 5.17, beams over rows with different image counts are mixed up by transformers itself. From 5.24 on the
argument `past_key_values` is called `cache`, and models rename the old name for whoever still uses it.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers.cache_utils import DynamicSlidingWindowLayer

from mustdrop.errors import ConfigError, UnsupportedOptionError

MINIMUM_TRANSFORMERS = "5.4"
TRANSFORMERS = Version(transformers.__version__)
_RECORDS = hasattr(DynamicSlidingWindowLayer, "activate_past_recording")


class _NoLayer:
    """Stands in for a cache layer that this release of transformers does not have; nothing is one."""


#: Cache layer of linear attention and short convolutions.
LinearAttentionLayer: Any = getattr(transformers.cache_utils, "LinearAttentionLayer", _NoLayer)

Attention = Callable[..., Any]
F = TypeVar("F", bound=Callable[..., Any])


def require_supported_transformers() -> None:
    """Raise `UnsupportedOptionError` on a transformers release older than the minimum."""
    if Version(MINIMUM_TRANSFORMERS) > TRANSFORMERS:
        raise UnsupportedOptionError(
            f"mustdrop needs transformers >= {MINIMUM_TRANSFORMERS}, found "
            f"{transformers.__version__}: pip install -U transformers."
        )


def older_than(version: str) -> bool:
    """Whether the installed transformers is older than `version`."""
    return Version(version) > TRANSFORMERS


def attention_registry() -> Any:
    """Transformers' table of attention functions by name."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS


def attention_function(module: nn.Module, implementation: str | None) -> Attention:
    """The function that `module` would call under `implementation`; "eager" lives in the module's own file."""
    if implementation not in (None, "eager"):
        return attention_registry()[implementation]  # type: ignore[no-any-return]
    for kind in type(module).__mro__:
        function = getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None)
        if function is not None:
            return function  # type: ignore[no-any-return]
    raise UnsupportedOptionError(
        f"{type(module).__name__} has no eager attention function to score with: use attn_implementation='sdpa'."
    )


def dynamic_cache(config: Any) -> Any:
    """An empty growing cache for a text model."""
    from transformers import DynamicCache

    return DynamicCache(config=config)


#: A `cache_implementation` that files of older models ask for: transformers leaves it out.
TAKEN_BACK = "hybrid"

CACHE_NAMES = ("past_key_values",) if older_than("5.24") else ("cache", "past_key_values")
_PAGED = (
    "PagedAttentionCache"  # of continuous batching, which takes texts alone: nothing is dropped, and it is left alone
)


def cache_of(kwargs: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a module, by its name of 5.24 or by the older one; None without one."""
    for name in CACHE_NAMES:
        cache = kwargs.get(name)
        if cache is not None:
            return None if name == "cache" and type(cache).__name__ == _PAGED else cache
    return None


def by_name(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of `function` (a bound method), all of them by name.

    Raises:
        TypeError: as the call itself would.
    """
    if not args:
        return kwargs
    signature = inspect.signature(function)  # of what a decorator wraps, not of the decorator
    try:
        named = dict(signature.bind_partial(*args, **kwargs).arguments)
    except TypeError as error:
        raise TypeError(f"{getattr(function, '__qualname__', function)}: {error}") from None
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            named |= named.pop(parameter.name, {})
    return named


def first_parameter(function: Callable[..., Any]) -> str:
    """Name of the first argument of a bound method; empty where it takes none."""
    return _first_parameter(getattr(function, "__func__", None) or function, hasattr(function, "__func__"))


@functools.lru_cache(maxsize=64)
def _first_parameter(function: Any, bound: bool) -> str:
    return next(iter([*inspect.signature(function).parameters][bound:]), "")


def give_cache(kwargs: dict[str, Any], cache: Any, name: str) -> None:
    """Hand `cache` over by the name that is there already, else by `name`."""
    names = [known for known in CACHE_NAMES if known in kwargs]
    kwargs[names[0] if names else name] = cache


def cache_name(module: nn.Module) -> str:
    """The name that the forward of `module` has for a cache. It is asked where nothing compiles."""
    kind: Any = type(module)
    return _cache_name(kind)


@functools.cache
def _cache_name(kind: Any) -> str:
    parameters = inspect.signature(kind.forward).parameters  # of what a decorator wraps, not of the decorator
    return next((name for name in CACHE_NAMES if name in parameters), "past_key_values")


def crop_length(tokens: int | Tensor, logical: int) -> int:
    """How many of `logical` tokens `crop(tokens)` removes; some versions count them in a tensor.

    Negative means "remove that many" everywhere. Positive was a target length before 5.20, and so was 0 in the versions
    whose sliding layers cannot record their past.

    Raises:
        ConfigError: a positive number in a version that takes none.
    """
    tokens = int(tokens)
    if tokens < 0 or (tokens == 0 and _RECORDS):
        return min(-tokens, logical)
    if not older_than("5.20"):
        raise ConfigError(
            f"crop({tokens}): a cache is cropped by a negative number, the tokens to remove. For the first {tokens} "
            f"tokens to stay, call crop({tokens} - cache.get_seq_length())."
        )
    return max(0, logical - tokens)


def records_past(layer: Any) -> bool:
    """Whether a layer of transformers keeps what has left its window until `crop`; older versions never do."""
    return bool(getattr(layer, "record_past", False))


@dataclass(frozen=True)
class Span:
    """What the tokens of one decoder layer see: their window, or the chunk that they lie in.

    Attributes:
        size: tokens of a window, the query included, or of a chunk.
        chunked: whether it is a chunk; the first one begins after the padding on the left.
    """

    size: int
    chunked: bool

    def reach(self, end: int, padding: Tensor | int = 0) -> Tensor | int:
        """First position that a token at `end` sees, () or (B, 1); later tokens see nothing before it either.

        Args:
            end: position of the token, logical.
            padding: (B, 1) long, tokens of padding on the left.
        """
        if self.chunked:
            return padding + (end - padding) // self.size * self.size
        return end - self.size + 1


def spans(config: Any, depth: int) -> list[Span | None]:
    """Per decoder layer of a text model, what its tokens see; None where they see everything before them."""
    layers = list(dynamic_cache(config).layers)[:depth]
    kinds = getattr(config, "layer_types", None) or []
    chunks = getattr(config, "attention_chunk_size", None) if not getattr(config, "sliding_window", None) else None
    found: list[Span | None] = [None] * depth
    for i, layer in enumerate(layers):
        if getattr(layer, "is_sliding", False):
            chunked = kinds[i] == "chunked_attention" if i < len(kinds) else chunks is not None
            found[i] = Span(int(layer.sliding_window), chunked)
    return found


def checkpoints_activations(module: nn.Module) -> bool:
    """Whether any part of `module` checkpoints now (the property that says so was renamed in 5.23)."""
    return any(part.training and getattr(part, "gradient_checkpointing", False) for part in module.modules())


_KEEP_OUT: list[Callable[[], None]] = []  # one for each function that was decorated before there was a compiler


def eager(function: F) -> F:
    """Keep `function` out of `torch.compile`: the shapes of its tensors depend on data, and it keeps state.

    Where nothing compiles it is called as it is: asking the compiler to look away takes longer than many a hook. The
    compiler (`torch._dynamo`, some 900 modules) is not imported before something compiles.
    """
    kept_out: list[Any] = []  # empty until there is a compiler to keep out

    def keep_out() -> None:
        kept_out.append(torch.compiler.disable(function))  # type: ignore[no-untyped-call]

    if "torch._dynamo" in sys.modules:
        keep_out()
    else:
        _KEEP_OUT.append(keep_out)

    @functools.wraps(function)
    def either(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            return function(*args, **kwargs)
        if not kept_out:
            _keep_all_out()
        return kept_out[0](*args, **kwargs)

    return cast(F, either)


def _keep_all_out() -> None:
    """All functions at once: this call breaks the graph, and only the first of them should pay for that."""
    for keep_out in _KEEP_OUT:
        keep_out()


def static_cache(config: Any, length: int) -> Any:
    """An empty cache of fixed size for a text model. Nothing is allocated."""
    from transformers import StaticCache

    return StaticCache(config=config, max_cache_len=length)


def fixed_address(tensor: Tensor) -> Tensor:
    """Mark a tensor that compiled code may read in place, as transformers marks the tensors of a static cache."""
    torch._dynamo.mark_static_address(tensor)
    return tensor
