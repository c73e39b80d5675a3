"""Trace, plan, cut, compare: what this package does with one network."""

from __future__ import annotations

import copy
import re
import time
from collections import Counter
from dataclasses import replace

import torch
from torch import Tensor, nn

import taylor_cuda as tc
from taylor_cuda.bench.coverage import compare
from taylor_cuda.bench.coverage.networks import Network
from taylor_cuda.bench.coverage.outcome import BUDGET, Outcome
from taylor_cuda.graph.groups import Groups

OUTPUT = "an output of the network"


def examine(network: Network) -> Outcome:
    """The whole row."""
    outcome = Outcome(network.name, network.source, network.shape, "ours")
    model, x = build(network)
    try:
        start, cpu = time.perf_counter(), time.process_time()
        try:
            groups = tc.trace(model, x)
        finally:
            outcome.seconds, outcome.cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
        account(model, groups, outcome)
        compare.enliven(model, x)
        keep = planned(model, groups, outcome)
        judge(model, x, groups, keep, outcome)
    except Exception as error:
        outcome.verdict, outcome.note = "error", describe(error)
    return outcome


def describe(error: Exception) -> str:
    """Its type and first line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def build(network: Network) -> tuple[nn.Module, Tensor]:
    """The network in eval mode and its example input, after one forward pass: the first one of a kind is slow."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = network.make().eval()
    x = network.inputs()
    with torch.no_grad():
        model(x)
    return model, x


def account(model: nn.Module, groups: Groups, outcome: Outcome) -> None:
    """What is offered, and why the rest stays."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    touched = {member.tensor for group in groups for member in group.members}
    reasons: Counter[str] = Counter()
    for frozen in groups.frozen:
        # the same reason at the same line, in however many blocks
        text = re.sub(r"\((?:[^()]*, )?([^(),]*:\d+)\)$", r"(\1)", frozen.reason)
        if text != OUTPUT:
            reasons[text] += frozen.size
    outcome.share = sum(size for name, size in sizes.items() if name in touched) / sum(sizes.values())
    outcome.groups, outcome.units = len(groups), sum(groups.sizes().values())
    outcome.frozen = tuple(reasons.most_common(3))


def planned(model: nn.Module, groups: Groups, outcome: Outcome) -> dict[str, Tensor]:
    """What a plan for the budget keeps; a random part of every group where no plan reaches it."""
    generator = torch.Generator().manual_seed(0)
    scores = {group.name: torch.rand(group.size, generator=generator) for group in groups}
    try:
        return tc.plan(model, groups, scores, budget={"macs": BUDGET}).keep
    except tc.BudgetError as error:
        outcome.note = str(error)
        return thinned(groups)


def thinned(groups: Groups) -> dict[str, Tensor]:
    """A random half or more of every group: a plan may leave a group whole, and then says nothing about it."""
    generator = torch.Generator().manual_seed(1)
    keep = {}
    for group in groups:
        gone = int(torch.randint(1, max(2, group.size // 2 + 1), (), generator=generator))
        order = torch.randperm(group.size, generator=generator)
        keep[group.name] = order[min(gone, group.size - 1) :].sort().values
    return keep


def judge(model: nn.Module, x: Tensor, groups: Groups, keep: dict[str, Tensor], outcome: Outcome) -> None:
    """Cut copies, by the plan and in every group, and compare. ``model`` and ``groups`` stay as they are."""
    small = cut_copy(model, groups, keep)
    outcome.macs = compare.count_macs(small, x) / compare.count_macs(model, x)
    compared = [
        apart(model, x, groups, kept, training)
        for kept in (keep, thinned(groups))
        for training in compare.modes(model, x)
    ]
    outcome.difference = max(difference for difference, _ in compared)
    outcome.effect = min(effect for _, effect in compared)
    right = outcome.difference <= compare.ALLOWED < 1e-2 < outcome.effect
    outcome.verdict = "ok" if right else "wrong"
    if right:
        again = replace(groups)
        tc.cut(copy.deepcopy(model), again, keep)
        outcome.verified = again.verified


def cut_copy(model: nn.Module, groups: Groups, keep: dict[str, Tensor]) -> nn.Module:
    """Cut without verifying: what ``tc.cut`` would refuse is for this comparison to find."""
    small = copy.deepcopy(model)
    tc.cut(small, replace(groups), keep, verify=False)
    return small


def apart(model: nn.Module, x: Tensor, groups: Groups, keep: dict[str, Tensor], training: bool) -> tuple[float, float]:
    """How far a cut is from zeroed by hand and from ``tc.masked``, whichever is further; and from the whole network."""
    offered = list(groups)
    found = compare.outputs(cut_copy(model, groups, keep), x, training)
    zeroed = compare.Zeroed(model, compare.dropped_columns(offered, keep), compare.kept_in_norms(model, offered, keep))
    twin = copy.deepcopy(model)
    with tc.masked(twin, groups, keep):
        masked = compare.outputs(twin, x, training)
    whole = compare.outputs(copy.deepcopy(model), x, training)
    difference = max(compare.furthest(expected, found) for expected in (zeroed.outputs(x, training), masked))
    return difference, compare.furthest(whole, found)
