"""The networks of the coverage table: how each is made, what it is run on, which layers write its outputs."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from taylor_cuda.bench.suites.networks import images

BATCH = 2


@dataclass(frozen=True)
class Network:
    """One row of the table.

    Attributes:
        name: its own name in ``source``.
        source: the package it comes from: ``"torchvision"``, ``"timm"`` or ``"own"``.
        make: builds it with random weights.
        inputs: builds its example input.
        heads: the layers whose outputs are the network's outputs. Our trace finds them out; a peer has to be told.
        shape: of the example input, in words.
    """

    name: str
    source: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    heads: tuple[str, ...]
    shape: str


class Attention(nn.Module):
    """Self-attention by hand: three projections, heads by view and permute, ``[N, L, width]`` in and out."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Every token looks at every token."""
        batch, length, _ = x.shape
        query, key, value = (
            layer(x).view(batch, length, self.heads, -1).permute(0, 2, 1, 3)
            for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.output(mixed.permute(0, 2, 1, 3).reshape(batch, length, -1))  # type: ignore[no-any-return]


class EncoderLayer(nn.Module):
    """Attention and a two-layer perceptron, each added to its input and then normalised."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention, self.attention_norm = Attention(width, heads), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.mlp_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, L, width]`` in and out."""
        x = self.attention_norm(x + self.attention(x))
        return self.mlp_norm(x + self.down(F.gelu(self.up(x))))  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """A text encoder with learned positions: int64 tokens ``[N, L]`` to logits ``[N, classes]``."""

    def __init__(
        self, vocabulary: int = 30_522, length: int = 128, width: int = 768, layers: int = 12, classes: int = 2
    ) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(EncoderLayer(width, width // 64) for _ in range(layers))
        self.pooler, self.classifier = nn.Linear(width, width), nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """The class of a text, from its first token."""
        x = self.norm(self.words(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device)))
        for layer in self.layers:
            x = layer(x)
        return self.classifier(torch.tanh(self.pooler(x[:, 0])))  # type: ignore[no-any-return]


def double_convolution(inputs: int, outputs: int) -> nn.Sequential:
    """Two 3x3 convolutions, each with BatchNorm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
        nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class UNet(nn.Module):
    """Down by max pooling, up by transposed convolutions, skips by concatenation: ``[N, 3, H, W]`` to two classes."""

    def __init__(self, width: int = 32, depth: int = 4) -> None:
        super().__init__()
        widths = [width << level for level in range(depth + 1)]
        pairs = list(pairwise(widths))
        self.stem = double_convolution(3, width)
        self.down = nn.ModuleList(double_convolution(fine, coarse) for fine, coarse in pairs)
        self.up = nn.ModuleList(nn.ConvTranspose2d(coarse, fine, 2, stride=2) for fine, coarse in pairs)
        self.merge = nn.ModuleList(double_convolution(2 * fine, fine) for fine, _ in pairs)
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """A logit a class and a pixel; H and W are multiples of ``2 ** depth``."""
        x = self.stem(x)
        skips = []
        for block in self.down:
            skips.append(x)
            x = block(F.max_pool2d(x, 2))
        for up, merge, skip in zip(reversed(self.up), reversed(self.merge), reversed(skips), strict=True):
            x = merge(torch.cat([skip, up(x)], 1))
        return self.head(x)  # type: ignore[no-any-return]


class Residual1d(nn.Module):
    """A residual block on signals, with a dilated convolution in the middle."""

    def __init__(self, inputs: int, outputs: int, dilation: int) -> None:
        super().__init__()
        self.first = nn.Conv1d(inputs, outputs, 7, stride=2, padding=3, bias=False)
        self.first_norm = nn.BatchNorm1d(outputs)
        self.second = nn.Conv1d(outputs, outputs, 3, padding=dilation, dilation=dilation, bias=False)
        self.second_norm = nn.BatchNorm1d(outputs)
        self.shortcut = nn.Conv1d(inputs, outputs, 1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, inputs, L]`` to ``[N, outputs, L / 2]``."""
        y = F.relu(self.first_norm(self.first(x)))
        return F.relu(self.second_norm(self.second(y)) + self.shortcut(x))


class SignalNet(nn.Module):
    """A 1-D residual network: ``[N, 12, L]`` signals to class logits."""

    def __init__(self, width: int = 64, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv1d(12, width, 15, padding=7)
        widths = [width << level for level in range(4)]
        self.blocks = nn.ModuleList(
            Residual1d(inputs, outputs, dilation)
            for inputs, outputs, dilation in zip([width, *widths], widths, (1, 2, 4, 8), strict=False)
        )
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """One logit a class."""
        x = F.gelu(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(-1))  # type: ignore[no-any-return]


def tokens(vocabulary: int = 30_522, length: int = 32) -> Tensor:
    """int64 ``[BATCH, length]``."""
    return torch.randint(vocabulary, (BATCH, length), generator=torch.Generator().manual_seed(0))


def signals(length: int = 256) -> Tensor:
    """Standard normal ``[BATCH, 12, length]``."""
    return torch.randn(BATCH, 12, length, generator=torch.Generator().manual_seed(0))


def torchvision_model(path: str, **options: Any) -> nn.Module:
    """``torchvision.models.PATH`` with random weights."""
    module, _, name = f"torchvision.models.{path}".rpartition(".")
    made: nn.Module = getattr(importlib.import_module(module), name)(weights=None, **options)
    return made


def fpn_backbone() -> nn.Module:
    """ResNet-18 with a feature pyramid, every stage trainable."""
    return torchvision_model(
        "detection.backbone_utils.resnet_fpn_backbone", backbone_name="resnet18", trainable_layers=5
    )


def timm_model(name: str) -> nn.Module:
    """A timm network with random weights."""
    made: nn.Module = importlib.import_module("timm").create_model(name, pretrained=False)
    return made


def _torchvision(path: str, size: int, *heads: str, **options: Any) -> Network:
    make = partial(torchvision_model, path, **options)
    return _of_images(path.rpartition(".")[2], "torchvision", make, size, heads)


def _timm(name: str, size: int, *heads: str) -> Network:
    return _of_images(name, "timm", partial(timm_model, name), size, heads)


def _of_images(name: str, source: str, make: Callable[[], nn.Module], size: int, heads: tuple[str, ...]) -> Network:
    return Network(name, source, make, partial(images, BATCH, size), heads, f"3x{size}x{size}")


NETWORKS: tuple[Network, ...] = (
    _torchvision("resnet18", 224, "fc"),
    _torchvision("resnet50", 224, "fc"),
    _torchvision("resnext50_32x4d", 224, "fc"),
    _torchvision("mobilenet_v2", 224, "classifier.1"),
    _torchvision("mobilenet_v3_large", 224, "classifier.3"),
    _torchvision("efficientnet_b0", 224, "classifier.1"),
    _torchvision("densenet121", 224, "classifier"),
    _torchvision("densenet201", 224, "classifier"),
    _torchvision("vgg16_bn", 224, "classifier.6"),
    _torchvision("googlenet", 224, "fc", "aux1.fc2", "aux2.fc2", init_weights=False),
    _torchvision("squeezenet1_1", 224, "classifier.1"),
    _torchvision("shufflenet_v2_x1_0", 224, "fc"),
    _torchvision("regnet_x_400mf", 224, "fc"),
    _torchvision("regnet_y_400mf", 224, "fc"),
    _torchvision("convnext_tiny", 224, "classifier.2"),
    _torchvision("vit_b_16", 224, "heads.head"),
    _torchvision("swin_t", 224, "head"),
    _torchvision("inception_v3", 299, "fc", "AuxLogits.fc", init_weights=False),
    _torchvision("segmentation.fcn_resnet50", 96, "classifier.4", weights_backbone=None),
    _torchvision("segmentation.deeplabv3_resnet50", 96, "classifier.4", weights_backbone=None),
    _of_images("resnet18_fpn", "torchvision", fpn_backbone, 128, ("fpn.layer_blocks.*.0",)),
    _timm("vit_tiny_patch16_224", 224, "head"),
    _timm("mobilevit_s", 256, "head.fc"),
    _timm("coatnet_0_rw_224", 224, "head.fc"),
    _timm("mixer_s32_224", 224, "head"),
    _timm("hrnet_w18", 224, "classifier"),
    Network("encoder", "own", Encoder, tokens, ("classifier",), "32 tokens"),
    _of_images("unet", "own", UNet, 64, ("head",)),
    Network("signal_net", "own", SignalNet, signals, ("head",), "12x256"),
)

SHORT: tuple[Network, ...] = (
    _torchvision("resnet18", 64, "fc"),
    _torchvision("mobilenet_v2", 64, "classifier.1"),
    _torchvision("shufflenet_v2_x1_0", 64, "fc"),
    Network(
        "encoder",
        "own",
        partial(Encoder, vocabulary=500, length=32, width=128, layers=2),
        partial(tokens, 500, 16),
        ("classifier",),
        "16 tokens",
    ),
    _of_images("unet", "own", partial(UNet, width=16, depth=3), 32, ("head",)),
    Network("signal_net", "own", partial(SignalNet, width=16), partial(signals, 64), ("head",), "12x64"),
)
"""Small enough for a test: a fraction of a second each."""
