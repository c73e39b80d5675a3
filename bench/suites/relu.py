"""The backward pass of a ReLU that leaves the sums of a gate behind it, against the one that leaves nothing."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import prod

import torch
from torch import Tensor

from taylor_cuda import ops
from taylor_cuda.bench.cases import ActivationCase, input_sets
from taylor_cuda.bench.environment import cache_bytes
from taylor_cuda.bench.race import ALLOWED, Entry, Key, Options, Provider, Race, worst_of, worst_share
from taylor_cuda.bench.suites.peers import our_names, our_providers, preceded_by
from taylor_cuda.bench.suites.scoring import BY_SIZE, Exact, exact, gate_shapes
from taylor_cuda.ops import library

OP = "score_relu_backward"
ALONE, APART = "threshold_backward", "threshold_backward+sums"


@dataclass(frozen=True)
class Inputs:
    """What a backward pass of relu(x), or of relu(x + skip), gets: and where the sums go, ``[N, C]`` each."""

    output: Tensor
    gradient: Tensor
    sums: Tensor
    skip: Tensor | None = None
    skip_sums: Tensor | None = None

    def clear(self) -> None:
        """Sums of nothing."""
        self.sums.zero_()
        if self.skip_sums is not None:
            self.skip_sums.zero_()


Result = tuple[Tensor, Inputs]
"""The gradient of the input, and where the sums went."""


def inputs_of(case: ActivationCase, skip: bool, device: str, seed: int) -> Inputs:
    """Half of the outputs are zeros, as they are behind a normalisation."""
    x, gradient = case.inputs(device, seed)
    sums = torch.zeros(case.shape[:2], device=device)
    if not skip:
        return Inputs(x.relu(), gradient, sums)
    other, _ = case.inputs(device, seed + 1000)
    return Inputs((x + other).relu(), gradient, sums, other, torch.zeros_like(sums))


def scored(given: Inputs) -> Result:
    """This package's own."""
    gx = library.score_relu_backward(given.output, given.gradient, given.sums, given.skip, given.skip_sums)
    return gx, given


def alone(given: Inputs) -> Result:
    """PyTorch's own, which leaves no sums."""
    return torch.ops.aten.threshold_backward(given.gradient, given.output, 0), given


def apart(given: Inputs) -> Result:
    """PyTorch's own, then the sums by a pass of their own."""
    gx = torch.ops.aten.threshold_backward(given.gradient, given.output, 0)
    ops.accumulate_channel_sums(given.output, given.gradient, given.sums)
    if given.skip is not None and given.skip_sums is not None:
        ops.accumulate_channel_sums(given.skip, gx, given.skip_sums)
    return gx, given


class Checks:
    """Compares with gx as PyTorch has it, bit for bit, and with sums in float64."""

    def __init__(self, inputs: list[Inputs]) -> None:
        self.gx = [alone(given)[0] for given in inputs]
        self.sums = [exact((given.output, given.gradient)) for given in inputs]
        self.skip_sums: list[Exact | None] = [
            None if given.skip is None else exact((given.skip, gx)) for given, gx in zip(inputs, self.gx, strict=True)
        ]

    def gradient_only(self, result: Result, index: int) -> float:
        """0 or infinity."""
        gx, _ = result
        right = torch.equal(gx, self.gx[index]) and gx.stride() == self.gx[index].stride()
        return 0.0 if right else float("inf")

    def everything(self, result: Result, index: int) -> float:
        """The worst of all three."""
        found = [self.gradient_only(result, index)]
        for sums, truth in ((result[1].sums, self.sums[index]), (result[1].skip_sums, self.skip_sums[index])):
            if sums is not None and truth is not None:
                found.append(worst_share(sums, truth.sums, ALLOWED["float32"] * truth.magnitudes))
        return worst_of(found)


def build(key: Key, case: ActivationCase, options: Options) -> Race:
    """The race for one shape."""
    skip = key.op.endswith(":skip")
    # The output and its gradient are read and that of the input is written; sums are read and written.
    tensors, sums = 3 + skip, (1 + skip) * 8 * case.shape[0] * case.shape[1]
    size = prod(case.shape) * case.dtype.itemsize
    count = input_sets(tensors * size, cache_bytes(options.device), least=1 if options.quick else 2)
    inputs = [inputs_of(case, skip, options.device, seed) for seed in range(count)]
    checks = Checks(inputs)

    def clear() -> None:
        for given in inputs:
            given.clear()

    providers, skipped = our_providers(OP, options, scored, checks.everything, before=clear)
    note = "leaves no sums"
    providers.append(Provider(ALONE, alone, checks.gradient_only, note, bytes=3 * size))
    again = (2 + 2 * skip) * size + sums
    passes = 3 * size + again
    providers.append(Provider(APART, apart, checks.everything, context=preceded_by(clear), bytes=passes))
    return Race(
        key,
        providers,
        inputs,
        tensors * size + sums,
        case.flops,
        peer=ALONE,
        skipped=skipped,
        timers=("graph", "eager"),
        rounds=30,
    )


def entries(options: Options) -> list[Entry]:
    """Every gate of the residual networks; behind the addition of a block for some of them."""
    wanted: list[tuple[tuple[int, ...], str, bool, int]]
    if options.quick:
        wanted = [((4, 32, 14, 14), layout, skip, 5) for layout in ("nchw", "channels_last") for skip in (False, True)]
    elif options.cuda:
        wanted = [(shape, "channels_last", False, 7) for shape in gate_shapes(256)]
        wanted += [((256, *gate), "channels_last", True, 43) for gate in BY_SIZE]
        wanted += [((256, *gate), "nchw", False, 45) for gate in BY_SIZE]
    else:
        wanted = [((16, 256, 28, 28), layout, False, 55) for layout in ("nchw", "channels_last")]
    dtype = torch.bfloat16 if options.cuda else torch.float32
    found = []
    for shape, layout, skip, priority in wanted:
        case = ActivationCase(shape, dtype, layout)
        key = Key("relu", f"{OP}:skip" if skip else OP, case.name, case.dtype_name, layout)
        names = (*our_names(OP, options), ALONE, APART)
        found.append(Entry(key, partial(build, case=case, options=options), names, priority, 2.0))
    return found
