"""Small networks with an explicit, hand-placed gate where each group's channels are read: the definition of the scores.

``gates`` maps a group's name (the module that writes its channels) to a vector that multiplies the channels wherever a
reader takes them. Without gates the networks are ordinary modules. Nothing here uses the package.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GatedNet(nn.Module):
    """Base: ``self.gated(name, x, dim)`` multiplies by the gate of that name, if there is one."""

    input_shape: tuple[int, ...] = (4, 3, 8, 8)
    group_sizes: ClassVar[dict[str, int]]

    def __init__(self) -> None:
        super().__init__()
        self.gates: dict[str, Tensor] = {}

    def gated(self, name: str, x: Tensor) -> Tensor:
        gate = self.gates.get(name)
        if gate is None:
            return x
        return x * gate.view(1, -1, *(1,) * (x.dim() - 2))


class ConvBN(GatedNet):
    """conv-BN-ReLU twice and a linear head: the affine form holds (ReLU and mean are homogeneous)."""

    group_sizes: ClassVar[dict[str, int]] = {"conv1": 6, "conv2": 5}

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 5, 3, bias=False), nn.BatchNorm2d(5)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(self.gated("conv1", x))))
        return self.head(self.gated("conv2", x.mean((2, 3))))


class ConvBias(GatedNet):
    """Convolutions with bias, SiLU and max pooling: only the readers' side is exact."""

    group_sizes: ClassVar[dict[str, int]] = {"conv1": 6, "conv2": 5}

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 3, stride=2)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.silu(self.conv1(x)), 2)
        x = F.silu(self.conv2(self.gated("conv1", x)))
        return self.head(self.gated("conv2", x.mean((2, 3))))


class Linears(GatedNet):
    """A multi-layer perceptron over tokens [N, T, C]."""

    input_shape = (4, 7, 9)
    group_sizes: ClassVar[dict[str, int]] = {"fc1": 8, "fc2": 6}

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.head = nn.Linear(9, 8), nn.Linear(8, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        gate1, gate2 = self.gates.get("fc1", x.new_ones(())), self.gates.get("fc2", x.new_ones(()))
        x = F.gelu(self.fc1(x)) * gate1
        x = F.gelu(self.fc2(x)) * gate2
        return self.head(x).mean(1)


class Residual(GatedNet):
    """A stem whose channels go through two residual blocks: one shared stream, two inner groups."""

    group_sizes: ClassVar[dict[str, int]] = {"stem": 6, "a1": 4, "b1": 5}

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.a1, self.abn1 = nn.Conv2d(6, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.a2, self.abn2 = nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.b1, self.bbn1 = nn.Conv2d(6, 5, 1, bias=False), nn.BatchNorm2d(5)
        self.b2, self.bbn2 = nn.Conv2d(5, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        y = F.relu(self.abn1(self.a1(self.gated("stem", x))))
        x = F.relu(x + self.abn2(self.a2(self.gated("a1", y))))
        y = F.relu(self.bbn1(self.b1(self.gated("stem", x))))
        x = F.relu(x + self.bbn2(self.b2(self.gated("b1", y))))
        return self.head(self.gated("stem", x.mean((2, 3))))


class Concat(GatedNet):
    """Two branches concatenated, then flattened into a linear head: several positions a unit."""

    input_shape = (4, 3, 6, 6)
    group_sizes: ClassVar[dict[str, int]] = {"left": 4, "right": 3, "merge": 5}

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 3, 3)
        self.merge, self.norm = nn.Conv2d(7, 5, 3), nn.BatchNorm2d(5)
        self.head = nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat([self.gated("left", F.relu(self.left(x))), self.gated("right", self.right(x).tanh())], 1)
        x = F.relu(self.norm(self.merge(both)))
        return self.head(self.gated("merge", x).flatten(1))


class Depthwise(GatedNet):
    """Pointwise, depthwise, pointwise with ReLU6: the unit passes the depthwise filter and ends at the second
    pointwise.
    """

    group_sizes: ClassVar[dict[str, int]] = {"expand": 6, "project": 5}

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.bn1 = nn.Conv2d(3, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.depthwise, self.bn2 = nn.Conv2d(6, 6, 3, groups=6, bias=False), nn.BatchNorm2d(6)
        self.project, self.bn3 = nn.Conv2d(6, 5, 1, bias=False), nn.BatchNorm2d(5)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.bn1(self.expand(x)))
        x = F.relu6(self.bn2(self.depthwise(x)))
        x = self.bn3(self.project(self.gated("expand", x)))
        return self.head(self.gated("project", x.mean((2, 3))))


NETS = [ConvBN, ConvBias, Linears, Residual, Concat, Depthwise]


def make(net: type[GatedNet], dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[GatedNet, Tensor, Tensor]:
    """A network with lively normalisations, a batch and its targets."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = net().to(dtype)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.3, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
    x = torch.randn(net.input_shape, generator=generator, dtype=torch.float64).to(dtype)
    return model, x, torch.randint(0, 4, (net.input_shape[0],), generator=generator)


def gate_gradients(model: GatedNet, x: Tensor, target: Tensor) -> dict[str, Tensor]:
    """dE/dz of every group by autograd through explicit gates; leaves no gradient behind."""
    gates = {name: torch.ones(size, dtype=x.dtype, requires_grad=True) for name, size in model.group_sizes.items()}
    model.gates = gates
    try:
        loss = F.cross_entropy(model(x), target)
        gradients = torch.autograd.grad(loss, list(gates.values()))
    finally:
        model.gates = {}
    return dict(zip(gates, gradients, strict=True))
