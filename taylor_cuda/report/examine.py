"""What a trace found in a model, as plain values: the facts that ``taylor-cuda doctor`` tells."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from taylor_cuda.graph.groups import ChannelGroup, Frozen, Groups, Role, layer_of, named_tensors
from taylor_cuda.planning.budget import budget_limits
from taylor_cuda.planning.cost import COSTS, CostTerms, Lengths, as_cost, compile_cost, original_totals
from taylor_cuda.planning.rungs import Rungs, allowed_counts, resolve_round_to
from taylor_cuda.report.usage import Usage, modules_of, observe_usage

__all__ = ["examine", "split_reason"]

_PLACE = re.compile(r"^(?P<text>.*) \((?P<place>[^()]*)\)$", re.DOTALL)
_LINE = re.compile(r"^\S[^,]*:\d+$")


def examine(
    model: nn.Module, groups: Groups, min_keep: int = 1, max_ratio: float = 1.0, round_to: int | str = "auto"
) -> dict[str, Any]:
    """What can go, what can't and why, how far a budget can go, and what may surprise.

    Args:
        model: the traced module.
        groups: from ``tc.trace`` of this model.
        min_keep: see ``tc.plan``.
        max_ratio: see ``tc.plan``.
        round_to: see ``tc.plan``.

    Returns:
        Values that JSON can hold. MACs are those of one example; a share is a fraction of the whole model's.

        - ``cost``: ``macs``, ``params`` and ``channels`` (units in all groups) of the model.
        - ``groups``: for each group ``name``; ``size`` in units; ``unit``, what one is: ``"channel"``, ``"head"``,
          ``"convolution group"``, ``"norm group"`` or ``"channels"`` (several, coupled by the code); ``width``, the
          positions of one unit where it is written (the most, where layers differ); ``writers``, ``readers``,
          ``norms``, ``others``: the layers, by name; ``members``: every place, ``tensor``, ``dim``, ``role``,
          ``width``; ``macs``, ``macs_share``, ``params``, ``params_share``: what would go with the whole group (groups
          that meet in a layer both count it); ``lowest``: units that stay at its floor; ``numbers``: attributes of
          modules that follow a cut, with ``module``, ``name``, ``value`` and ``per_unit``.
        - ``frozen``: channels that stay: ``name`` of the layer, ``size``, ``reason``, and the ``module`` and ``line``
          of code where it happened ("" where they aren't known).
        - ``best_case``: every group at its floor: ``macs``, ``params``, ``channels``; ``budget``, the least value of
          each budget that ``tc.plan`` can meet; ``min_keep``, ``max_ratio``, ``round_to``, which floors follow from.
        - ``traps``: ``frozen_parameters``: ``parameter`` and the ``groups`` it lies in; ``shared``: ``parameter``, all
          its ``names``, and ``calls``, how often one forward pass uses it; ``odd_groups``: names of groups whose
          units aren't single channels; ``unused`` and ``train_only``: ``module``, ``params`` (a count) and
          ``parameters`` (names) of what no forward pass meets, or only one in train mode.
        - ``notes``: what the trace noted.

    Raises:
        InputError: a floor that isn't one.
    """
    lengths = Lengths(model, groups)
    terms = compile_cost(lengths, groups)
    multiple = resolve_round_to(model, round_to)
    rungs = allowed_counts(groups, lengths, multiple, min_keep, max_ratio)
    found = [_group(model, groups, terms, rungs, number) for number in range(len(groups))]
    modules = {name for name, _ in model.named_modules()}
    floors = {"min_keep": min_keep, "max_ratio": max_ratio, "round_to": multiple}
    return {
        "cost": asdict(as_cost(groups, terms.totals(terms.sizes))),
        "groups": found,
        "frozen": [_frozen(entry, modules) for entry in groups.frozen],
        "best_case": {**_best_case(groups, terms.totals(rungs.lowest)), **floors},
        "traps": _traps(model, groups, found, observe_usage(model, groups.example_inputs)),
        "notes": list(groups.notes),
    }


# -- groups -----------------------------------------------------------------------------------------------------------


def _group(model: nn.Module, groups: Groups, terms: CostTerms, rungs: Rungs, number: int) -> dict[str, Any]:
    group = groups.groups[number]
    whole = as_cost(groups, terms.totals(terms.sizes))
    without = list(terms.sizes)
    without[number] = 0
    rest = as_cost(groups, terms.totals(without))
    return {
        "name": group.name,
        "size": group.size,
        "unit": _unit(model, groups, group),
        "width": max(member.width for member in group.role("write")),
        "writers": _layers(group, "write"),
        "readers": _layers(group, "read"),
        "norms": _layers(group, "norm"),
        "others": _layers(group, "other"),
        "members": [{"tensor": m.tensor, "dim": m.dim, "role": m.role, "width": m.width} for m in group.members],
        "macs": whole.macs - rest.macs,
        "macs_share": _share(whole.macs - rest.macs, whole.macs),
        "params": whole.params - rest.params,
        "params_share": _share(whole.params - rest.params, whole.params),
        "lowest": rungs.lowest[number],
        "numbers": [
            {"module": n.module, "name": n.name, "value": n.per_unit * group.size, "per_unit": n.per_unit}
            for n in group.numbers
        ],
    }


def _layers(group: ChannelGroup, role: Role) -> list[str]:
    """The modules (or parameters of the model itself) that have members with this role; writers' biases are no others.

    In the order of the model.
    """
    written = {layer_of(member.tensor) for member in group.role("write")} if role == "other" else set()
    names = dict.fromkeys(layer_of(member.tensor) for member in group.role(role))
    return [name for name in names if name not in written]


def _unit(model: nn.Module, groups: Groups, group: ChannelGroup) -> str:
    """What one unit of a group is."""
    if all(member.width == 1 for member in group.role("write")):
        return "channel"
    places = {(member.tensor, member.dim) for member in group.members}
    if group.numbers or any(call.along in places for call in groups.calls):
        return "head"
    modules = dict(model.named_modules())
    owners = [modules.get(layer_of(member.tensor)) for member in group.members if member.width > 1]
    if any(isinstance(owner, _ConvNd) and owner.groups > 1 for owner in owners):
        return "convolution group"
    if any(isinstance(owner, nn.GroupNorm) for owner in owners):
        return "norm group"
    return "channels"


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


# -- what stays, and how far the rest can go --------------------------------------------------------------------------


def _frozen(entry: Frozen, modules: Collection[str]) -> dict[str, Any]:
    text, module, line = split_reason(entry.reason, modules)
    return {"name": entry.name, "size": entry.size, "reason": text, "module": module, "line": line}


def split_reason(reason: str, modules: Collection[str]) -> tuple[str, str, str]:
    """A reason, the module and the ``file.py:12`` that stand in brackets at its end, or "" where they don't."""
    found = _PLACE.match(reason)
    parts = found["place"].split(", ") if found else []
    lines = [part for part in parts if _LINE.match(part)]
    names = [part for part in parts if part and part in modules]
    if not found or parts not in (names[:1] + lines[:1], names[:1], lines[:1]):
        return reason, "", ""
    return found["text"], "".join(names), "".join(lines)


def _best_case(groups: Groups, lowest: Sequence[int]) -> dict[str, Any]:
    """The cost with every group at its floor, and the least budgets of four decimals that allow it."""
    originals = original_totals(groups)
    budget = {}
    for name, least, original in zip(COSTS, lowest, originals, strict=True):
        if original:
            steps = math.floor(least / original * 10**4)
            while steps < 10**4 and budget_limits({name: steps / 10**4}, originals)[name] < least:
                steps += 1
            budget[name] = steps / 10**4
    return {**asdict(as_cost(groups, lowest)), "budget": budget}


# -- traps ------------------------------------------------------------------------------------------------------------


def _traps(model: nn.Module, groups: Groups, found: list[dict[str, Any]], usage: Usage) -> dict[str, Any]:
    parameters = dict(model.named_parameters())
    met = usage.in_eval | usage.in_train
    return {
        "frozen_parameters": _frozen_parameters(model, groups),
        "shared": _shared(model, groups, usage),
        "odd_groups": [group["name"] for group in found if group["unit"] != "channel"],
        "unused": _counted(model, [name for name in parameters if name not in met]),
        "train_only": _counted(model, [name for name in parameters if name in met - usage.in_eval]),
    }


def _frozen_parameters(model: nn.Module, groups: Groups) -> list[dict[str, Any]]:
    lie_in: dict[str, list[str]] = {}
    for group in groups:
        for name in dict.fromkeys(member.tensor for member in group.members):
            lie_in.setdefault(name, []).append(group.name)
    return [
        {"parameter": name, "groups": lie_in[name]}
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad and name in lie_in
    ]


def _shared(model: nn.Module, groups: Groups, usage: Usage) -> list[dict[str, Any]]:
    """Parameters with several names, or used more than once in one forward pass."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    products = Counter(call.weight for call in groups.calls)
    shared = []
    for name, parameter in model.named_parameters():
        calls = max(products[name], usage.calls.get(name.rpartition(".")[0], 0))
        if len(names[id(parameter)]) > 1 or calls > 1:
            shared.append({"parameter": name, "names": names[id(parameter)], "calls": calls})
    return shared


def _counted(model: nn.Module, parameters: list[str]) -> list[dict[str, Any]]:
    tensors = named_tensors(model)
    return [
        {"module": module, "params": sum(tensors[name].numel() for name in names), "parameters": names}
        for module, names in modules_of(model, parameters).items()
    ]
