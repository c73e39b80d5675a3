"""What a pruner can't work with is refused when it is made, or where it happens, and nothing is touched."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD

import taylor_cuda as tc
from tests.loops.loop import EXAMPLE, Loop, Net, Parts, batches


def test_an_optimizer_of_another_model_is_refused_before_any_training() -> None:
    model = Net()
    with pytest.raises(tc.InputError, match=r"optimizer: it doesn't own .*weight"):
        tc.Pruner(model, EXAMPLE, SGD(copy.deepcopy(model).parameters(), lr=0.1))
    most = [parameter for name, parameter in model.named_parameters() if name != "conv1.weight"]
    with pytest.raises(tc.InputError, match=r"optimizer: it doesn't own conv1\.weight,"):
        tc.Pruner(model, EXAMPLE, SGD(most, lr=0.1))
    model.conv1.weight.requires_grad_(False)
    tc.Pruner(model, EXAMPLE, SGD(most, lr=0.1))
    assert model.conv1.weight.shape == (12, 8, 3, 3)


def test_an_average_of_another_model_is_refused_before_any_training() -> None:
    model = Net()
    with pytest.raises(tc.InputError, match=r"ema: stem\.weight has shape"):
        tc.Pruner(model, EXAMPLE, SGD(model.parameters(), lr=0.1), ema=Net(6, 6, 6))


@pytest.mark.parametrize("take", [tc.Pruner, lambda *args: tc.watch(*args).__enter__()], ids=["Pruner", "watch"])
def test_wrapped_models_are_refused(take, tmp_path: Path) -> None:
    with pytest.raises(tc.InputError, match="wrapped in DataParallel; give the module inside"):
        take(nn.DataParallel(Net()), EXAMPLE)
    with pytest.raises(tc.InputError, match=r"compiled by torch\.compile; give the original module"):
        take(torch.compile(Net(), backend="eager"), EXAMPLE)
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    if not dist.is_gloo_available():
        pytest.skip("no gloo")
    from torch.distributed._composable.replicate import replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        with pytest.raises(tc.InputError, match="sharded by FSDP"):
            take(fsdp.fully_shard(Net(), mesh=mesh), EXAMPLE)
        for whole in (False, True):
            sharded = fsdp.FullyShardedDataParallel(Net(), device_id=torch.device("cpu"), use_orig_params=whole)
            for model in (sharded, sharded.module):
                with pytest.raises(
                    tc.InputError, match=r"sharded by FSDP; .* train with DistributedDataParallel until"
                ):
                    take(model, EXAMPLE)
        with pytest.raises(tc.InputError, match=r"head\.weight is distributed .* train with DistributedDataParallel"):
            take(parallelize_module(Net(), mesh, {"head": ColwiseParallel()}), EXAMPLE)
        with pytest.raises(tc.InputError, match="replicated in place; wrap it in DistributedDataParallel"):
            take(replicate(Net()), EXAMPLE)
        mixed = nn.parallel.DistributedDataParallel(Net())
        mixed.mixed_precision = object()  # a real one needs a GPU
        with pytest.raises(tc.InputError, match="mixed_precision"):
            take(mixed, EXAMPLE)
    finally:
        dist.destroy_process_group()


def test_an_accumulation_left_open_is_refused() -> None:
    loop = Loop(Parts(), Net())
    pruner = loop.pruner(every=2)
    x, target = batches(1)[0]
    pruner.backward(F.cross_entropy(loop.model(x), target), accumulate=True)
    loop.optimizer.step()
    with pytest.raises(tc.InputError, match=r"accumulate: .* had accumulate=True"):
        pruner.step()
    assert pruner.batches == 0
    pruner.update()  # takes the scores of what was accumulated
    assert pruner.step() is None
    assert (pruner.batches, pruner.importance.steps) == (1, 1)
    loop.step(batches(1)[0], pruner)
    assert pruner.step() is not None


def test_a_criterion_that_needs_outputs_is_refused_where_nobody_gives_them() -> None:
    model = Net()
    with pytest.raises(tc.InputError, match="criterion: wanted one that gradients suffice for, got 'taylor_so'"):
        tc.watch(model, EXAMPLE, "taylor_so").__enter__()
    assert not model._forward_pre_hooks
