"""What the networks of these tests are made of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def conv(a: int, b: int, k: int = 3, **kwargs: Any) -> nn.Conv2d:
    return nn.Conv2d(a, b, k, padding=k // 2, **kwargs)


class Net(nn.Module):
    """Layers by keyword, the forward pass given by a subclass."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)


def image(n: int = 2, size: int = 8) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))
