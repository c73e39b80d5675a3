"""Small networks whose readers stand behind ReLUs in every way that Python knows, and some that need gates."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RidingNet(nn.Module):
    """Base.

    Attributes:
        shape: of the inputs.
        gates: readers whose sums need a pass of their own, in a pass as it was recorded.
    """

    shape: tuple[int, ...] = (3, 3, 8, 8)
    gates: int = 0

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 5, 3)
        self.norm, self.head = nn.BatchNorm2d(6), nn.Linear(5, 4)

    def finish(self, z: Tensor) -> Tensor:
        return self.head(F.relu(self.c(z)).mean((2, 3)))


class Calls(RidingNet):
    """Every name a ReLU goes by."""

    def __init__(self) -> None:
        super().__init__()
        self.d, self.e = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.a(x)))
        x = self.b(x).relu_()
        x = torch.relu_(self.d(x))
        return self.finish(F.relu(input=self.e(input=x), inplace=True))


class Reused(RidingNet):
    """One in-place module for all, in a Sequential and not assigned."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.front = nn.Sequential(self.a, self.norm, self.relu, nn.MaxPool2d(2, 1), self.b, self.relu)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c(self.front(x))
        self.relu(x)
        return self.head(x.mean((2, 3)))


class Residual(RidingNet):
    """A stream through two blocks, added in place and not, and once more read by two layers at its end."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.side = nn.Conv2d(6, 7, 1), nn.Conv2d(7, 6, 1), nn.Conv2d(6, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.a(x))), 3, 2, 1)
        x = F.relu(torch.add(self.b(x), x))
        y = self.down(F.relu(self.up(x)))
        y += x
        y = F.relu(y, inplace=True)
        return self.head(F.relu(self.c(y) + self.side(y)).mean((2, 3)))


class Pooled(RidingNet):
    """Functions that keep the sums: pooling, dropout, views."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.pool = nn.Linear(5 * 4, 8), nn.AdaptiveAvgPool2d(2)
        self.drop, self.last = nn.Dropout(0.3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout2d(F.avg_pool2d(torch.relu(self.a(x)), 2), 0.2, self.training)
        x = F.relu(self.c(F.relu(self.b(x))))
        x = self.drop(F.relu(self.wide(torch.flatten(self.pool(x), 1))))
        return self.last(x)


class Tokens(RidingNet):
    """A perceptron over [N, T, C]: the channels come last."""

    shape = (3, 5, 6)

    def __init__(self) -> None:
        super().__init__()
        self.up, self.mid, self.down = nn.Linear(6, 8), nn.Linear(8, 7), nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(F.relu(self.up(x)), 0.2, self.training)
        return self.down(self.mid(x).relu()).mean(1)


class FlatTokens(RidingNet):
    """Tokens side by side: a unit is one channel of each, and no block of them."""

    shape = (3, 8, 6)
    gates = 1

    def __init__(self) -> None:
        super().__init__()
        self.up, self.head = nn.Linear(6, 8), nn.Linear(8 * 8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.up(x)).flatten(1))


class Concatenated(RidingNet):
    """What is concatenated needs a gate behind it, and so does what has three uses; a later ReLU gives a ride again."""

    gates = 2

    def __init__(self) -> None:
        super().__init__()
        self.join, self.after = nn.Conv2d(12, 6, 1), nn.BatchNorm2d(12)
        self.first = nn.Conv2d(12, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        x = torch.cat([F.relu(self.first(torch.cat([x, F.relu(self.b(x))], 1))), x], 1)
        return self.finish(F.relu(self.join(F.relu(self.after(x)))))


class Smooth(RidingNet):
    """ReLU6, GELU and hard-swish need gates."""

    gates = 3

    def __init__(self) -> None:
        super().__init__()
        self.d = nn.Conv2d(6, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.d(F.gelu(self.b(F.relu6(self.norm(self.a(x)))))))
        return self.finish(x)


class TwoOutputs(RidingNet):
    """The output of the first ReLU is one of the model's, so nothing is pruned there and nothing summed."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = F.relu(self.a(x))
        return self.finish(F.relu(self.b(z))), z


class Scaled(RidingNet):
    """Three uses, one of which is a product: a gate."""

    gates = 2

    def __init__(self) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Linear(6, 3), nn.Linear(3, 6)

    def forward(self, x: Tensor) -> Tensor:
        z = F.relu(self.a(x))
        s = torch.sigmoid(self.excite(F.relu(self.squeeze(z.mean((2, 3))))))
        return self.finish(z * s[:, :, None, None])


class Twice(RidingNet):
    """One layer is called twice, on two ReLUs."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.b(F.relu(self.a(x))))
        return self.finish(F.relu(self.b(x)))


class TwoLengths(RidingNet):
    """Two readers of one ReLU at two resolutions: per-example means divide by two numbers, so a gate before each."""

    gates = 2

    def __init__(self) -> None:
        super().__init__()
        self.d = nn.Conv2d(6, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = F.relu(self.a(x))
        y = F.relu(self.c(z).mean((2, 3)) + self.d(F.max_pool2d(z, 2)).mean((2, 3)))
        return self.head(y)


class Changed(RidingNet):
    """A pooled tensor is changed in place before it is read."""

    gates = 1

    def forward(self, x: Tensor) -> Tensor:
        z = F.max_pool2d(F.relu(self.a(x)), 2)
        z += 0.1
        return self.finish(F.relu(self.b(z)))


class Kept(RidingNet):
    """A module keeps its activation, for whoever asks for the gradient of it."""

    gates = 1

    def forward(self, x: Tensor) -> Tensor:
        self.kept = [F.relu(self.a(x))]
        return self.finish(F.relu(self.b(self.kept[0])))


NETS = (
    Calls,
    Reused,
    Residual,
    Pooled,
    Tokens,
    FlatTokens,
    Concatenated,
    Smooth,
    TwoOutputs,
    Scaled,
    Twice,
    TwoLengths,
    Changed,
    Kept,
)
