"""The running statistics of BatchNorm: taken anew, and made the same on all ranks."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from taylor_cuda.distributed import mean, world_size
from taylor_cuda.errors import InputError
from taylor_cuda.train.modes import eval_mode


@torch.no_grad()
def recalibrate_batch_norm(model: nn.Module, batches: Iterable[Any], limit: int = 50, group: Any = None) -> int:
    """Take the running statistics of every BatchNorm anew: the plain average over ``batches``.

    After channels are gone, and weights have moved fast, the moving averages lag behind. Everything but the BatchNorms
    runs in eval mode; train or eval mode and ``momentum`` of each module are put back. On an exception the old
    statistics are.

    Args:
        model: on the device of the batches, or the other way round.
        batches: tensors, tuples whose first entry is the model's input (labels may follow), or dicts of keyword
            arguments.
        limit: batches to use at most.
        group: ranks whose batches count too, as many on each; all of them end with the same statistics.

    Returns:
        The number of batches used; 0, and nothing is changed, where the model has no BatchNorm with running statistics.

    Raises:
        InputError: there is no batch.
    """
    norms = _norms(model)
    if not norms:
        return 0
    momenta = [norm.momentum for norm in norms]
    old = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers(recurse=False)]
    device = next(model.parameters()).device
    used = 0
    with eval_mode(model):
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum, norm.training = None, True
            for batch in itertools.islice(batches, limit):
                _call(model, batch, device)
                used += 1
            if used == 0:
                raise InputError("recalibrate_batch_norm: wanted at least one batch, got none")
            average_statistics(model, group)
        except BaseException:
            for buffer, value in old:
                buffer.copy_(value)
            raise
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
    return used


@torch.no_grad()
def average_statistics(model: nn.Module, group: Any) -> None:
    """Give all ranks the mean of their running statistics; nothing where there is one."""
    if world_size(group) == 1:
        return
    buffers = statistics_of(model)
    for dtype in {buffer.dtype for buffer in buffers}:
        alike = [buffer for buffer in buffers if buffer.dtype == dtype]
        flat = mean(torch.cat([buffer.flatten() for buffer in alike]), group)
        torch._foreach_copy_(alike, list(flat.split([buffer.numel() for buffer in alike])))


def statistics_of(model: nn.Module) -> list[Tensor]:
    """The running means and variances themselves, in which ranks differ."""
    buffers = (buffer for norm in _norms(model) for buffer in (norm.running_mean, norm.running_var))
    return [buffer for buffer in buffers if buffer is not None]


def _norms(model: nn.Module) -> list[_BatchNorm]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm) and module.running_mean is not None]


def _call(model: nn.Module, batch: Any, device: torch.device) -> None:
    if isinstance(batch, Mapping):
        model(**{key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()})
        return
    images = batch[0] if isinstance(batch, (tuple, list)) else batch
    model(images.to(device))
