"""A CLIP or SigLIP tower with window merging, written out by hand on the blocks of a plain model.

Windows of the output of one block become their mean, the remaining blocks run on the shorter sequence. One image at a
time, no hooks, no mustdrop.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from .versions import tower_body


@dataclass(frozen=True)
class Encoded:
    """One image after the tower.

    ``names`` (M,) patches that the remaining tokens are named by, ascending; ``members[m]`` the patches token m is the
    mean of; ``features`` (M, D) after the projector; ``attention`` (M,) what CLS gives (CLIP) or what a token receives
    on average (SigLIP) in the scoring block.
    """

    names: Tensor
    members: list[list[int]]
    features: Tensor
    attention: Tensor

    def key_set(self, share: float, among: Tensor | None = None) -> set[int]:
        """Names of the top ``ceil(share * M)`` tokens, of all of them or of those in ``among``."""
        candidates = range(len(self.names)) if among is None else torch.isin(self.names, among).nonzero()[:, 0].tolist()
        ranked = sorted(candidates, key=lambda m: -self.attention[m].item())
        return set(self.names[ranked[: -int(-(share * len(ranked) - 1e-9) // 1)]].tolist())

    def best(self, count: int) -> list[int]:
        """Names of the ``count`` tokens with the most attention, ascending."""
        return sorted(self.names[self.attention.argsort(descending=True)[:count]].tolist())


def _run(block: Any, states: Tensor) -> Tensor:
    out = block(states, attention_mask=None)
    return out if torch.is_tensor(out) else out[0]


def _attention(block: Any, states: Tensor) -> Tensor:
    """(S, S) head-mean attention probabilities of one block for its input (1, S, C)."""
    module, x = block.self_attn, block.layer_norm1(states)
    heads = module.num_heads
    q, k = (p(x).view(x.shape[1], heads, -1).transpose(0, 1) for p in (module.q_proj, module.k_proj))
    return (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1).mean(0)


def _merge(patches: Tensor, grid: int, window: int, threshold: float, at_least: int) -> list[list[int]]:
    similar = []
    for top, left in itertools.product(range(0, grid - window + 1, window), repeat=2):
        members = [(top + a) * grid + left + b for a in range(window) for b in range(window)]
        pairs = list(itertools.combinations(members, 2))
        cosines = [cosine_similarity(patches[a], patches[b], dim=0).item() for a, b in pairs]
        similar.append((sum(cosines) / len(pairs), members))
    similar = sorted((s for s in similar if s[0] >= threshold), key=lambda s: -s[0])
    merged = [members for _, members in similar[: max(0, grid * grid - at_least) // (window * window - 1)]]
    gone = {n for members in merged for n in members}
    groups = merged + [[n] for n in range(grid * grid) if n not in gone]
    side = (window - 1) // 2 * (window + 1)
    return sorted(groups, key=lambda members: members[side] if len(members) > 1 else members[0])


@torch.no_grad()
def encode(
    model: Any,
    pixels: Tensor,
    *,
    window: int | None = 3,
    threshold: float = 0.8,
    layer: int = 0,
    key_layer: int = -1,
    at_least: int = 0,
) -> Encoded:
    """One image (3, H, W) through the tower of a plain LLaVA and its projector."""
    body = tower_body(model)
    blocks = list(body.encoder.layers)
    prefix = 1 if model.config.vision_config.model_type == "clip_vision_model" else 0
    states = body.embeddings(pixels[None])
    if hasattr(body, "pre_layrnorm"):
        states = body.pre_layrnorm(states)
    grid = round((states.shape[1] - prefix) ** 0.5)
    members = [[n] for n in range(grid * grid)]
    read = len(blocks) + model.config.vision_feature_layer  # output of this block, counted as hidden_states[...]
    features = attention = None
    for i, block in enumerate(blocks):
        if i == key_layer % len(blocks):
            weights = _attention(block, states)
            attention = weights[0, prefix:] if prefix else weights.mean(0)
        states = _run(block, states)
        if i == layer and window is not None:
            members = _merge(states[0, prefix:], grid, window, threshold, at_least)
            means = [states[0, prefix:][m].mean(0) for m in members]
            states = torch.cat([states[:, :prefix], torch.stack(means)[None]], 1)
        if i == read:
            features = model.model.multi_modal_projector(states[:, prefix:])[0]
    side = 0 if window is None else (window - 1) // 2 * (window + 1)
    names = torch.tensor([m[side] if len(m) > 1 else m[0] for m in members])
    return Encoded(names, members, features, attention)
