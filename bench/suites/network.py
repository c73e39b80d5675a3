"""A whole network scored once, after a backward pass that was made anyway: this package against everybody else.

``torch-pruning`` and our own pass need only parameters and their gradients. A gate parameter after every layer (the way
of the paper's own code) and a hook for the scores of every example work on activations; what they add to a forward and
backward pass is measured on tensors of the sizes of all of the network's gates.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from taylor_cuda import ops
from taylor_cuda.bench.cases import BLOCKS, ActivationCase, resnet_gates
from taylor_cuda.bench.race import ALLOWED, Entry, Key, Options, Provider, Race, of_square, worst_of, worst_share
from taylor_cuda.bench.suites.graph import torch_pruning_groups
from taylor_cuda.bench.suites.networks import images, make, with_gradients
from taylor_cuda.bench.suites.peers import installed, our_names, our_providers
from taylor_cuda.bench.suites.scoring import Exact, exact
from taylor_cuda.graph import trace
from taylor_cuda.graph.groups import ChannelGroup, Groups, Member, named_tensors
from taylor_cuda.importance import Importance

Site = tuple[Tensor, Tensor, Tensor]
"""An activation, its gradient, and a gate of ones that gets one of its own."""

Tensors = dict[str, Tensor]

CRITERIA = ("taylor_fo", "taylor_weight", "magnitude")


def members_of(group: ChannelGroup, criterion: str) -> tuple[Member, ...]:
    """Where a criterion looks: Taylor-FO at γ and β where they suffice, else at readers; the others at what writes."""
    return (group.affine or group.role("read")) if criterion == "taylor_fo" else group.role("write")


def by_layer(groups: Groups, tensors: Tensors, gradients: Tensors, criterion: str) -> Tensor:
    """Flat ``[units]``: the criterion in plain PyTorch, one layer after the other, in the dtype of ``tensors``."""

    def terms(name: str) -> Tensor:
        if criterion == "magnitude":
            return tensors[name].square()
        products = tensors[name] * gradients[name]
        return products.square() if criterion == "taylor_weight" else products

    total = unit_sums(groups, terms, criterion)
    return total.square() if criterion == "taylor_fo" else total


def unit_sums(groups: Groups, terms: Callable[[str], Tensor], criterion: str) -> Tensor:
    """Flat ``[units]``: the sum over all of a unit's places of what ``terms`` makes of the tensor there."""
    totals = []
    for group in groups:
        parts = []
        for member in members_of(group, criterion):
            values = terms(member.tensor)
            others = [dim for dim in range(values.dim()) if dim != member.dim]
            along = values.sum(others) if others else values
            parts.append(along[member.index.to(values.device)].sum(1))
        totals.append(torch.stack(parts).sum(0))
    return torch.cat(totals)


def truth(groups: Groups, model: nn.Module, criterion: str) -> tuple[Tensor, Tensor]:
    """The importance in float64, and how far off a float32 one may be."""
    tensors = {name: tensor.detach().double() for name, tensor in named_tensors(model).items()}
    gradients = gradients_of(model, torch.float64)
    expected = by_layer(groups, tensors, gradients, criterion)
    if criterion != "taylor_fo":
        return expected, ALLOWED["float32"] * expected
    magnitude = unit_sums(groups, lambda name: (tensors[name] * gradients[name]).abs(), criterion)
    return expected, of_square(expected.sqrt(), ALLOWED["float32"] * magnitude)


