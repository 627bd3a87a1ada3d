"""Registration: schema, output shapes, reference and launcher of every operation. Callers use `mustdrop.kernels`."""

from __future__ import annotations

import torch
from torch import Tensor

from mustdrop.kernels import reference, reference_tokens
from mustdrop.kernels.dispatch import register

_ATTENTION = (
    "(Tensor q, Tensor k, Tensor rows, Tensor visible, float scaling, Tensor? bias=None, float? softcap=None, "
    "SymInt first=0) -> Tensor"
)


def _rows(q: Tensor, k: Tensor, rows: Tensor, visible: Tensor, scaling: float, *rest: object) -> Tensor:
    return q.new_empty(rows.shape[0], rows.shape[1], k.shape[2] - _first(rest), dtype=torch.float32)


def _statistics(q: Tensor, k: Tensor, rows: Tensor, visible: Tensor, scaling: float, *rest: object) -> Tensor:
    return q.new_empty(rows.shape[0], 2, k.shape[2] - _first(rest), dtype=torch.float32)


def _first(rest: tuple[object, ...]) -> int:
    return rest[2] if len(rest) > 2 else 0  # type: ignore[return-value]


def _scores(q: Tensor, k: Tensor, *rest: object) -> Tensor:
    return q.new_empty(k.shape[0], k.shape[2], dtype=torch.float32)


def _match(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return a.new_empty(a.shape[:2], dtype=torch.float32), a.new_empty(a.shape[:2], dtype=torch.long)


def _gathered(tensors: list[Tensor], index: Tensor, zero: bool = False) -> list[Tensor]:
    return [x.new_empty(*index.shape, *x.shape[2:]) for x in tensors]


def _cut(mask: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return mask.new_empty(rows.shape[0], mask.shape[1], rows.shape[1], columns.shape[1])


def _compacted(tensors: list[Tensor], index: Tensor) -> list[Tensor]:
    return [x.new_empty(index.shape[0], x.shape[1], index.shape[1], x.shape[3]) for x in tensors]


row_probabilities = register(f"row_probabilities{_ATTENTION}", _rows, "attention:row_probabilities")(
    reference.row_probabilities
)
text_statistics = register(f"text_statistics{_ATTENTION}", _statistics, "attention:text_statistics")(
    reference.text_statistics
)
key_scores = register(
    "key_scores(Tensor q, Tensor k, Tensor visible, float scaling, Tensor? bias=None, float? softcap=None) -> Tensor",
    _scores,
    "decode:key_scores",
)(reference.key_scores)
received_attention = register(
    "received_attention(Tensor q, Tensor k, Tensor visible, float scaling) -> Tensor",
    _scores,
    "attention:received_attention",
)(reference.received_attention)
window_similarity = register(
    "window_similarity(Tensor x, Tensor index) -> Tensor",
    lambda x, index: x.new_empty(x.shape[0], index.shape[0], dtype=torch.float32),
    "merging:window_similarity",
)(reference_tokens.window_similarity)
merge_tokens = register(
    "merge_tokens(Tensor x, Tensor slot, SymInt slots, Tensor? weight=None) -> Tensor",
    lambda x, slot, slots, weight=None: x.new_empty(x.shape[0], slots, x.shape[2]),
    "merging:merge_tokens",
)(reference_tokens.merge_tokens)
best_match = register("best_match(Tensor a, Tensor b) -> (Tensor, Tensor)", _match, "matching:best_match")(
    reference_tokens.best_match
)
gather_rows = register(
    "gather_rows(Tensor[] tensors, Tensor index, bool zero=False) -> Tensor[]", _gathered, "gathering:gather_rows"
)(reference_tokens.gather_rows)
cut_mask = register("cut_mask(Tensor mask, Tensor rows, Tensor columns) -> Tensor", _cut, "gathering:cut_mask")(
    reference_tokens.cut_mask
)
compact = register("compact(Tensor[] tensors, Tensor index) -> Tensor[]", _compacted, "gathering:compact")(
    reference_tokens.compact
)
