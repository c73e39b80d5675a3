"""ResNet-18 for small images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from taylor_cuda.bench.coverage.compare import count_macs
from taylor_cuda.bench.resnet import DEPTHS, BasicBlock
from taylor_cuda.train.modes import eval_mode


class SmallImageResNet18(nn.Module):
    """The 18 layers of arXiv:1512.03385 behind a 3 × 3 stem of stride 1, without max-pool, for ``[N, 1, H, W]``.

    Args:
        width: channels of the stem and the first stage; 64 in the paper.
        classes: outputs.
    """

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        blocks, inputs = list[nn.Module](), width
        for stage, depth in enumerate(DEPTHS["resnet18"]):
            for number in range(depth):
                blocks.append(BasicBlock(inputs, width << stage, 2 if stage and not number else 1))
                inputs = width << stage
        self.blocks = nn.Sequential(*blocks)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[N, classes]``."""
        x = self.blocks(self.relu(self.bn1(self.conv1(x))))
        logits: Tensor = self.fc(self.avgpool(x).flatten(1))
        return logits


def macs(model: nn.Module, size: int) -> int:
    """Multiply-accumulates for one image, as PyTorch's own counter counts them."""
    with eval_mode(model):
        return count_macs(model, torch.zeros(1, 1, size, size, device=next(model.parameters()).device))
