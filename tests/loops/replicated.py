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
from tests.loops.loop import EXAMPLE, WIDTHS, Batch, DictAverage, Net

SIZE = 16
"""Examples of a whole batch."""


class GroupNormNet(Net):
    """``Net`` with normalisations whose outputs depend on one example only, so that it may be in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.bn0, self.bn1, self.bn2 = (nn.GroupNorm(width // 2, width) for width in (*WIDTHS[:2], WIDTHS[0]))


def make(net: Callable[[], Net]) -> Net:
    """The same in every process, in float64; batch normalisations have statistics of their own and are in eval mode."""
    torch.manual_seed(5)
    model = net().double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model.train(not isinstance(model.bn0, nn.BatchNorm2d))


def batches(count: int) -> list[Batch]:
    """Whole ones; what a rank or a micro-batch has of one is told by ``part``."""
    generator = torch.Generator().manual_seed(7)
    found = []
    for _ in range(count):
        target = torch.randint(0, 4, (SIZE,), generator=generator)
        x = torch.randn(SIZE, 3, 6, 6, generator=generator, dtype=torch.float64)
        x[torch.arange(SIZE), target % 3] += target.view(-1, 1, 1)
        found.append((x, target))
    return found


def part(batch: Batch, number: int, of: int) -> Batch:
    return tuple(tensor.chunk(of)[number] for tensor in batch)  # type: ignore[return-value]


@dataclass
class Told:
    """Of every prune step: the scores, what is left by original indices, and how much that is.

    Attributes:
        end: everything that training changes, after the last step.
    """

    scores: list[dict[str, Tensor]] = field(default_factory=list)
    kept: list[dict[str, Tensor]] = field(default_factory=list)
    widths: list[list[int]] = field(default_factory=list)
    end: Tensor = field(default_factory=lambda: torch.zeros(0))

    def check(self, expected: Told, bound: float = 1e-5) -> None:
        """Assert that both runs decided the same, from the same scores, and came to the same end."""
        for mine, other in zip(self.scores, expected.scores, strict=True):
            for name, score in mine.items():
                difference = float((score - other[name]).abs().max() / other[name].max())
                assert difference <= bound, (name, difference)
        assert self.widths == expected.widths
        for mine, other in zip(self.kept, expected.kept, strict=True):
            assert all(torch.equal(kept, other[name]) for name, kept in mine.items())
        torch.testing.assert_close(self.end, expected.end, rtol=0, atol=bound)


def state_of(model: nn.Module, optimizer: SGD, average: DictAverage) -> Tensor:
    """All parameters, buffers, momenta and averages, flat."""
    momenta = [optimizer.state[p]["momentum_buffer"] for p in model.parameters()]
    tensors = [*model.parameters(), *model.buffers(), *momenta, *average.values.values()]
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


def check_one_model(state: Tensor, group: Any) -> None:
    """The same on all ranks, bit for bit, by its size and a hash."""
    factors = torch.arange(1, 2 * len(state), 2)
    mine = torch.stack((torch.tensor(len(state)), (state.view(torch.int64) * factors).sum()))
    found = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, mine, group=group)
    assert all(torch.equal(other, mine) for other in found)


@dataclass(frozen=True)
class Run:
    """What a run is made of.

    Attributes:
        net: the network.
        criterion: of the pruner.
        micro: micro-batches an optimizer step, all but the last one in ``no_sync``.
        options: more of ``tc.Pruner``.
        wrapping: of ``DistributedDataParallel``.
        prepare: what is done to the module before it is wrapped.
        after: steps after the last prune step.
    """

    net: Callable[[], Net]
    criterion: str = "taylor_fo"
    micro: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)
    wrapping: Mapping[str, Any] = field(default_factory=dict)
    prepare: Callable[[Net], Any] = lambda model: model
    after: int = 2

    def go(self, group: Any = None) -> Told:
        """Train and prune to the end: whole batches in this process, or this rank's part of each."""
        ranks, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
        model = self.prepare(make(self.net))
        called: Any = model if group is None else Wrapper(model, process_group=group, **self.wrapping)
        optimizer, average = SGD(model.parameters(), lr=0.05, momentum=0.9), DictAverage(model)
        options = {"every": 4, "steps": 2, "budget": {"macs": 0.45, "channels": 0.6}, "max_ratio": 0.5, **self.options}
        pruner = tc.Pruner(called, EXAMPLE.double(), optimizer, criterion=self.criterion, ema=average.values, **options)
        told = Told()
        for whole in batches(options["every"] * options["steps"] + self.after):
            mine = part(whole, rank, ranks)
            for i in range(self.micro):
                x, target = part(mine, i, self.micro)
                waits = i + 1 < self.micro
                with called.no_sync() if waits and ranks > 1 else nullcontext():
                    outputs = called(x)
                    pruner.backward(F.cross_entropy(outputs, target) / self.micro, outputs, accumulate=waits)
            optimizer.step()
            optimizer.zero_grad()
            average.update(model)
            scores = None if pruner.done else pruner.importance.scores()
            if pruner.step() is not None and scores is not None:
                told.scores.append(scores)
                left = pruner.keep
                told.kept.append({group.name: group.kept[left[group.name]] for group in pruner.groups})
                told.widths.append([len(kept) for kept in told.kept[-1].values()])
            told.end = state_of(model, optimizer, average)
            if group is not None:
                check_one_model(told.end, group)
        assert len(told.widths) == options["steps"]
        assert sum(told.widths[-1]) < sum(told.widths[0]) < sum(group.original_size for group in pruner.groups)
        assert group is None or called.process_group is group
        return told
