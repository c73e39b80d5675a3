"""Networks with a gate of ones at every place where a sum over parameters may stand for its gradient: the truth.

The networks that ``gated_nets`` holds have one gate a group, at its readers. These have named places anywhere, and one
backward pass gives both sides of an identity: the gates' gradients and the parameters'. Nothing here uses the package.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PlacedNet(nn.Module):
    """``self.at(place, x)`` multiplies a dimension by that place's gate while ``self.places`` is not None."""

    shape: tuple[int, ...] = (4, 3, 10, 10)

    def __init__(self) -> None:
        super().__init__()
        self.places: dict[str, Tensor] | None = None

    def at(self, place: str, x: Tensor, dim: int = 1) -> Tensor:
        if self.places is None:
            return x
        gate = self.places.setdefault(place, torch.ones(x.shape[dim], dtype=torch.float64, requires_grad=True))
        if x.dtype == torch.float64:
            return x * gate.view([-1 if d == dim % x.dim() else 1 for d in range(x.dim())])
        gate.grad = torch.zeros_like(gate)
        x.register_hook(functools.partial(_add_to, gate.grad, x.detach(), dim % x.dim()))
        return x


def _add_to(total: Tensor, a: Tensor, dim: int, g: Tensor) -> None:
    """Add Σ a·g, which autograd would round to the 16 bits of a gate's product."""
    total += (a.double() * g.double()).movedim(dim, 0).flatten(1).sum(1)


class Normed(PlacedNet):
    """A normalisation with scale and shift, then only what keeps proportions, then a reader."""

    def __init__(self, norm: nn.Module, last: bool = False) -> None:
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(3, 6, 3), norm, last
        self.dropout, self.reader, self.head = nn.Dropout(0.3), nn.Conv2d(6, 5, 1), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if self.last else self.norm(x)
        x = self.at("ReLU", F.relu(self.at("norm", x)))
        x = F.avg_pool2d(self.at("max pool", F.max_pool2d(x, 2)), 2)
        x = F.silu(self.reader(self.at("pools and dropout", self.dropout(x))))
        return self.head(x.mean((2, 3)))


class Activated(PlacedNet):
    """A BatchNorm, an activation and a reader."""

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.norm, self.activation = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), activation
        self.reader, self.head = nn.Conv2d(6, 5, 3), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        # So large that a ReLU6 cuts something off.
        x = self.at("behind", self.activation(4 * self.norm(self.conv(x))))
        return self.head(torch.tanh(self.reader(x)).mean((2, 3)))


