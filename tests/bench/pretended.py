"""A GPU that isn't there: tensors stay on the CPU, and what is asked of CUDA is answered by stand-ins."""

from __future__ import annotations

import contextlib
import time

import torch

from taylor_cuda.bench.race import Options


class Pretended(Options):
    """Takes every branch of a run on a GPU, on the CPU."""

    @property
    def cuda(self):
        return True


class Event:
    def __init__(self, enable_timing=False):
        assert enable_timing

    def record(self):
        self.at = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return max(end.at - self.at, 1e-9) * 1e3


class Stream:
    def wait_stream(self, other):
        assert isinstance(other, Stream)


class Graph:
    """Runs nothing when it is replayed: what is captured has run already, as it would have on a GPU's first replay."""

    def replay(self):
        time.sleep(1e-5)


class Memory:
    """Bytes as a test wants them."""

    def __init__(self):
        self.held, self.peak, self.free = 0, 0, 0

    def reset(self):
        self.peak = self.held

    def hold(self, size):
        self.held += size
        self.peak = max(self.peak, self.held)

    def pass_through(self, size):
        self.peak = max(self.peak, self.held + size)


def install(monkeypatch):
    """Put the stand-ins in place; the memory that they report."""
    memory = Memory()
    stands = {
        "Event": Event,
        "Stream": Stream,
        "CUDAGraph": Graph,
        "graph": lambda graph: contextlib.nullcontext(),
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": Stream,
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "mem_get_info": lambda: (memory.free, memory.free),
        "memory_reserved": lambda: memory.held,
        "memory_allocated": lambda: memory.held,
        "max_memory_allocated": lambda: memory.peak,
        "reset_peak_memory_stats": memory.reset,
    }
    for name, stand in stands.items():
        monkeypatch.setattr(torch.cuda, name, stand)
    return memory
