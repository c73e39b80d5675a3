"""Small networks whose Python code, not their layers, is what makes them hard."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.graph.base import Net, conv


class ConstantSlice(Net):
    """``x[:, :4]``: a number that a cut doesn't change."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 8), b=conv(4, 6), fc=nn.Linear(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.b(self.a(x)[:, :4])).mean((2, 3)))


class ConstantSplit(Net):
    """``split(4)``: looks like a chunk until the channels are fewer."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 8), b=conv(4, 6), c=conv(4, 6), fc=nn.Linear(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.a(x).split(4, 1)
        return self.fc(F.relu(self.b(one) + self.c(two)).mean((2, 3)))


class ConstantView(Net):
    """``view(n, 16, -1)``: the number of channels held by the code."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 16), b=nn.Conv1d(16, 6, 1), fc=nn.Linear(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).view(x.shape[0], 16, -1)
        return self.fc(F.relu(self.b(x)).mean(2))


class ConstantScale(Net):
    """Divided by the number of channels: masked and cut differ."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 8), b=conv(8, 6), fc=nn.Linear(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.fc(F.relu(self.b(x / x.shape[1])).mean((2, 3)))


class SecondOutput(Net):
    """An inner feature map is returned as well."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 8), b=conv(8, 6), c=conv(6, 4), fc=nn.Linear(4, 2))

    def forward(self, x: Tensor) -> dict[str, Any]:
        feature = self.b(F.relu(self.a(x)))
        return {"logits": self.fc(self.c(F.relu(feature)).mean((2, 3))), "inner": [feature]}


class ConstantAdd(Net):
    """A constant of the size of the channels that is no buffer of the model."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 8), b=conv(8, 6), fc=nn.Linear(6, 2))
        self.shift = [torch.arange(8.0).view(1, 8, 1, 1)]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.b(self.a(x) + self.shift[0])).mean((2, 3)))


class BufferAdd(Net):
    """The same as a buffer: it shrinks with the channels."""

    shift: Tensor

    def __init__(self) -> None:
        super().__init__(a=conv(3, 8), b=conv(8, 6), fc=nn.Linear(6, 2))
        self.register_buffer("shift", torch.arange(8.0).view(1, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.b(self.a(x) + self.shift)).mean((2, 3)))


class InPlace(Net):
    """In-place adds, activations and writes into a tensor made like another."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 8), b=conv(8, 8), c=conv(8, 4), fc=nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu_(self.a(x))
        y = torch.zeros_like(x)
        y.copy_(x).mul_(2.0)
        y += F.silu(self.b(x), inplace=True)
        y[:, :, 0] *= 3
        return self.fc(self.c(y).mean((2, 3)))


class InPlaceFresh(Net):
    """Written into a tensor of a size that the code gives: stays."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 8), b=conv(8, 4), fc=nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros(x.shape[0], 8, *x.shape[2:])
        y[:, :, 1:] = self.a(x)[:, :, 1:]
        return self.fc(F.relu(self.b(y)).mean((2, 3)))


class Shared(Net):
    """One module used twice, its own reader: input and output are one set of channels."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 8), s=conv(8, 8), b=conv(8, 4), fc=nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        x = F.relu(self.s(x))
        x = F.relu(self.s(x))
        return self.fc(F.relu(self.b(x)).mean((2, 3)))


class Functional(Net):
    """Weights called by function, keyword arguments, two inputs."""

    def __init__(self) -> None:
        super().__init__(fc=nn.Linear(6, 2))
        self.w1 = nn.Parameter(torch.randn(8, 3, 3, 3))
        self.w2 = nn.Parameter(torch.randn(6, 8, 1, 1))

    def forward(self, image: Tensor, gain: Tensor) -> dict[str, Tensor]:
        x = F.conv2d(input=image, weight=self.w1, padding=1)
        return {"y": self.fc(F.relu(F.conv2d(F.relu(x) * gain, self.w2)).mean((2, 3)))}


class TrainHead(Net):
    """A second head that runs only in train mode reads the same channels."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 8), b=conv(8, 6), fc=nn.Linear(6, 2), aux=conv(8, 3, 1))

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.a(x))
        y = self.fc(F.relu(self.b(F.dropout2d(x, 0.5, self.training))).mean((2, 3)))
        return (y, self.aux(x).mean((2, 3))) if self.training else y


class Tied(Net):
    """One matrix as a layer and, transposed, as its inverse; and a product by hand."""

    def __init__(self) -> None:
        super().__init__(a=nn.Linear(6, 10), t=nn.Linear(10, 4), out=nn.Linear(10, 5), fc=nn.Linear(5, 2))

    def forward(self, x: Tensor) -> Tensor:
        code = torch.tanh(self.t(self.a(x)))
        return self.fc(F.relu(self.out(F.linear(code, self.t.weight.t()))))


class ByHand(Net):
    """``x @ W``: a product that no reader function sees."""

    def __init__(self) -> None:
        super().__init__(a=nn.Linear(6, 10), b=nn.Linear(4, 7), fc=nn.Linear(7, 2))
        self.w = nn.Parameter(torch.randn(10, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.b(F.relu(self.a(x)) @ self.w)))


class Parametrized(Net):
    """A weight that is computed from others."""

    def __init__(self) -> None:
        super().__init__(
            a=conv(3, 8),
            w=nn.utils.parametrizations.weight_norm(conv(8, 6)),
            b=conv(6, 5),
            c=conv(5, 4),
            fc=nn.Linear(4, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.c(F.relu(self.b(F.relu(self.w(F.relu(self.a(x)))))))).mean((2, 3)))


class Unknown(Net):
    """A softmax over channels, a mean over channels, and an op without a rule (cummax), one after the other."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 8), b=conv(8, 8), c=conv(8, 8), d=conv(8, 6), e=conv(6, 4), fc=nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).softmax(1))
        x = self.c(x - x.mean(1, keepdim=True))
        return self.fc(F.relu(self.e(F.relu(self.d(x.cummax(2).values)))).mean((2, 3)))


class OneD(Net):
    def __init__(self) -> None:
        super().__init__(
            a=nn.Conv1d(3, 8, 3),
            bn=nn.BatchNorm1d(8),
            b=nn.Conv1d(8, 6, 3),
            bnl=nn.BatchNorm1d(5),
            fc=nn.Linear(6, 5),
            out=nn.Linear(5, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool1d(F.leaky_relu(self.bn(self.a(x))), 2)
        return self.out(F.relu(self.bnl(self.fc(F.max_pool1d(self.b(x), 2).amax(2)))))


class ThreeD(Net):
    def __init__(self) -> None:
        super().__init__(a=nn.Conv3d(3, 6, 3), bn=nn.BatchNorm3d(6), b=nn.Conv3d(6, 4, 1), fc=nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool3d(F.interpolate(F.pad(self.bn(self.a(x)), (1, 1)), scale_factor=2), 2)
        return self.fc(self.b(x).mean((2, 3, 4)))


class PReLUed(Net):
    def __init__(self) -> None:
        super().__init__(a=conv(3, 8), act=nn.PReLU(8), b=conv(8, 4), act2=nn.PReLU(), fc=nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.act2(self.b(self.act(self.a(x)))).mean((2, 3)))


class GLU(Net):
    def __init__(self) -> None:
        super().__init__(a=conv(3, 8), b=conv(4, 6), fc=nn.Linear(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.b(F.glu(self.a(x), 1))).mean((2, 3)))
