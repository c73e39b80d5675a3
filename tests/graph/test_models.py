"""torchvision's networks: cut equals masked for random plans, and shares of the network that can be cut."""

from __future__ import annotations

import pytest
import torch

from taylor_cuda.graph.tracer import trace
from tests.graph.checks import cut_error, random_plan

models = pytest.importorskip("torchvision.models")


def share_of_parameters(model, groups) -> float:
    """Share of the parameters that lie in a tensor of some group."""
    parameters = dict(model.named_parameters())
    names = {member.tensor for group in groups for member in group.members} & parameters.keys()
    return sum(parameters[name].numel() for name in names) / groups.original_params


# name, groups, units, groups with affine, least share of the parameters
CASES = [
    ("resnet18", 12, 2880, 8, 0.99),
    ("mobilenet_v2", 25, 9128, 2, 0.99),
    ("densenet121", 120, 10240, 120, 0.99),
    ("shufflenet_v2_x1_0", 19, 3165, 17, 0.99),
]


@pytest.mark.parametrize(("name", "count", "units", "affine", "share"), CASES)
def test_random_plans(name, count, units, affine, share):
    torch.manual_seed(0)
    model = getattr(models, name)(weights=None).eval()
    generator = torch.Generator().manual_seed(1)
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.dim() == 1:
            tensor.data = tensor.data + 0.3 * torch.rand(tensor.shape, generator=generator)
    x = torch.randn(2, 3, 64, 64, generator=generator)
    groups = trace(model, x)
    assert (len(groups), sum(groups.sizes().values()), sum(bool(g.affine) for g in groups)) == (count, units, affine)
    assert not [entry for entry in groups.frozen if "rule for" in entry.reason]
    assert share_of_parameters(model, groups) > share
    for seed in range(3):
        # up to 200 layers; a few roundings of fp32 in each
        assert cut_error(model, groups, random_plan(groups, seed)) < 2e-5


def test_heads_of_train_mode_are_cut_too():
    model = models.googlenet(weights=None, init_weights=False, aux_logits=True)
    groups = trace(model, torch.randn(1, 3, 64, 64), prove=False)
    readers = {member.tensor for group in groups for member in group.role("read")}
    assert {"aux1.conv.conv.weight", "aux2.fc1.weight", "aux2.fc2.weight"} <= readers
