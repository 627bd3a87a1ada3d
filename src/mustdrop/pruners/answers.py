"""What scorers and rules answer, looked at before it is used: every question that the runtime asks them passes here.

Shapes are checked always. Numbers (finite, in range) are checked of what is not mustdrop's own: on a CPU always, on an
accelerator, where looking waits for the device, at the first answer of each kind that an object gives to a model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from mustdrop.errors import ConfigError

if TYPE_CHECKING:
    from mustdrop.pruners.cache_scorers import CacheScorer, Received
    from mustdrop.pruners.input import InputRule
    from mustdrop.pruners.text_scorers import Seen, TextScorer
    from mustdrop.pruners.vision_rules import Features, InnerRule, VisionRule
    from mustdrop.selection import Selection

Kind = Literal["float", "long", "bool"]

_looked: WeakValueDictionary[tuple[int, str], Any] = WeakValueDictionary()


def forget(owner: object) -> None:
    """Look at the numbers of a scorer or rule again: it comes to another model."""
    for key in [key for key in list(_looked) if key[0] == id(owner)]:
        _looked.pop(key, None)


# -- input stage ------------------------------------------------------------------------------------------------------


def cells(rule: InputRule, media: Sequence[Tensor]) -> list[Tensor]:
    """`InputRule.choose`: per medium (frames, rows, columns) bool, one cell of each at least.

    Raises:
        ConfigError: see `scores`.
    """
    got: object = rule.choose(media)
    if not isinstance(got, Sequence) or len(got) != len(media):
        came = f"{len(got)} of them" if isinstance(got, Sequence) else _shown(got)
        raise ConfigError(f"{_name(rule)}.choose: expected a tensor for each of {len(media)} media, got {came}.")
    made = [_tensor(rule, "choose", one, "bool", seen.shape[:3], None) for one, seen in zip(got, media, strict=True)]
    for one in made:
        _require(
            not one.numel() or bool(one.any()),
            f"{_name(rule)}.choose: at least one cell of each picture must enter the encoder, got one with none.",
        )
    return made


# -- prefill stage ----------------------------------------------------------------------------------------------------


def scores(scorer: TextScorer, seen: Seen) -> Tensor:
    """`TextScorer.score`: (B, n) float, finite on the vision tokens.

    Raises:
        ConfigError: it is something else; the message names the class, what came and what is expected.
    """
    got = _tensor(scorer, "score", scorer.score(seen), "float", seen.alive.shape, seen.alive.device)
    _finite(scorer, "score", got, seen.alive, seen.attention)
    return got


def stays(
    scorer: TextScorer, seen: Seen, count: Tensor, protected: Tensor | None = None, importance: Tensor | None = None
) -> Tensor:
    """`TextScorer.choose`: (B, n) bool, `count` vision tokens of each row (all, where there are fewer).

    Raises:
        ConfigError: see `scores`.
    """
    got = scorer.choose(seen, count, protected, importance)
    got = _tensor(scorer, "choose", got, "bool", seen.alive.shape, seen.alive.device)
    if _looks(scorer, "choose", got):
        wanted, kept = torch.minimum(count, seen.alive.sum(1)), (got & seen.alive).sum(1)
        _require(
            not bool((got & ~seen.alive).any()) and torch.equal(kept, wanted.to(kept)),
            f"{_name(scorer)}.choose: expected {wanted.tolist()} vision tokens per sample and nothing else, got "
            f"{got.sum(1).tolist()} rows, {kept.tolist()} of them vision tokens.",
        )
    return got


def raters(scorer: TextScorer, embeds: Tensor, vision: Tensor, text: Tensor) -> Tensor:
    """`TextScorer.raters`: (B, S) bool, some of the text.

    Raises:
        ConfigError: see `scores`.
    """
    got = _tensor(scorer, "raters", scorer.raters(embeds, vision, text), "bool", text.shape, text.device)
    if _looks(scorer, "raters", got):
        _require(
            not bool((got & ~text).any()),
            f"{_name(scorer)}.raters names tokens that are not among the text it was given.",
        )
    return got


# -- vision stage -----------------------------------------------------------------------------------------------------


def features(rule: VisionRule, seen: Features, count: int | None) -> Selection:
    """`VisionRule.choose`: a `Selection` of `count` different features of each view.

    Raises:
        ConfigError: see `scores`.
    """
    from mustdrop.selection import Selection

    b, n = seen.values.shape[:2]
    try:
        got: Any = rule.choose(seen, count)
    except ConfigError as error:
        raise ConfigError(f"{_name(rule)}.choose: {error}") from error
    if not isinstance(got, Selection):
        raise ConfigError(
            f"{_name(rule)}.choose returned {_shown(got)}, expected a Selection: Selection.best(score, count) for "
            f"scores (B, N), here {(b, n)}, or Selection(keep) for indices (B, count)."
        )
    if got.score is not None:
        _tensor(rule, "choose, score of Selection.best", got.score, "float", (b, n), None)
        _finite(rule, "choose, score of Selection.best", got.score, None, seen.values)
    keep: Any = got.keep
    m = int(keep.shape[1]) if isinstance(keep, Tensor) and keep.ndim == 2 else -1
    if count is not None and m not in (-1, count):
        raise ConfigError(f"{_name(rule)}.choose was asked for {count} of {n} features and returned {m}.")
    _tensor(rule, "choose, Selection.keep", keep, "long", (b, m if count is None else count), seen.values.device)
    if got.merge_into is not None:
        _tensor(rule, "choose, Selection.merge_into", got.merge_into, "long", (b, n), seen.values.device)
    if _looks(rule, "choose", keep):
        _indices(rule, got, n, m)
    if got.blend is None or _ours(rule):
        return got
    return replace(got, blend=_blending(rule, got.blend, m))


def module_scores(module: torch.nn.Module, got: Any, values: Tensor) -> Tensor:
    """What a module given as `importance=` answers: (B, N) float, finite.

    Raises:
        ConfigError: see `scores`.
    """
    score = _tensor(module, "forward, as importance=", got, "float", values.shape[:2], values.device)
    _finite(module, "forward, as importance=", score, None, values)
    return score


def _indices(rule: VisionRule, got: Selection, n: int, m: int) -> None:
    ordered = got.keep.sort(1).values
    _require(
        bool(((got.keep >= 0) & (got.keep < n)).all()) and not bool((ordered[:, 1:] == ordered[:, :-1]).any()),
        f"{_name(rule)}.choose, Selection.keep: expected features 0 to {n - 1}, each once, got {_some(got.keep)}.",
    )
    _require(
        got.merge_into is None or bool(((got.merge_into >= -1) & (got.merge_into < m)).all()),
        f"{_name(rule)}.choose, Selection.merge_into: expected columns 0 to {m - 1} of keep, or -1 where a feature "
        "is gone.",
    )


def _blending(rule: VisionRule, blend: Callable[[Tensor], Tensor], m: int) -> Callable[[Tensor], Tensor]:
    def checked(values: Tensor) -> Tensor:
        shape = (values.shape[0], m, values.shape[2])
        made = _tensor(rule, "choose, Selection.blend", blend(values), "float", shape, values.device)
        _finite(rule, "choose, Selection.blend", made, None, values)
        return made

    return checked


def amounts(rule: InnerRule, patches: int, target: int, layers: int) -> list[int]:
    """`InnerRule.amounts`: an int for each layer, fewer than the patches in all.

    Raises:
        ConfigError: see `scores`.
    """
    got: Any = rule.amounts(patches, target, layers)
    fits = isinstance(got, Sequence) and len(got) == layers
    fits = fits and all(isinstance(k, int) and k >= 0 for k in got) and sum(got) < max(patches, 1)
    _require(
        fits,
        f"{_name(rule)}.amounts: expected {layers} ints, one per layer, none below 0, together less than the {patches} "
        f"patches, got {got!r}.",
    )
    return list(got)


def slots(rule: InnerRule, keys: Tensor, number: int, protected: int) -> tuple[Tensor, int]:
    """`InnerRule.join`: (B, N) long slots, and how many there are.

    Raises:
        ConfigError: see `scores`.
    """
    got: Any = rule.join(keys, number, protected)
    if not isinstance(got, tuple) or len(got) != 2 or not isinstance(got[1], int):
        raise ConfigError(
            f"{_name(rule)}.join returned {_shown(got)}, expected a tuple: the slot of each token, (B, N) long, here "
            f"{(keys.shape[0], keys.shape[-2])}, and the number of slots, an int."
        )
    shape = (keys.shape[0], keys.shape[-2])
    slot, total = _tensor(rule, "join", got[0], "long", shape, keys.device), got[1]
    if _looks(rule, "join", slot):
        front = torch.arange(protected, dtype=torch.long, device=slot.device)
        fits = bool(((slot >= 0) & (slot < total)).all()) and bool((slot[:, :protected] == front).all())
        _require(
            fits and bool((slot[:, protected:] >= protected).all()),
            f"{_name(rule)}.join: expected slots 0 to {total - 1}, the first {protected} for the tokens at the front, "
            f"which nothing joins, got {_some(slot)}.",
        )
    return slot, total


def uneven_slots(
    rule: InnerRule, keys: Tensor, numbers: Tensor, lengths: Tensor, left: Sequence[int], protected: int
) -> Tensor | None:
    """`InnerRule.join_uneven`: (B, N) long slots, as many in each row as are `left`; None if the rule cannot.

    Raises:
        ConfigError: see `scores`.
    """
    got = rule.join_uneven(keys, numbers, lengths, protected)
    if got is None:
        return None
    slot = _tensor(rule, "join_uneven", got, "long", (keys.shape[0], keys.shape[-2]), keys.device)
    if _looks(rule, "join_uneven", slot):
        most = torch.tensor(left, dtype=torch.long, device=slot.device)[:, None]
        real = torch.arange(slot.shape[1], dtype=torch.long, device=slot.device) < lengths[:, None]
        _require(
            bool((torch.where(real, (slot >= 0) & (slot < most), slot == -1)).all()),
            f"{_name(rule)}.join_uneven: expected slots below {list(left)}, and -1 on padding, got {_some(slot)}.",
        )
    return slot


# -- decode stage -----------------------------------------------------------------------------------------------------


def rows(scorer: CacheScorer, text: Tensor, prompt: Tensor) -> Tensor:
    """`CacheScorer.rows`: (B, n) bool, some rows of the prompt.

    Raises:
        ConfigError: see `scores`.
    """
    got = _tensor(scorer, "rows", scorer.rows(text, prompt), "bool", prompt.shape, prompt.device)
    if _looks(scorer, "rows", got):
        _require(not bool((got & ~prompt).any()), f"{_name(scorer)}.rows names rows that are padding.")
    return got


def gathered(scorer: CacheScorer, attention: Tensor, own: Tensor) -> Tensor:
    """`CacheScorer.gather`: (B, n) float.

    Raises:
        ConfigError: see `scores`.
    """
    shape = (attention.shape[0], attention.shape[2])
    got = _tensor(scorer, "gather", scorer.gather(attention, own), "float", shape, attention.device)
    _finite(scorer, "gather", got, None, attention)
    return got


def added(scorer: CacheScorer, known: Received, step: Received) -> Received:
    """`CacheScorer.add`: a `Received` of the same entries.

    Raises:
        ConfigError: see `scores`.
    """
    got: Any = scorer.add(known, step)
    if not isinstance(got, type(step)):
        raise ConfigError(f"{_name(scorer)}.add returned {_shown(got)}, expected a Received(given, queries).")
    for what in ("given", "queries"):
        part = _tensor(
            scorer, f"add, Received.{what}", getattr(got, what), "float", step.given.shape, step.given.device
        )
        _finite(scorer, f"add, Received.{what}", part, None, step.given)
    return got


def entries(scorer: CacheScorer, read: Received, vision: Tensor) -> Tensor:
    """`CacheScorer.score`: (B, n) float, finite on the vision entries.

    Raises:
        ConfigError: see `scores`.
    """
    got = _tensor(scorer, "score", scorer.score(read, vision), "float", vision.shape, vision.device)
    _finite(scorer, "score", got, vision, read.given)
    return got


def budgets(scorer: CacheScorer, mass: Tensor, count: Tensor, entries: Tensor) -> Tensor:
    """`CacheScorer.budgets`: (L, B) long, no more than there is, and no more than `count` in the mean over the layers.

    Raises:
        ConfigError: see `scores`.
    """
    got = _tensor(scorer, "budgets", scorer.budgets(mass, count, entries), "long", entries.shape, entries.device)
    if _looks(scorer, "budgets", got):
        fits = bool(((got >= 0) & (got <= entries)).all()) and bool((got.sum(0) <= count * len(got)).all())
        _require(
            fits,
            f"{_name(scorer)}.budgets: expected 0 to {entries.amax(0).tolist()} entries per layer, in the mean "
            f"{count.tolist()} at most; got {_some(got)}.",
        )
    return got


# -- what is the matter -----------------------------------------------------------------------------------------------


def _tensor(
    owner: object, what: str, got: Any, kind: Kind, shape: Sequence[int], device: torch.device | None
) -> Tensor:
    fits = isinstance(got, Tensor) and got.shape == tuple(shape) and (device is None or got.device == device)
    if not fits or not _is(kind, got.dtype):
        where = "" if device is None else f" on {device}"
        raise ConfigError(
            f"{_name(owner)}.{what}: expected a {kind} tensor of shape {tuple(shape)}{where}, got {_shown(got)}."
        )
    tensor: Tensor = got
    return tensor


def _is(kind: Kind, dtype: torch.dtype) -> bool:
    return dtype.is_floating_point if kind == "float" else dtype == {"long": torch.long, "bool": torch.bool}[kind]


def _finite(owner: object, what: str, got: Tensor, where: Tensor | None, given: Tensor) -> None:
    if not _looks(owner, what, got):
        return
    wrong = ~got.isfinite() if where is None else ~got.isfinite() & where
    if not bool(wrong.any()):
        return
    cause = "" if bool(given.isfinite().all()) else " So are numbers that it was given: the model's own overflow."
    raise ConfigError(
        f"{_name(owner)}.{what}: expected finite numbers, and {int(wrong.sum())} of {got.numel()} are not, the first "
        f"is {float(got[wrong][0])}.{cause}"
    )


def _looks(owner: object, what: str, got: Tensor) -> bool:
    """Whether the numbers are looked at."""
    if _ours(owner) or torch.compiler.is_compiling():
        return False
    if got.device.type == "cpu":
        return True
    first = (id(owner), what) not in _looked
    _looked[id(owner), what] = owner
    return first


def _ours(owner: object) -> bool:
    return type(owner).__module__.startswith("mustdrop.")


def _require(fits: bool, message: str) -> None:
    if not fits:
        raise ConfigError(message)


def _name(owner: object) -> str:
    return type(owner).__name__


def _shown(got: Any) -> str:
    if isinstance(got, Tensor):
        return f"a tensor of shape {tuple(got.shape)}, {str(got.dtype).removeprefix('torch.')} on {got.device}"
    return f"{got!r} ({type(got).__name__})" if isinstance(got, int | float | str | None) else f"a {type(got).__name__}"


def _some(got: Tensor) -> str:
    values = got.flatten()[:8].tolist()
    return f"{values}{'...' if got.numel() > len(values) else ''}"
