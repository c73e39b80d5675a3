"""What a step's time is spent on, by torch.profiler: every kernel's, by the op that launched it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from taylor_cuda.bench.race import Options

CLASSES = ("conv", "batch_norm", "relu", "add", "optimizer", "scoring", "other")

# What an op's name has in it; the first that fits. On a GPU a ReLU is a clamp_min.
WORDS = (
    ("scoring", ("taylor_cuda",)),
    ("batch_norm", ("batch_norm",)),
    ("conv", ("conv",)),
    ("relu", ("relu", "threshold", "clamp_min")),
    ("add", ("aten::add",)),
)
RANGES = {"scoring": "scoring", "Optimizer.": "optimizer"}
"""Named ranges: all that runs in one counts as that, whatever it is."""

STEPS = 3


def split(run: Callable[[], Any], options: Options) -> dict[str, float]:
    """Microseconds of one call of ``run`` by class.

    On a GPU those of kernels, on a CPU those of ops without the ops that they call; Python's own time is in none.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if options.cuda else [])]
    with profile(activities=activities) as recorded:
        for _ in range(STEPS):
            run()
        if options.cuda:
            torch.cuda.synchronize()
    totals = by_class(recorded.events() or (), on_gpu=options.cuda)
    return {name: spent / STEPS for name, spent in totals.items()}


def by_class(events: Iterable[Any], on_gpu: bool) -> dict[str, float]:
    """Microseconds by class.

    Args:
        events: of ``torch.profiler``, on the host and on the device.
        on_gpu: count what ran on the device. A kernel that no op is known to have launched is in ``"other"``.
    """
    totals = dict.fromkeys(CLASSES, 0.0)
    seen = 0.0
    for event in events:
        if event.device_type == DeviceType.CPU:
            # A named range has a shadow on the device, as long as all that runs in it.
            own = [kernel.duration for kernel in event.kernels if not _is_range(kernel.name)]
            totals[class_of(event)] += sum(own) if on_gpu else event.self_cpu_time_total
        elif not _is_range(event.name):
            seen += event.time_range.elapsed_us()
    if on_gpu:
        totals["other"] += max(0.0, seen - sum(totals.values()))
    return totals


def class_of(event: Any) -> str:
    """The class of an event on the host: that of a named range around it, or by its own name."""
    around = event
    while around is not None:
        for start, name in RANGES.items():
            if around.name.startswith(start):
                return name
        around = around.cpu_parent
    return next((name for name, words in WORDS if any(word in event.name for word in words)), "other")


def _is_range(name: str) -> bool:
    return name.startswith((*RANGES, "ProfilerStep"))
