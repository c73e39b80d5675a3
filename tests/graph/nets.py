"""Small networks, one construct each, and what their groups must be, worked out by hand.

``expected.py`` holds what may be cut from each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.graph.attention_nets import CountedHeads, FixedHeads, FusedHeads, HeadsByHand, OpenHeads, WidthFromInput
from tests.graph.base import Net, conv, image
from tests.graph.odd_nets import (
    GLU,
    BufferAdd,
    ByHand,
    ConstantAdd,
    ConstantScale,
    ConstantSlice,
    ConstantSplit,
    ConstantView,
    Functional,
    InPlace,
    InPlaceFresh,
    OneD,
    Parametrized,
    PReLUed,
    SecondOutput,
    Shared,
    ThreeD,
    Tied,
    TrainHead,
    Unknown,
)


class ConvBN(Net):
    def __init__(self) -> None:
        super().__init__(a=conv(3, 8, bias=False), bn=nn.BatchNorm2d(8), b=conv(8, 4), fc=nn.Linear(4, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn(self.a(x))), 2)
        return self.fc(F.relu(self.b(x)).mean((2, 3)))


class MLP(Net):
    def __init__(self) -> None:
        super().__init__(a=nn.Linear(6, 10), b=nn.Linear(10, 7, bias=False), c=nn.Linear(7, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.gelu(self.b(torch.tanh(self.a(x)))))


class Residual(Net):
    """stem + block(stem): one group for the stream, one inside the block."""

    def __init__(self) -> None:
        super().__init__(
            stem=conv(3, 8),
            one=conv(8, 6),
            bn1=nn.BatchNorm2d(6),
            two=conv(6, 8),
            bn2=nn.BatchNorm2d(8),
            fc=nn.Linear(8, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.bn2(self.two(F.relu(self.bn1(self.one(x))))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Concat(Net):
    def __init__(self) -> None:
        super().__init__(a=conv(3, 4), b=conv(3, 6), bn=nn.BatchNorm2d(10), c=conv(10, 3), fc=nn.Linear(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.a(x), self.b(x)], dim=1)
        return self.fc(self.c(F.silu(self.bn(x))).mean((2, 3)))


class Depthwise(Net):
    """1x1, depthwise with a channel multiplier of 2, 1x1."""

    def __init__(self) -> None:
        super().__init__(
            a=conv(3, 6, 1), d=conv(6, 12, groups=6), bn=nn.BatchNorm2d(12), b=conv(12, 4, 1), fc=nn.Linear(4, 2)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.b(F.relu6(self.bn(self.d(self.a(x))))).mean((2, 3)))


class Grouped(Net):
    """A convolution of 4 groups: a unit is 2 channels in and 3 out."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 8), g=conv(8, 12, groups=4), b=conv(12, 5), fc=nn.Linear(5, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.b(self.g(F.relu(self.a(x))))).mean((2, 3)))


class Transposed(Net):
    def __init__(self) -> None:
        super().__init__(
            a=conv(3, 6),
            up=nn.ConvTranspose2d(6, 8, 2, stride=2),
            g=nn.ConvTranspose2d(8, 12, 2, stride=2, groups=4),
            b=conv(12, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.g(F.relu(self.up(F.relu(self.a(x)))))))


class SqueezeExcite(Net):
    def __init__(self) -> None:
        super().__init__(a=conv(3, 8), down=conv(8, 4, 1), up=conv(4, 8, 1), b=conv(8, 5), fc=nn.Linear(5, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.a(x))
        scale = torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))
        return self.fc(F.relu(self.b(x * scale)).mean((2, 3)))


class GroupNormed(Net):
    """A unit is a norm group of 3 channels."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 12), gn=nn.GroupNorm(4, 12), b=conv(12, 5), fc=nn.Linear(5, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.b(F.relu(self.gn(self.a(x)))).mean((2, 3)))


class LayerNormed(Net):
    """Tokens: embed, then x + mlp(norm(x)); the norm lies inside the group of the stream."""

    def __init__(self) -> None:
        super().__init__(
            embed=nn.Linear(6, 8),
            norm=nn.LayerNorm(8),
            up=nn.Linear(8, 10),
            down=nn.Linear(10, 8),
            head=nn.Linear(8, 3),
        )
        self.scale = nn.Parameter(torch.full((8,), 1e-6))
        self.position = nn.Parameter(torch.zeros(1, 5, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.position
        x = x + self.scale * self.down(F.gelu(self.up(self.norm(x))))
        return self.head(x.mean(1))


class Shuffle(Net):
    """A channel shuffle between two convolutions: the same channel of each half is one unit."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 8), b=conv(8, 8), c=conv(8, 6), fc=nn.Linear(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(F.relu(self.a(x)))
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.fc(F.relu(self.c(x)).mean((2, 3)))


