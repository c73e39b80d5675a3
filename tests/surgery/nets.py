"""Small networks with hand-written groups: what may be cut is stated here, not found by the tracer under test
elsewhere."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taylor_cuda.graph.groups import Call, ChannelGroup, Groups, Member, Role


def span(size: int, start: int = 0, width: int = 1) -> Tensor:
    """Positions of ``size`` units of ``width`` neighbours each, from ``start`` on: int64 [size, width]."""
    return start + torch.arange(size * width).view(size, width)


def group(name: str, size: int, *places: tuple[str, int, Role] | tuple[str, int, Role, Tensor]) -> ChannelGroup:
    members = tuple(Member(p[0], p[1], p[3] if len(p) == 4 else span(size), p[2]) for p in places)
    return ChannelGroup(name, members, torch.arange(size), size)


def norm(name: str, size: int, *, stats: bool = True) -> list[tuple[str, int, Role]]:
    parts = ("weight", "bias", "running_mean", "running_var") if stats else ("weight", "bias")
    return [(f"{name}.{part}", 0, "norm") for part in parts]


class Net(nn.Module):
    input_shape: tuple[int, ...] = (2, 3, 8, 8)

    def channel_groups(self) -> list[ChannelGroup]:
        raise NotImplementedError

    def groups(self, x: Tensor) -> Groups:
        weights = [name for name, p in self.named_parameters() if p.dim() > 1]
        calls = tuple(Call(name, name.rpartition(".")[0], "conv", 1) for name in weights)
        params = sum(p.numel() for p in self.parameters())
        return Groups(tuple(self.channel_groups()), (), calls, ((x,), {}), x.shape[0], 1, params)


class ConvBN(Net):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 5, 3, bias=False), nn.BatchNorm2d(5)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.head(F.relu(self.bn2(self.conv2(x))).mean((2, 3)))

    def channel_groups(self) -> list[ChannelGroup]:
        return [
            group("conv1", 6, ("conv1.weight", 0, "write"), *norm("bn1", 6), ("conv2.weight", 1, "read")),
            group("conv2", 5, ("conv2.weight", 0, "write"), *norm("bn2", 5), ("head.weight", 1, "read")),
        ]


class ConvBias(Net):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 1), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.silu(self.conv1(x)), 2)
        return self.head(F.silu(self.conv2(x)).mean((2, 3)))

    def channel_groups(self) -> list[ChannelGroup]:
        return [
            group("conv1", 6, ("conv1.weight", 0, "write"), ("conv1.bias", 0, "other"), ("conv2.weight", 1, "read")),
            group("conv2", 5, ("conv2.weight", 0, "write"), ("conv2.bias", 0, "other"), ("head.weight", 1, "read")),
        ]


class Linears(Net):
    """An MLP over tokens, with a LayerNorm whose statistics change with the cut."""

    input_shape = (2, 7, 9)

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.norm, self.fc2, self.head = nn.Linear(9, 8), nn.LayerNorm(8), nn.Linear(8, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.fc2(F.gelu(self.norm(self.fc1(x)))))).mean(1)

    def channel_groups(self) -> list[ChannelGroup]:
        return [
            group(
                "fc1",
                8,
                ("fc1.weight", 0, "write"),
                ("fc1.bias", 0, "other"),
                *norm("norm", 8, stats=False),
                ("fc2.weight", 1, "read"),
            ),
            group("fc2", 6, ("fc2.weight", 0, "write"), ("fc2.bias", 0, "other"), ("head.weight", 1, "read")),
        ]


class Residual(Net):
    """A stream that a stem and two blocks write, and inner groups."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.a1, self.abn1 = nn.Conv2d(6, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.a2, self.abn2 = nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)), inplace=True)
        y = F.relu(self.abn1(self.a1(x)), inplace=True)
        x = F.relu(x + self.abn2(self.a2(y)))
        return self.head(x.mean((2, 3)))

    def channel_groups(self) -> list[ChannelGroup]:
        stream = [("stem.weight", 0, "write"), *norm("bn", 6), ("a1.weight", 1, "read"), ("a2.weight", 0, "write")]
        return [
            group("stem", 6, *stream, *norm("abn2", 6), ("head.weight", 1, "read")),
            group("a1", 4, ("a1.weight", 0, "write"), *norm("abn1", 4), ("a2.weight", 1, "read")),
        ]


