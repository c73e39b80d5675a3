"""Every parameter of a network in one call: ``weight_importance`` against a loop, torch._foreach and a dot product."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import prod

import torch
from torch import Tensor

from taylor_cuda import ops
from taylor_cuda.bench.cases import input_sets, parameter_bytes, resnet_parameters
from taylor_cuda.bench.environment import cache_bytes
from taylor_cuda.bench.race import ALLOWED, Entry, Key, Options, Provider, Race, worst_share
from taylor_cuda.bench.suites.peers import our_names, our_providers
from taylor_cuda.ops import reference

TINY: list[tuple[str, tuple[int, ...]]] = [
    ("conv", (16, 3, 3, 3)),
    ("norm", (16,)),
    ("norm", (16,)),
    ("conv", (24, 16, 3, 3)),
    ("linear", (10, 24)),
    ("bias", (10,)),
]


@dataclass(frozen=True)
class ParameterSet:
    """Weights and gradients of one network, each in one flat buffer, so that a dot product can read the same data."""

    weights: list[Tensor]
    gradients: list[Tensor]
    dims: list[int]
    flat_weights: Tensor
    flat_gradients: Tensor

    @property
    def results(self) -> int:
        """Channels in all results together."""
        return sum(weight.shape[dim] for weight, dim in zip(self.weights, self.dims, strict=True))


def parameter_set(
    shapes: list[tuple[str, tuple[int, ...]]],
    side: str,
    gradient_dtype: torch.dtype,
    layout: str,
    device: str,
    seed: int,
) -> ParameterSet:
    """Random parameters of a network.

    Args:
        shapes: as ``resnet_parameters`` gives them.
        side: ``"readers"`` (a convolution's or linear layer's input channels) or ``"writers"`` (its output channels). A
            normalisation takes part in both, the bias of a linear layer in the second.
        gradient_dtype: weights are float32.
        layout: ``"parameters"``, or ``"channels_last"`` for convolutions with the input channels innermost.
        device: where they lie.
        seed: of the values.
    """
    generator = torch.Generator(device=device).manual_seed(seed)
    used = [(kind, shape) for kind, shape in shapes if side == "writers" or kind != "bias"]
    total = sum(prod(shape) for _, shape in used)
    flat_weights = torch.randn(total, device=device, generator=generator)
    flat_gradients = torch.randn(total, device=device, generator=generator).to(gradient_dtype)

    def views(flat: Tensor) -> list[Tensor]:
        pieces = flat.split([prod(shape) for _, shape in used])
        return [_shaped(piece, shape, layout) for piece, (_, shape) in zip(pieces, used, strict=True)]

    dims = [1 if side == "readers" and kind in ("conv", "linear") else 0 for kind, _ in used]
    return ParameterSet(views(flat_weights), views(flat_gradients), dims, flat_weights, flat_gradients)


def _shaped(flat: Tensor, shape: tuple[int, ...], layout: str) -> Tensor:
    if layout == "channels_last" and len(shape) == 4:
        outputs, inputs, height, width = shape
        return flat.view(outputs, height, width, inputs).permute(0, 3, 1, 2)
    return flat.view(shape)


def in_one_call(parameters: ParameterSet) -> list[Tensor]:
    """This package's own."""
    return ops.weight_importance(parameters.weights, parameters.gradients, parameters.dims)


def dot(parameters: ParameterSet) -> Tensor:
    """The sum over all channels of all layers, by the one function that reads the same data and does nothing else."""
    return torch.dot(parameters.flat_weights, parameters.flat_gradients)


def per_layer(parameters: ParameterSet) -> list[Tensor]:
    """What somebody without this package writes: one layer after the other."""
    return [
        _sum_except(weight * gradient, dim)
        for weight, gradient, dim in zip(parameters.weights, parameters.gradients, parameters.dims, strict=True)
    ]


def foreach(parameters: ParameterSet) -> list[Tensor]:
    """All products in one call, then one reduction a layer."""
    products = torch._foreach_mul(parameters.weights, parameters.gradients)
    return [_sum_except(product, dim) for product, dim in zip(products, parameters.dims, strict=True)]


def _sum_except(product: Tensor, dim: int) -> Tensor:
    others = [other for other in range(product.dim()) if other != dim]
    return product.sum(others) if others else product


def build(key: Key, gradient_dtype: torch.dtype, options: Options) -> Race:
    """The race over one network's parameters."""
    network, _, side = key.case.partition(":")
    shapes = TINY if network == "tiny" else resnet_parameters(network)
    made = partial(parameter_set, shapes, side, gradient_dtype, key.layout, options.device)
    inputs = [made(seed=0)]
    size = parameter_bytes(list(zip(inputs[0].weights, inputs[0].gradients, strict=True)), inputs[0].results)
    inputs += [
        made(seed=seed) for seed in range(1, input_sets(size, 0 if options.quick else cache_bytes(options.device)))
    ]
    truth = [_exact(parameters) for parameters in inputs]

    def check(result: list[Tensor], index: int) -> float:
        return worst_share(torch.cat(result), *truth[index])

    def check_dot(result: Tensor, index: int) -> float:
        expected, allowed = truth[index]
        # Each number is read once whichever side is asked for, so the dot product is the sum of all results.
        return worst_share(result, expected.sum(), allowed.sum())

    providers, skipped = our_providers("weight_importance", options, in_one_call, check)
    providers.append(Provider("torch", per_layer, check, "one layer after the other"))
    providers.append(Provider("torch.foreach", foreach, check))
    if gradient_dtype == torch.float32:
        providers.append(Provider("torch.dot", dot, check_dot, "one sum over all parameters: a ceiling"))
    else:
        skipped.append(("torch.dot", "takes no two dtypes"))
    return Race(
        key,
        providers,
        inputs,
        size,
        2 * inputs[0].flat_weights.numel(),
        peer="torch",
        skipped=skipped,
        timers=("eager", "graph"),
    )


def _exact(parameters: ParameterSet) -> tuple[Tensor, Tensor]:
    weights = [weight.double() for weight in parameters.weights]
    gradients = [gradient.double() for gradient in parameters.gradients]
    expected = torch.cat(reference.weight_importance(weights, gradients, parameters.dims, "sum"))
    magnitude = torch.cat(reference.weight_importance(weights, gradients, parameters.dims, "abs"))
    return expected, ALLOWED["float32"] * magnitude


def entries(options: Options) -> list[Entry]:
    """ResNet-50 from both sides, then the rest."""
    network, sides = "tiny" if options.quick else "resnet50", ("readers", "writers")
    wanted = [(network, side, torch.float32, "parameters", 5) for side in sides]
    wanted += [(network, side, torch.float32, "channels_last", 20) for side in sides]
    if not options.quick:
        wanted.append(("resnet101", "writers", torch.float32, "parameters", 6 if options.cuda else 25))
    if options.cuda:
        wanted += [(network, side, torch.bfloat16, "parameters", 15) for side in sides]
    if options.cuda and not options.quick:
        wanted.append(("resnet101", "readers", torch.float32, "parameters", 6))
    names = (*our_names("weight_importance", options), "torch", "torch.foreach", "torch.dot")
    found = []
    for network, side, dtype, layout, priority in wanted:
        key = Key("scoring", "weight_importance", f"{network}:{side}", str(dtype).removeprefix("torch."), layout)
        found.append(Entry(key, partial(build, gradient_dtype=dtype, options=options), names, priority))
    return found
