"""Small networks whose units have a weight in the statistics of the normalisations around them: paths to a cut.

``weights`` maps a group's name to a vector: 1 is a unit as it is, 0 a unit that is cut. Nothing here uses the package.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def weighted(norm: nn.Module, x: Tensor, w: Tensor | None) -> Tensor:
    """A LayerNorm or RMSNorm that channel k of the last dimension enters with weight w[k]."""
    if w is None:
        return norm(x)
    mean = (w * x).sum(-1, keepdim=True) / w.sum() if isinstance(norm, nn.LayerNorm) else 0
    square = (w * (x - mean).square()).sum(-1, keepdim=True) / w.sum()
    eps = torch.finfo(x.dtype).eps if norm.eps is None else norm.eps
    y = (x - mean) / (square + eps).sqrt() * norm.weight
    return y + norm.bias if isinstance(norm, nn.LayerNorm) else y


class WeightedNet(nn.Module):
    """``weights[group]``, if set, is every unit's weight: in the statistics it enters and at its readers."""

    shape: tuple[int, ...] = (3, 5, 9)
    width: ClassVar[dict[str, int]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.weights: dict[str, Tensor] = {}

    def w(self, group: str) -> Tensor | None:
        weight = self.weights.get(group)
        return None if weight is None else weight.repeat_interleave(self.width.get(group, 1))

    def at_reader(self, group: str, x: Tensor) -> Tensor:
        weight = self.w(group)
        return x if weight is None else x * weight


class Mlp(WeightedNet):
    """One LayerNorm between a writer and a reader; the second group has none."""

    def __init__(self, norm: nn.Module | None = None, units: int = 8) -> None:
        super().__init__()
        self.fc1, self.norm = nn.Linear(9, units), nn.LayerNorm(units) if norm is None else norm
        self.fc2, self.head = nn.Linear(units, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(weighted(self.norm, self.fc1(x), self.w("fc1")))
        x = F.gelu(self.fc2(self.at_reader("fc1", x)))
        return self.head(self.at_reader("fc2", x)).mean(1)


class RmsMlp(Mlp):
    def __init__(self) -> None:
        super().__init__(nn.RMSNorm(8, eps=0.2))


class Stream(WeightedNet):
    """A residual stream with three LayerNorms inside its group, one of them with a large eps."""

    def __init__(self, kind: type[nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(9, 8), nn.Linear(8, 4)
        self.norms = nn.ModuleList([kind(8), kind(8, eps=0.5), kind(8)])
        self.up = nn.ModuleList([nn.Linear(8, 10), nn.Linear(8, 7)])
        self.down = nn.ModuleList([nn.Linear(10, 8), nn.Linear(7, 8)])

    def block(self, at: int, x: Tensor) -> Tensor:
        y = weighted(self.norms[at], x, self.w("embed"))
        y = F.gelu(self.up[at](self.at_reader("embed", y)))
        return self.down[at](self.at_reader(f"up.{at}", y))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for at in range(2):
            x = x + self.block(at, x)
        return self.head(self.at_reader("embed", weighted(self.norms[2], x, self.w("embed")).mean(1)))


class RmsStream(Stream):
    def __init__(self) -> None:
        super().__init__(nn.RMSNorm)


class OneNormTwice(Stream):
    """The same LayerNorm is called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.norms[1] = self.norms[2] = self.norms[0]


class Checkpointed(Stream):
    """Blocks run again in the backward pass; their outputs are changed in place."""

    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for at in range(2):
            x = x + checkpoint(self.block, at, x, use_reentrant=self.reentrant)
        return self.head(self.at_reader("embed", weighted(self.norms[2], x, self.w("embed")).mean(1)))


class Reentrant(Checkpointed):
    reentrant = True


class Wide(WeightedNet):
    """A grouped convolution: a unit takes two channels of a LayerNorm over the channels of an image."""

    shape = (3, 3, 6, 6)
    width: ClassVar[dict[str, int]] = {"a": 2}

    def __init__(self) -> None:
        super().__init__()
        self.a, self.grouped = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=4)
        self.norm, self.out = nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(F.silu(self.a(x))).permute(0, 2, 3, 1)
        return self.out(self.at_reader("a", F.silu(weighted(self.norm, x, self.w("a"))))).mean((1, 2))


class Joined(WeightedNet):
    """Two groups side by side in one LayerNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.norm, self.out = nn.Linear(9, 4), nn.Linear(9, 3), nn.LayerNorm(7), nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        w = torch.cat([self.weights["left"], self.weights["right"]]) if self.weights else None
        x = weighted(self.norm, torch.cat([self.left(x), self.right(x).tanh()], -1), w)
        return self.out(F.relu(x) if w is None else F.relu(x) * w).mean(1)


class Functional(WeightedNet):
    """No module: plain parameters, keyword arguments, and a ReLU in place behind the normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(9, 8), nn.Linear(8, 4)
        self.scale, self.shift = nn.Parameter(torch.rand(8) + 0.5), nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        if self.weights:
            norm = nn.LayerNorm(self.scale.shape, eps=0.1)
            norm.weight, norm.bias = self.scale, self.shift
            x = F.relu(weighted(norm, x, self.w("fc1")))
        else:
            x = F.relu_(
                F.layer_norm(input=x, normalized_shape=self.scale.shape, weight=self.scale, bias=self.shift, eps=0.1)
            )
        return self.fc2(self.at_reader("fc1", x).mean(1))


NETS = [Mlp, RmsMlp, Stream, RmsStream, OneNormTwice, Checkpointed, Reentrant, Wide, Joined, Functional]


def make(
    net: type[WeightedNet], seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[WeightedNet, Tensor, Tensor]:
    """A network with lively normalisations, a batch that isn't centred, and targets."""
    torch.manual_seed(seed)
    model = net()
    for module in model.modules():
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            nn.init.uniform_(module.weight, 0.3, 1.7)
        if isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.bias, 0, 0.3)
    return model.to(dtype), torch.randn(net.shape, dtype=dtype) + 0.3, torch.randint(0, 4, net.shape[:1])
