"""Torch-Pruning with the exact first-order importance. Digits; ``python examples/torch_pruning_taylor.py [EPOCHS]``."""

import sys

import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import nn

import taylor_cuda as tc
from taylor_cuda.train.data import TensorData, load_digits


def layer(inputs: int, outputs: int, size: int = 3, groups: int = 1) -> nn.Sequential:
    """Convolution, BatchNorm, ReLU."""
    convolution = nn.Conv2d(inputs, outputs, size, padding=size // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


def train(model: nn.Module, data: TensorData, epochs: int) -> None:
    """With SGD."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for epoch in range(epochs):
        for inputs, targets in data.train(epoch):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, data: TensorData) -> float:
    """On the validation set."""
    model.eval()
    hits = [(model(inputs).argmax(1) == targets).float() for inputs, targets in data.val()]
    return torch.cat(hits).mean().item()


def main(epochs: int = 4) -> None:
    """Train a depthwise network, remove half of all channels, train on."""
    torch.manual_seed(0)
    data = load_digits(batch=64)
    model = nn.Sequential(
        *(layer(1, 32), layer(32, 32, groups=32), layer(32, 64, 1), nn.MaxPool2d(2)),
        *(layer(64, 64, groups=64), layer(64, 64, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
    )
    example = data.val_set[0][:2]
    train(model, data, epochs)
    macs = tp.utils.count_ops_and_params(model, example)[0]
    print(f"trained: {macs:,.0f} MACs, accuracy {accuracy(model, data):.4f}")

    imp = tc.integrations.torch_pruning.TaylorImportance()
    pruner = tp.pruner.BasePruner(
        model, example, importance=imp, global_pruning=True, pruning_ratio=0.5, ignored_layers=[model[-1]]
    )
    for inputs, targets in data.unaugmented():
        model.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        imp.update(model)
    pruner.step()
    model.zero_grad()
    macs = tp.utils.count_ops_and_params(model, example)[0]
    print(f"pruned: {macs:,.0f} MACs, accuracy {accuracy(model, data):.4f}")

    train(model, data, epochs)
    print(f"trained on: accuracy {accuracy(model, data):.4f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
