"""Convolutions of which some channels are kept: all computed, masked, rebuilt without the others, and ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from taylor_cuda.bench.cases import input_sets
from taylor_cuda.bench.convolutions import DEPTHWISE, SHARES, ConvCase, Convolution, filled, resnet_convolutions
from taylor_cuda.bench.environment import cache_bytes
from taylor_cuda.bench.race import PACKED, Entry, Key, Options, Provider, Race, worst_of
from taylor_cuda.bench.suites.peers import our_names, our_providers
from taylor_cuda.ops import library, reference

FORWARD, BACKWARD = "masked_conv2d_forward", "masked_conv2d_backward"
DENSE, MASK, PRUNED, FILLED = "torch", "torch:mask", "torch-pruning", "torch-pruning:aligned"
ALLOWED = {"float32": 2.0**-17, "bfloat16": 2.0**-6}
"""Of the largest element of a channel: the rounding of what is stored in this type."""

BATCH = {"cpu": 4, "cuda": 256}
DONE_WHEN = ConvCase(Convolution(128, 128, 3, 1, 28), 16, 50, torch.float32, "nchw", exactly=True)
"""The case with figures for a CPU, in both layouts."""

TELLING = (Convolution(64, 64, 3, 1, 56), Convolution(256, 64, 1, 1, 56), Convolution(256, 1024, 1, 1, 14))
"""What a CPU measures at every share, forward and backward: many images' pixels, few, and many channels."""


class Operands(NamedTuple):
    """``[N, C_in, H, W]``, ``[C_out, C_in / groups, R, S]``, and the output's gradient."""

    x: Tensor
    weight: Tensor
    gradient: Tensor
    groups: int


class Lists(NamedTuple):
    """Keep lists of the input and of the output channels."""

    inputs: Tensor
    outputs: Tensor


@dataclass(frozen=True)
class Inputs:
    """One convolution in every form.

    Attributes:
        whole: all channels; those that are dropped hold numbers like the others.
        pruned: what is left of it when the dropped channels are removed.
        aligned: the same, filled up with channels of zeros.
        exact: the lists of ``pruned``.
        lists: the lists of ``aligned``.
        masks: of the input and of the output channels, 1 or 0, ``[1, C, 1, 1]``.
    """

    whole: Operands
    pruned: Operands
    aligned: Operands
    exact: Lists
    lists: Lists
    masks: tuple[Tensor, Tensor]


Results = list[Tensor]
"""The output; or the gradients of the input and of the weight."""


def inputs_of(case: ConvCase, device: str, seed: int) -> Inputs:
    """Standard normal, with weights that keep the size of the activations."""
    one, generator = case.convolution, torch.Generator(device=device).manual_seed(seed)
    memory_format = torch.channels_last if case.layout == "channels_last" else torch.contiguous_format

    def made(*shape: int) -> Tensor:
        values = torch.randn(shape, device=device, generator=generator).to(case.dtype)
        return values.contiguous(memory_format=memory_format)

    inputs = one.inputs // one.groups
    weight = made(one.outputs, inputs, one.kernel, one.kernel) / (inputs * one.kernel**2) ** 0.5
    x = made(case.batch, one.inputs, one.height, one.height)
    whole = Operands(x, weight, made(case.batch, one.outputs, one.output_height, one.output_height), one.groups)
    exact = Lists(*(kept.to(device) for kept in case.kept()))
    lists = Lists(*(filled(kept) for kept in exact))
    before, after = (
        reference.unpack_channels(x.new_ones(1, len(kept), 1, 1), kept, channels)
        for kept, channels in zip(exact, case.whole, strict=True)
    )
    return Inputs(whole, packed(whole, exact), packed(whole, lists), exact, lists, (before, after))


def packed(whole: Operands, lists: Lists) -> Operands:
    """The channels of the lists."""
    x = reference.pack_channels(whole.x, lists.inputs)
    groups = len(lists.inputs) if whole.groups > 1 else 1
    return Operands(x, packed_weight(whole, lists), reference.pack_channels(whole.gradient, lists.outputs), groups)


