"""How long forward passes take, measured side by side so that a busy machine slows every model alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from taylor_cuda.train.modes import eval_mode


def latency_ms(
    models: Mapping[str, nn.Module],
    shape: tuple[int, ...],
    batch: int,
    device: torch.device,
    seconds: float = 5.0,
    repeats: int = 50,
) -> dict[str, float] | None:
    """Median milliseconds of one forward pass of each model, in turns: one pass each, again and again.

    Args:
        models: on ``device``; measured in eval mode, which is put back.
        shape: of one example.
        batch: examples in the input, standard normal.
        device: CUDA events on a GPU, the wall clock elsewhere.
        seconds: stop taking turns after this long; every model gets one pass to warm up and at least one that counts.
        repeats: turns at most.

    Returns:
        ``{name: milliseconds}``, or ``None`` where the device has not enough memory for the batch.
    """
    x = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0)).to(device)
    times: dict[str, list[float]] = {name: [] for name in models}
    try:
        with torch.inference_mode(), eval_mode(*models.values()):
            for model in models.values():
                _forward_ms(model, x, device)
            start = time.perf_counter()
            for _ in range(repeats):
                for name, model in models.items():
                    times[name].append(_forward_ms(model, x, device))
                if time.perf_counter() - start > seconds:
                    break
    except torch.OutOfMemoryError:
        return None
    return {name: statistics.median(values) for name, values in times.items()}


def _forward_ms(model: nn.Module, x: Tensor, device: torch.device) -> float:
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        model(x)
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))
    start = time.perf_counter()
    model(x)
    return (time.perf_counter() - start) * 1e3
