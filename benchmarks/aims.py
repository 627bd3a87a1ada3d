"""What is aimed at on a CPU: `benchmarks.end_to_end` and the tables of the documents say whether a run meets it.

The documents are made without torch, so nothing is imported here.
"""

#: Of the FLOPs ratio that the prefill must reach, and how much slower it may be where nothing is dropped.
SHARE_OF_FLOPS, MOST_OVERHEAD = 0.90, 0.01
