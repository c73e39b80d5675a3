"""Oracles of more than one removal: one unit after another, and every subset of a layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from math import comb
from typing import Any

import torch
from torch import Tensor, nn

from taylor_cuda.errors import InputError
from taylor_cuda.graph.groups import Groups, named_tensors
from taylor_cuda.study.batches import Batch, LossFn, evaluating, mini_batches
from taylor_cuda.study.evaluate import Evaluator
from taylor_cuda.study.oracle import FORMS, Form, check_study, formed

__all__ = ["BestSubset", "Removal", "combinatorial_oracle", "greedy_oracle"]


@dataclass(frozen=True)
class Removal:
    """One step of the greedy oracle.

    Attributes:
        group: name of the group.
        unit: its index in the group as it was before the first removal.
        change: the mean loss after this removal minus the one before it.
    """

    group: str
    unit: int
    change: float


@dataclass(frozen=True)
class BestSubset:
    """What the combinatorial oracle found.

    Attributes:
        units: int64 ``[count]``, the subset whose removal is best.
        change: the mean loss without it minus the mean loss.
        subsets: int64 ``[S, count]``, all subsets, in lexicographic order.
        changes: float64 ``[S]``, the signed change of the mean loss without each.
    """

    units: Tensor
    change: float
    subsets: Tensor
    changes: Tensor


def _held(batches: Iterable[Any], device: torch.device, what: str) -> list[Batch]:
    held = list(mini_batches(batches, device))
    if not held:
        raise InputError(f"{what}: batches: wanted at least one example, got none")
    return held


def greedy_oracle(
    model: nn.Module,
    groups: Groups,
    loss_fn: LossFn,
    batches: Iterable[Any],
    removals: int,
    *,
    form: Form = "signed",
) -> list[Removal]:
    """Remove the least important unit, measure all others again without it, and so on. No group is emptied.

    The least important one is that with the smallest change of the mean loss, in the ``form`` that is asked for:
    ``"signed"`` the one without which the loss is lowest, ``"absolute"`` and ``"squared"`` the one that changes it
    least. The batches are kept on the model's device. Removed, modes and states: as in ``tc.oracle``.

    Args:
        model: the traced module itself.
        groups: from ``tc.trace`` of this model.
        loss_fn: ``loss_fn(outputs, targets)``, the mean loss of a mini-batch as a scalar tensor.
        batches: ``(inputs, targets)`` pairs, gone through once.
        removals: how many units to remove.
        form: what is smallest.

    Returns:
        The removals in order.

    Raises:
        InputError: an argument that can't be used, or more removals than there are units to spare.
    """
    check_study(model, groups, loss_fn, "greedy_oracle", form=(form, FORMS))
    spare = sum(group.size - 1 for group in groups)
    if not 0 < removals <= spare:
        raise InputError(f"greedy_oracle: removals: wanted 1 to {spare} (one unit of each group stays), got {removals}")
    device = next(iter(named_tensors(model).values())).device
    evaluator = Evaluator(model, groups, loss_fn)
    removed = {group.name: torch.zeros(group.size, dtype=torch.bool) for group in groups}
    order: list[Removal] = []
    with evaluating(model):
        held = _held(batches, device, "greedy_oracle")
        for _ in range(removals):
            left = {name: (~gone).nonzero() for name, gone in removed.items() if int((~gone).sum()) > 1}
            changes = _mean_changes(evaluator, held, removed, left)
            best = min(left, key=lambda name: float(formed(changes[name], form).min()))
            at = int(formed(changes[best], form).argmin())
            order.append(Removal(best, int(left[best][at, 0]), float(changes[best][at])))
            removed[best][order[-1].unit] = True
    return order


def combinatorial_oracle(
    model: nn.Module,
    groups: Groups,
    loss_fn: LossFn,
    batches: Iterable[Any],
    group: str,
    count: int,
    *,
    form: Form = "signed",
    limit: int = 100_000,
) -> BestSubset:
    """Remove every subset of ``count`` units of one group, each from the intact network, and name the best.

    The best is the one with the smallest change of the mean loss in the ``form`` that is asked for, as in
    ``tc.greedy_oracle``. Removed, modes and states: as in ``tc.oracle``.

    Args:
        model: the traced module itself.
        groups: from ``tc.trace`` of this model.
        loss_fn: ``loss_fn(outputs, targets)``, the mean loss of a mini-batch as a scalar tensor.
        batches: ``(inputs, targets)`` pairs, gone through once.
        group: its name.
        count: units to remove, at least one and not all.
        form: what is smallest.
        limit: the most subsets that are tried.

    Raises:
        InputError: an argument that can't be used, or more than ``limit`` subsets.
    """
    check_study(model, groups, loss_fn, "combinatorial_oracle", form=(form, FORMS))
    sizes = groups.sizes()
    if group not in sizes:
        raise InputError(f"combinatorial_oracle: group: wanted one of {list(sizes)}, got {group!r}")
    if not 0 < count < sizes[group]:
        raise InputError(f"combinatorial_oracle: count: wanted 1 to {sizes[group] - 1} units of {group}, got {count}")
    number = comb(sizes[group], count)
    if number > limit:
        raise InputError(
            f"combinatorial_oracle: count: {group} has {number} subsets of {count} units, more than limit={limit}; "
            "wanted fewer units, or a higher limit"
        )
    device = next(iter(named_tensors(model).values())).device
    subsets = torch.tensor(list(combinations(range(sizes[group]), count)), dtype=torch.int64)
    with evaluating(model):
        held = _held(batches, device, "combinatorial_oracle")
        changes = _mean_changes(Evaluator(model, groups, loss_fn), held, {}, {group: subsets})[group]
    at = int(formed(changes, form).argmin())
    return BestSubset(subsets[at], float(changes[at]), subsets, changes)


def _mean_changes(
    evaluator: Evaluator, held: list[Batch], off: dict[str, Tensor], removals: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The change of the mean loss for each row of units in ``removals``, against that with only ``off`` off."""
    examples = sum(batch.examples for batch in held)
    total: dict[str, Tensor] = {}
    count = next(iter(removals.values())).shape[1]
    for batch in held:
        evaluator.start(batch, list(removals), count, off)
        for name, units in removals.items():
            change = batch.examples / examples * (evaluator.losses(name, units) - evaluator.base)
            total[name] = total[name] + change if name in total else change
    return {name: change.cpu() for name, change in total.items()}
