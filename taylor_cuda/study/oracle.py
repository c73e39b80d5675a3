"""The true importance of every unit: what the loss does when it is removed. ``tc.oracle``."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from taylor_cuda.errors import InputError
from taylor_cuda.graph.checks import check_model, check_not_compacted
from taylor_cuda.graph.groups import Groups, named_tensors
from taylor_cuda.study.batches import LossFn, evaluating, mini_batches
from taylor_cuda.study.evaluate import Evaluator

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
        memory: bytes that copies of a mini-batch may take. ``None``: half of what is free on a GPU, 256 MiB on a CPU.

    Returns:
        ``{group name: float64 [size]}`` on the CPU.

    Raises:
        InputError: an argument that can't be used; no batches.

    Source: the oracle of Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019, equation 1.
    """
    check_study(model, groups, loss_fn, "oracle", form=(form, FORMS), per=(per, ("set", "batch")))
    device = next(iter(named_tensors(model).values())).device
    evaluator = Evaluator(model, groups, loss_fn, memory)
    total = {group.name: torch.zeros(group.size, dtype=torch.float64, device=device) for group in groups}
    examples = 0
    with evaluating(model):
        for batch in mini_batches(batches, device):
            evaluator.start(batch, list(total))
            examples += batch.examples
            for group in groups:
                losses = evaluator.losses(group.name, torch.arange(group.size)[:, None])
                change = losses - evaluator.base
                total[group.name] += batch.examples * (formed(change, form) if per == "batch" else change)
    if not examples:
        raise InputError("oracle: batches: wanted at least one example, got none")
    means = {name: (changes / examples).cpu() for name, changes in total.items()}
    return {name: formed(mean, form) if per == "set" else mean for name, mean in means.items()}
