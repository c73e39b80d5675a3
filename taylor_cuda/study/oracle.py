"""The true importance of every unit: what the loss does when it is removed. ``tc.oracle``."""

from __future__ import annotations

from collections.abc import Iterable, Sized
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from taylor_cuda.distributed import gathered, together, total, world_size
from taylor_cuda.errors import InputError
from taylor_cuda.graph.checks import check_model, check_not_compacted
from taylor_cuda.graph.groups import Groups, named_tensors
from taylor_cuda.study.batches import LossFn, evaluating, mini_batches
from taylor_cuda.study.evaluate import Evaluator
from taylor_cuda.study.tally import Tally, study_key

__all__ = ["FORMS", "Form", "Per", "check_study", "formed", "oracle"]

Form = Literal["signed", "absolute", "squared"]
Per = Literal["set", "batch"]
FORMS = {"signed": torch.Tensor.clone, "absolute": torch.Tensor.abs, "squared": torch.Tensor.square}


def formed(change: Tensor, form: Form) -> Tensor:
    """A signed change of the loss as ``form`` reports it."""
    return FORMS[form](change)


def check_study(
    model: nn.Module, groups: Groups, loss_fn: Any, what: str, **choices: tuple[str, Iterable[str]]
) -> None:
    """Raise unless ``what`` can measure this model.

    Raises:
        InputError: names the argument; ``choices``: ``{argument: (value, what it may be)}``.
    """
    check_model(model, what)
    check_not_compacted(model, what)
    if not isinstance(groups, Groups):
        raise InputError(f"{what}: groups: wanted what tc.trace returns, got {type(groups).__name__}")
    tensors = named_tensors(model)
    for group in groups:
        for member in group.members:
            if member.tensor not in tensors:
                raise InputError(f"{what}: groups: made for another model: this one has no {member.tensor}")
    if not callable(loss_fn):
        raise InputError(f"{what}: loss_fn: wanted a function of (outputs, targets), got {type(loss_fn).__name__}")
    for argument, (value, allowed) in choices.items():
        if value not in allowed:
            raise InputError(f"{what}: {argument}: wanted one of {sorted(allowed)}, got {value!r}")


def oracle(
    model: nn.Module,
    groups: Groups,
    loss_fn: LossFn,
    batches: Iterable[Any],
    *,
    form: Form = "signed",
    per: Per = "set",
    progress: bool = False,
    resume: str | Path | None = None,
    process_group: Any = None,
    memory: int | None = None,
) -> dict[str, Tensor]:
    """What the loss does when one unit is removed from the intact network, for every unit of every group.

    Removed means what ``tc.cut`` makes of it: zero at the inputs of the unit's readers, LayerNorm statistics over what
    is kept. The model runs in eval mode, without gradients and without autocast; it, its modes and all random states
    are left as they were.

    Args:
        model: the traced module itself.
        groups: from ``tc.trace`` of this model.
        loss_fn: ``loss_fn(outputs, targets)``, the mean loss of a mini-batch as a scalar tensor.
        batches: ``(inputs, targets)`` pairs, gone through once; inputs are a tensor, a tuple of arguments or a dict of
            keyword arguments. Tensors are moved to the model's device.
        form: ``"signed"`` loss without the unit minus loss; ``"absolute"`` its size; ``"squared"`` its square, the
            paper's importance.
        per: ``"set"``: the change of the mean loss over all batches, then ``form``; ``"batch"``: ``form`` of the change
            on each mini-batch, then the mean. Both means weigh batches by their examples (the length of dimension 0 of
            the first input).
        progress: show a bar.
        resume: a file to write what was measured to now and then, and to go on from if it is there.
        process_group: share the units out over these ranks, each of which has the same batches and gets all results.
        memory: bytes that copies of a mini-batch may take. ``None``: half of what is free on a GPU, 32 MiB on a CPU.

    Returns:
        ``{group name: float64 [size]}`` on the CPU.

    Raises:
        InputError: an argument that can't be used; no batches.

    Source: the oracle of Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019, equation 1.
    """
    check_study(model, groups, loss_fn, "oracle", form=(form, FORMS), per=(per, ("set", "batch")))
    if resume is not None and not isinstance(resume, (str, Path)):
        raise InputError(f"oracle: resume: wanted a path, got {type(resume).__name__}")
    if memory is not None and memory < 1:
        raise InputError(f"oracle: memory: wanted a number of bytes, got {memory}")
    share = _Share(process_group)
    with together("oracle", process_group):
        tally = _measure(model, groups, loss_fn, batches, share, (form, per), progress, resume, memory)
        if not tally.examples:
            raise InputError("oracle: batches: wanted at least one example, got none")
    if len(set(gathered(tally.batches(), process_group))) > 1:
        raise InputError("oracle: batches: wanted the same on every rank (units are shared out, examples aren't)")
    means = {name: total(mean, process_group).cpu() for name, mean in tally.means().items()}
    return {name: formed(mean, form) if per == "set" else mean for name, mean in means.items()}


class _Share:
    """Which units this rank measures."""

    def __init__(self, group: Any) -> None:
        self.size = world_size(group)
        self.rank = 0 if self.size == 1 else dist.get_rank(group)

    def units(self, size: int) -> Tensor:
        """int64 ``[units, 1]``: every ``size``-th one."""
        return torch.arange(self.rank, size, self.size)[:, None]

    def path(self, resume: str | Path | None) -> Path | None:
        """The file of this rank."""
        if resume is None or self.size == 1:
            return None if resume is None else Path(resume)
        return Path(f"{resume}.{self.rank}of{self.size}")


def _measure(
    model: nn.Module,
    groups: Groups,
    loss_fn: LossFn,
    batches: Iterable[Any],
    share: _Share,
    how: tuple[Form, Per],
    progress: bool,
    resume: str | Path | None,
    memory: int | None,
) -> Tally:
    """The changes of this rank's units over all batches."""
    form, per = how
    device = next(iter(named_tensors(model).values())).device
    path = share.path(resume)
    loss = getattr(loss_fn, "__qualname__", type(loss_fn).__qualname__)
    key = "" if path is None else study_key(model, groups, *how, share.rank, share.size, loss)
    tally = Tally(groups.sizes(), device, path, key)
    evaluator = Evaluator(model, groups, loss_fn, memory)
    each = {group.name: share.units(group.size) for group in groups}
    removals = sum(len(units) for units in each.values())
    count = len(batches) if isinstance(batches, Sized) else None
    whole = None if count is None else count * removals
    with (
        evaluating(model),
        tqdm(total=whole, desc="oracle", unit="unit", leave=False, disable=not progress or share.rank > 0) as bar,
    ):
        try:
            for batch in mini_batches(batches, device):
                todo = tally.start(batch, batch.digest() if path is not None or share.size > 1 else "")
                bar.update(sum(len(units) for name, units in each.items() if name not in todo))
                if not todo:
                    continue
                evaluator.start(batch, todo)
                for name in todo:
                    change = evaluator.losses(name, each[name]) - evaluator.base
                    found = torch.zeros(groups[name].size, dtype=torch.float64, device=device)
                    found[each[name].flatten()] = formed(change, form) if per == "batch" else change
                    tally.add(name, found)
                    bar.update(len(each[name]))
                tally.finish(batch)
        finally:
            tally.save()
    return tally
