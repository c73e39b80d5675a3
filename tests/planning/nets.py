"""Small networks with their groups and calls written out by hand, so that planning is tested without the tracer."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taylor_cuda.graph.groups import Call, ChannelGroup, Groups, Member

Place = tuple[str, int, str, int, int]
"""Tensor, dimension, role, width of a unit, first position."""


def hand_groups(
    model: nn.Module, sizes: dict[str, int], places: dict[str, list[Place]], calls: list[tuple[str, int]], x: Tensor
) -> Groups:
    """``calls``: a weight and its MACs per element for one example."""
    tensors = dict(model.named_parameters())
    groups = []
    for name, size in sizes.items():
        members = [
            Member(tensor, dim, torch.arange(start, start + size * width).view(size, width), role)
            for tensor, dim, role, width, start in places[name]
        ]
        groups.append(ChannelGroup(name, tuple(members), torch.arange(size), size))
    batch = x.shape[0]
    uses = tuple(Call(w, w.rpartition(".")[0], "convolution", macs * batch) for w, macs in calls)
    macs = sum(use.macs_per_weight * (tensors[use.weight].numel() if use.weight else 1) for use in uses)
    return Groups(
        tuple(groups), (), uses, ((x,), {}), batch, macs, sum(parameter.numel() for parameter in model.parameters())
    )


def layer(conv: str, bn: str | None = None, start: int = 0) -> list[Place]:
    """A convolution's outputs and its BatchNorm."""
    norm = [(f"{bn}.{name}", 0, "norm", 1, start) for name in ("weight", "bias", "running_mean", "running_var")]
    return [(f"{conv}.weight", 0, "write", 1, start), *(norm if bn else [])]


class Chain(nn.Module):
    """conv-BN-ReLU-conv, 2×2 positions flattened into a linear layer: a unit of conv2 takes four of its columns."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 4, 1)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(F.relu(self.bn(self.conv1(x))))
        return self.fc(F.adaptive_avg_pool2d(x, 2).flatten(1))


def chain() -> tuple[nn.Module, Groups]:
    model, x = Chain(), torch.randn(2, 3, 8, 8)
    places = {
        "conv1": [*layer("conv1", "bn"), ("conv2.weight", 1, "read", 1, 0)],
        "conv2": [*layer("conv2"), ("conv2.bias", 0, "other", 1, 0), ("fc.weight", 1, "read", 4, 0)],
    }
    calls = [("conv1.weight", 64), ("conv2.weight", 64), ("fc.weight", 1)]
    return model, hand_groups(model, {"conv1": 6, "conv2": 4}, places, calls, x)


class Residual(nn.Module):
    """A stream that one convolution both reads and writes, so its cost is quadratic in the stream's width."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.same = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.down, self.up = nn.Conv2d(6, 5, 1, bias=False), nn.Conv2d(5, 6, 1, bias=False)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.same(x)
        x = x + self.up(F.relu(self.down(x)))
        return self.fc(x.mean((2, 3)))


def residual() -> tuple[nn.Module, Groups]:
    model, x = Residual(), torch.randn(3, 3, 4, 4)
    reads = [(f"{name}.weight", 1, "read", 1, 0) for name in ("same", "down", "fc")]
    places = {
        "stem": [*layer("stem"), *layer("same"), *layer("up"), *reads],
        "down": [*layer("down"), ("up.weight", 1, "read", 1, 0)],
    }
    calls = [(f"{name}.weight", 16) for name in ("stem", "same", "down", "up")] + [("fc.weight", 1)]
    return model, hand_groups(model, {"stem": 6, "down": 5}, places, calls, x)


class Concat(nn.Module):
    """Two branches, and the input itself where ``skip`` is set, side by side before the layer that reads them."""

    def __init__(self, left: int, right: int, skip: bool) -> None:
        super().__init__()
        wide = left + right + 3 * skip
        self.left, self.right = nn.Conv2d(3, left, 1, bias=False), nn.Conv2d(3, right, 1, bias=False)
        self.bn = nn.BatchNorm2d(wide)
        self.both = nn.Conv2d(wide, 8, 1, bias=False)
        self.fc = nn.Linear(8, 2)
        self.skip = skip

    def forward(self, x: Tensor) -> Tensor:
        branches = [self.left(x), self.right(x), *([x] if self.skip else [])]
        return self.fc(self.both(F.relu(self.bn(torch.cat(branches, 1)))).mean((2, 3)))


