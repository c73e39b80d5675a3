"""Traced networks of torchvision: cut, trained on, saved, loaded."""

from __future__ import annotations

import pytest
import torch

from taylor_cuda.graph import trace
from taylor_cuda.surgery import cut, load, save

models = pytest.importorskip("torchvision.models")


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "shufflenet_v2_x0_5", "densenet121"])
def test_a_traced_network_is_cut_twice_trained_saved_and_loaded(name, tmp_path):
    torch.manual_seed(0)
    model = getattr(models, name)(weights=None).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 64, 64)
    groups = trace(model, x, prove=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    held = model(x)
    for seed in (0, 1):
        held.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(seed)
        keep = {
            group.name: torch.randperm(group.size, generator=generator)[: (group.size + 1) // 2].sort().values
            for group in groups
        }
        cut(model, groups, keep, optimizer)
        # another order of summation, through up to 121 layers: 100 eps
        assert groups.verified <= 100 * torch.finfo(torch.float32).eps
        held = model(x)
    save(model, tmp_path / "small.safetensors")
    fresh = getattr(models, name)(weights=None).to(memory_format=torch.channels_last)
    load(fresh, tmp_path / "small.safetensors")
    expected = model.eval()(x)
    assert expected.isfinite().all()
    assert torch.equal(fresh.eval()(x), expected)
    assert sum(p.numel() for p in fresh.parameters()) < 0.5 * groups.original_params
