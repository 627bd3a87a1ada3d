"""The back half of a pruned model in two processes without an engine, whose features differ more than rounding does."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from mustdrop.adapters.base import Tower
from mustdrop.integrations.vllm import settings
from mustdrop.layout import Layout

PROCESSES = 2
SIDE, KEPT = 6, 9
HEADS, HEAD = 2, 8
WIDTH = HEADS * HEAD


def features(rank: int) -> Tensor:
    """(SIDE * SIDE, 3 * WIDTH), others in each process."""
    return torch.randn(SIDE**2, 3 * WIDTH, generator=torch.Generator().manual_seed(rank))


def model(method: str, rank: int) -> Any:
    """A model of one axis whose encoder has one attention, of this process's heads, and gives `features(rank)`."""
    from vllm.model_executor.layers.attention import MMEncoderAttention

    from mustdrop.integrations.vllm.model import OneAxis

    class Inner:
        def embed_multimodal(self, **kwargs: Any) -> list[Tensor]:
            q, k, v = (part[None] for part in features(rank + 9).split(HEADS * HEAD, 1))
            self.block.attention(q, k, v)
            return [self.projector(features(rank)[None, :, :WIDTH])[0]]

    class Outer(OneAxis, Inner):
        def __init__(self) -> None:
            self.mustdrop = settings.parse({"method": method, "keep": KEPT})
            self._mustdrop_stages = {}
            self.projector, self.block = nn.Identity(), nn.Module()
            self.block.attention = MMEncoderAttention(HEADS, HEAD)
            self.config = self

        def get_text_config(self) -> Any:
            return type("Text", (), {"hidden_size": WIDTH})

        def mustdrop_tower(self, kind: str) -> Tower:
            return Tower(nn.Identity(), nn.ModuleList([self.block]))

        def mustdrop_projector(self) -> nn.Module:
            return self.projector

        def mustdrop_layouts(self, kind: str, arguments: Any, sizes: Any) -> list[Layout]:
            return [Layout.of_frames((1, SIDE, SIDE), (SIDE, SIDE))]

    return Outer()


def rows(method: str, rank: int) -> Tensor:
    """What a process hands over for one image."""
    from mustdrop.integrations.vllm.processor import FIELD, Announced

    none = torch.zeros(0, dtype=torch.long)
    announced = Announced("image", KEPT, SIDE**2, none, none.bool())
    (found,) = model(method, rank).embed_multimodal(**{FIELD: [announced.tensor()]})
    return found


def run(methods: tuple[str, ...], folder: Path) -> list[dict[str, Any]]:
    """What each process has, in the order of their ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_process, (methods, str(folder), port), PROCESSES)
    return [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]


def _process(rank: int, methods: tuple[str, ...], folder: str, port: int) -> None:
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "VLLM_DIST_IDENT": f"mustdrop-{port}"}
    import vllm.distributed as parallel
    from vllm.config import VllmConfig, set_current_vllm_config

    from mustdrop.integrations.vllm.watching import gathered, of_first

    with set_current_vllm_config(VllmConfig()):
        with patch.object(parallel, "get_tensor_model_parallel_world_size", lambda: 1):
            alone = {method: rows(method, rank) for method in methods}
        parallel.init_distributed_environment(PROCESSES, rank, f"tcp://127.0.0.1:{port}", rank, "gloo")
        parallel.initialize_model_parallel(PROCESSES)
        mine = features(rank)
        found = {
            "alone": alone,
            "together": {method: rows(method, rank) for method in methods},
            "sent": [of_first(one) for one in kinds(mine)],
            "gathered": gathered(mine, 1),
        }
    torch.save(found, Path(folder, f"{rank}.pt"))


def kinds(x: Tensor) -> tuple[Tensor, ...]:
    """In every type that is sent."""
    return (x, x.bfloat16(), x > 0, x.long())