def packed_weight(whole: Operands, lists: Lists, weight: Tensor | None = None) -> Tensor:
    """The filters of the listed outputs, and of each the listed inputs; those of single channels have one input."""
    columns = lists.inputs if whole.groups == 1 else lists.inputs[:0]
    weight = whole.weight if weight is None else weight
    bounds = [0, len(lists.outputs), len(lists.outputs) + len(columns)]
    return reference.gather_kept([weight], torch.cat([lists.outputs, columns]), bounds, [False], weight.dtype)[0]


def convolved(one: Convolution, given: Operands) -> Results:
    """PyTorch's own."""
    return [torch.conv2d(given.x, given.weight, None, *one.sizes, given.groups)]


def convolved_backward(one: Convolution, given: Operands) -> Results:
    """PyTorch's own, both gradients."""
    gradients = torch.ops.aten.convolution_backward(
        given.gradient, given.x, given.weight, None, *one.sizes, False, [0, 0], given.groups, [True, True, False]
    )
    return list(gradients[:2])


def masked(one: Convolution, given: Inputs) -> Results:
    """What a mask costs that multiplies: before and after a convolution of all channels."""
    before, after = given.masks
    (y,) = convolved(one, given.whole._replace(x=given.whole.x * before))
    return [y * after]


def masked_backward(one: Convolution, given: Inputs) -> Results:
    """The gradient of that, from the masked input that the forward pass has kept."""
    before, after = given.masks
    gx, gw = convolved_backward(one, given.whole._replace(gradient=given.whole.gradient * after))
    return [gx * before, gw]


def ours(one: Convolution, given: Inputs, *, pack: bool) -> Results:
    """This package's own, between tensors of all channels or packed ones."""
    x, lists = given.aligned.x if pack else given.whole.x, given.lists
    keep = lists.outputs, lists.inputs
    y = library.masked_conv2d_forward(x, given.whole.weight, None, *keep, *one.sizes, one.groups, pack, None, False)
    return [y]


def ours_backward(one: Convolution, given: Inputs, *, pack: bool) -> Results:
    """Likewise; the gradient of the weight is whole in both."""
    operands, lists = given.aligned if pack else given.whole, given.lists
    keep = lists.outputs, lists.inputs
    gradients = library.masked_conv2d_backward(
        operands.gradient, operands.x, given.whole.weight, *keep, *one.sizes, one.groups, pack, [True, True, False]
    )
    return list(gradients[:2])


def distance(actual: Tensor, expected: Tensor, dim: int, allowed: float) -> float:
    """The worst error, as a share of what is allowed of the largest element of its channel; a zero has to be one."""
    if actual.shape != expected.shape:
        return float("nan")
    others = [other for other in range(expected.dim()) if other != dim]
    worst = (actual.to(expected) - expected).abs().amax(others)
    largest = expected.abs().amax(others)
    return float((worst / (allowed * largest)).where((worst != 0) | (largest != 0), 0.0).max())


class Truth:
    """What every form has to give, from the definition in float64."""

    def __init__(self, case: ConvCase, given: Inputs, *, backward: bool) -> None:
        self.allowed, self.dims = ALLOWED[case.dtype_name], (1, 0) if backward else (1,)
        self.given, self.backward = given, backward
        self.dense, self.masked = self._exact(case, None), self._exact(case, given.exact)

    def _exact(self, case: ConvCase, lists: Lists | None) -> Results:
        one, whole = case.convolution, self.given.whole
        x, weight, gradient = (tensor.double() for tensor in whole[:3])
        keep_out, keep_in = (None, None) if lists is None else (lists.outputs, lists.inputs)
        if not self.backward:
            y = reference.masked_conv2d_forward(
                x, weight, None, keep_out, keep_in, *one.sizes, one.groups, False, None, False
            )
            return [y]
        gradients = reference.masked_conv2d_backward(
            gradient, x, weight, keep_out, keep_in, *one.sizes, one.groups, False, [True, True, False]
        )
        return list(gradients[:2])

    def packed(self, lists: Lists, *, weight: bool) -> Results:
        """The channels of the lists, in the weight's gradient too with ``weight``."""
        if not self.backward:
            return [reference.pack_channels(self.masked[0], lists.outputs)]
        gx, gw = self.masked
        gx = reference.pack_channels(gx, lists.inputs)
        return [gx, packed_weight(self.given.whole, lists, gw) if weight else gw]

    def worst(self, result: Results, expected: Results) -> float:
        """Over all results."""
        pairs = zip(result, expected, self.dims, strict=True)
        return worst_of(distance(actual, wanted, dim, self.allowed) for actual, wanted, dim in pairs)


