"""Networks for digits that the command line can name."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taylor_cuda.train.models import DigitsResNet


class SmoothNet(nn.Module):
    """Convolutions, norms of single examples and no kinks: rounding stays rounding, on any number of ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 12, 3, padding=1), nn.GroupNorm(3, 12)
        self.conv2, self.norm2 = nn.Conv2d(12, 16, 3, 2, padding=1), nn.GroupNorm(4, 16)
        self.conv3, self.conv4 = nn.Conv2d(16, 20, 3, padding=1), nn.Conv2d(20, 16, 1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm2(self.conv2(F.silu(self.norm1(self.conv1(x))))))
        x = x + self.conv4(F.silu(self.conv3(x)))
        return torch.tanh(self.head(x.mean((2, 3)))) * 4


def smooth() -> nn.Module:
    return SmoothNet()


def coloured(num_classes: int = 10) -> nn.Module:
    """``DigitsResNet`` for three colours."""
    model = DigitsResNet(num_classes)
    model.stem[0] = nn.Conv2d(3, 32, 3, padding=1, bias=False)
    return model
