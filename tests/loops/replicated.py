"""One pruning run, in one process on whole batches or on ranks that have a part of each, told step by step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as Wrapper
from torch.optim import SGD

import taylor_cuda as tc
from tests.loops.loop import EXAMPLE, WIDTHS, Batch, Net

SIZE = 16
"""Examples of a whole batch."""


class GroupNormNet(Net):
    """``Net`` with normalisations whose outputs depend on one example only, so that it may be in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.bn0, self.bn1, self.bn2 = (nn.GroupNorm(width // 2, width) for width in (*WIDTHS[:2], WIDTHS[0]))


def make(net: Callable[[], Net], dtype: torch.dtype = torch.float64) -> Net:
    """The same in every process; batch normalisations with statistics of their own, and in eval mode."""
    torch.manual_seed(5)
    model = net().to(dtype)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model.train(not isinstance(model.bn0, nn.BatchNorm2d))


def batches(count: int, dtype: torch.dtype = torch.float64) -> list[Batch]:
    """Whole ones; what a rank or a micro-batch has of one is told by ``part``."""
    generator = torch.Generator().manual_seed(7)
    found = []
    for _ in range(count):
        target = torch.randint(0, 4, (SIZE,), generator=generator)
        x = torch.randn(SIZE, 3, 6, 6, generator=generator, dtype=dtype)
        x[torch.arange(SIZE), target % 3] += target.view(-1, 1, 1)
        found.append((x, target))
    return found


def part(batch: Batch, number: int, of: int) -> Batch:
    return tuple(tensor.chunk(of)[number] for tensor in batch)  # type: ignore[return-value]


@dataclass
class Told:
    """Of every prune step: the scores, what the plan keeps, by original indices too, and the widths."""

    scores: list[dict[str, Tensor]] = field(default_factory=list)
    kept: list[dict[str, Tensor]] = field(default_factory=list)
    widths: list[list[int]] = field(default_factory=list)

    def check(self, expected: Told, bound: float) -> float:
        """Assert that both runs decided the same, from the same scores. Returns the greatest relative difference."""
        assert self.widths == expected.widths
        worst = 0.0
        for mine, other in zip(self.kept, expected.kept, strict=True):
            assert all(torch.equal(kept, other[name]) for name, kept in mine.items())
        for mine, other in zip(self.scores, expected.scores, strict=True):
            for name, score in mine.items():
                worst = max(worst, float((score - other[name]).abs().max() / other[name].max()))
        assert worst <= bound, worst
        return worst


@dataclass(frozen=True)
class Run:
    """What a run is made of.

    Attributes:
        net: the network.
        options: of ``tc.Pruner``.
        micro: micro-batches an optimizer step, all but the last one in ``no_sync``.
        wrapping: options of the wrapper.
        prepare: done to the module before it is wrapped.
        after: steps after the last prune step.
        dtype: of the network.
    """

    net: Callable[[], Net]
    options: Mapping[str, Any]
    micro: int = 1
    wrapping: Mapping[str, Any] = field(default_factory=dict)
    prepare: Callable[[Net], None] = lambda model: None
    after: int = 2
    dtype: torch.dtype = torch.float64

    def go(self, ranks: int = 1, each: Callable[[Net, SGD], None] = lambda model, optimizer: None) -> Told:
        """Train and prune to the end. ``each`` is called after every step."""
        model = make(self.net, self.dtype)
        self.prepare(model)
        called = model if ranks == 1 else Wrapper(model, **self.wrapping)
        optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
        options = {"every": 5, "steps": 2, "budget": {"macs": 0.45, "channels": 0.6}, "max_ratio": 0.5, **self.options}
        pruner = tc.Pruner(called, EXAMPLE.to(self.dtype), optimizer, **options)
        told = Told()
        for whole in batches(options["every"] * options["steps"] + self.after, self.dtype):
            mine = whole if ranks == 1 else part(whole, dist.get_rank(), ranks)
            for i in range(self.micro):
                x, target = part(mine, i, self.micro)
                waits = i + 1 < self.micro
                with called.no_sync() if waits and ranks > 1 else nullcontext():
                    outputs = called(x)
                    loss = F.cross_entropy(outputs, target) / self.micro
                    pruner.backward(loss, outputs, accumulate=waits)
            optimizer.step()
            optimizer.zero_grad()
            scores = None if pruner.done else pruner.importance.scores()
            plan = pruner.step()
            if plan is not None and scores is not None:
                told.scores.append(scores)
                told.kept.append({group.name: group.kept.clone() for group in pruner.groups})
                told.widths.append(model.widths())
            each(model, optimizer)
        assert pruner.done
        assert len(told.widths) == options["steps"]
        return told