def gradients_of(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """``.grad`` of every parameter that has one."""
    return {
        name: parameter.grad.to(dtype) for name, parameter in model.named_parameters() if parameter.grad is not None
    }


def build(key: Key, size: int, batch: int, options: Options) -> Race:
    """The race of one criterion on one network."""
    network, criterion = key.case, key.op
    x, model = images(1, size), make(network)
    groups = trace(model, x)
    with_gradients(model, 2 if options.quick else 8, size, options.device)
    expected, allowed = truth(groups, model, criterion)
    estimator = Importance(model, groups, criterion)

    def scored(_inputs: Any) -> dict[str, Tensor]:
        estimator.update()
        return estimator.scores()

    def check_scores(result: dict[str, Tensor], _index: int) -> float:
        return worst_share(torch.cat(list(result.values())), expected, allowed)

    tensors = {name: tensor.detach() for name, tensor in named_tensors(model).items()}
    gradients = gradients_of(model, torch.float32)
    note = "Importance.update(), .scores()"
    providers, skipped = our_providers("weight_importance", options, scored, check_scores, note)
    plain = Provider(
        "torch",
        lambda _: by_layer(groups, tensors, gradients, criterion),
        lambda result, _: worst_share(result, expected, allowed),
        "one layer after the other",
    )
    providers.append(plain)
    if criterion == "taylor_fo":
        peer = installed("torch_pruning")
        if peer is None:
            skipped.append(("torch-pruning", "not installed"))
        else:
            providers.append(torch_pruning(peer, model, x, options))
        if network in BLOCKS:
            providers += with_activations(network, batch, options)
    first_peer = "torch-pruning" if criterion == "taylor_fo" else "torch"
    return Race(key, providers, bytes=bytes_of(groups, model, criterion), peer=first_peer, skipped=skipped)


def bytes_of(groups: Groups, model: nn.Module, criterion: str) -> int:
    """Every tensor that the criterion looks at once, its gradient too, and one float32 number a unit written."""
    tensors = named_tensors(model)
    names = {member.tensor for group in groups for member in members_of(group, criterion)}
    reads = 1 if criterion == "magnitude" else 2
    return sum(reads * tensors[name].nbytes for name in names) + 4 * sum(groups.sizes().values())


def torch_pruning(peer: Any, model: nn.Module, x: Tensor, options: Options) -> Provider:
    """``GroupTaylorImportance`` over all of Torch-Pruning's groups.

    It is another formula (Σ|w·g| of filters and of readers, each group divided by its mean; BatchNorm never enters, as
    that branch tests for another handler), so it is checked against itself in float64.
    """
    importance = peer.importance.GroupTaylorImportance()

    def prepared(dtype: torch.dtype) -> list[Any]:
        theirs = copy.deepcopy(model).to("cpu", dtype)
        groups = torch_pruning_groups(peer, theirs, x.to(dtype))
        theirs.to(options.device)
        for mine, other in zip(model.parameters(), theirs.parameters(), strict=True):
            other.grad = None if mine.grad is None else mine.grad.to(dtype)
        return groups

    groups = prepared(torch.float32)
    expected = torch.cat([importance(group) for group in prepared(torch.float64)])
    return Provider(
        "torch-pruning",
        lambda _: [importance(group) for group in groups],
        lambda result, _: worst_share(torch.cat(result), expected, 1e-4 * expected.abs()),
        note="GroupTaylorImportance; its scores leave BatchNorm out",
        bytes=0,
    )


def with_activations(network: str, batch: int, options: Options) -> list[Provider]:
    """The three ways that go over every activation of the network again."""
    dtype, layout = (torch.bfloat16, "channels_last") if options.cuda else (torch.float32, "nchw")
    cases = [
        ActivationCase((batch, channels, height, height), dtype, layout)
        for (channels, height), count in sorted(resnet_gates(network).items())
        for _ in range(count)
    ]
    sites: list[Site] = []
    exacts: list[Exact] = []
    for seed, case in enumerate(cases):
        activation, gradient = case.inputs(options.device, seed)
        exacts.append(exact((activation, gradient)))
        gate = torch.ones(1, case.shape[1], 1, 1, dtype=dtype, device=options.device, requires_grad=True)
        sites.append((activation.requires_grad_(), gradient, gate))

    def check(op: str, dtype: str) -> Callable[[list[Tensor], int], float]:
        def worst(result: list[Tensor], _index: int) -> float:
            return worst_of(worst_share(one, *this.of(op, dtype)) for one, this in zip(result, exacts, strict=True))

        return worst

    note = f"{len(sites)} gates, batch {batch}, {cases[0].dtype_name}, {layout}"
    low, moved = cases[0].dtype_name, sum(case.bytes("channel_importance") for case in cases)
    batch_sums, example_sums = "channel_importance", "channel_importance:sample"

    def provider(name: str, run: Callable[[list[Site]], list[Tensor]], op: str, dtype: str) -> Provider:
        return Provider(name, lambda _: run(sites), check(op, dtype), note, bytes=moved)

    return [
        provider("ours:activations", fused, batch_sums, "float32"),
        provider("nvlabs-style", gate_parameters, batch_sums, low),
        provider("hooks", hooks, example_sums, low),
    ]


def fused(sites: list[Site]) -> list[Tensor]:
    """The fused kernel at every gate."""
    return [ops.channel_importance(activation.detach(), gradient) for activation, gradient, _ in sites]


def gate_parameters(sites: list[Site]) -> list[Tensor]:
    """(dE/dz)² of a gate parameter z = 1 multiplied in after every layer, by autograd (arXiv:1906.10771, eq. 8)."""
    scores = []
    for activation, gradient, gate in sites:
        _, slope = torch.autograd.grad(activation * gate, (activation, gate), gradient)
        scores.append(slope.flatten().square())
    return scores


@torch.no_grad()
def hooks(sites: list[Site]) -> list[Tensor]:
    """Σ_n (Σ_l a·g)² by a hook on every gate's output."""
    return [(activation * gradient).sum((2, 3)).square().sum(0) for activation, gradient, _ in sites]


def entries(options: Options) -> list[Entry]:
    """The scoring pass of each criterion that needs no activation."""
    network, size, batch = "resnet50", 224, 256 if options.cuda else 8
    if options.quick:
        network, size, batch = "tiny", 64, 2
    found = []
    for criterion in CRITERIA:
        names = [*our_names("weight_importance", options), "torch"]
        if criterion == "taylor_fo":
            names += ["torch-pruning", *(["ours:activations", "nvlabs-style", "hooks"] if network in BLOCKS else [])]
        made = partial(build, size=size, batch=batch, options=options)
        priority = 25 if criterion == "taylor_fo" else 45
        found.append(Entry(Key("network", criterion, network), made, names, priority))
    return found
