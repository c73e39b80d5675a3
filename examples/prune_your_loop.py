"""A training loop of one's own with three more lines. Random data; ``python examples/prune_your_loop.py [STEPS]``."""

import sys

import torch
import torch.nn.functional as F
import torchvision

import taylor_cuda as tc


def main(steps: int = 40) -> None:
    """Prune a ResNet-18 to half its MACs while it trains."""
    model = torchvision.models.resnet18(num_classes=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    example = torch.randn(2, 3, 64, 64)
    pruner = tc.Pruner(model, example, optimizer=optimizer, budget={"macs": 0.5}, every=max(1, steps // 10), steps=5)
    for step in range(steps):
        inputs, targets = torch.randn(8, 3, 64, 64), torch.randint(0, 10, (8,))
        outputs = model(inputs)
        pruner.backward(F.cross_entropy(outputs, targets), outputs)
        optimizer.step()
        optimizer.zero_grad()
        if plan := pruner.step():
            print(f"step {step + 1}: {plan.cost.macs:,} of {plan.cost_original.macs:,} MACs")
    tc.save(model, "resnet18-half.safetensors")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