def concat(left: int = 12, right: int = 20, skip: bool = False) -> tuple[nn.Module, Groups]:
    model, x = Concat(left, right, skip), torch.randn(1, 3, 4, 4)
    places = {
        name: [
            (f"{name}.weight", 0, "write", 1, 0),
            *layer("both", "bn", start)[1:],
            ("both.weight", 1, "read", 1, start),
        ]
        for name, start in (("left", 0), ("right", left))
    }
    places["both"] = [*layer("both"), ("fc.weight", 1, "read", 1, 0)]
    calls = [("left.weight", 16), ("right.weight", 16), ("both.weight", 16), ("fc.weight", 1)]
    return model, hand_groups(model, {"left": left, "right": right, "both": 8}, places, calls, x)


class Grouped(nn.Module):
    """A grouped convolution, whose units are whole convolution groups, and a depthwise one after it."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(3, 8, 1, bias=False)
        self.grouped = nn.Conv2d(8, 16, 3, padding=1, groups=4, bias=False)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.fc = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.depthwise(F.relu(self.grouped(self.wide(x)))).mean((2, 3)))


def grouped() -> tuple[nn.Module, Groups]:
    model, x = Grouped(), torch.randn(1, 3, 5, 5)
    places = {
        "grouped": [
            ("wide.weight", 0, "write", 2, 0),
            ("grouped.weight", 0, "write", 4, 0),
            ("depthwise.weight", 0, "write", 4, 0),
            ("depthwise.bias", 0, "other", 4, 0),
            ("fc.weight", 1, "read", 4, 0),
        ]
    }
    calls = [("wide.weight", 25), ("grouped.weight", 25), ("depthwise.weight", 25), ("fc.weight", 1)]
    return model, hand_groups(model, {"grouped": 4}, places, calls, x)


class Twice(nn.Module):
    """One weight used at two resolutions, and a product without any weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 1, bias=False)
        self.again = nn.Conv2d(6, 6, 1, bias=False)
        self.fc = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.again(self.conv(x))
        x = self.again(F.avg_pool2d(x, 2))
        y = self.fc(x.mean((2, 3)))
        return y @ torch.ones(2, 7)


def twice() -> tuple[nn.Module, Groups]:
    model, x = Twice(), torch.randn(2, 3, 4, 4)
    places = {
        "conv": [*layer("conv"), *layer("again"), ("again.weight", 1, "read", 1, 0), ("fc.weight", 1, "read", 1, 0)]
    }
    calls = [("conv.weight", 16), ("again.weight", 16), ("again.weight", 4), ("fc.weight", 1), ("", 14)]
    return model, hand_groups(model, {"conv": 6}, places, calls, x)


NETS: dict[str, Callable[[], tuple[nn.Module, Groups]]] = {
    "chain": chain,
    "residual": residual,
    "concat": concat,
    "skip": lambda: concat(5, 7, skip=True),
    "grouped": grouped,
    "twice": twice,
}


def two_layers() -> tuple[nn.Module, Groups]:
    """Linear 2→3→4→1: params = macs = 2·a + a·b + b, small enough to plan by hand."""
    model = nn.Sequential(*(nn.Linear(i, o, bias=False) for i, o in ((2, 3), (3, 4), (4, 1))))
    places = {
        "0": [*layer("0"), ("1.weight", 1, "read", 1, 0)],
        "1": [*layer("1"), ("2.weight", 1, "read", 1, 0)],
    }
    calls = [("0.weight", 1), ("1.weight", 1), ("2.weight", 1)]
    return model, hand_groups(model, {"0": 3, "1": 4}, places, calls, torch.randn(1, 2))


def random_scores(groups: Groups, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {group.name: torch.rand(group.size, generator=generator) ** 3 for group in groups}