class PixelShuffle(Net):
    """Four channels become one of twice the size, and one becomes four again."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 12), b=conv(3, 5), c=conv(20, 6), fc=nn.Linear(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = F.pixel_unshuffle(self.b(F.pixel_shuffle(self.a(x), 2)), 2)
        return self.fc(F.relu(self.c(x)).mean((2, 3)))


class RMSNormed(Net):
    """An RMSNorm, whose mean square is taken over what is kept, inside a residual stream."""

    def __init__(self) -> None:
        super().__init__(
            embed=nn.Linear(6, 8),
            norm=nn.RMSNorm(8),
            up=nn.Linear(8, 10, bias=False),
            down=nn.Linear(10, 8, bias=False),
            head=nn.Linear(8, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head((x + self.down(F.silu(self.up(self.norm(x))))).mean(1))


class C2f(Net):
    """``chunk`` of a convolution: its halves are one set of units, and the second runs through a residual block."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 8, 1), m1=conv(4, 6), m2=conv(6, 4), b=conv(12, 5, 1), fc=nn.Linear(5, 2))

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.a(x).chunk(2, 1))
        parts.append(parts[-1] + self.m2(F.relu(self.m1(parts[-1]))))
        return self.fc(F.relu(self.b(torch.cat(parts, 1))).mean((2, 3)))


class Flatten(Net):
    """The channels of a 2x2 map, flattened: four positions a unit in the linear layer."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 6), fc=nn.Linear(24, 8), out=nn.Linear(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.fc(F.adaptive_max_pool2d(self.a(x), 2).flatten(1))))


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "conv_bn": (ConvBN, image),
    "mlp": (MLP, lambda: torch.randn(4, 6)),
    "residual": (Residual, image),
    "concat": (Concat, image),
    "depthwise": (Depthwise, image),
    "grouped": (Grouped, image),
    "transposed": (Transposed, lambda: image(2, 4)),
    "squeeze_excite": (SqueezeExcite, image),
    "group_norm": (GroupNormed, image),
    "layer_norm": (LayerNormed, lambda: torch.randn(2, 5, 6)),
    "shuffle": (Shuffle, image),
    "pixel_shuffle": (PixelShuffle, image),
    "rms_norm": (RMSNormed, lambda: torch.randn(2, 5, 6)),
    "open_heads": (OpenHeads, lambda: torch.randn(2, 5, 6)),
    "counted_heads": (CountedHeads, lambda: torch.randn(2, 5, 6)),
    "fused_heads": (FusedHeads, lambda: torch.randn(2, 5, 6)),
    "heads_by_hand": (HeadsByHand, lambda: torch.randn(2, 5, 6)),
    "fixed_heads": (FixedHeads, lambda: torch.randn(2, 5, 6)),
    "width_from_input": (WidthFromInput, lambda: torch.randn(2, 5, 12)),
    "c2f": (C2f, image),
    "flatten": (Flatten, image),
    "constant_slice": (ConstantSlice, image),
    "constant_split": (ConstantSplit, image),
    "constant_view": (ConstantView, image),
    "constant_scale": (ConstantScale, image),
    "second_output": (SecondOutput, image),
    "constant_add": (ConstantAdd, image),
    "buffer_add": (BufferAdd, image),
    "in_place": (InPlace, image),
    "in_place_fresh": (InPlaceFresh, image),
    "shared": (Shared, image),
    "functional": (Functional, lambda: {"image": image(), "gain": torch.randn(2, 1, 1, 1)}),
    "train_head": (TrainHead, image),
    "tied": (Tied, lambda: (torch.randn(4, 6),)),
    "by_hand": (ByHand, lambda: torch.randn(4, 6)),
    "parametrized": (Parametrized, image),
    "unknown": (Unknown, image),
    "one_d": (OneD, lambda: torch.randn(2, 3, 20)),
    "three_d": (ThreeD, lambda: torch.randn(2, 3, 6, 6, 6)),
    "prelu": (PReLUed, image),
    "glu": (GLU, image),
}
