"""What `keep` means: the equal-token budget, and how it is spread over the filter layers.

`keep` is the mean over the decoder layers of the vision tokens that a layer processes (a filter layer counts its
input, because that is what it computes on). It is the "192 / 128 / 64 tokens" of the papers' tables, never exceeded.
METHODS: MustDrop arXiv 2411.10803; the geometric schedule is ours, see docs/fidelity.md.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from mustdrop.errors import BudgetError, ConfigError

Keep = int | float

_EPS = 1e-6


def plain(value: Any) -> Any:
    """A scalar of numpy or torch as the Python number that it holds, also inside tuples and lists; else `value`."""
    if type(value) in (list, tuple):
        return type(value)(map(plain, value))
    item = getattr(value, "item", None)
    return item() if callable(item) and getattr(value, "shape", None) == () else value


def check_keep(keep: Keep, what: str = "keep") -> Keep:
    """Reject a `keep` that can never be right, whatever the image.

    Args:
        keep: int (tokens) or float in (0, 1] (share of the prompt's vision tokens); scalars of numpy and torch count as
            what they hold.
        what: name used in the message.

    Returns:
        The budget as a Python number.

    Raises:
        BudgetError: not a number, not positive, or a float above 1.
    """
    keep = plain(keep)
    if isinstance(keep, bool) or not isinstance(keep, int | float):
        raise BudgetError(
            f"{what} must be a number of tokens (int) or a share in (0, 1] (float), got {keep!r}.{_typed(keep, what)}"
        )
    if isinstance(keep, float) and not 0.0 < keep <= 1.0:
        raise BudgetError(
            f"{what}={keep} is a share and must lie in (0, 1]. Write an int for a number of tokens, e.g. {what}=64."
        )
    if keep <= 0:
        raise BudgetError(f"{what}={keep} must be positive: the smallest possible budget is 1 token.")
    return keep


def _typed(keep: object, what: str) -> str:
    """What to write in place of a text that says a number, as a command line takes it."""
    try:
        return f" Without quotes: {what}={check_keep(parse_keep(keep), what)!r}." if isinstance(keep, str) else ""
    except BudgetError:
        return ""


def tokens_of(keep: Keep, total: int, what: str = "keep", strict: bool = True) -> float:
    """`keep` in tokens for a prompt with `total` vision tokens.

    Args:
        keep: int (tokens) or float (share).
        total: vision tokens of the prompt, at least 1.
        what: name used in the message.
        strict: whether a budget beyond the prompt is an error. If not, all tokens stay where there are fewer than
            `keep`, and one where a share is less than that.

    Raises:
        BudgetError: with `strict`, more tokens than the prompt has, or less than one.
    """
    keep = check_keep(keep, what)
    tokens = keep * total if isinstance(keep, float) else float(keep)
    if not strict:
        return min(max(tokens, 1.0), float(total))
    if tokens > total + _EPS:
        raise BudgetError(
            f"{what}={keep} is more than the {total} vision tokens of this prompt. Use "
            f"{what}<={total}, or a share in (0, 1]."
        )
    if tokens < 1 - _EPS:
        raise BudgetError(
            f"{what}={keep} of {total} vision tokens is {tokens:.3g}, less than one token. "
            f"The smallest possible {what} here is {1 / total:.4g} (or the int 1)."
        )
    return tokens


def scaled_layers(reference: Sequence[int], depth: int, n_layers: int) -> tuple[int, ...]:
    """Layer indices published for a model of `depth` layers, carried over to one of `n_layers`.

    Each index x becomes floor(n_layers * x / depth + 1/2), kept within [1, n_layers - 2] so that a filter neither reads
    the first layer nor follows the last; duplicates collapse. `n_layers == depth` gives the published indices.
    """
    high = max(n_layers - 2, 0)
    low = min(1, high)
    return tuple(sorted({min(max(math.floor(n_layers * x / depth + 0.5), low), high) for x in reference}))


def spans(n_layers: int, layers: Sequence[int]) -> tuple[int, ...]:
    """How many decoder layers run before the first filter, between filters, and after the last.

    A filter at layer l scores with layer l and takes effect after it, so layer l counts as "before".

    Raises:
        ConfigError: a layer outside the model, or layers that are not strictly ascending.
    """
    check_layers(layers, n_layers)
    edges = [0, *[layer + 1 for layer in layers], n_layers]
    return tuple(b - a for a, b in itertools.pairwise(edges))


def check_layers(layers: Sequence[int], n_layers: int, what: str = "layers") -> None:
    """Raise `ConfigError` unless `layers` are ascending, distinct and leave at least one layer to run after them."""
    bad = [layer for layer in layers if not 0 <= layer <= n_layers - 2]
    if bad:
        raise ConfigError(
            f"{what}={tuple(layers)}: {bad} outside this model. It has {n_layers} decoder layers; a filter can follow "
            f"layers 0 to {n_layers - 2}."
        )
    if list(layers) != sorted(set(layers)):
        raise ConfigError(
            f"{what}={tuple(layers)} must be ascending without repeats, e.g. {tuple(sorted(set(layers)))}."
        )


def smallest(total: int, n_layers: int, layers: Sequence[int]) -> int:
    """The smallest `keep` in tokens that filters after `layers` can reach: one survivor from the first filter on."""
    before = spans(n_layers, layers)[0]
    return max(1, math.ceil((before * total + (n_layers - before)) / n_layers - _EPS))


def schedule(total: int, n_layers: int, layers: Sequence[int], keep: Keep) -> tuple[int, ...]:
    """Survivors after each filter so that the mean over the decoder layers meets `keep` and never exceeds it.

    The shape is geometric (survivors after the k-th filter: total * rho**k) with rho solved by bisection; what rounding
    leaves over is given back from the last filter to the first, one token at a time.

    Args:
        total: vision tokens of the prompt at the input of the language model.
        n_layers: decoder layers.
        layers: filter layers, ascending, 0-based; the tokens leave after the layer.
        keep: int (tokens) or float (share of `total`).

    Returns:
        One count per filter layer, each at least 1 and not ascending.

    Raises:
        BudgetError: `keep` cannot be met; the message names the smallest that can.
        ConfigError: layers outside the model.
    """
    total = int(total)
    return spread(total, n_layers, tuple(layers), tokens_of(keep, total), f"keep={keep}")


@lru_cache(maxsize=4096)
def spread(
    total: int, n_layers: int, layers: Sequence[int], tokens: float, what: str = "keep", strict: bool = True
) -> tuple[int, ...]:
    """`schedule` for a budget already in tokens, which may exceed `total` (then nothing is dropped).

    Without `strict`, a budget that only fails because a token cannot be divided leaves one token after every filter;
    that is less than one token too many.
    """
    width = spans(n_layers, layers)
    if tokens >= total - _EPS or not layers:
        if tokens < total - _EPS:
            raise BudgetError(f"{what} needs at least one filter layer, and there is none.")
        return (total,) * len(layers)
    limit = math.floor(n_layers * tokens + _EPS) - width[0] * total
    if limit < sum(width[1:]):
        if not strict and n_layers * tokens > width[0] * total + _EPS:
            return (1,) * len(layers)
        least = smallest(total, n_layers, layers)
        raise BudgetError(
            f"{what} is impossible with {total} vision tokens and filters after layers "
            f"{tuple(layers)} of {n_layers}: the "
            f"first {width[0]} layers process all {total}. The smallest possible keep is {least} "
            f"({least / total:.3g} of the tokens). Filter earlier, or drop tokens at the vision stage."
        )

    def counts(rho: float) -> list[int]:
        return [max(1, math.floor(total * rho ** (k + 1) + _EPS)) for k in range(len(layers))]

    def cost(survivors: Sequence[int]) -> int:
        return sum(w * n for w, n in zip(width[1:], survivors, strict=True))

    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(counts(middle)) <= limit else (low, middle)
    survivors = counts(low)
    left = limit - cost(survivors)
    for k in reversed(range(len(layers))):
        ceiling = survivors[k - 1] if k else total
        extra = min(left // width[k + 1], ceiling - survivors[k])
        survivors[k] += extra
        left -= extra * width[k + 1]
    return tuple(survivors)


def entry(total: int, n_layers: int, layers: Sequence[int], tokens: float, taper: float | None = None) -> int:
    """How many vision tokens the encoder may hand over when the filters must meet `tokens` equal tokens.

    The largest number for which the last filter still leaves a quarter of the budget. Without this limit a small
    budget is spent almost entirely on the layers before the first filter, and the last layers see a handful of tokens.

    Args:
        total: vision tokens that the encoder has.
        n_layers: decoder layers.
        layers: filter layers.
        tokens: the budget in equal tokens.
        taper: share of the tokens that enter which the last filter must leave, in place of a quarter of the budget.
    """
    if not layers:
        return min(total, math.floor(tokens + _EPS))
    low, high = min(total, math.floor(tokens + _EPS)), total
    while low < high:  # survivors of the last filter fall as more tokens enter
        middle = (low + high + 1) // 2
        try:
            last = spread(middle, n_layers, tuple(layers), tokens)[-1]
            fits = last >= (tokens / 4 if taper is None else middle * taper - _EPS)
        except BudgetError:
            fits = False
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


def share_out(amount: int, sizes: Sequence[int], needs: int | None = None, each: bool = False) -> list[int]:
    """Split `amount` tokens over images in proportion to their `sizes`; the parts add up to `amount`.

    Args:
        amount: tokens.
        sizes: of the images, not all of them 0.
        needs: an image that gets one token at least, at the cost of the one that has most; None: none does.
        each: whether all images that are not empty do, as far as the tokens go round.
    """
    total = sum(sizes)
    ends = [amount * sum(sizes[: i + 1]) // total for i in range(len(sizes))]
    parts = [b - a for a, b in itertools.pairwise([0, *ends])]
    if needs is not None and amount and not parts[needs]:
        parts[parts.index(max(parts))] -= 1
        parts[needs] = 1
    for poor in [i for i, part in enumerate(parts) if each and sizes[i] and not part]:
        rich = parts.index(max(parts))
        if parts[rich] > 1:
            parts[rich] -= 1
            parts[poor] = 1
    return parts


def keep_text(keep: Keep) -> str:
    """A budget for a table: tokens as a number, a share in per cent, so that 1 and 100% cannot be taken for another.

    `parse_keep` reads it, and so does `--keep`; four digits are left of a share.
    """
    return f"{100 * keep:.4g}%" if isinstance(keep, float) else str(keep)


def knob_text(name: str, value: object) -> str:
    """A setting for a table: `keep=25%`, `window=2`."""
    if name == "keep" and isinstance(value, int | float) and not isinstance(value, bool):
        return f"keep={keep_text(value)}"
    return f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"


def parse_keep(text: str, where: str = "") -> Keep:
    """A budget that somebody typed: "64" is tokens, "0.25" and "25%" are shares.

    Args:
        text: what was typed.
        where: what the message begins with.

    Raises:
        BudgetError: it is none of these.
    """
    number = text.strip()
    try:
        if number.endswith("%"):
            return float(number[:-1]) / 100
        return float(number) if set(number.lower()) & set(".en") else int(number)
    except ValueError:
        raise BudgetError(f"{where}{text!r} is neither a number of tokens (64) nor a share (0.25, 25%).") from None
