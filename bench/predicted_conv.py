"""What the byte and FLOP model predicts for masked convolutions on an H200: written down before the first run there.

A convolution takes what is longer of its FLOPs at 790 TFLOP/s and its bytes at 4,300 GB/s, the product and the copy
known of that GPU: its floor. Assumed is that cuDNN reaches two thirds of the product's rate and 85 % of the copy's, and
that one kernel after another costs 2 microseconds. Nothing here was measured.
"""

from __future__ import annotations

from math import prod

import torch

from taylor_cuda.bench.cases import resnet_parameters
from taylor_cuda.bench.convolutions import ALIGNED, IMAGE, ConvCase, resnet_convolutions

GB_PER_S, TFLOPS = 4300.0, 790.0
OF_COPY, OF_PRODUCT, LAUNCH_US = 0.85, 2 / 3, 2.0
OF_COPY_GATHER = 0.8
"""Many tensors in one launch, as in ``predictions.WEIGHTS``."""


def cases_of(network: str, percent: int = 50, batch: int = 256) -> dict[ConvCase, int]:
    """``{case: how often}`` of a network as it is trained on a GPU."""
    found = resnet_convolutions(network)
    return {ConvCase(one, batch, percent, torch.bfloat16, "channels_last"): count for one, count in found.items()}


def moved_us(size: float, share: float = 1.0) -> float:
    """Bytes at a share of the copy rate."""
    return size / (GB_PER_S * share) * 1e-3


def conv_us(case: ConvCase, counts: tuple[int, int], copy: float = 1.0, product: float = 1.0) -> float:
    """A forward pass between ``counts`` channels at these shares of both ceilings; at 1.0 the floor."""
    return max(case.flops(counts) / (TFLOPS * product) * 1e-6, moved_us(case.bytes(counts), copy))


def dense_us(case: ConvCase) -> float:
    """Of all channels."""
    return conv_us(case, case.whole, OF_COPY, OF_PRODUCT) + LAUNCH_US


def aligned_us(case: ConvCase) -> float:
    """Of what is kept, filled up to multiples of 16."""
    return conv_us(case, case.counts(aligned=True), OF_COPY, OF_PRODUCT) + LAUNCH_US


def unaligned_us(case: ConvCase) -> float:
    """Of as many channels as fall: copied to a number that tensor cores take, convolved, and copied back."""
    inputs, outputs = case.counts()
    images = case.bytes((inputs, 0)) + case.bytes((0, outputs))
    copies = 1 if inputs == IMAGE else 2
    return aligned_us(case) + moved_us(2 * images, OF_COPY) + copies * LAUNCH_US


def folded_us(case: ConvCase) -> float:
    """Of an image whose pixels are folded into channels: four copies into zeros, and 16 channels under 4 x 4.

    cuDNN took 1,770 us for its own way, 11 times of what the model says of it (run 1a5b09a9ab84); 3 of 8 channels
    filled with zeros took it 3,940 (run 6344e6129d27). Runs of six bytes are copied at a quarter of the copy rate.
    """
    one, (inputs, outputs) = case.convolution, case.counts(aligned=True)
    taps = -(-one.kernel // one.stride)
    channels = inputs * one.stride**2
    image = case.batch * (one.output_height + taps - 1) ** 2 * case.dtype.itemsize
    folded = image * (channels + -channels % ALIGNED)
    fold = moved_us(folded, OF_COPY) + moved_us(2 * image * channels, 0.25) + (1 + one.stride**2) * LAUNCH_US
    products = case.batch * one.output_height**2 * outputs * taps**2 * (channels + -channels % ALIGNED)
    moved = moved_us(folded + case.bytes((0, outputs)), OF_COPY)
    return fold + max(2 * products / (TFLOPS * OF_PRODUCT) * 1e-6, moved) + LAUNCH_US


def packed_us(case: ConvCase) -> float:
    """Ours between packed tensors: the kept weights are gathered first."""
    inputs, outputs = case.counts(aligned=True)
    convolution = folded_us(case) if inputs == IMAGE and case.convolution.stride > 1 else aligned_us(case)
    weight = case.bytes((inputs, outputs)) - case.bytes((inputs, 0)) - case.bytes((0, outputs))
    return convolution + moved_us(2 * weight, OF_COPY_GATHER) + LAUNCH_US


def unpacked_us(case: ConvCase) -> float:
    """Ours between tensors of all channels: packed before and unpacked after, both whole in memory."""
    (inputs, outputs), kept = case.whole, case.counts(aligned=True)
    images = case.bytes((inputs, 0)) + case.bytes((0, outputs)) + case.bytes((kept[0], 0)) + case.bytes((0, kept[1]))
    return packed_us(case) + moved_us(images, OF_COPY) + 2 * LAUNCH_US


def floors(network: str) -> dict[str, tuple[int, float, float]]:
    """``{case: (how often, floor of all channels, floor at one half in and out)}`` in microseconds."""
    return {
        case.name: (count, conv_us(case, case.whole), conv_us(case, case.counts(aligned=True)))
        for case, count in cases_of(network).items()
    }


def sum_us(network: str, packed: bool = True) -> float:
    """All forward convolutions of a network at one half."""
    return sum(count * (packed_us if packed else unpacked_us)(case) for case, count in cases_of(network).items())


def dense_cast_us(network: str) -> float:
    """What autocast does with the weights of a dense step: 32 bits in, 16 bits out."""
    weights = sum(prod(shape) for kind, shape in resnet_parameters(network) if kind in ("conv", "linear"))
    return moved_us(6 * weights)


def gather_us(network: str) -> tuple[float, float]:
    """Half of all rows and columns of a network's weights, in 16 bits, and their gradients back into cleared ones.

    A kept row is read whole, as half of its columns touch every sector of it.
    """
    rows = kept = dense = 0.0
    for kind, shape in resnet_parameters(network):
        by_row = 1.0 if kind in ("linear", "bias") else 0.5
        by_column = 1.0 if len(shape) == 1 or shape[1] == IMAGE else 0.5
        dense += prod(shape)
        rows += by_row * prod(shape)
        kept += by_row * by_column * prod(shape)
    gather = moved_us(4 * rows + 2 * kept, OF_COPY_GATHER)
    return gather + LAUNCH_US, moved_us(2 * kept + 4 * dense, OF_COPY_GATHER) + LAUNCH_US
