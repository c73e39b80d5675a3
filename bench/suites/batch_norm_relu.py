"""BatchNorm, addition and ReLU as one op whose backward pass leaves gate sums, against PyTorch's separate ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from taylor_cuda import ops
from taylor_cuda.bench.cases import ActivationCase, input_sets
from taylor_cuda.bench.environment import cache_bytes
from taylor_cuda.bench.race import Entry, Key, Options, Provider, Race, worst_of
from taylor_cuda.bench.suites.peers import compiled, our_names, our_providers, preceded_by
from taylor_cuda.bench.suites.scoring import BY_SIZE

OP = "batch_norm_relu"
MOMENTUM, EPS = 0.1, 1e-5
WITH_SUMS = "torch+sums"
ALLOWED = {"float32": 2.0**-17, "bfloat16": 2.0**-6}
"""Of the norm of the exact result: the rounding of outputs that are stored in this type."""

ALLOWED_PEER = {"float32": 2.0**-17, "bfloat16": 2.0**-3}
"""The same for separate ops, which round before they add: the ReLU of one element in some hundreds is turned then."""


@dataclass(frozen=True)
class Inputs:
    """A layer's x, γ, β and, if there is one, residual; the gradient of its output, running statistics, and sums."""

    parameters: tuple[Tensor, ...]
    gradient: Tensor
    running: tuple[Tensor, Tensor]
    sums: Tensor

    @property
    def residual(self) -> Tensor | None:
        """What is added before the ReLU."""
        return self.parameters[3] if len(self.parameters) > 3 else None


Layer = Callable[..., Tensor]
"""(x, γ, β, residual or None, inputs) -> y."""


def ours(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, given: Inputs) -> Tensor:
    """This package's own, with the gate sums of every example."""
    return ops.batch_norm_relu(x, *given.running, weight, bias, True, MOMENTUM, EPS, residual, given.sums)


def separate(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, given: Inputs) -> Tensor:
    """Two ops of PyTorch, or three; no sums."""
    y = F.batch_norm(x, *given.running, weight, bias, True, MOMENTUM, EPS)
    return F.relu_(y if residual is None else y.add_(residual))


def scored(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, given: Inputs) -> Tensor:
    """The same, with the gate sums of every example by a pass of their own."""
    y = ops.score_gate(F.batch_norm(x, *given.running, weight, bias, True, MOMENTUM, EPS), given.sums)
    return F.relu(y if residual is None else y + residual)


def inputs_of(case: ActivationCase, residual: bool, device: str, seed: int) -> Inputs:
    """Random, with statistics that are not those of the batch."""
    x, gradient = case.inputs(device, seed)
    generator = torch.Generator(device=device).manual_seed(seed)
    channels = case.shape[1]
    weight = torch.rand(channels, device=device, generator=generator) + 0.5
    bias = torch.randn(channels, device=device, generator=generator) / 10
    added = (case.inputs(device, seed + 1000)[0],) if residual else ()
    parameters = tuple(tensor.requires_grad_() for tensor in (x, weight, bias, *added))
    running = torch.zeros(channels, device=device), torch.ones(channels, device=device)
    return Inputs(parameters, gradient, running, torch.zeros(case.shape[:2], device=device))


def pass_of(layer: Layer, given: Inputs, *, backward: bool) -> tuple[list[Tensor], Inputs]:
    """The output; or the gradients of x, γ, β and the residual."""
    x, weight, bias = given.parameters[:3]
    y = layer(x, weight, bias, given.residual, given)
    if not backward:
        return [y.detach()], given
    return list(torch.autograd.grad(y, given.parameters, given.gradient)), given


def exact(given: Inputs, *, backward: bool) -> tuple[list[Tensor], Tensor]:
    """The same in float64, and the gate sums."""
    wide = Inputs(
        tuple(tensor.detach().double().requires_grad_() for tensor in given.parameters),
        given.gradient.double(),
        (torch.zeros_like(given.running[0]).double(), torch.ones_like(given.running[1]).double()),
        torch.zeros_like(given.sums).double(),
    )
    x, weight, bias = wide.parameters[:3]
    normal = F.batch_norm(x, *wide.running, weight, bias, True, MOMENTUM, EPS)
    y = F.relu(normal if wide.residual is None else normal + wide.residual)
    if not backward:
        return [y.detach()], wide.sums
    *gradients, inner = torch.autograd.grad(y, (*wide.parameters, normal), wide.gradient)
    return gradients, (normal * inner).flatten(2).sum(2).detach()


