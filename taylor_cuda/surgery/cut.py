"""Removing channels for real: ``tc.cut``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from taylor_cuda.graph.checks import COMPACTED, check_model
from taylor_cuda.graph.groups import Groups, units_to_keep
from taylor_cuda.graph.recorder import copy_model
from taylor_cuda.graph.slicing import shrink_groups, slice_model, tensor_keeps
from taylor_cuda.surgery.compact import Compacted
from taylor_cuda.surgery.recipe import check_current, compose
from taylor_cuda.surgery.shrink import Shrinking
from taylor_cuda.surgery.verify import DifferenceError, MaskedReference

__all__ = ["cut"]


def cut(
    model: nn.Module, groups: Groups, plan: Any, optimizer: Any = None, ema: Any = None, verify: bool = True
) -> Groups:
    """Remove the units that a plan drops from a model, and from everything that goes with it, in place.

    Parameters stay the same objects, so no optimizer, scheduler or reference goes stale. Sliced are parameters, their
    gradients, buffers, the optimizer's state and EMA copies; layers' sizes follow; dtype, device, ``requires_grad``,
    memory format and training flags stay. It is a transaction: whatever is raised, ``KeyboardInterrupt`` included,
    everything is as it was before, bit for bit.

    A model that runs compact (``tc.compact``) no longer does so afterwards: the cut makes a plan permanent.

    What was cut is remembered, in original positions, as ``model.taylor_cuda_recipe``.

    Args:
        model: the traced module itself, not a compiled or wrapped one.
        groups: from ``tc.trace`` of this model; updated in place.
        plan: a ``tc.Plan``, or ``{group name: sorted int64 indices of the units to keep}``; groups that aren't named
            stay whole.
        optimizer: the optimizer (or a list of them) that trains the model. Every state tensor of a parameter's shape
            is sliced with it. Without it, an optimizer made before goes on with state of the wrong shape: make a new
            one.
        ema: copies that follow: a module, an object that has one in ``.module``
            (``torch.optim.swa_utils.AveragedModel``, timm's ``ModelEmaV3``), a dict of tensors by name, or a list of
            these.
        verify: run the example inputs through the masked model before and through the cut model after, and compare at
            the outputs and at every reader of channels. The greatest relative difference is then in
            ``groups.verified``. Where it is too great, a float64 copy decides whether that is rounding.

    Returns:
        ``groups``, which are now those of the smaller model.

    Raises:
        InputError: an argument doesn't fit; raised before anything is touched.
        CutError: the cut model doesn't compute what the masked model did.
    """
    check_model(model, "cut")
    compacted: Compacted | None = vars(model).get(COMPACTED)
    if compacted is None:
        return _cut(model, groups, plan, optimizer, ema, verify)
    with compacted.suspended():
        result = _cut(model, groups, plan, optimizer, ema, verify)
    compacted.close()
    return result


def _cut(model: nn.Module, groups: Groups, plan: Any, optimizer: Any, ema: Any, verify: bool) -> Groups:
    keep = units_to_keep(groups, plan)
    check_current(model, groups)
    keeps = tensor_keeps(model, groups, keep)
    if not keeps:
        return groups
    shrinking = Shrinking(model, keeps, optimizer, ema)
    recipe = compose(model, groups, keep, keeps)
    shrunk = shrink_groups(groups, keep, keeps)
    exact = None
    try:
        with torch.inference_mode(False), shrinking.transaction(groups):
            reference = MaskedReference(model, groups, keep) if verify else None
            shrinking.apply(recipe)
            groups.verified = reference.compare() if reference is not None else None
            groups.groups = shrunk
            return groups
    except DifferenceError:
        # a LayerNorm that is left with two channels of nearly equal values magnifies rounding a thousand times
        exact = _difference_in_double(model, groups, keep)
        if exact is None:
            raise
    with torch.inference_mode(False), shrinking.transaction(groups):
        shrinking.apply(recipe)
        groups.verified, groups.groups = exact, shrunk
    return groups


def _difference_in_double(model: nn.Module, groups: Groups, keep: dict[str, Tensor]) -> float | None:
    """How far a float64 copy of the model, cut, is from that copy, masked; None where they differ or can't be run."""
    try:
        twin = copy_model(model).double()
        reference = MaskedReference(twin, groups, keep)
        slice_model(twin, groups, keep)
        return reference.compare()
    except Exception:
        return None
