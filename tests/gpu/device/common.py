"""Shapes of networks, and a comparison of a CUDA graph with a plain run."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

NETWORK_SHAPES = [(64, 64, 56, 56), (32, 256, 28, 28), (32, 1024, 14, 14), (64, 512, 7, 7), (16, 768, 197), (512, 4096)]


def capture_and_compare(run: Callable[[], list[Tensor]], inputs: list[Tensor], sums: Tensor | None) -> None:
    """Replayed on other numbers, a captured run leaves the bits that a plain one leaves."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()  # Triton compiles and allocators fill before the capture
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    for x in inputs:
        x.mul_(1.25)
    if sums is not None:
        sums.zero_()
    graph.replay()
    replayed = [x.clone() for x in (*results, *([] if sums is None else [sums]))]
    if sums is not None:
        sums.zero_()
    again = run()
    expected = [*again, *([] if sums is None else [sums])]
    assert all(torch.equal(a, b) for a, b in zip(replayed, expected, strict=True))
