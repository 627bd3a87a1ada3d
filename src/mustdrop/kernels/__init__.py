"""The operations on many tokens: attention statistics, similarity, merging, matching, choosing, gathering, compaction.

Each is a readable PyTorch reference, which is the specification, and a Triton kernel of the same signature; the
decorator `operation` makes one function of the two. `dispatch` says which of them runs. Every function takes tensors of
any device.
"""

import importlib

from mustdrop.kernels.dispatch import Choice, chosen, implementation, use_kernels
from mustdrop.kernels.reference import (
    key_scores,
    received_attention,
    row_probabilities,
    text_statistics,
    text_sums,
)
from mustdrop.kernels.reference_choices import (
    farthest_first,
    greedy_coverage,
    greedy_determinant,
    without_duplicates,
)
from mustdrop.kernels.reference_merging import bipartite_slots, followed, merge_sized
from mustdrop.kernels.reference_select import select
from mustdrop.kernels.reference_tokens import (
    best_match,
    compact,
    compact_each,
    cut_mask,
    gather_rows,
    merge_tokens,
    window_similarity,
)

importlib.import_module("mustdrop.kernels.on_host")  # tells the operations what it has

__all__ = [
    "Choice",
    "best_match",
    "bipartite_slots",
    "chosen",
    "compact",
    "compact_each",
    "cut_mask",
    "farthest_first",
    "followed",
    "gather_rows",
    "greedy_coverage",
    "greedy_determinant",
    "implementation",
    "key_scores",
    "merge_sized",
    "merge_tokens",
    "received_attention",
    "row_probabilities",
    "select",
    "text_statistics",
    "text_sums",
    "use_kernels",
    "window_similarity",
    "without_duplicates",
]