Check = Callable[[Results, int], float]


def build(key: Key, case: ConvCase, options: Options) -> Race:
    """The race of one convolution."""
    backward = key.op == BACKWARD
    whole, size, flops = (
        case.bytes(case.whole, backward=backward),
        case.bytes(case.counts(), backward=backward),
        case.flops(case.counts(), backward=backward),
    )
    # On a CPU a convolution computes so much longer than it reads that where its input lies makes no difference.
    sets = input_sets(whole, cache_bytes(options.device)) if options.cuda and not options.quick else 1
    inputs = [inputs_of(case, options.device, seed) for seed in range(sets)]
    if backward:
        # What a masked convolution keeps of its forward pass is the masked input.
        inputs = [replace(one, whole=one.whole._replace(x=one.whole.x * one.masks[0])) for one in inputs]
    truth = [Truth(case, given, backward=backward) for given in inputs]

    def checked(expected: Callable[[Truth, Inputs], Results]) -> Check:
        return lambda result, index: truth[index].worst(result, expected(truth[index], inputs[index]))

    providers, skipped = _our_forms(key.op, case, options, checked)
    providers += _peers(case, checked, backward=backward)
    providers = [one if one.name.endswith((PACKED, PRUNED, FILLED)) else replace(one, bytes=whole) for one in providers]
    # The case with promised figures takes the time that they need; a CPU has few rounds for each of the others.
    seconds = None if options.cuda or options.quick else 6.0 if case.exactly else 0.3
    timers = ("graph", "eager") if case.percent == SHARES[0] else ("graph",)
    return Race(key, providers, inputs, size, flops, DENSE, skipped, timers, seconds=seconds)


def _our_forms(
    op: str, case: ConvCase, options: Options, checked: Callable[[Callable[[Truth, Inputs], Results]], Check]
) -> tuple[list[Provider], list[tuple[str, str]]]:
    """Every backend of ours, between tensors of all channels and between packed ones."""
    run = partial(ours_backward if op == BACKWARD else ours, case.convolution)
    note = _occurrences(case.convolution)
    check, check_packed = (
        checked(lambda true, _: true.masked),
        checked(lambda true, given: true.packed(given.lists, weight=False)),
    )
    providers, skipped = our_providers(op, options, partial(run, pack=False), check, note)
    compact, _ = our_providers(op, options, partial(run, pack=True), check_packed, note)
    providers += [replace(provider, name=provider.name + PACKED) for provider in compact]
    return providers, [*skipped, *((name + PACKED, reason) for name, reason in skipped)]


def _peers(
    case: ConvCase, checked: Callable[[Callable[[Truth, Inputs], Results]], Check], *, backward: bool
) -> list[Provider]:
    """PyTorch's convolution of all channels, of masked ones, and of what is left when channels are removed."""
    run, by_mask = (convolved_backward, masked_backward) if backward else (convolved, masked)
    one = case.convolution
    dense = checked(lambda true, _: true.dense)
    found = [Provider(DENSE, lambda given: run(one, given.whole), dense, "computes all channels")]
    if case.percent == 100:
        return found
    check_pruned, check_filled = (
        checked(lambda true, given: true.packed(given.exact, weight=True)),
        checked(lambda true, given: true.packed(given.lists, weight=True)),
    )
    counts, more = ("{} to {} channels".format(*case.counts(aligned=aligned)) for aligned in (False, True))
    return [
        *found,
        Provider(MASK, partial(by_mask, one), checked(lambda true, _: true.masked), "a product before and after"),
        Provider(PRUNED, lambda given: run(one, given.pruned), check_pruned, counts),
        Provider(FILLED, lambda given: run(one, given.aligned), check_filled, more),
    ]


