"""Which models the package takes: a module of plain tensors, as its author built it."""

from __future__ import annotations

from typing import Any

from torch import nn

from taylor_cuda.errors import InputError
from taylor_cuda.graph.groups import named_tensors

__all__ = ["COMPACTED", "check_model", "check_not_compacted"]

COMPACTED = "taylor_cuda_compacted"
"""The attribute of a model that runs compact (``tc.compact``) under which that is kept."""

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)
_SHARDED = frozenset({"FullyShardedDataParallel", "FSDPModule"})
_REPLICATED = ("torch.distributed._composable.replicate", "DDP")
_INSTEAD = "shards have no whole channels: train with DistributedDataParallel until the last cut, then fully_shard it"


def check_model(model: Any, what: str) -> None:
    """Raise unless ``model`` is a module of plain tensors: neither it nor a part of it compiled, wrapped or sharded.

    Hooks and modes that are put into a module are never met by a forward pass that was compiled before, and a wrapper
    keeps what it knows of the parameters from the time it was made.

    Args:
        model: what the user gave.
        what: who asks, for the message.

    Raises:
        InputError: it isn't; the message names the part.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"{what}: model: wanted a torch.nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        place = f" (at {name})" if name else ""
        if hasattr(module, "_orig_mod"):
            raise InputError(
                f"{what}: model was compiled by torch.compile{place}; give the original module, model._orig_mod, and "
                "call the compiled one; or compile in place, model.compile()"
            )
        kinds = {(kind.__module__, kind.__name__) for kind in type(module).__mro__}
        if {name for _, name in kinds} & _SHARDED or getattr(module, "_is_fsdp_managed_module", False):
            raise InputError(f"{what}: model is sharded by FSDP{place}; {_INSTEAD}")
        if _REPLICATED in kinds:
            raise InputError(f"{what}: model is replicated in place{place}; wrap it in DistributedDataParallel instead")
        if isinstance(module, _WRAPPERS):
            kind = type(module).__name__
            anew = "; tc.Pruner takes it as it is, after any other cut wrap it anew" if "Distributed" in kind else ""
            raise InputError(f"{what}: model is wrapped in {kind}{place}; give the module inside, model.module{anew}")
    for name, tensor in named_tensors(model).items():
        if hasattr(tensor, "placements"):
            raise InputError(f"{what}: {name} is distributed over devices (a DTensor); {_INSTEAD}")
        if nn.parameter.is_lazy(tensor):
            raise InputError(f"{what}: {name} has no shape yet; run the model once, as every lazy module needs")


def check_not_compacted(model: nn.Module, what: str) -> None:
    """Raise if ``model`` runs compact: its forward pass isn't that of its parameters."""
    if COMPACTED in vars(model):
        raise InputError(f"{what}: model runs compact; close() what tc.compact returned first, or tc.cut the model")