class Concat(Net):
    """Two branches in one reader, and a flattened map: units of several positions."""

    input_shape = (2, 3, 6, 6)

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 3, 3)
        self.merge, self.norm = nn.Conv2d(7, 5, 3), nn.BatchNorm2d(5)
        self.head = nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat([F.relu(self.left(x)), self.right(x).tanh()], 1)
        return self.head(F.relu(self.norm(self.merge(both))).flatten(1))

    def channel_groups(self) -> list[ChannelGroup]:
        left = [("left.weight", 0, "write"), ("left.bias", 0, "other"), ("merge.weight", 1, "read", span(4))]
        right = [("right.weight", 0, "write"), ("right.bias", 0, "other"), ("merge.weight", 1, "read", span(3, 4))]
        merge = [("merge.weight", 0, "write"), ("merge.bias", 0, "other"), *norm("norm", 5)]
        return [
            group("left", 4, *left),
            group("right", 3, *right),
            group("merge", 5, *merge, ("head.weight", 1, "read", span(5, width=4))),
        ]


class Depthwise(Net):
    def __init__(self) -> None:
        super().__init__()
        self.expand, self.bn1 = nn.Conv2d(3, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.depthwise, self.bn2 = nn.Conv2d(6, 6, 3, groups=6, bias=False), nn.BatchNorm2d(6)
        self.project, self.head = nn.Conv2d(6, 5, 1, bias=False), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.bn2(self.depthwise(F.relu6(self.bn1(self.expand(x))))))
        return self.head(self.project(x).mean((2, 3)))

    def channel_groups(self) -> list[ChannelGroup]:
        inside = [("expand.weight", 0, "write"), *norm("bn1", 6), ("depthwise.weight", 0, "other"), *norm("bn2", 6)]
        return [
            group("expand", 6, *inside, ("project.weight", 1, "read")),
            group("project", 5, ("project.weight", 0, "write"), ("head.weight", 1, "read")),
        ]


class Grouped(Net):
    """A grouped convolution: the unit is a whole convolution group, two channels in and three out."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Conv2d(3, 8, 1, bias=False)
        self.grouped, self.head = nn.Conv2d(8, 12, 3, groups=4), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.grouped(F.relu(self.expand(x)))).mean((2, 3)))

    def channel_groups(self) -> list[ChannelGroup]:
        three = span(4, width=3)
        places = [
            ("grouped.weight", 0, "write", three),
            ("grouped.bias", 0, "other", three),
            ("head.weight", 1, "read", three),
        ]
        return [group("expand", 4, ("expand.weight", 0, "write", span(4, width=2)), *places)]


class Tied(Net):
    """One convolution used twice and one parameter under two names, on a stream of four channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 4)
        self.again = self.block
        self.scale = nn.Parameter(torch.rand(4, 1, 1) + 0.5)
        self.also_scale = self.scale

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(self.block(x) * self.scale)
        x = F.relu(self.again(x) * self.also_scale)
        return self.head(x.mean((2, 3)))

    def channel_groups(self) -> list[ChannelGroup]:
        block = [
            ("block.weight", 0, "write"),
            ("block.weight", 1, "read"),
            ("block.bias", 0, "other"),
            ("scale", 0, "other"),
        ]
        stem = [("stem.weight", 0, "write"), ("stem.bias", 0, "other")]
        return [group("stem", 4, *stem, *block, ("head.weight", 1, "read"))]


NETS: list[Callable[[], Net]] = [ConvBN, ConvBias, Linears, Residual, Concat, Depthwise, Grouped, Tied]


def make(net: Callable[[], Net], seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Net, Tensor, Groups]:
    """A network with lively norms, its input and its groups."""
    torch.manual_seed(seed)
    model = net().to(dtype)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "bn" in name or "norm" in name:
            with torch.no_grad():
                if name.endswith(("weight", "var")):
                    tensor.uniform_(0.5, 1.5)
                elif tensor.is_floating_point():
                    tensor.normal_(0, 0.3)
    x = torch.randn(model.input_shape, dtype=dtype)
    return model, x, model.groups(x)


def random_keep(groups: Groups, seed: int = 0) -> dict[str, Tensor]:
    """Every group with two units or more loses at least one and keeps at least one."""
    generator = torch.Generator().manual_seed(seed)
    keep = {}
    for one in groups:
        if one.size == 1:
            continue
        count = int(torch.randint(1, one.size, (), generator=generator))
        keep[one.name] = torch.randperm(one.size, generator=generator)[:count].sort().values
    return keep


def train_steps(model: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer, count: int, seed: int = 7) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        target = torch.randn(x.shape[0], 4, generator=generator, dtype=x.dtype)
        optimizer.zero_grad()
        F.mse_loss(model(x), target).backward()
        optimizer.step()
