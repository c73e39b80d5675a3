"""Eval mode for a while, and not compiled for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def eval_mode(*models: nn.Module) -> Iterator[None]:
    """Eval mode for a while, uncompiled; train or eval mode of every single module is put back."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        with uncompiled(*models):
            yield
    finally:
        for module, training in modes:
            module.training = training


def uncompiled(*models: nn.Module) -> AbstractContextManager[Any]:
    """Run models as they are written for a while, compiled or not: for shapes and widths that don't last."""
    if any(model._compiled_call_impl is not None for model in models):
        return torch.compiler.set_stance("force_eager")  # type: ignore[no-any-return]
    return contextlib.nullcontext()


@contextmanager
def compiler_for(prune_steps: int, probed: bool) -> Iterator[None]:
    """Let ``torch.compile`` follow a network that is cut again and again; its settings are put back.

    Args:
        prune_steps: each of them gives all code new widths, for which it is compiled anew.
        probed: the criterion goes back through the network more than once.
    """
    import torch._dynamo.config as dynamo
    import torch._functorch.config as functorch

    limit = max(dynamo.recompile_limit, 2 * (prune_steps + 2))  # train and eval mode, before, after and between
    # a backward pass that overwrites what it was given can't be gone through again
    donated = functorch.donated_buffer and not probed
    with dynamo.patch(recompile_limit=limit), functorch.patch(donated_buffer=donated):
        yield
