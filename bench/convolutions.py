"""The convolutions that are measured: those of named networks, which channels are kept, and what each has to do."""

from __future__ import annotations

import zlib
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from taylor_cuda.bench.cases import BLOCKS

ALIGNED = 16
"""Kept channels are filled up to a multiple of this with channels of zeros."""

IMAGE = 3
"""Channels of an image, which are always kept."""

SHARES = (50, 75, 25, 100)
"""Percent of the input and of the output channels that are kept; the first is what promises are about."""


@dataclass(frozen=True)
class Convolution:
    """A square convolution of square images.

    Attributes:
        inputs: channels.
        outputs: channels.
        kernel: 1, 3, 7.
        stride: of both directions.
        height: of the input.
        groups: 1, or ``inputs`` where each channel has a filter of its own.
    """

    inputs: int
    outputs: int
    kernel: int
    stride: int
    height: int
    groups: int = 1

    @property
    def padding(self) -> int:
        """That which a stride of 1 needs to leave the size alone."""
        return self.kernel // 2

    @property
    def sizes(self) -> tuple[list[int], list[int], list[int]]:
        """Stride, padding and dilation, as ops take them."""
        return [self.stride] * 2, [self.padding] * 2, [1, 1]

    @property
    def depthwise(self) -> bool:
        """Whether inputs and outputs are the same channels."""
        return self.groups > 1

    @property
    def output_height(self) -> int:
        """Of the output."""
        return (self.height + 2 * self.padding - self.kernel) // self.stride + 1

    @property
    def kind(self) -> str:
        """What a choice of kernels may depend on: ``"depthwise"``, ``"1x1"``, ``"3x3"``, ``"7x7"``."""
        return "depthwise" if self.depthwise else f"{self.kernel}x{self.kernel}"


def resnet_convolutions(network: str) -> Counter[Convolution]:
    """``{convolution: how often it occurs}`` in a bottleneck ResNet at 224 x 224, in the order of their first time."""
    found = Counter([Convolution(3, 64, 7, 2, 224)])
    inputs, height = 64, 56
    for stage, blocks in enumerate(BLOCKS[network]):
        width = 64 << stage
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            found[Convolution(inputs, width, 1, 1, height)] += 1
            found[Convolution(width, width, 3, stride, height)] += 1
            if not block:
                found[Convolution(inputs, 4 * width, 1, stride, height)] += 1
            height //= stride
            found[Convolution(width, 4 * width, 1, 1, height)] += 1
            inputs = 4 * width
    return found


DEPTHWISE = tuple(
    Convolution(channels, channels, 3, stride, height, channels)
    for channels, stride, height in ((32, 1, 112), (96, 2, 112), (144, 1, 56), (192, 1, 28), (576, 1, 14), (960, 1, 7))
)
"""Some of MobileNetV2's, from its first to its last."""


def kept_channels(channels: int, percent: int, seed: int, *, exactly: bool = False) -> Tensor:
    """The kept channels, int64 ``[K]`` and ascending, drawn at random.

    As many as fall: one or three fewer than ``percent``, so that the number fits no vector and no tile, while filled up
    to a multiple of 16 it is most often ``percent`` again. ``exactly`` that share with ``exactly``.
    """
    if percent == 100 or channels == IMAGE:
        return torch.arange(channels)
    generator = torch.Generator().manual_seed(seed)
    count = channels * percent // 100
    if not exactly:
        count -= 1 + 2 * int(torch.randint(2, (1,), generator=generator))
    return torch.randperm(channels, generator=generator)[:count].sort().values


def filled(kept: Tensor, multiple: int = ALIGNED) -> Tensor:
    """A keep list with entries of -1 up to the next multiple; that of an image's three channels stays."""
    missing = -len(kept) % multiple if len(kept) > IMAGE else 0
    return torch.cat([kept, kept.new_full((missing,), -1)])


@dataclass(frozen=True)
class ConvCase:
    """One convolution of which some channels are kept.

    Attributes:
        convolution: with all channels.
        batch: images.
        percent: of the input and of the output channels, those that are kept.
        dtype: of everything.
        layout: ``"nchw"`` or ``"channels_last"``.
        exactly: keep this share and not as many as fall.
    """

    convolution: Convolution
    batch: int
    percent: int
    dtype: torch.dtype
    layout: str
    exactly: bool = False

    @property
    def name(self) -> str:
        """``256x64x56x56 to 64 3x3 stride 1 keep 50%``."""
        one = self.convolution
        shape = f"{self.batch}x{one.inputs}x{one.height}x{one.height}"
        share = f"{'exactly ' if self.exactly else ''}{self.percent}%"
        return f"{shape} to {one.outputs} {one.kind} stride {one.stride} keep {share}"

    @property
    def dtype_name(self) -> str:
        """``bfloat16``."""
        return str(self.dtype).removeprefix("torch.")

    def kept(self) -> tuple[Tensor, Tensor]:
        """The kept input and output channels, the same in every run."""
        one = self.convolution
        seed = zlib.crc32(f"{one} {self.percent}".encode())
        inputs = kept_channels(one.inputs, self.percent, seed, exactly=self.exactly)
        if one.depthwise:
            return inputs, inputs
        return inputs, kept_channels(one.outputs, self.percent, seed + 1, exactly=self.exactly)

    def counts(self, *, aligned: bool = False) -> tuple[int, int]:
        """How many input and output channels are kept, or their lists' lengths after they were filled up."""
        inputs, outputs = (filled(one) if aligned else one for one in self.kept())
        return len(inputs), len(outputs)

    def flops(self, counts: tuple[int, int], *, backward: bool = False) -> int:
        """Two for each product between ``counts`` input and output channels; in both gradients that many each."""
        one, (inputs, outputs) = self.convolution, counts
        terms = (1 if one.depthwise else inputs) * one.kernel**2
        return 2 * self.batch * one.output_height**2 * outputs * terms * (2 if backward else 1)

    def bytes(self, counts: tuple[int, int], *, backward: bool = False) -> int:
        """Input and weight read, output written. For both gradients each of the three is read or written twice.

        Pixels that a stride skips are not read.
        """
        one, (inputs, outputs) = self.convolution, counts
        read = one.height if one.kernel >= one.stride else one.output_height
        images = read**2 * inputs + one.output_height**2 * outputs
        weight = outputs * (1 if one.depthwise else inputs) * one.kernel**2
        return (self.batch * images + weight) * self.dtype.itemsize * (2 if backward else 1)

    @property
    def whole(self) -> tuple[int, int]:
        """The counts of all channels."""
        return self.convolution.inputs, self.convolution.outputs