def _occurrences(one: Convolution) -> str:
    """How often a network has it, so that rows can be added up."""
    found = [(network, resnet_convolutions(network)[one]) for network in ("resnet50", "resnet101")]
    return ", ".join(f"{count} in {network}" for network, count in found if count)


def names_of(case: ConvCase, op: str, options: Options) -> list[str]:
    """All who are invited."""
    mine = our_names(op, options)
    peers = [DENSE, MASK, PRUNED, FILLED] if case.percent < 100 else [DENSE]
    return [*mine, *(name + PACKED for name in mine), *peers]


def entries(options: Options) -> list[Entry]:
    """Every convolution of the residual networks, and some of MobileNetV2's."""
    wanted = _quick(options) if options.quick else _on_a_gpu() if options.cuda else _on_a_cpu()
    found = []
    for case, op, priority in wanted:
        key = Key("conv", op, case.name, case.dtype_name, case.layout)
        built = partial(build, case=case, options=options)
        seconds = 3.0 if options.cuda else 12.0 if case.exactly else 1.5
        found.append(Entry(key, built, names_of(case, op, options), priority, seconds))
    return found


def _quick(options: Options) -> list[tuple[ConvCase, str, int]]:
    dtype = torch.bfloat16 if options.cuda else torch.float32
    cases = [
        ConvCase(Convolution(32, 48, 3, 2, 9), 2, 50, dtype, "channels_last"),
        ConvCase(Convolution(32, 32, 3, 1, 8, 32), 2, 50, dtype, "nchw"),
        ConvCase(Convolution(3, 32, 1, 1, 8), 2, 100, dtype, "nchw"),
    ]
    return [(case, op, 10) for case in cases for op in (FORWARD, BACKWARD)]


def _on_a_cpu() -> list[tuple[ConvCase, str, int]]:
    """The case with promised figures; all shapes at one share; a few at all of them, in both layouts and directions."""
    layouts = ("nchw", "channels_last")
    made = partial(ConvCase, batch=BATCH["cpu"], dtype=torch.float32)
    wanted = [(replace(DONE_WHEN, layout=layout), FORWARD, 7) for layout in layouts]
    shapes = [*resnet_convolutions("resnet50"), *DEPTHWISE]
    wanted += [(made(one, percent=50, layout="channels_last"), FORWARD, 61) for one in shapes]
    wanted += [(made(one, percent=50, layout="nchw"), FORWARD, 62) for one in TELLING]
    wanted += [(made(one, percent=50, layout="channels_last"), BACKWARD, 63) for one in TELLING]
    wanted += [
        (made(one, percent=percent, layout="channels_last"), FORWARD, 64)
        for one, percent in product(TELLING, SHARES[1:])
    ]
    return wanted


def _on_a_gpu() -> list[tuple[ConvCase, str, int]]:
    """All shapes at the share that promises are about, then the way back, then the other shares."""
    made = partial(ConvCase, batch=BATCH["cuda"], dtype=torch.bfloat16, layout="channels_last")
    shapes = list(resnet_convolutions("resnet50"))
    wanted = []
    for percent, forward, backward in ((50, 10, 23), (75, 46, 92), (25, 46, 92), (100, 47, 93)):
        cases = [made(one, percent=percent) for one in shapes]
        wanted += [(case, FORWARD, forward) for case in cases] + [(case, BACKWARD, backward) for case in cases]
    wanted += [(made(one, percent=50), op, 24) for one in DEPTHWISE for op in (FORWARD, BACKWARD)]
    return wanted
