"""``tc.trace``: which channels of a model can be removed, and every place each of them lies in."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from taylor_cuda.errors import InputError
from taylor_cuda.graph.affine import with_affine
from taylor_cuda.graph.checks import check_model, check_not_compacted
from taylor_cuda.graph.flow import Flow
from taylor_cuda.graph.groups import Call, ChannelGroup, Frozen, Groups, call_arguments, named_tensors
from taylor_cuda.graph.labels import Array
from taylor_cuda.graph.prove import prove as prove_groups
from taylor_cuda.graph.recorder import copied, copy_model, leaves, record, set_mode, undisturbed
from taylor_cuda.graph.units import Units, freeze_unreached

__all__ = ["trace"]

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
Use = tuple[Call, "Array | None"]
"""What costs MACs, and the labels along which it does where these are no weight's."""


def trace(model: nn.Module, example_inputs: Any, ignore: Sequence[str] = (), prove: bool = True) -> Groups:
    """Find the groups of channels that can be removed from ``model``.

    The forward pass runs on a copy, in eval and in train mode, under rules for every ATen op (DESIGN 5).
    Data-dependent control flow is followed as it goes for the example. The model itself, its modes, gradients, hooks
    and the random states stay as they are.

    Args:
        model: any module on one device; not compiled and not wrapped.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments, on the model's device.
        ignore: names of modules, with ``*`` and ``?``, whose outputs stay. The network's own outputs stay always.
        prove: compare a cut copy with a masked one and offer only what holds. Without it, code with numbers that
            should have shrunk (``x[:, :8]``) may be offered.

    Returns:
        The groups, what is frozen and why, and what costs MACs.

    Raises:
        InputError: the model can't be traced as it is, its forward pass raises, a name in ``ignore`` matches nothing,
            or there is nothing to prune.
    """
    check_model(model, "trace")
    check_not_compacted(model, "trace")
    _check_tensors(model)
    inputs: Inputs = copied(call_arguments(example_inputs))
    stay = _matching(model, ignore)
    twin = _copy(model)
    with undisturbed(model):
        flow = Flow(twin)
        calls, modes_differ, notes = _record_both(twin, flow, inputs, stay)
        units = Units(flow, flow.labels.solve())
        found, left = units.groups()
        uses = tuple(units.along(found, call, labels) for call, labels in calls)
        tensors = named_tensors(model)
        groups = Groups(
            groups=tuple(units.with_numbers(with_affine(units, found))),
            frozen=tuple(units.frozen(left)),
            calls=uses,
            example_inputs=inputs,
            batch_size=next((tensor.shape[0] for tensor in leaves(inputs) if tensor.dim()), 1),
            original_macs=sum(call.macs_per_weight * call.elements(lambda name: tensors[name].shape) for call in uses),
            original_params=sum(parameter.numel() for parameter in model.parameters()),
            notes=notes,
        )
        if prove:
            _without(groups, prove_groups(twin, groups, inputs, modes_differ))
    if not groups.groups:
        raise InputError(f"model: nothing to prune. {_summary(groups.frozen)}")
    return groups


def _check_tensors(model: nn.Module) -> None:
    """Raise unless there are parameters and all tensors lie on one real device."""
    if not any(parameter.numel() for parameter in model.parameters()):
        raise InputError("model: has no parameters, so there is nothing to prune")
    devices = {str(tensor.device) for tensor in named_tensors(model).values()}
    if "meta" in devices:
        raise InputError("model: has tensors on the meta device, which hold no values; build it on a real device")
    if len(devices) > 1:
        raise InputError(f"model: wanted all parameters and buffers on one device, got {sorted(devices)}")


def _matching(model: nn.Module, ignore: Sequence[str]) -> dict[str, str]:
    """``{module name: the pattern in ignore that matches it}``."""
    patterns = [ignore] if isinstance(ignore, str) else list(ignore)
    names = [name for name, _ in model.named_modules() if name]
    found = {}
    for pattern in patterns:
        hits = [name for name in names if fnmatchcase(name, pattern)]
        if not hits:
            raise InputError(f"ignore: {pattern!r} matches no module of the model; names are like {names[:5]}")
        found.update(dict.fromkeys(hits, pattern))
    return found


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copy_model(model)
    except Exception as error:
        raise InputError(f"model: can't be deep-copied, which tracing needs: {error}") from error


def _record_both(
    twin: nn.Module, flow: Flow, inputs: Inputs, stay: dict[str, str]
) -> tuple[list[Use], bool, list[str]]:
    """Trace eval mode, then train mode: the calls of eval mode, whether train mode does anything else, and notes."""
    notes: list[str] = []
    try:
        set_mode(twin, False)
        record(twin, flow, inputs, set(stay))
    except Exception as error:
        raise InputError(
            f"example_inputs: the model's forward pass raises with them: {type(error).__name__}: {error}"
        ) from error
    calls, flow.calls = flow.calls, []
    steps, flow.steps = flow.steps, []
    try:
        set_mode(twin, True)
        record(twin, flow, inputs, set(stay))
    except Exception as error:
        flow.steps = steps
        notes.append(f"in train mode the forward pass raises {type(error).__name__}: {error}; only eval mode is proved")
    freeze_unreached(flow)
    for pattern in sorted(set(stay.values())):
        if not any(name in flow.ran for name, given in stay.items() if given == pattern):
            raise InputError(f"ignore: the forward pass calls no module that {pattern!r} matches; name their layers")
    return calls, flow.steps != steps, [*notes, *flow.notes]


def _without(groups: Groups, bad: dict[str, str]) -> None:
    """Move the groups that failed their proof to what is frozen."""
    kept: list[ChannelGroup] = [group for group in groups if group.name not in bad]
    failed = [
        Frozen(group.name, group.role("write")[0].index.numel(), bad[group.name])
        for group in groups
        if group.name in bad
    ]
    groups.groups = tuple(kept)
    groups.frozen = (*groups.frozen, *failed)


def _summary(frozen: Sequence[Frozen]) -> str:
    sizes: dict[str, int] = {}
    for entry in frozen:
        sizes[entry.reason] = sizes.get(entry.reason, 0) + entry.size
    main = sorted(sizes.items(), key=lambda item: -item[1])[:5]
    if not main:
        return "No layer writes channels that another layer reads."
    return "Channels that stay: " + "; ".join(f"{size} ({reason})" for reason, size in main)
