"""`patch`, `unpatch`, `patched`, `trace`: the only way in and out of a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

from torch import nn

from mustdrop.adapters import find as find_adapter
from mustdrop.adapters.unsupported import inside, unwrapped
from mustdrop.budget import Keep
from mustdrop.errors import AmbiguousBudgetWarning, BudgetError, ConfigError, NotPatchedError, warn
from mustdrop.method import DEFAULT_METHOD, Method
from mustdrop.pruners import DecodeCachePruner, PrefillPruner, VisionStagePruner
from mustdrop.pruners.answers import forget
from mustdrop.registry import MethodLike, resolve
from mustdrop.runtime.core import Runtime
from mustdrop.runtime.plan import require_possible
from mustdrop.trace import Trace

M = TypeVar("M", bound=nn.Module)

_ATTRIBUTE = "_mustdrop"


def patch(
    model: M,
    method: MethodLike | None = None,
    *,
    keep: Keep | None = None,
    vision: VisionStagePruner | None = None,
    prefill: PrefillPruner | None = None,
    decode: DecodeCachePruner | None = None,
    **knobs: Any,
) -> M:
    """Make `model` drop vision tokens. Patching a patched model replaces what was there.

    Args:
        model: a Hugging Face vision-language model of a known family (`mustdrop.adapters()`), or a peft model around
            one: then the model inside is patched.
        method: a method by name (`mustdrop.list_methods()`), a `Recipe` class or object, or a `Method`. Default:
            "mustdrop", unless one of the three pruners is given.
        keep: equal-token budget: int (tokens) or share in (0, 1] of the prompt's vision tokens. It is the mean over the
            decoder layers of the vision tokens that a layer processes; never exceeded. Default one third.
        vision: what happens in the vision encoder.
        prefill: what happens between decoder layers.
        decode: what happens to the KV cache.
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
    chosen = _method(method, keep, vision, prefill, decode, knobs)
    _put_in(model, chosen)
    warn_of_one(chosen)
    return model


def unpatch(model: M) -> M:
    """Take mustdrop out of `model` again; it computes bit for bit what it did before.

    No-op on a model that is not patched.
    """
    runtime = _runtime(model)
    if runtime is not None:
        runtime.uninstall()
        object.__delattr__(runtime.model, _ATTRIBUTE)
    return model


@contextmanager
def patched(model: M, method: MethodLike | None = None, **settings: Any) -> Iterator[M]:
    """`patch` for the length of a `with` block; afterwards the model is as it was, also after an exception.

    A model that was already patched gets its former method back.

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
            _put_in(model, before.method)


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
            _put_in(model, before.method)


def trace(model: nn.Module) -> Trace:
    """What the last generate or forward of a patched model kept (of this thread, if it made one).

    Raises:
        NotPatchedError: the model is not patched, or has not run since.
    """
    runtime = _runtime(model)
    if runtime is None:
        raise NotPatchedError(f"this {type(model).__name__} is not patched: call mustdrop.patch(model) first.")
    found = runtime.local.record or runtime.last
    if found is None:
        raise NotPatchedError("the patched model has not run yet: call model.generate(...) or model(...) first.")
    return found


last_trace = trace


def _runtime(model: object) -> Runtime | None:
    """Of a model, or of the one that `torch.compile`, data parallel, a pipeline or the like has wrapped."""
    for thing in (model, *(inner for _, inner in unwrapped(model))):
        found = vars(inside(thing)).get(_ATTRIBUTE) if isinstance(thing, nn.Module) else None
        if found is not None:
            return cast(Runtime, found)
    return None


def _method(
    given: MethodLike | None,
    keep: Keep | None,
    vision: VisionStagePruner | None,
    prefill: PrefillPruner | None,
    decode: DecodeCachePruner | None,
    knobs: dict[str, Any],
) -> Method:
    sockets = {"vision": vision, "prefill": prefill, "decode": decode}
    composed = {name: value for name, value in sockets.items() if value is not None}
    if composed:
        extra = [name for name, value in {"a method": given, "keep": keep, **knobs}.items() if value is not None]
        if extra:
            raise ConfigError(
                f"patch takes either a method or a composition of pruners; got {', '.join(composed)} "
                f"and {', '.join(extra)}. Put settings into "
                "the pruners, e.g. prefill=PrefillPruner(keep=64)."
            )
        return Method(vision, prefill, decode)
    if keep is not None:
        knobs = {"keep": keep, **knobs}
    return resolve(DEFAULT_METHOD if given is None else given, **knobs)


def _put_in(model: nn.Module, chosen: Method) -> None:
    """Patch with a method that is known to be one."""
    inner = inside(model)
    runtime = Runtime(inner, find_adapter(inner), chosen)  # fails before the model is touched
    try:
        require_possible(chosen, runtime.depth, runtime.filters)
    except BudgetError as error:
        hint = (
            "" if chosen.name == DEFAULT_METHOD else f" Or name a method that also drops earlier: {DEFAULT_METHOD!r}."
        )
        raise BudgetError(f"{error}{hint}") from None
    for pruner in (chosen.vision, chosen.prefill, chosen.decode):
        forget(getattr(pruner, "score", None))
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
        budgets = [getattr(pruner, "keep", None) for pruner in (method.vision, method.prefill, method.decode)]
        if any(isinstance(keep, int) and keep == 1 for keep in budgets):
            warn(
                f"method {method.name!r} with keep=1 keeps one token: an int counts tokens. A float is a share, and "
                "keep=1.0 (100%) keeps all of them: write that if you meant it.",
                AmbiguousBudgetWarning,
            )
            return