def distance(actual: Tensor, expected: Tensor, allowed: float) -> float:
    """The norm of the difference, as a share of what is allowed of the norm of what is expected."""
    return float((actual.double() - expected).norm() / (allowed * expected.norm()))


def build(key: Key, case: ActivationCase, options: Options, *, compile_too: bool) -> Race:
    """The race for one shape."""
    _, way, *rest = key.op.split(":")
    residual, backward = "residual" in rest, way == "forward+backward"
    size = prod(case.shape) * case.dtype.itemsize
    count = input_sets(3 * size, cache_bytes(options.device), least=1 if options.quick else 2)
    inputs = [inputs_of(case, residual, options.device, seed) for seed in range(count)]
    truth = [exact(given, backward=backward) for given in inputs]

    def check(allowed: float, *, sums: bool) -> Callable[[tuple[list[Tensor], Inputs], int], float]:
        def worst(result: tuple[list[Tensor], Inputs], index: int) -> float:
            pairs = list(zip(result[0], truth[index][0], strict=True))
            if sums and backward:
                pairs.append((result[1].sums, truth[index][1]))
            return worst_of(distance(actual, expected, allowed) for actual, expected in pairs)

        return worst

    check_sums, check_ours = (check(table[key.dtype], sums=True) for table in (ALLOWED_PEER, ALLOWED))
    check_plain = check(ALLOWED_PEER[key.dtype], sums=False)

    def clear() -> None:
        for given in inputs:
            given.sums.zero_()

    def run(layer: Layer) -> Callable[[Inputs], tuple[list[Tensor], Inputs]]:
        return lambda given: pass_of(layer, given, backward=backward)

    providers, skipped = our_providers(f"{OP}_forward", options, run(ours), check_ours, before=clear)
    providers.append(Provider("torch", run(separate), check_plain, "leaves no sums"))
    providers.append(Provider(WITH_SUMS, run(scored), check_sums, context=preceded_by(clear)))
    if compile_too:
        x, weight, bias = inputs[0].parameters[:3]
        fast = compiled(separate, x, weight, bias, inputs[0].residual, inputs[0])
        if isinstance(fast, str):
            skipped.append(("torch.compile", fast))
        else:
            providers.append(Provider("torch.compile", run(fast), check_plain, "leaves no sums"))
    # x twice and y; on the way back x and the gradient twice and gx; the residual, on the way back y and its gradient.
    passes = (3 + residual) + backward * (5 + 2 * residual)
    return Race(
        key, providers, inputs, passes * size, peer="torch", skipped=skipped, timers=("graph", "eager"), rounds=20
    )


def entries(options: Options) -> list[Entry]:
    """A few gates of the residual networks, in training mode."""
    dtype = torch.bfloat16 if options.cuda else torch.float32
    if options.quick:
        shapes: list[tuple[int, ...]] = [(4, 16, 14, 14)]
    else:
        shapes = [(256, *gate) for gate in BY_SIZE] if options.cuda else [(16, 64, 56, 56)]
    names = [*our_names(f"{OP}_forward", options), "torch", WITH_SUMS]
    compile_too = options.cuda and not options.quick
    found = []
    for shape in shapes:
        for way in ("forward", "forward+backward", "forward+backward:residual"):
            case = ActivationCase(shape, dtype, "channels_last")
            key = Key("batch_norm_relu", f"{OP}:{way}", case.name, case.dtype_name, case.layout)
            made = partial(build, case=case, options=options, compile_too=compile_too)
            peers = (*names, "torch.compile") if compile_too else tuple(names)
            found.append(Entry(key, made, peers, 21 if "back" in way else 48, 4.0))
    return found
