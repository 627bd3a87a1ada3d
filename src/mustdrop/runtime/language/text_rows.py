"""Rows of a prompt's text: which are padding, which end it, which ask about its vision tokens and score them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mustdrop import kernels
from mustdrop.constants import sent
from mustdrop.runtime.masks import shows


def valid_tokens(tokens: Tensor, mask: Any, start: int = 0) -> Tensor:
    """(B, length) bool, tokens of this pass that are not padding, as the attention mask says (all without one).

    Args:
        tokens: (B, length), for the shape.
        mask: None, (B, keys), or what `generate` makes of that for a static cache: (B or 1, 1, length, keys), or a dict
            of such. There, padding is what no token sees.
        start: logical position of the first token; a mask may cover keys after the last one, as for a static cache.
    """
    if isinstance(mask, dict):
        mask = next((m for m in mask.values() if m is not None), None)
    if isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[3] >= start + tokens.shape[1]:
        here = mask[:, 0, :, start : start + tokens.shape[1]]
        return shows(here).any(1).to(tokens.device).expand(tokens.shape[0], -1)
    if isinstance(mask, Tensor) and mask.ndim == 2:
        end = start + tokens.shape[1]
        here = mask[:, start:end] if mask.shape[1] > end else mask[:, -tokens.shape[1] :]
        return here.to(tokens.device, torch.bool, copy=True)  # the caller's mask may change before a trace is made
    return torch.ones_like(tokens, dtype=torch.bool)


def last_token(valid: np.ndarray) -> np.ndarray:
    """(B, length) bool, True at the last valid token of each row."""
    last: np.ndarray = valid & (valid[:, ::-1].cumsum(1)[:, ::-1] == 1)
    return last


def words(embeds: Tensor, vision: np.ndarray, valid: np.ndarray) -> list[Tensor]:
    """Per row (T, C), embeddings of the text after the last vision token; of all text where none follows.

    Args:
        embeds: (B, length, C) embeddings of the prompt's tokens, of which those of vision tokens are not looked at.
        vision: (B, length) bool.
        valid: (B, length) bool, tokens that are not padding.
    """
    text = valid & ~vision
    last = text & _after_vision(vision)
    text = np.where(last.any(1, keepdims=True), last, text)
    places = [np.flatnonzero(row) for row in text]
    if len({len(place) for place in places}) == 1:
        return list(kernels.gather_rows([embeds], sent(np.stack(places), embeds.device))[0].unbind(0))
    return [row[sent(place, embeds.device)] for row, place in zip(embeds, places, strict=True)]


def prompt_tokens(valid: np.ndarray, length: int | None) -> np.ndarray:
    """(B, length) bool, valid tokens of the prompt, of which `length` are new; None: all of the pass are.

    What `generate` appended to it (drafts, or its answer so far where there is no cache) decides nothing.
    """
    return valid if length is None else valid & (np.arange(valid.shape[1]) < length)


def raters(vision: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """(B, length) bool, text after the row's last vision token; without text the last token.

    `valid` marks the tokens of the prompt. Labels decide nothing: what is dropped is the same with and without them.
    """
    text = valid & ~vision & _after_vision(vision)
    return np.where(text.any(1, keepdims=True), text, last_token(valid))


def _after_vision(vision: np.ndarray) -> np.ndarray:
    """(B, length) bool, no vision token here or later."""
    after: np.ndarray = vision[:, ::-1].cumsum(1)[:, ::-1] == 0
    return after
