"""`patch`, `unpatch`, `patched`, `trace`: the only way in and out of a model."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

from torch import nn

from mustdrop import stages
from mustdrop.adapters import find as find_adapter
from mustdrop.adapters.unsupported import inside, unwrapped
from mustdrop.budget import Keep, plain
from mustdrop.errors import AmbiguousBudgetWarning, BudgetError, ConfigError, NotPatchedError, warn
from mustdrop.method import DEFAULT_METHOD, Method
from mustdrop.pruners import DecodeCachePruner, InputPruner, PrefillPruner, VisionStagePruner
from mustdrop.pruners.answers import forget
from mustdrop.registry import MethodLike, resolve
from mustdrop.runtime.ledger import Ledger
from mustdrop.runtime.plan import require_possible
from mustdrop.runtime.session import Runtime

if TYPE_CHECKING:
    from mustdrop.trace import Trace

M = TypeVar("M", bound=nn.Module)

_ATTRIBUTE = "_mustdrop"
#: What models that were unpatched have left: the models themselves keep nothing.
_left: weakref.WeakKeyDictionary[nn.Module, Ledger] = weakref.WeakKeyDictionary()


def patch(
    model: M,
    method: MethodLike | None = None,
    *,
    keep: Keep | None = None,
    vision: VisionStagePruner | None = None,
    prefill: PrefillPruner | None = None,
    decode: DecodeCachePruner | None = None,
    input: InputPruner | None = None,
    strict: bool | None = None,
    **knobs: Any,
) -> M:
    """Make `model` drop vision tokens. Patching a patched model replaces what was there.

    Args:
        model: a Hugging Face vision-language model of a known family (`mustdrop.adapters()`), or a peft model around
            one: then the model inside is patched.
        method: a method by name (`mustdrop.list_methods()`), a `Recipe` class or object, or a `Method`. Default:
            "mustdrop", unless one of the four pruners is given.
        keep: average retained tokens per layer: int (tokens) or share in (0, 1] of the prompt's vision tokens. It is
            the mean over the decoder layers of the vision tokens that a layer processes; never exceeded. Default one
            third.
        vision: what happens in the vision encoder.
        prefill: what happens between decoder layers.
        decode: what happens to the KV cache.
        input: what happens before the vision encoder.
        strict: whether a picture that is too small for a budget or for a window is an error. By default such a picture
            keeps what there is, at least one token, and is not merged; a `Method` may say otherwise.
        **knobs: further settings of the named method.

    Returns:
        The same model.

    Raises:
        UnsupportedModelError: no adapter for the model, or it lacks what a stage needs.
        UnknownMethodError, UnknownKnobError: names that do not exist; the message lists the known ones.
        BudgetError, ConfigError: values out of range, layers that the model does not have, settings that contradict, a
            share that no prompt can meet on this model.
        UnsupportedOptionError: an attention backend that cannot be pruned.
    """
    chosen = _method(method, keep, Sockets(vision, prefill, decode, input), knobs)
    if strict is not None:
        if not isinstance(plain(strict), bool):
            raise ConfigError(f"strict must be True or False, got {strict!r}.")
        chosen = replace(chosen, strict=bool(strict))
    _put_in(model, chosen)
    warn_of_one(chosen)
    return model


def unpatch(model: M) -> M:
    """Take mustdrop out of `model` again; it computes bit for bit what it did before. Its last trace can still be read.

    No-op on a model that is not patched.
    """
    runtime = _runtime(model)
    if runtime is not None:
        runtime.uninstall()
        if runtime.engine is not None:
            runtime.engine.release()
        object.__delattr__(runtime.model, _ATTRIBUTE)
        _left[runtime.model] = runtime.ledger
    return model


@contextmanager
def patched(model: M, method: MethodLike | None = None, **settings: Any) -> Iterator[M]:
    """`patch` for the length of a `with` block; afterwards the model is as it was, also after an exception.

    A model that was already patched gets its former method back. The trace of the last call in the block stays.

    Args:
        model: see `patch`.
        method: see `patch`.
        **settings: see `patch`.
    """
    before = _runtime(model)
    patch(model, method, **settings)
    try:
        yield model
    finally:
        unpatch(model)
        if before is not None:
            _again(model, before, _left.pop(before.model, before.ledger))


@contextmanager
def unpatched(model: M) -> Iterator[M]:
    """The model without mustdrop for the length of a `with` block; afterwards it is patched as before, if it was.

    Args:
        model: patched or not.
    """
    before = _runtime(model)
    unpatch(model)
    try:
        yield model
    finally:
        if before is not None:
            _again(model, before, before.ledger)


def trace(model: nn.Module) -> Trace:
    """What the last generate or forward of a patched model kept, also after it was unpatched.

    A call inside another one (of a logits processor, say) leaves no trace. Of calls in several threads it is the last
    one of this thread, unless one of another thread began and ended after it.

    Raises:
        NotPatchedError: the model was never patched, or has not run since, or its last call failed.
    """
    runtime = _runtime(model)
    if runtime is not None:
        runtime.calls.sweep()
    ledger = _former(model) if runtime is None else runtime.ledger
    if ledger is None or (runtime is None and ledger.outcome() is None):
        raise NotPatchedError(f"this {type(model).__name__} is not patched: call mustdrop.patch(model) first.")
    return ledger.trace()


def _again(model: nn.Module, before: Runtime, ledger: Ledger) -> None:
    """Patch as before, with what a block inside has left, or else with what there was before it."""
    _put_in(model, before.method)
    runtime = _runtime(model)
    assert runtime is not None  # it has just been patched
    runtime.engine = None if before.engine is None else before.engine.again(runtime)
    runtime.ledger = before.ledger if ledger.newest is None else ledger


last_trace = trace


def _runtime(model: object) -> Runtime | None:
    """Of a model, or of the one that `torch.compile`, data parallel, a pipeline or the like has wrapped."""
    for thing in (model, *(inner for _, inner in unwrapped(model))):
        found = vars(inside(thing)).get(_ATTRIBUTE) if isinstance(thing, nn.Module) else None
        if found is not None:
            return cast(Runtime, found)
    return None


def _former(model: object) -> Ledger | None:
    """What became of the calls of a model that was patched, or of one that is wrapped in the same way."""
    for thing in (model, *(inner for _, inner in unwrapped(model))):
        found = _left.get(inside(thing)) if isinstance(thing, nn.Module) else None
        if found is not None:
            return found
    return None


class Sockets(NamedTuple):
    """The pruners of a composition."""

    vision: VisionStagePruner | None
    prefill: PrefillPruner | None
    decode: DecodeCachePruner | None
    input: InputPruner | None


def _method(
    given: MethodLike | None,
    keep: Keep | None,
    sockets: Sockets,
    knobs: dict[str, Any],
) -> Method:
    composed = {name: value for name, value in sockets._asdict().items() if value is not None}
    if composed:
        extra = [name for name, value in {"a method": given, "keep": keep, **knobs}.items() if value is not None]
        if extra:
            raise ConfigError(
                f"patch takes either a method or a composition of pruners; got {', '.join(composed)} "
                f"and {', '.join(extra)}. Put settings into "
                "the pruners, e.g. prefill=PrefillPruner(keep=64)."
            )
        return Method(**composed)
    if keep is not None:
        knobs = {"keep": keep, **knobs}
    return resolve(DEFAULT_METHOD if given is None else given, **knobs)


def _put_in(model: nn.Module, chosen: Method) -> None:
    """Patch with a method that is known to be one."""
    inner = inside(model)
    adapter = find_adapter(inner)
    stages.require(chosen, adapter)
    if chosen.vision is not None:
        chosen = replace(chosen, vision=chosen.vision.bound(inner))
    runtime = Runtime(inner, adapter, chosen)  # fails before the model is touched
    try:
        require_possible(chosen, runtime.depth, runtime.filters)
    except BudgetError as error:
        hint = (
            "" if chosen.name == DEFAULT_METHOD else f" Or name a method that also drops earlier: {DEFAULT_METHOD!r}."
        )
        raise BudgetError(f"{error}{hint}") from None
    for pruner in (chosen.vision, chosen.prefill, chosen.decode):
        score = getattr(pruner, "score", None)
        for asked in (score, getattr(getattr(score, "importance", None), "module", None)):
            forget(asked)
    unpatch(model)
    try:
        runtime.install()
    except BaseException:
        runtime.uninstall()
        raise
    object.__setattr__(inner, _ATTRIBUTE, runtime)


def warn_of_one(*methods: Method) -> None:
    """Say once that keep=1 is one token: it looks like keep=1.0, and the two are the least and the most."""
    for method in methods:
        for what, pruner in (("keep", method.vision), ("keep", method.prefill), (_decode_knob(method), method.decode)):
            keep = getattr(pruner, "keep", None)
            if isinstance(keep, int) and keep == 1:
                warn(
                    f"method {method.name!r} with {what}=1 keeps one token: an int counts tokens. A float is a share, "
                    f"and {what}=1.0 (100%) keeps all of them: write that if you meant it.",
                    AmbiguousBudgetWarning,
                )
                return


def _decode_knob(method: Method) -> str:
    """What the budget of the cache is called: where tokens are dropped earlier, `keep` is theirs."""
    return "keep" if method.prefill is None and not method.marks else "decode_keep"
