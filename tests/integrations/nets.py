"""Networks that Torch-Pruning traces rightly, and gates at any layer's inputs: the truth, without the package."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.graph.base import Net, conv, image


def layer(a: int, b: int, k: int = 3, **options: Any) -> nn.Sequential:
    return nn.Sequential(conv(a, b, k, bias=False, **options), nn.BatchNorm2d(b), nn.ReLU())


class Inverted(nn.Module):
    """x + 1x1, depthwise, 1x1, each with a BatchNorm: MobileNet V2's block."""

    def __init__(self, width: int, inside: int) -> None:
        super().__init__()
        self.up, self.depthwise = layer(width, inside, 1), layer(inside, inside, groups=inside)
        self.down, self.norm = conv(inside, width, 1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.down(self.depthwise(self.up(x))))


class Mobile(nn.Module):
    def __init__(self, channels: int = 3, width: int = 8, classes: int = 5) -> None:
        super().__init__()
        self.stem, self.one = layer(channels, width), Inverted(width, 3 * width)
        self.wider, self.two = layer(width, 2 * width, stride=2), Inverted(2 * width, 6 * width)
        self.fc = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.two(self.wider(self.one(self.stem(x)))).mean((2, 3)))


class Joined(Net):
    """Two layers side by side, then transposed convolutions, and a flattened map."""

    def __init__(self) -> None:
        super().__init__(
            a=conv(3, 6), b=conv(6, 4), c=conv(10, 5), d=nn.ConvTranspose2d(5, 4, 2), e=nn.Linear(4 * 81, 7),
            fc=nn.Linear(7, 3),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.a(x))
        x = self.c(torch.cat([torch.tanh(self.b(x)), x], 1))
        return self.fc(F.gelu(self.e(F.gelu(self.d(F.relu(x))).flatten(1))))


class Gated(Net):
    """The halves of one layer are multiplied: its channels c and c + 8 go together."""

    def __init__(self) -> None:
        super().__init__(a=nn.Linear(6, 16), b=nn.Linear(8, 5), fc=nn.Linear(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        one, other = self.a(x).chunk(2, 1)
        return self.fc(F.relu(self.b(one * other.sigmoid())))


class Twice(Net):
    """One layer runs twice on a residual stream that it reads and writes."""

    def __init__(self) -> None:
        super().__init__(a=nn.Linear(6, 8), b=nn.Linear(8, 8), fc=nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.a(x))
        x = x + F.gelu(self.b(x))
        return self.fc(x + F.gelu(self.b(x)))


class Grouped(Net):
    def __init__(self) -> None:
        super().__init__(a=conv(3, 8), g=conv(8, 12, groups=4), b=conv(12, 5), fc=nn.Linear(5, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.b(F.silu(self.g(F.silu(self.a(x)))))).mean((2, 3)))


class GroupNormed(Net):
    def __init__(self) -> None:
        super().__init__(a=conv(3, 12), norm=nn.GroupNorm(4, 12), b=conv(12, 5), fc=nn.Linear(5, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.b(F.relu(self.norm(self.a(x)))).mean((2, 3)))


class Chain(Net):
    """What carries channels on, one after another, from a to the inputs of ``reader``."""

    def __init__(self, *between: nn.Module, reader: nn.Module | None = None) -> None:
        super().__init__(a=conv(3, 6), between=nn.Sequential(*between), reader=reader or conv(6, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.reader(self.between(self.a(x))).mean((2, 3))


class Stream(Net):
    """Tokens: a linear layer and a position, then a layer scaled by a parameter, and a frozen reader of the sum."""

    def __init__(self) -> None:
        super().__init__(embed=nn.Linear(6, 8), up=nn.Linear(8, 10), down=nn.Linear(10, 8), fc=nn.Linear(8, 3))
        self.position, self.scale = nn.Parameter(torch.randn(1, 5, 8)), nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.position
        x = x + self.scale * self.down(F.gelu(self.up(x)))
        return self.fc(x).mean(1)


class Attention(Net):
    def __init__(self) -> None:
        super().__init__(embed=nn.Linear(6, 8), mha=nn.MultiheadAttention(8, 2, batch_first=True), fc=nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.fc(x + self.mha(x, x, x, need_weights=False)[0]).mean(1)


def tokens() -> Tensor:
    return torch.randn(4, 5, 6)


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "depthwise": (Mobile, lambda: image(4)),
    "joined": (Joined, lambda: image(4)),
    "gated": (Gated, lambda: torch.randn(4, 6)),
    "twice": (Twice, lambda: torch.randn(4, 6)),
    "tokens": (Stream, tokens),
}


def gates(model: nn.Module, x: Tensor, sizes: Mapping[str, tuple[str, int]]) -> dict[str, Tensor]:
    """dE/dz of gates of one: ``{gate: [size]}``.

    Args:
        model: scored by the mean square of its outputs, whose gradients it keeps.
        x: its inputs.
        sizes: ``{module: (gate, size)}``: this gate stands at the module's inputs, over and over along dimension 1, or
            along the last one of tokens.
    """
    zs = {gate: torch.ones(size, dtype=x.dtype, requires_grad=True) for gate, size in sizes.values()}

    def hook(z: Tensor) -> Callable[..., tuple[Tensor, ...]]:
        def times(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            def gated(a: Tensor) -> Tensor:
                dim = 2 if a.dim() == 3 else 1
                return a * z.repeat(a.shape[dim] // len(z)).view([-1 if d == dim else 1 for d in range(a.dim())])

            return tuple(gated(a) for a in inputs)

        return times

    hooks = [model.get_submodule(name).register_forward_pre_hook(hook(zs[gate])) for name, (gate, _) in sizes.items()]
    model.zero_grad()
    loss_of(model(x)).backward()
    for each in hooks:
        each.remove()
    return {gate: z.grad for gate, z in zs.items() if z.grad is not None}


def loss_of(outputs: Tensor) -> Tensor:
    return outputs.square().sum(1).mean()
