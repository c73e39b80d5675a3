"""The largest batch that fits into a GPU's memory: two small ones measured, a straight line through both, few tries."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from torch import nn

SHARES = (0.95, 0.90, 0.85)
"""Of the memory, that a try may need by the line: some holds other things, some is lost to blocks of the wrong size."""

MULTIPLE = 32


def largest_batch(run: Callable[[int], object], most: int, first: int = 64) -> int:
    """A batch that ``run`` had memory for; where the first try fits, some 5 % below the largest one.

    Memory is taken to be linear in the batch.

    Args:
        run: makes one call with that many examples.
        most: never more than this.
        first: the smaller of the two batches whose memory is measured.

    Returns:
        A multiple of 32, or ``most``, or at worst ``2 * first``.

    Raises:
        torch.OutOfMemoryError: not even the two small batches fit.
    """
    first = min(first, max(1, most // 2))
    small, large = _peak(run, first), _peak(run, 2 * first)
    per_example = (large - small) / first
    for share in SHARES:
        batch = _at(share * _memory() - (small - first * per_example), per_example, most)
        if batch <= 2 * first:
            break
        if _fits(run, batch):
            return batch
    return min(most, 2 * first)


def most_elements(model: nn.Module, one: torch.Tensor) -> int:
    """Elements of the largest output of any module for the input ``one`` of one example."""
    seen = [1]

    def look(_module: nn.Module, _args: object, output: object) -> None:
        if isinstance(output, torch.Tensor):
            seen.append(output.numel())

    hooks = [module.register_forward_hook(look) for module in model.modules()]
    try:
        with torch.no_grad():
            model(one)
    finally:
        for hook in hooks:
            hook.remove()
    return max(seen)


def _at(bytes_left: float, per_example: float, most: int) -> int:
    if per_example <= 0:
        return most
    return min(most, int(bytes_left / per_example) // MULTIPLE * MULTIPLE)


def _memory() -> int:
    """What this process may have in all: what it holds and what is free."""
    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()


def _peak(run: Callable[[int], object], batch: int) -> int:
    run(batch)  # looks for the fastest convolutions, with memory of its own
    torch.cuda.reset_peak_memory_stats()
    run(batch)
    return torch.cuda.max_memory_allocated()


def _fits(run: Callable[[int], object], batch: int) -> bool:
    torch.cuda.empty_cache()
    try:
        run(batch)
        torch.cuda.synchronize()
        fits = True
    except torch.OutOfMemoryError:
        fits = False
    # Only here is the error gone, and with it the tensors of the frames that it came through.
    gc.collect()
    torch.cuda.empty_cache()
    return fits
