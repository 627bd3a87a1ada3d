"""Old pictures shrink: once a newer one has arrived in a chat, those of earlier turns keep a few cache entries each.

Pictures that arrive in one pass are of one age. Which picture an entry belongs to is known by its position: a cache
layer carries the number of the picture at each position of the sequence, from the first pass on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mustdrop import kv
from mustdrop.errors import MustDropError
from mustdrop.indices import HOST, on, take
from mustdrop.pruners import CacheScorer, DecodeCachePruner, Received, answers
from mustdrop.rules.ranking import keep_best

if TYPE_CHECKING:
    from mustdrop.runtime.language.later_tokens import LaterTokens
    from mustdrop.runtime.language.vision_tokens import VisionTokens
    from mustdrop.runtime.state import Forward

#: What ranks where the decode stage reads nothing of the prompt: the newest question.
_NEWEST_TEXT = CacheScorer()


def numbers(media: VisionTokens) -> Tensor:
    """(B, length) long, which picture (or video) of the pass each token belongs to, -1 for text and hidden tokens."""
    found = torch.full(media.places.shape, -1, dtype=torch.long, device=HOST)
    if media.shown.media:
        for row, own, places in zip(found, media.shown.media, media.places, strict=True):
            where = places.nonzero()[:, 0]
            for k, medium in enumerate(own):
                row[where[medium.index]] = k
    else:  # the encoder did not run in this call: what lies side by side is one picture
        starts = media.places & ~nn.functional.pad(media.places, (1, 0))[:, :-1]
        found = starts.long().cumsum(1) - 1
    return found.masked_fill(~media.vision, -1)


def due(decode: DecodeCachePruner, cache: Any, media: VisionTokens) -> bool:
    """Whether this pass brings a newer picture to a row whose cache holds older ones."""
    entries = None if cache is None else kv.first(cache)
    if decode.old_pictures is None or entries is None or entries.pictures is None:
        return False
    return bool(((entries.pictures >= 0).any(1) & media.vision.any(1)).any())


def scorer(decode: DecodeCachePruner) -> CacheScorer:
    """What ranks the entries of an old picture: the decode stage's own scorer, if it reads the prompt."""
    return decode.scorer if decode.reads_prompt or decode.score is not None else _NEWEST_TEXT


def reader(decode: DecodeCachePruner) -> DecodeCachePruner:
    """A decode stage that reads what ranks the entries of an old picture, in each layer as it runs."""
    return decode.model_copy(update={"score": scorer(decode), "after_prefill": False})


def shrink(decode: DecodeCachePruner, forward: Forward, later: LaterTokens) -> None:
    """At the end of the pass that brought the newer picture: the best entries of each old one stay, in every layer."""
    layers = forward.cache.layers[: len(later.spans)]
    unread = [i for i, layer in enumerate(layers) if layer.attended is None]
    if unread:
        raise MustDropError(
            f"decoder layers {unread} ran without their attention being read: their attention modules do not ask their "
            "config which function to use."
        )
    for i, layer in enumerate(layers):
        layer.evict(_stays(decode, forward, layer, later.candidates(i, layer)))
        if not decode.reads_prompt:
            layer.attended = layer.queries = None  # the generated tokens rank from their first on


def by_picture(stored: kv.Stored) -> Tensor | None:
    """(B, pictures of the chat) long, entries of each that a layer stores; None where nobody asked for that."""
    positions, pictures = stored.places, stored.pictures
    if pictures is None or positions is None:
        return None
    number, known = _number(positions, pictures), torch.arange(int(pictures.max()) + 1, dtype=torch.long, device=HOST)
    return (number[..., None] == known).sum(1)


def _stays(decode: DecodeCachePruner, forward: Forward, layer: kv.Slots, seen: Tensor) -> Tensor:
    """(B, slots) bool, the entries of one layer that stay; `seen` marks those that a later token sees."""
    positions, vision = layer.slot_positions(), layer.slot_vision()
    assert forward.media is not None, "asked for a pass without media"
    assert positions is not None, "a layer without entries"
    assert vision is not None, "a layer without entries"
    assert layer.pictures is not None, "a layer that knows no pictures"
    assert layer.attended is not None, "an unread layer"
    assert layer.queries is not None, "an unread layer"
    newer = forward.media.vision.any(1)
    number = _number(positions, layer.pictures)
    old = (number >= 0) & vision & (positions < forward.start) & newer[:, None]
    asked, seen = scorer(decode), seen.to(HOST)
    pad = (0, layer.slots - layer.attended.shape[1])
    read = Received(nn.functional.pad(layer.attended, pad), nn.functional.pad(layer.queries, pad))
    score = answers.entries(asked, read, on(old & seen, read.given.device)).to(HOST)
    stays = torch.ones_like(old)
    for k in torch.unique(number[old]).tolist():
        own = old & (number == k)
        count = decode.left_of((layer.pictures == k).sum(1))
        best = keep_best(score, count, own & seen)
        stays &= ~own | best | (own.sum(1) <= count)[:, None]
    return stays


def _number(positions: Tensor, pictures: Tensor) -> Tensor:
    """(B, slots) long, the picture that each position belongs to, -1 for text and padding."""
    known = pictures.shape[1]
    inside = (positions >= 0) & (positions < known)
    return take(pictures, positions.clamp(0, known - 1), 1).masked_fill(~inside, -1)
