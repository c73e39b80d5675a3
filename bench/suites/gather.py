"""The kept rows and columns of all of a network's parameters in one call, and back, against a loop over them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from taylor_cuda.bench.cases import input_sets, resnet_parameters
from taylor_cuda.bench.convolutions import IMAGE
from taylor_cuda.bench.environment import cache_bytes
from taylor_cuda.bench.race import Entry, Key, Options, Provider, Race
from taylor_cuda.bench.suites.peers import our_names, our_providers
from taylor_cuda.bench.suites.weights import TINY, parameter_set
from taylor_cuda.ops import library, reference

GATHER, SCATTER = "gather_kept", "scatter_kept"
LOOP, CAST = "torch", "torch.cast"

Lists = list[tuple[Tensor | None, Tensor | None]]
"""Kept rows and columns of each tensor; None where all are kept."""


@dataclass(frozen=True)
class Inputs:
    """A network's dense parameters, what of each is kept, and the gradients of what is kept.

    Attributes:
        dense: float32.
        lists: apart, as a loop wants them.
        keep: one after another, as ``gather_kept`` wants them.
        bounds: of the lists in ``keep``.
        cast: those that a network computes with in ``dtype``: the weights of convolutions and linear layers.
        dtype: of the kept weights.
        gradients: laid out as what ``gather_kept`` gives.
        targets: dense, of numbers that have to go.
    """

    dense: list[Tensor]
    lists: Lists
    keep: Tensor
    bounds: list[int]
    cast: list[bool]
    dtype: torch.dtype
    gradients: list[Tensor]
    targets: list[Tensor]

    @property
    def kept_bytes(self) -> int:
        """Of the gradients, or of what ``gather_kept`` gives."""
        return sum(one.nbytes for one in self.gradients)


def inputs_of(shapes: list[tuple[str, tuple[int, ...]]], layout: str, options: Options, seed: int) -> Inputs:
    """Half of all channels at random, but for those of an image and the classes."""
    parameters = parameter_set(shapes, "writers", torch.float32, layout, options.device, seed)
    generator = torch.Generator().manual_seed(seed)

    def kept(channels: int) -> Tensor:
        return torch.randperm(channels, generator=generator)[: channels // 2].sort().values.to(options.device)

    lists: Lists = []
    for kind, shape in shapes:
        rows = None if kind in ("linear", "bias") else kept(shape[0])
        columns = None if len(shape) == 1 or shape[1] == IMAGE else kept(shape[1])
        lists.append((rows, columns))
    flat = [one for pair in lists for one in pair]
    bounds = [0, *accumulate(0 if one is None else len(one) for one in flat)]
    cast = [kind in ("conv", "linear") and options.cuda for kind, _ in shapes]
    dtype = torch.bfloat16 if options.cuda else torch.float32
    keep = torch.cat([one for one in flat if one is not None])
    gradients = reference.gather_kept(parameters.gradients, keep, bounds, cast, dtype)
    # Numbers other than 0, which clearing has to remove.
    targets = [torch.ones_like(one) for one in parameters.weights]
    return Inputs(parameters.weights, lists, keep, bounds, cast, dtype, gradients, targets)


def gathered(given: Inputs) -> list[Tensor]:
    """This package's own."""
    kept: list[Tensor] = library.gather_kept(given.dense, given.keep, given.bounds, given.cast, given.dtype)
    return kept


def scattered(given: Inputs) -> list[Tensor]:
    """This package's own, back."""
    library.scatter_kept(given.gradients, given.targets, given.keep, given.bounds, True)
    return given.targets


def gathered_in_a_loop(given: Inputs) -> list[Tensor]:
    """What somebody without this package writes: rows, columns, the cast, one parameter after the other."""
    results = []
    for tensor, (rows, columns), cast in zip(given.dense, given.lists, given.cast, strict=True):
        result = tensor if rows is None else tensor.index_select(0, rows)
        result = result if columns is None else result.index_select(1, columns)
        results.append(result.to(given.dtype) if cast else result)
    return results


