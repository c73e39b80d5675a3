"""``nn.SyncBatchNorm`` on CPU ranks, for which torch has none: its equation, and a wrapper that takes it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as Wrapper


class Summed(torch.autograd.Function):
    """The sum over all ranks; so is the gradient's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return total(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return total(gradients[0])


def total(x: Tensor) -> Tensor:
    result = x.clone()
    dist.all_reduce(result)
    return result


def forward(self: nn.SyncBatchNorm, x: Tensor) -> Tensor:
    """Mean and variance over the batches of all ranks in train mode; buffers as ``nn.BatchNorm2d`` has them."""
    if not self.training:
        return nn.modules.batchnorm._BatchNorm.forward(self, x)
    dims, shape = [0, *range(2, x.dim())], (1, -1, *(1,) * (x.dim() - 2))
    count = x.numel() // x.shape[1] * dist.get_world_size()
    mean = Summed.apply(x.sum(dims)) / count
    centred = x - mean.view(shape)
    variance = Summed.apply(centred.square().sum(dims)) / count
    with torch.no_grad():
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * count / (count - 1), self.momentum)
    y = centred * (variance + self.eps).rsqrt().view(shape)
    return y * self.weight.view(shape) + self.bias.view(shape)


@contextmanager
def on_cpu() -> Iterator[None]:
    """Meanwhile every ``nn.SyncBatchNorm`` runs so, and ``DistributedDataParallel`` doesn't ask for a GPU."""
    with (
        mock.patch.object(nn.SyncBatchNorm, "forward", forward),
        mock.patch.object(Wrapper, "_passing_sync_batchnorm_handle"),
    ):
        yield
