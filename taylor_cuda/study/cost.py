"""What the oracle computes, counted without computing it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from taylor_cuda.errors import InputError
from taylor_cuda.graph.groups import Groups
from taylor_cuda.graph.recorder import copy_model
from taylor_cuda.study.batches import LossFn, evaluating, mini_batches
from taylor_cuda.study.oracle import check_study
from taylor_cuda.study.recording import record
from taylor_cuda.study.replay import part_after

__all__ = ["OracleCost", "oracle_cost"]


@dataclass(frozen=True)
class OracleCost:
    """Products of convolutions, linear layers and attention, over all batches.

    Attributes:
        macs: what ``tc.oracle`` computes: for each batch the pass that is recorded and what comes after each unit; on
            the first one a whole pass for each group besides, to check it.
        naive: one whole forward pass for each unit.
    """

    macs: int
    naive: int

    @property
    def ratio(self) -> float:
        """How many times less than the naive way."""
        return self.naive / self.macs


def oracle_cost(model: nn.Module, groups: Groups, loss_fn: LossFn, batches: Iterable[Any]) -> OracleCost:
    """The MACs of ``tc.oracle``, and of one forward pass a unit.

    Args:
        model: the traced module itself.
        groups: from ``tc.trace`` of this model.
        loss_fn: ``loss_fn(outputs, targets)``; it gets tensors on the meta device, which have shapes but no values.
        batches: as for ``tc.oracle``; only shapes are looked at, so that they may be on the meta device.

    Raises:
        InputError: an argument that can't be used.
        Exception: what the model or the loss raises without values.
    """
    check_study(model, groups, loss_fn, "oracle_cost")
    twin, meta = copy_model(model).eval().to("meta"), torch.device("meta")
    macs = naive = 0
    with evaluating(model):
        for batch in mini_batches(batches, meta):
            recording = record(twin, groups, loss_fn, batch, {})
            macs += recording.macs * (1 + (len(groups) if not naive else 0))
            macs += sum(part_after(recording, group, 1).macs * group.size for group in groups)
            naive += recording.macs * sum(groups.sizes().values())
    if not naive:
        raise InputError("oracle_cost: batches: wanted at least one example, got none")
    return OracleCost(macs, naive)
