"""The loss with units removed, one whole forward pass each: the definition, and the way that always goes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from taylor_cuda.graph.groups import Groups
from taylor_cuda.graph.mask import MaskedForward
from taylor_cuda.graph.recorder import copied
from taylor_cuda.graph.sites import active_in_forward
from taylor_cuda.study.batches import Batch, LossFn, scalar_loss

__all__ = ["Drops", "loss_without"]

Drops = Mapping[str, Tensor]
"""``{group name: bool [size], True = removed}``; a group that isn't named keeps all."""


def loss_without(model: nn.Module, groups: Groups, loss_fn: LossFn, batch: Batch, drops: Drops) -> Tensor:
    """The loss of one mini-batch while units are off as a cut would leave them.

    Args:
        model: in eval mode.
        groups: of this model.
        loss_fn: ``(outputs, targets)`` to the mean loss.
        batch: on the model's device.
        drops: ``{group name: bool [size], True = removed}``.

    Returns:
        A scalar on the model's device. Random numbers, if the model draws any, are the same in every pass.
    """
    keep = {name: (~drop.cpu()).nonzero().flatten() for name, drop in drops.items()}
    masks = MaskedForward(model, groups, keep)
    handles = active_in_forward(model, masks)
    torch.manual_seed(0)
    args, kwargs = copied((batch.args, batch.kwargs))
    try:
        with cast(TorchFunctionMode, masks):
            outputs: Any = model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return scalar_loss(loss_fn, outputs, batch.targets)
