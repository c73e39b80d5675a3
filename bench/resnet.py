"""The residual networks of arXiv:1512.03385, so that a machine without torchvision measures them too.

Modules have torchvision's names and sit where torchvision has them, so its weights fit.
"""

from __future__ import annotations

from torch import Tensor, nn

DEPTHS = {"tiny": (1, 1), "resnet18": (2, 2, 2, 2), "resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}
"""Blocks in each stage; ``tiny`` is for trying things out."""


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions beside an identity or a projection."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = projection(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, inputs, H, W]`` to ``[N, width, H / stride, W / stride]``."""
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += x if self.downsample is None else self.downsample(x)
        result: Tensor = self.relu(y)
        return result


class Bottleneck(nn.Module):
    """A 3 x 3 convolution between two 1 x 1 ones; the stride is in the 3 x 3 one."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = projection(inputs, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, inputs, H, W]`` to ``[N, 4 * width, H / stride, W / stride]``."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += x if self.downsample is None else self.downsample(x)
        result: Tensor = self.relu(y)
        return result


def projection(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    """A 1 x 1 convolution where a block changes its input's shape."""
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


class ResNet(nn.Module):
    """A network of ``DEPTHS``, for images ``[N, 3, H, W]`` and 1000 classes."""

    def __init__(self, network: str) -> None:
        super().__init__()
        block = BasicBlock if network == "resnet18" else Bottleneck
        inputs = first = 8 if network == "tiny" else 64
        self.conv1 = nn.Conv2d(3, inputs, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        for stage, depth in enumerate(DEPTHS[network]):
            width, blocks = first << stage, []
            for number in range(depth):
                blocks.append(block(inputs, width, 2 if stage and not number else 1))
                inputs = block.expansion * width
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.depth = len(DEPTHS[network])
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, 1000)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[N, 1000]``."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in range(self.depth):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        logits: Tensor = self.fc(self.avgpool(x).flatten(1))
        return logits
