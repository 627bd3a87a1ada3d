"""Which of several processes this is: what `accelerate launch`, `torchrun` and MPI tell the programs they start."""

from __future__ import annotations

import os
from dataclasses import dataclass

# Place among all processes, number of them, place on this machine: torch's, then those of the MPI implementations that
# `accelerate launch` starts processes on CPUs with (Intel MPI and MPICH, Open MPI, MVAPICH).
_LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK"),
)


@dataclass(frozen=True)
class Share:
    """The place of this process.

    Attributes:
        rank: among all processes.
        world: number of processes.
        local: among those of this machine.
    """

    rank: int = 0
    world: int = 1
    local: int = 0


def share() -> Share:
    """The place of this process, from its environment; that of a single one if no launcher started it."""
    for rank, world, local in _LAUNCHERS:
        if rank in os.environ and world in os.environ:
            return Share(int(os.environ[rank]), int(os.environ[world]), int(os.environ.get(local, "0")))
    return Share()
