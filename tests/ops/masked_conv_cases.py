"""Masked convolutions of any kind, and the dense one that each of them has to equal."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import taylor_cuda as tc
from taylor_cuda.ops import backends

ENGINES = ("native", "reference")
each_engine = pytest.mark.parametrize("engine", ENGINES)


@contextlib.contextmanager
def running(engine: str) -> Iterator[None]:
    """Whatever is kept, the compact convolution runs (with the packing that is built here), or the definition."""
    with pytest.MonkeyPatch.context() as patch:
        for kind in backends.COMPACT_UP_TO:
            patch.setitem(backends.COMPACT_UP_TO, kind, 9.0 if engine == "native" else -1.0)
        if engine == "native":
            yield
        else:
            with backends.use(engine):
                yield


@dataclass
class Case:
    """Arguments of one call; masks are bool, and ``listed`` says that lists of them are given, ``round_to`` long."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    keep_out: Tensor | None
    keep_in: Tensor | None
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    packed: bool
    listed: bool
    round_to: int
    scale: Tensor | None
    relu: bool

    def inputs(self) -> list[Tensor]:
        """New leaves, laid out as those of the case."""
        given = [each for each in (self.x, self.weight, self.bias) if each is not None]
        return [each.detach().clone().requires_grad_() for each in given]

    def kept(self) -> tuple[Tensor | None, Tensor | None]:
        masks = (self.keep_out, self.keep_in)
        if not self.listed:
            return masks
        if self.keep_in is self.keep_out and self.keep_in is not None:
            (both,) = tc.keep_lists([self.keep_in], self.round_to)
            return both, both
        lists = iter(tc.keep_lists([mask for mask in masks if mask is not None], self.round_to))
        return next(lists) if masks[0] is not None else None, next(lists) if masks[1] is not None else None

    def dense(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """What PyTorch computes with masks."""
        y = F.conv2d(without(x, self.keep_in), weight, None, self.stride, self.padding, self.dilation, self.groups)
        y = y if self.scale is None else y * self.scale.view(-1, 1, 1)
        y = y if bias is None else y + bias.view(-1, 1, 1)
        return without(y.relu() if self.relu else y, self.keep_out)

    def masked(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The op, between whole tensors."""
        keep_out, keep_in = self.kept()
        if self.packed and keep_in is not None:
            x = tc.pack_channels(x, keep_in)
        where = (self.stride, self.padding, self.dilation, self.groups)
        y = tc.masked_conv2d(x, weight, bias, keep_out, keep_in, *where, self.packed, self.scale, self.relu)
        if self.packed and keep_out is not None:
            y = tc.unpack_channels(y, keep_out, weight.shape[0])
        return y


def without(x: Tensor, keep: Tensor | None) -> Tensor:
    return x if keep is None else torch.where(keep.view(-1, 1, 1), x, x.new_zeros(()))


def random_case(seed: int) -> Case:
    """Any of the kinds, sizes and masks, in float64."""
    r, generator = random.Random(seed), torch.Generator().manual_seed(seed)

    def numbers(*shape: int, last: bool = False) -> Tensor:
        made = torch.randn(shape, generator=generator, dtype=torch.float64)
        return made.contiguous(memory_format=torch.channels_last) if last else made

    def mask(channels: int) -> Tensor | None:
        share = r.choice([None, 0.0, 0.3, 0.5, 0.7, 1.0])
        return None if share is None else torch.rand(channels, generator=generator) < share

    groups = r.choice([1, 1, 2, 3, 4])
    kind = "dense" if groups == 1 else r.choice(["grouped", "depthwise", "multiplied"])
    inputs, outputs = (
        groups * (r.randint(1, 4) if kind == "grouped" else 1),
        groups * (2 if kind == "multiplied" else 1),
    )
    if kind == "grouped":
        outputs = groups * r.randint(1, 4)
    elif kind == "dense":
        inputs, outputs = r.randint(1, 9), r.randint(1, 9)
    kernel, stride, dilation, padding = (
        (r.randint(a, b), r.randint(a, b)) for a, b in ((1, 3), (1, 3), (1, 2), (0, 2))
    )
    packed = r.random() < 0.4
    same = r.random() < 0.3 and inputs == outputs
    keep_out = mask(outputs)
    return Case(
        x=numbers(r.choice([0, 1, 2, 3]), inputs, r.randint(5, 9), r.randint(5, 9), last=r.random() < 0.5),
        weight=numbers(outputs, inputs // groups, *kernel, last=r.random() < 0.5),
        bias=numbers(outputs) if r.random() < 0.6 else None,
        keep_out=keep_out,
        keep_in=keep_out if same else mask(inputs),
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        packed=packed,
        listed=packed or r.random() < 0.5,
        round_to=r.choice([1, 1, 4]),
        scale=numbers(outputs) if r.random() < 0.3 else None,
        relu=r.random() < 0.4,
    )