class Written(PlacedNet):
    """A layer whose output meets nothing that takes its scale away."""

    def __init__(self, writer: nn.Module) -> None:
        super().__init__()
        self.first, self.writer, self.head = nn.Conv2d(3, 6, 1), writer, nn.LazyLinear(4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        linear = isinstance(self.writer, nn.Linear)
        x = self.at("output", self.writer(x.flatten(2).mT).mT if linear else self.writer(x))
        return self.head(torch.sin(F.relu(x)).flatten(1))


class Read(PlacedNet):
    """A layer that is linear in the channels it reads, behind something that is not."""

    def __init__(self, reader: nn.Module) -> None:
        super().__init__()
        self.first, self.reader, self.head = nn.Conv2d(3, 6, 3), reader, nn.LazyLinear(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.at("input", F.gelu(self.first(x)))
        x = self.reader(x.flatten(2).mT).mT if isinstance(self.reader, nn.Linear) else self.reader(x)
        return self.head(torch.tanh(x).flatten(1))


class Joined(PlacedNet):
    """Two branches, concatenated; the right one is read once more by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.norm, self.right = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(3, 3, 3)
        self.both, self.alone, self.head = nn.Conv2d(7, 5, 3), nn.Conv2d(3, 5, 3), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        left = self.at("left", F.relu(self.norm(self.left(x))))
        right = self.at("right", F.gelu(self.right(x)))
        return self.head(F.silu(self.both(torch.cat([left, right], 1)) + self.alone(right)).mean((2, 3)))


class Excited(PlacedNet):
    """Squeeze and excitation: a gate before it, and one behind its product."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.squeeze, self.excite = nn.Linear(6, 3), nn.Linear(3, 6)
        self.reader, self.head = nn.Conv2d(6, 5, 3), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.at("before", F.relu(self.norm(self.conv(x))))
        factor = torch.sigmoid(4 * self.excite(F.relu(self.squeeze(4 * x.mean((2, 3))))))
        x = self.at("behind", x * factor[:, :, None, None])
        return self.head(F.silu(self.reader(x)).mean((2, 3)))


class Tied(PlacedNet):
    """One convolution, and one BatchNorm, used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.conv, self.norm = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        for use in ("once", "twice"):
            x = F.relu(self.at(f"norm, {use}", self.norm(self.conv(self.at(f"input, {use}", x)))))
        return self.head(x.mean((2, 3)))


class Block(nn.Module):
    """A bottleneck; ``down`` where it starts a stage."""

    def __init__(self, wide: int, narrow: int, out: int, stride: int, start: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(wide, narrow, 1, bias=False), nn.BatchNorm2d(narrow)
        self.conv2, self.bn2 = nn.Conv2d(narrow, narrow, 3, stride, 1, bias=False), nn.BatchNorm2d(narrow)
        self.conv3, self.bn3 = nn.Conv2d(narrow, out, 1, bias=False), nn.BatchNorm2d(out)
        self.down = nn.Conv2d(wide, out, 1, stride, bias=False) if start else None
        self.down_bn = nn.BatchNorm2d(out) if start else None

    def forward(self, x: Tensor, at: Callable[[str, Tensor], Tensor]) -> Tensor:
        skip = x if self.down is None or self.down_bn is None else self.down_bn(self.down(x))
        y = F.relu(at("inner1", self.bn1(self.conv1(x))))
        y = F.relu(at("inner2", self.bn2(self.conv2(y))))
        return at("output", F.relu(self.bn3(self.conv3(y)) + skip))


class Stages(PlacedNet):
    """A stem and two stages of bottlenecks, with a gate at every block's output."""

    def __init__(self, width: int = 4, blocks: int = 3) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 2 * width, 3, bias=False), nn.BatchNorm2d(2 * width)
        shapes = [(2 * width, width, 4 * width, 1), (4 * width, 2 * width, 8 * width, 2)]
        self.stages = nn.ModuleList(
            nn.ModuleList(
                Block(wide if b == 0 else out, narrow, out, stride if b == 0 else 1, b == 0) for b in range(blocks)
            )
            for wide, narrow, out, stride in shapes
        )
        self.head = nn.Linear(8 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        for s, stage in enumerate(self.stages):
            for b, block in enumerate(stage):
                x = block(x, lambda place, y, at=f"{s}.{b}": self.at(f"{at} {place}", y))
        return self.head(x.mean((2, 3)))


def make(
    model: PlacedNet, seed: int = 0, batch: int | None = None, size: int | None = None
) -> tuple[Any, Tensor, Tensor]:
    """The network in float64 with lively normalisations, a batch and its targets."""
    torch.manual_seed(seed)
    shape = (batch or model.shape[0], model.shape[1], *(size or length for length in model.shape[2:]))
    x, target = torch.randn(shape, dtype=torch.float64), torch.randint(0, 4, (shape[0],))
    model.double()
    with torch.no_grad():
        model(x)  # gives lazy layers their shape
    for module in model.modules():
        if getattr(module, "affine", False) or isinstance(module, nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.3, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
    return model, x, target


def backward(model: PlacedNet, x: Tensor, target: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
    """One backward pass: the gradient of the gate at every place, and those of the parameters in the model."""
    model.zero_grad()
    model.places = {}
    try:
        (F.cross_entropy(model(x), target) * scale).backward()
        return {place: gate.grad for place, gate in model.places.items() if gate.grad is not None}
    finally:
        model.places = None
