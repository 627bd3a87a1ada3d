"""What a vision rule may read of one encoder layer, from its queries and keys."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from mustdrop.adapters.base import Tower
from mustdrop.constants import numbers
from mustdrop.kernels import received_attention, row_probabilities
from mustdrop.pruners import Read
from mustdrop.runtime.masks import shows
from mustdrop.runtime.vision.encoder_run import EncoderRun


def of_items(read: Read, tower: Tower, q: Tensor, k: Tensor, visible: Tensor, scaling: float) -> Tensor:
    """(items, patches) or (items, patches, D) of a tower whose items have a batch dimension.

    Args:
        read: what is read.
        tower: the encoder.
        q: (items, H, S, D) queries.
        k: (items, H, S, D) keys.
        visible: (items, S) bool, tokens that are not padding.
        scaling: of the logits.
    """
    inside = slice(tower.prefix, k.shape[2] - tower.suffix)
    if read.what in ("keys", "joint_keys"):
        return _keys(read, k[:, :, inside])
    if read.what == "received" or not tower.has_cls:
        return received_attention(q, k, visible, scaling)[:, inside]
    if read.what == "joint_attention":
        q, k = (x.transpose(1, 2).flatten(2)[:, None] for x in (q, k))
        scaling = q.shape[-1] ** -0.5
    cls = numbers([0 if tower.prefix else k.shape[2] - 1] * len(q), q.device)[:, None]
    return row_probabilities(q, k, cls, visible[:, None], scaling)[:, 0, inside]


def of_segments(
    read: Read, q: Tensor, k: Tensor, mask: Tensor | None, kwargs: dict[str, Any], scaling: float
) -> list[Tensor]:
    """One piece per segment of a packed sequence: (length,) or (length, D).

    Attention is what a patch receives on average, times the length of the segment: a token of a long segment shares the
    attention with more others; times the length, 1 means "as much as on average" everywhere. Some attention functions
    are called once per segment, others once with the borders of all.
    """
    if read.what in ("keys", "joint_keys"):
        return [_keys(read, k)[0]]
    borders = kwargs.get("cu_seq_lens_q")
    edges = [0, q.shape[2]] if borders is None else borders.tolist()
    if borders is None and mask is not None and mask.ndim == 4:  # one call with a block-diagonal mask
        first = shows(mask[0, 0]).int().argmax(1)  # each token's segment starts at the first token that it sees
        edges = [*torch.unique(first).tolist(), q.shape[2]]
    scores = []
    for start, end in itertools.pairwise(edges):
        everything = torch.ones(q.shape[0], end - start, dtype=torch.bool, device=q.device)
        score = received_attention(q[:, :, start:end], k[:, :, start:end], everything, scaling)
        scores.append(score[0] * (end - start))
    return scores


def of_states(tower: Tower, states: Tensor, run: EncoderRun) -> Tensor:
    """Hidden states of the patches: (patches, C) of a packed tower, else (items, patches, C)."""
    if tower.packed:
        return states.flatten(0, -2).float()
    return run.whole(states[:, tower.prefix : states.shape[1] - tower.suffix].float())


def _keys(read: Read, k: Tensor) -> Tensor:
    """(B, N, D) keys of (B, H, N, D): mean over the heads, or the heads side by side."""
    return k.float().mean(1) if read.what == "keys" else k.transpose(1, 2).flatten(2).float()
