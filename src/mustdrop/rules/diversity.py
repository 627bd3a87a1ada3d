"""Features that differ from each other: max-min distance, determinants, and removal of duplicates.

All take features (B, N, C) of B rows that are chosen from alone, compare by cosine in float32, and give ties to the
lower index.
"""

from __future__ import annotations

from mustdrop.kernels import farthest_first, greedy_determinant, without_duplicates
from mustdrop.kernels.reference_tokens import unit

__all__ = ["farthest_first", "greedy_determinant", "unit", "without_duplicates"]
