"""The processes of a run: one, or those that ``torchrun`` has started."""

from __future__ import annotations

import gc
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from taylor_cuda.errors import TaylorError
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
        parent: the process that started this one.
    """

    device: torch.device
    rank: int = 0
    ranks: int = 1
    group: Any = None
    parent: int = field(default_factory=os.getppid)

    @property
    def abandoned(self) -> bool:
        """``torchrun`` is gone: nobody would end this process, and somebody may start the run again beside it."""
        return self.group is not None and os.getppid() != self.parent

    @property
    def first(self) -> bool:
        """It is the one that writes and prints."""
        return self.rank == 0


def rank_of_environment() -> tuple[int, int]:
    """``(rank, ranks)`` of the process group that there is, or as ``torchrun`` has set them; else ``(0, 1)``."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def fresh_store(store: Any, rank: int, ranks: int) -> Any:
    """A part of a store that no processes have written to but those that are here now.

    ``torchrun --max-restarts`` gives ranks that it starts anew the store of those before: some would find the addresses
    of the dead there, and wait for them for as long as ``TIMEOUT``. Its count of restarts isn't the same on all
    machines (https://github.com/pytorch/pytorch/issues/135712), so rank 0 names a part of the store, and only one that
    is alive can answer a name that was made up just now.

    Args:
        store: a ``torch.distributed.Store``, the same for all ranks.
        rank: of this process.
        ranks: how many there are.

    Raises:
        TaylorError: they did not all come.
    """
    me, until = uuid.uuid4().hex, time.monotonic() + TIMEOUT.total_seconds()
    if rank == 0:
        store.set("part", me)
    while time.monotonic() < until:
        part = me if rank == 0 else store.get("part").decode()
        present = f"{part}/present"
        if rank == 0:
            others = [f"{part}/{other}" for other in range(1, ranks)]
            if store.check(others):
                store.set(present, " ".join([me, *(store.get(other).decode() for other in others)]))
        else:
            store.set(f"{part}/{rank}", me)
        if store.check([present]) and me in store.get(present).decode().split():
            return dist.PrefixStore(part, store)  # type: ignore[attr-defined]
        time.sleep(0.02)
    raise TaylorError(f"launch: not all {ranks} ranks came within {TIMEOUT}")


@contextmanager
def launched(device: str) -> Iterator[Launch]:
    """Join the other processes of ``torchrun``, and leave them at the end. Nothing to join without it.

    A process group that is there already is taken as it is, and stays.

    Args:
        device: see ``find_device``; under ``torchrun`` ``"auto"`` and ``"cuda"`` are the GPU of this process's number
            on its machine.

    Raises:
        InputError: there is no such device.
        TaylorError: not all ranks came.
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
        from torch.distributed.rendezvous import rendezvous  # not there in a torch without distributed

        store, _, _ = next(rendezvous("env://", timeout=TIMEOUT))
        backend = "nccl" if found.type == "cuda" else "gloo"
        store = fresh_store(store, rank, ranks)
        dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=TIMEOUT)
    try:
        yield Launch(found, rank, ranks, dist.group.WORLD)
    finally:
        if mine:
            gc.collect()  # wrappers hold on to the group in cycles
            dist.destroy_process_group()