def scattered_in_a_loop(given: Inputs) -> list[Tensor]:
    """The same, back, into what was cleared before."""
    for value, target, (rows, columns) in zip(given.gradients, given.targets, given.lists, strict=True):
        value = value.to(target.dtype)
        if columns is not None:
            value = torch.zeros_like(target[: len(value)]).index_copy_(1, columns, value)
        if rows is None:
            target.copy_(value)
        else:
            target.zero_().index_copy_(0, rows, value)
    return given.targets


def cast_as_autocast(given: Inputs) -> list[Tensor]:
    """All of every weight in 16 bits: what a dense step under autocast does anyway, and gathering does in passing."""
    return [tensor.to(given.dtype) for tensor, cast in zip(given.dense, given.cast, strict=True) if cast]


def same(one: Tensor, other: Tensor) -> bool:
    """In dtype, shape and every value."""
    return one.dtype == other.dtype and torch.equal(one, other)


def exactly(expected: list[list[Tensor]]) -> Callable[[list[Tensor], int], float]:
    """0 where all tensors are equal to the last bit, else infinity."""

    def check(result: list[Tensor], index: int) -> float:
        wanted = expected[index]
        right = len(result) == len(wanted) and all(map(same, result, wanted))
        return 0.0 if right else float("inf")

    return check


def build(key: Key, options: Options) -> Race:
    """The race over one network's parameters, one way."""
    network, _, _ = key.case.partition(" ")
    made = partial(inputs_of, TINY if network == "tiny" else resnet_parameters(network), key.layout, options)
    inputs = [made(seed=0)]
    kept, dense = inputs[0].kept_bytes, sum(one.nbytes for one in inputs[0].dense)
    cache = 0 if options.quick else cache_bytes(options.device)
    inputs += [made(seed=seed) for seed in range(1, input_sets(kept + dense, cache))]
    if key.op == GATHER:
        check, run, loop = exactly([truth_of_gather(given) for given in inputs]), gathered, gathered_in_a_loop
        size = 4 * sum(one.numel() for one in inputs[0].gradients) + kept
    else:
        check, run, loop = exactly([truth_of_scatter(given) for given in inputs]), scattered, scattered_in_a_loop
        size = kept + dense
    providers, skipped = our_providers(key.op, options, run, check)
    providers.append(Provider(LOOP, loop, check, "one parameter after the other"))
    if key.op == GATHER and options.cuda:
        whole = [cast_as_autocast(given) for given in inputs]
        moved = 6 * sum(one.numel() for one in whole[0])
        providers.append(Provider(CAST, cast_as_autocast, exactly(whole), "all of every weight", bytes=moved))
    return Race(key, providers, inputs, size, 0, LOOP, skipped, ("graph", "eager"))


def truth_of_gather(given: Inputs) -> list[Tensor]:
    """By the definition."""
    return reference.gather_kept(given.dense, given.keep, given.bounds, given.cast, given.dtype)


def truth_of_scatter(given: Inputs) -> list[Tensor]:
    """By the definition, elsewhere than in the inputs."""
    targets = [target.clone() for target in given.targets]
    reference.scatter_kept(given.gradients, targets, given.keep, given.bounds, True)
    return targets


def entries(options: Options) -> list[Entry]:
    """ResNet-50 at one half; on a GPU in both layouts of its weights."""
    network = "tiny" if options.quick else "resnet50"
    found = []
    for layout in ("channels_last", "parameters") if options.cuda or options.quick else ("parameters",):
        for op in (GATHER, SCATTER):
            # On a GPU weights are float32 and what is gathered from them has 16 bits.
            key = Key("gather", op, f"{network} keep 50%", "bfloat16" if options.cuda else "float32", layout)
            peers = (LOOP, CAST) if op == GATHER and options.cuda else (LOOP,)
            priority = 26 if not options.cuda else 12 if layout == "channels_last" else 48
            found.append(Entry(key, partial(build, options=options), (*our_names(op, options), *peers), priority, 4.0))
    return found
