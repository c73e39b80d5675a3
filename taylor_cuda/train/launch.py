"""The processes of a run: one, or those that ``torchrun`` has started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from taylor_cuda.train.environment import find_device

TIMEOUT = timedelta(minutes=30)
"""How long a rank may let the others wait: the first measures alone, and writes files."""


@dataclass(frozen=True)
class Launch:
    """This process among those of the run.

    Attributes:
        device: what it computes on.
        rank: its number; 0 writes and prints.
        ranks: how many there are.
        group: all of them, for ``torch.distributed``; ``None`` where there is one.
    """

    device: torch.device
    rank: int = 0
    ranks: int = 1
    group: Any = None

    @property
    def first(self) -> bool:
        """It is the one that writes and prints."""
        return self.rank == 0


def rank_of_environment() -> tuple[int, int]:
    """``(rank, ranks)`` of the process group that there is, or as ``torchrun`` has set them; else ``(0, 1)``."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


@contextmanager
def launched(device: str) -> Iterator[Launch]:
    """Join the other processes of ``torchrun``, and leave them at the end. Nothing to join without it.

    A process group that is there already is taken as it is, and stays.

    Args:
        device: see ``find_device``; under ``torchrun`` ``"auto"`` and ``"cuda"`` are the GPU of this process's number
            on its machine.

    Raises:
        InputError: there is no such device.
    """
    rank, ranks = rank_of_environment()
    local = int(os.environ.get("LOCAL_RANK", 0))
    if ranks > 1 and device in ("auto", "cuda") and torch.cuda.is_available():
        device = f"cuda:{local}"
    found = find_device(device)
    if ranks == 1:
        yield Launch(found)
        return
    if found.type == "cuda":
        torch.cuda.set_device(found)
    mine = not dist.is_initialized()
    if mine:
        dist.init_process_group("nccl" if found.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield Launch(found, rank, ranks, dist.group.WORLD)
    finally:
        if mine:
            dist.destroy_process_group()
