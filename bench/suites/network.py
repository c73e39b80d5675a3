"""A whole network scored once, after a backward pass that was made anyway: this package against everything else that can do it.

``torch-pruning`` and our own pass need only parameters and their gradients. A gate parameter after every layer (the way of the paper's
own code) and a hook for the scores of every example work on activations; what they add to a forward and backward pass is measured
on tensors of the sizes of all of ResNet's gates.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bench.cases import ActivationCase, resnet_gates
from bench.race import EPS, Entry, Options, Provider, Race, of_square, worst_share
from bench.suites.graph import torch_pruning_groups
from bench.suites.networks import images, make, with_gradients
from bench.suites.peers import installed, ours, using
from bench.suites.scoring import SLACK, Exact, exact
from taylor_cuda import ops
from taylor_cuda.graph import trace
from taylor_cuda.graph.groups import ChannelGroup, Groups, Member, named_tensors
from taylor_cuda.importance import Importance

Site = tuple[Tensor, Tensor, Tensor]
"""An activation, its gradient, and a gate of ones that gets one of its own."""

CRITERIA = ("taylor_fo", "taylor_weight", "magnitude")


def members_of(group: ChannelGroup, criterion: str) -> tuple[Member, ...]:
    """Where a criterion looks: for Taylor-FO at γ and β where they suffice, otherwise at the readers; else at what writes the units."""
    return (group.affine or group.role("read")) if criterion == "taylor_fo" else group.role("write")


def by_layer(
    groups: Groups, tensors: dict[str, Tensor], gradients: dict[str, Tensor], criterion: str
) -> tuple[Tensor, Tensor]:
    """The criterion written down in plain PyTorch, one layer after the other, in the dtype of ``tensors``.

    Returns:
        Flat ``[units]``: the importance, and Σ of the absolute values of what was summed (before any square of a sum).
    """
    totals, magnitudes = [], []
    for group in groups:
        total: Tensor | float = 0.0
        magnitude: Tensor | float = 0.0
        for member in members_of(group, criterion):
            w = tensors[member.tensor]
            values = w * (w if criterion == "magnitude" else gradients[member.tensor])
            values = values.square() if criterion == "taylor_weight" else values
            others = [dim for dim in range(w.dim()) if dim != member.dim]
            index = member.index.to(w.device)
            total = total + (values.sum(others) if others else values)[index].sum(1)
            magnitude = magnitude + (values.abs().sum(others) if others else values.abs())[index].sum(1)
        totals.append(torch.as_tensor(total).square() if criterion == "taylor_fo" else torch.as_tensor(total))
        magnitudes.append(torch.as_tensor(magnitude))
    return torch.cat(totals), torch.cat(magnitudes)


def truth(groups: Groups, model: nn.Module, criterion: str) -> tuple[Tensor, Tensor]:
    """The importance in float64, and how far off a float32 one may be."""
    tensors = {name: tensor.detach().double() for name, tensor in named_tensors(model).items()}
    expected, magnitude = by_layer(groups, tensors, gradients_of(model, torch.float64), criterion)
    allowed = SLACK * EPS["float32"] * magnitude
    return expected, of_square(expected.sqrt(), allowed) if criterion == "taylor_fo" else allowed


def gradients_of(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """``.grad`` of every parameter that has one."""
    return {
        name: parameter.grad.to(dtype) for name, parameter in model.named_parameters() if parameter.grad is not None
    }


def build(network: str, criterion: str, size: int, batch: int, options: Options) -> Race:
    """The race of one criterion on one network."""
    x = images(1, size)
    model = make(network)
    groups = trace(model, x)
    with_gradients(model, 2 if options.quick else 8, size, options.device)
    expected, allowed = truth(groups, model, criterion)
    estimator = Importance(model, groups, criterion)

    def pass_of_ours(_inputs: Any) -> Tensor:
        estimator.update()
        return torch.cat(list(estimator.scores().values()))

    def check(result: Tensor, _index: int) -> float:
        return worst_share(result, expected, allowed)

    tensors = {name: tensor.detach() for name, tensor in named_tensors(model).items()}
    gradients = gradients_of(model, torch.float32)
    providers, skipped = [], []
    for name, backend in ours("weight_importance", options).items():
        if backend is None:
            skipped.append((name, "not built here"))
        else:
            providers.append(
                Provider(name, pass_of_ours, check, note="Importance.update() and .scores()", context=using(backend))
            )
    providers.append(
        Provider(
            "torch",
            lambda _: by_layer(groups, tensors, gradients, criterion)[0],
            check,
            note="one layer after the other",
        )
    )
    if criterion == "taylor_fo":
        peer = installed("torch_pruning")
        if peer is None:
            skipped.append(("torch-pruning", "not installed"))
        else:
            providers.append(torch_pruning(peer, model, x, options))
        if network in ("resnet50", "resnet101"):
            providers += with_activations(network, batch, options)
    return Race(
        "network",
        criterion,
        network,
        "float32",
        "parameters",
        bytes_of(groups, model, criterion),
        0,
        (None,),
        tuple(providers),
        "torch-pruning" if criterion == "taylor_fo" else "torch",
        tuple(skipped),
    )


def bytes_of(groups: Groups, model: nn.Module, criterion: str) -> int:
    """Every tensor that the criterion looks at once, its gradient too, and one float32 number a unit written."""
    tensors = named_tensors(model)
    names = {member.tensor for group in groups for member in members_of(group, criterion)}
    reads = 1 if criterion == "magnitude" else 2
    return sum(reads * tensors[name].nbytes for name in names) + 4 * sum(groups.sizes().values())


def torch_pruning(peer: Any, model: nn.Module, x: Tensor, options: Options) -> Provider:
    """``GroupTaylorImportance`` over all of Torch-Pruning's groups.

    It is another formula (Σ|w·g| of filters, readers too, each group divided by its mean; BatchNorm never enters, since its branch tests
    for another handler), so it is checked against itself in float64.
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

    def check(op: str, eps: float) -> Callable[[list[Tensor], int], float]:
        def worst(result: list[Tensor], _index: int) -> float:
            return max(worst_share(one, *this.of(op, eps)) for one, this in zip(result, exacts, strict=True))

        return worst

    where = f"{len(sites)} gates, batch {batch}, {cases[0].dtype_name}, {layout}"
    low, moved = EPS[cases[0].dtype_name], sum(case.bytes("channel_importance") for case in cases)
    return [
        Provider(
            "ours:activations", lambda _: fused(sites), check("channel_importance", EPS["float32"]), where, bytes=moved
        ),
        Provider(
            "nvlabs-style", lambda _: gate_parameters(sites), check("channel_importance", low), where, bytes=moved
        ),
        Provider(
            "hooks",
            lambda _: hooks(sites),
            check("channel_importance:sample", low),
            f"{where}; squares of every example",
            bytes=moved,
        ),
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
    network, size, batch = ("resnet18", 64, 2) if options.quick else ("resnet50", 224, 256 if options.cuda else 8)

    def made(criterion: str, priority: int) -> Entry:
        names = [*ours("weight_importance", options), "torch"]
        if criterion == "taylor_fo":
            names += ["torch-pruning", *(["ours:activations", "nvlabs-style", "hooks"] if not options.quick else [])]
        return Entry(
            "network",
            criterion,
            network,
            "float32",
            "parameters",
            lambda: build(network, criterion, size, batch, options),
            tuple(names),
            priority,
        )

    return [made(criterion, 25 if criterion == "taylor_fo" else 45) for criterion in CRITERIA]
