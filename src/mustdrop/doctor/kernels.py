"""The Triton kernels beside their references, on a few small tensors.

`python -m mustdrop.doctor.kernels` prints the differences on the CPU; it is started with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import json
import sys

import torch
from torch import Tensor

from mustdrop import kernels
from mustdrop.kernels import dispatch

TOLERANCE = 1e-5


def differences(device: torch.device) -> dict[str, float]:
    """Largest absolute difference of each operation from its reference, in float32.

    Args:
        device: where both run. On a CPU, Triton's interpreter must be on.
    """
    before = dispatch.chosen()
    try:
        dispatch.use_kernels("reference")
        expected = _results(device)
        dispatch.use_kernels("triton")
        got = _results(device)
    finally:
        dispatch.use_kernels(before)
    return {name: float((got[name].float() - expected[name].float()).abs().max()) for name in expected}


def read(text: str) -> dict[str, float]:
    """What the process printed."""
    found: dict[str, float] = json.loads(text.strip().splitlines()[-1])
    return found


def _results(device: torch.device) -> dict[str, Tensor]:
    """One call of each operation that a patched model needs; the same inputs every time."""
    source = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=source, dtype=torch.float32, device="cpu").to(device)

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=source, device="cpu").to(device)

    queries, keys, features = random(2, 4, 40, 16), random(2, 2, 40, 16), random(2, 40, 32)
    rows = integers(40, 2, 5)
    visible = torch.arange(40, dtype=torch.long, device=device) <= rows[..., None]
    windows = torch.arange(36, dtype=torch.long, device=device).view(9, 4)
    slot, index = integers(12, 2, 40), integers(40, 2, 10)
    return {
        "text_statistics": kernels.text_statistics(queries, keys, rows, visible, 0.25),
        "key_scores": kernels.key_scores(queries[:, :, -1], keys, visible[:, 0], 0.25),
        "window_similarity": kernels.window_similarity(features, windows),
        "merge_tokens": kernels.merge_tokens(features, slot, 12),
        "gather_rows": kernels.gather_rows([features], index)[0],
        "compact": kernels.compact([keys], index)[0],
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(differences(torch.device("cpu"))) + "\n")
