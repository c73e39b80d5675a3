"""Whole networks for the suites that need one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from taylor_cuda.bench.resnet import DEPTHS, ResNet
from taylor_cuda.bench.suites.peers import installed


class MissingPeerError(RuntimeError):
    """Something that this race needs isn't installed."""


def make(network: str, seed: int = 0) -> nn.Module:
    """A network by torchvision's name, with random weights and random normalisation parameters, in training mode.

    At PyTorch's own initial values (γ = 1, β = 0) half of the terms of a score would be zeros.
    """
    models: Any = None if network in DEPTHS else installed("torchvision.models")
    if network not in DEPTHS and models is None:
        raise MissingPeerError(f"{network} is torchvision's, which is not installed")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = ResNet(network) if network in DEPTHS else getattr(models, network)(weights=None)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.1)
    return model


def images(batch: int, size: int, device: str = "cpu", seed: int = 0) -> Tensor:
    """Standard normal images ``[batch, 3, size, size]``."""
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed)).to(device)


def labels(batch: int, device: str = "cpu") -> Tensor:
    """Class numbers ``[batch]``."""
    return torch.arange(batch, device=device) % 1000


def with_gradients(model: nn.Module, batch: int, size: int, device: str) -> nn.Module:
    """The model on ``device`` after one backward pass of a cross-entropy loss."""
    model.to(device)
    nn.functional.cross_entropy(model(images(batch, size, device)), labels(batch, device)).backward()
    return model
