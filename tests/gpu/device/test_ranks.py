"""``DistributedDataParallel`` and ``SyncBatchNorm`` on a GPU, of which one is enough: one rank."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import taylor_cuda as tc
from tests.loops.loop import EXAMPLE, Net, batches

if not torch.cuda.is_available() or not dist.is_available() or not dist.is_nccl_available():
    pytest.skip("no CUDA device, or no nccl", allow_module_level=True)

pytestmark = pytest.mark.gpu


@pytest.fixture
def rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def pruned(wrapped: bool, criterion: str, **options: object) -> Net:
    torch.manual_seed(3)
    model = Net().cuda()
    called: nn.Module = model
    if wrapped:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        called = DistributedDataParallel(model, device_ids=[0], **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    pruner = tc.Pruner(called, EXAMPLE.cuda(), optimizer, {"macs": 0.5}, criterion, every=3, steps=2, round_to=1)
    for x, target in batches(9):
        outputs = called(x.cuda())
        pruner.backward(F.cross_entropy(outputs, target.cuda()), outputs)
        optimizer.step()
        optimizer.zero_grad()
        pruner.step()
    assert pruner.done
    return model


@pytest.mark.usefixtures("rank")
@pytest.mark.parametrize("criterion", ["taylor_fo", "taylor_fg", "taylor_so"])
def test_a_wrapped_model_is_pruned_as_it_is_without(criterion: str) -> None:
    expected = pruned(False, criterion)
    for options in ({}, {"gradient_as_bucket_view": True, "static_graph": True}):
        model = pruned(True, criterion, **options)
        assert model.widths() == expected.widths() != Net().widths()
        assert isinstance(model.bn0, nn.SyncBatchNorm)
        for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4, msg=name)
