"""Optimizers by name: SGD and AdamW of torch, every other one of timm."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from taylor_cuda.errors import InputError

MOMENTUM = 0.9


def new_optimizer(name: str, model: nn.Module, lr: float, weight_decay: float) -> Optimizer:
    """An optimizer over all parameters of a model.

    Args:
        name: ``"sgd"`` (momentum 0.9), ``"adamw"``, or what ``timm.optim`` calls one (``"lamb"``, ``"lars"``, …), which
            then leaves biases and norms out of the weight decay.
        model: whose parameters.
        lr: learning rate.
        weight_decay: likewise.

    Raises:
        InputError: there is none of this name, or timm isn't installed.
    """
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), lr=lr, momentum=MOMENTUM, weight_decay=weight_decay)
    if name == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
    try:
        optim = importlib.import_module("timm.optim")
    except ImportError as error:
        raise InputError(
            f"optimizer: wanted 'sgd' or 'adamw', or one of timm's, which is not installed ({error}), got {name!r}"
        ) from error
    known = [str(known) for known in optim.list_optimizers()]
    if name not in known:
        near = difflib.get_close_matches(name, ["sgd", "adamw", *known], n=3, cutoff=0.5)
        hint = f"; the nearest are {', '.join(near)}" if near else ""
        raise InputError(f"optimizer: neither torch nor timm has one named {name!r} here{hint}")
    try:
        return optim.create_optimizer_v2(  # type: ignore[no-any-return]
            model, opt=name, lr=lr, weight_decay=weight_decay, momentum=MOMENTUM
        )
    except Exception as error:  # a class that lacks a library of its own, or takes other arguments
        raise InputError(f"optimizer: {name!r} can't be made: {error}") from error


@torch.no_grad()
def shrink_filters(weights: Iterable[Tensor], by: float) -> None:
    """Take ``by`` from the norm of every filter of convolutions: a step of the group lasso.

    Filters of a norm of at most 1e-5 stay as they are.

    Source: the training of Molchanov et al. 2019, whose coefficient is not multiplied by the learning rate.

    Args:
        weights: ``[filters, C, kH, kW]`` each; changed.
        by: in units of the weights.
    """
    for weight in weights:
        norms = torch.linalg.vector_norm(weight.flatten(1), dim=1)
        shares = torch.where(norms > 1e-5, by / (norms + 1e-13), 0.0)
        weight.mul_(1 - shares.view(-1, 1, 1, 1))
