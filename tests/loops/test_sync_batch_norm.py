"""A model whose batch normalisations were made ``nn.SyncBatchNorm`` is looked at on a copy that meets no other rank."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import taylor_cuda as tc
from tests.loops.loop import EXAMPLE, Net, batches
from tests.loops.synced import on_cpu

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="no gloo")


@pytest.fixture
def group(tmp_path: Path) -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.new_group([0])
    dist.destroy_process_group()


def both(group: dist.ProcessGroup | None) -> tuple[Net, Net]:
    """The same network with and without."""
    torch.manual_seed(3)
    plain = Net().eval()
    return plain, nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain), group)


@pytest.mark.parametrize("own_group", [False, True])
def test_it_is_traced_masked_cut_and_measured_like_batch_norm(group: dist.ProcessGroup, own_group: bool) -> None:
    """In train mode torch's own refuses these tensors, and asks other ranks where it doesn't."""
    plain, synced = both(group if own_group else None)
    plain.train(), synced.train()
    with on_cpu(), mock.patch.object(dist, "all_reduce") as asked:
        groups, expected = tc.trace(synced, EXAMPLE), tc.trace(plain, EXAMPLE)
        tc.Importance(synced, groups, source="activations").close()
    assert not asked.called
    assert groups.sizes() == expected.sizes()
    assert groups.notes == expected.notes == []
    assert [entry.reason for entry in groups.frozen] == [entry.reason for entry in expected.frozen]
    truth, of_plain = (
        tc.oracle(model.eval(), found, F.cross_entropy, batches(1))
        for model, found in ((synced, groups), (plain, expected))
    )
    assert all(torch.equal(value, of_plain[name]) for name, value in truth.items())
    x, keep = batches(1)[0][0], {group.name: torch.arange(0, group.size, 2) for group in groups}
    with tc.masked(synced, groups, keep):
        off = synced(x)
    tc.cut(synced.train(), groups, keep)
    assert groups.verified is not None
    assert synced.training
    assert synced.bn0.training
    assert isinstance(synced.bn0, nn.SyncBatchNorm)
    assert synced.bn0.num_features == 4
    assert "forward" not in vars(synced.bn0)
    torch.testing.assert_close(synced.eval()(x), off)


@pytest.mark.parametrize(
    ("mode", "criterion"), [("cut", "taylor_fo"), ("cut", "taylor_fg"), ("cut", "taylor_so"), ("compact", "taylor_so")]
)
def test_it_is_scored_and_pruned_like_batch_norm(group: dist.ProcessGroup, mode: str, criterion: str) -> None:
    """In eval mode, in which torch has it on a CPU."""
    ends = []
    for model in both(group):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        pruner = tc.Pruner(
            model, EXAMPLE, optimizer, every=2, steps=2, mode=mode, criterion=criterion, budget={"channels": 0.6}
        )
        for x, target in batches(4):
            outputs = model(x)
            pruner.backward(F.cross_entropy(outputs, target), outputs)
            optimizer.step()
            optimizer.zero_grad()
            pruner.step()
        pruner.finish()
        ends.append(model)
    plain, synced = ends
    assert synced.widths() == plain.widths() != Net().widths()
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), synced.parameters(), strict=True))
