"""Arguments of every op, large enough that its work is divided: for what holds of all ops alike. A new op is one entry.

``INPUTS[op](m)`` lists calls; ``m(*shape)`` is a random tensor of the type and device in question. Made anew from the
same seed the numbers are the same, which is how a run is repeated for an op that changes its arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from taylor_cuda.ops import reference

Call = tuple[Any, ...]


class Maker:
    """Random tensors of one type on one device."""

    def __init__(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype, self.device = dtype, device

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.dtype).to(self.device)

    def nhwc(self, n: int, c: int, h: int, w: int) -> Tensor:
        return self(n, h, w, c).permute(0, 3, 1, 2)

    def sums(self, *shape: int) -> Tensor:
        """What an op adds to: of the type it sums in."""
        return torch.randn(shape, generator=self.generator).to(reference.result_dtype(self.dtype)).to(self.device)

    def whole(self, *numbers: int, shape: tuple[int, ...] | None = None) -> Tensor:
        return torch.tensor(numbers, device=self.device).reshape(len(numbers) if shape is None else shape)


def _pairs(m: Maker) -> list[tuple[Tensor, Tensor]]:
    return [
        (m(6, 40, 28, 28), m(6, 40, 28, 28)),
        (m.nhwc(6, 40, 28, 28), m.nhwc(6, 40, 28, 28)),
        (m(9, 37, 7, 7), m(9, 37, 7, 7)),
        (m(700, 61), m(700, 61)),
    ]


def _weights(m: Maker) -> tuple[list[Tensor], list[Tensor], list[int]]:
    shapes = [((64, 48, 3, 3), 0), ((64, 48, 3, 3), 1), ((300, 700), 0), ((300, 700), 1), ((3, 9000), 0), ((500,), 0)]
    return [m(*shape) for shape, _ in shapes], [m(*shape) for shape, _ in shapes], [dim for _, dim in shapes]


def _window(m: Maker) -> tuple[Tensor, Tensor]:
    return m.sums(4000), m.whole(0, 0)


def _kept(m: Maker, n: int, every: int = 2) -> Tensor:
    """The positions of every so many of n, and two entries of none."""
    return m.whole(*range(0, n, every), -1, -1)


def _kept_weights(m: Maker) -> tuple[list[Tensor], Tensor, list[int]]:
    """Weights, their keep lists in one, and where each begins: rows and columns, rows, columns, neither."""
    weights = [m(64, 48, 3, 3), m.nhwc(64, 48, 3, 3), m(300, 700), m(300, 700).t(), m(500), m(90_000)]
    rows, columns = _kept(m, 64), _kept(m, 48, 3)
    lists = [rows, columns, rows, columns, rows[:0], _kept(m, 700), _kept(m, 700), rows[:0], _kept(m, 500)]
    bounds = [sum(map(len, lists[:i])) for i in range(len(lists) + 1)]
    return weights, torch.cat(lists), [*bounds, *bounds[-1:] * 3]


def _scattered(m: Maker, clear: bool) -> Call:
    weights, keep, bounds = _kept_weights(m)
    targets = [torch.empty_like(w, dtype=reference.result_dtype(m.dtype)).fill_(1) for w in weights]
    values = reference.gather_kept(weights, keep, bounds, [False] * len(weights), m.dtype)
    return values, targets, keep, bounds, clear


def _two_thirds(m: Maker, channels: int, fills: int = 0) -> Tensor:
    """Two of three channels, the same for every seed: what is captured once has one length."""
    return m.whole(*(c for c in range(channels) if c % 3), *[-1] * fills)


def _masked_convolutions(m: Maker) -> list[tuple[Tensor, Tensor, Call]]:
    """x, weight, and the arguments from keep_out to packed."""
    lists, packed = (_two_thirds(m, 32), _two_thirds(m, 40)), (_two_thirds(m, 32, 1), _two_thirds(m, 40, 2))
    compact = m.nhwc(6, len(packed[1]), 14, 14)
    depthwise = _two_thirds(m, 40)
    square, wide = ([1, 1], [1, 1], [1, 1]), ([2, 1], [0, 2], [1, 2])
    return [
        (m(6, 40, 14, 14), m(32, 40, 3, 3), (*lists, *square, 1, False)),
        (m.nhwc(6, 40, 14, 14), m(32, 40, 3, 3), (*lists, *wide, 1, False)),
        (m(6, 40, 7, 7), m(32, 40, 1, 1), (None, lists[1], [1, 1], [0, 0], [1, 1], 1, False)),
        (compact, m(32, 40, 3, 3), (*packed, *square, 1, True)),
        (m(6, 40, 14, 14), m(40, 1, 3, 3), (depthwise, depthwise, *square, 40, False)),
    ]


INPUTS: dict[str, Callable[[Maker], list[Call]]] = {
    "channel_importance": lambda m: [(*pair, r) for pair in _pairs(m) for r in reference.CHANNEL_REDUCTIONS],
    "channel_sums": lambda m: list(_pairs(m)),
    "accumulate_channel_sums": lambda m: [(a, g, m.sums(*a.shape[first:2])) for a, g in _pairs(m) for first in (0, 1)],
    "accumulate_importance": lambda m: [
        (
            [m.sums(*n, 3000), m.sums(*n, 5000)],
            m.whole(*range(8000)),
            m.whole(*range(0, 8001, 2)),
            *_window(m),
            reduction,
        )
        for n in ((), (30,))
        for reduction in ("batch", "sample", "abs", "sum")
    ],
    "batch_norm_relu_backward": lambda m: [
        (g, x, None, m.sums(c), m.sums(c).abs(), m.sums(c), m.sums(c), m.sums(*x.shape[:2]), True, True, [True] * 4)
        for x, g in _pairs(m)
        for c in x.shape[1:2]
    ],
    "batch_norm_relu_forward": lambda m: [
        (x, m.sums(c), m.sums(c).abs(), m.sums(c), m.sums(c), residual, training, 0.1, 1e-5, True)
        for x, residual in _pairs(m)
        for c in x.shape[1:2]
        for training in (True, False)
    ],
    "gather_kept": lambda m: [
        (*_kept_weights(m), [i % 2 == 0 for i in range(6)], dtype) for dtype in (torch.float16, m.dtype)
    ],
    "keep_mask": lambda m: [(m.sums(n).mul(8).round(), m.whole(n // 3, shape=())) for n in (1, 5000, 70_000)],
    "pack_channels": lambda m: [(x, _kept(m, x.shape[1])) for x, _ in _pairs(m)],
    "scatter_kept": lambda m: [_scattered(m, clear) for clear in (True, False)],
    "masked_conv2d_backward": lambda m: [
        (reference.masked_conv2d_forward(x, w, None, *options, None, False).sin(), x, w, *options, [True] * 3)
        for x, w, options in _masked_convolutions(m)
    ],
    "masked_conv2d_forward": lambda m: [
        (x, w, m(w.shape[0]), *options, *epilogue)
        for x, w, options in _masked_convolutions(m)
        for epilogue in ((None, False), (m.sums(w.shape[0]), True))
    ],
    "score_relu_backward": lambda m: [
        (a.relu(), g, m.sums(*a.shape[first:2]), *skip)
        for a, g in _pairs(m)
        for first in (0, 1)
        for skip in ((), (g * 2, m.sums(*a.shape[first:2])))
    ],
    "unpack_channels": lambda m: [
        (x, m.whole(*range(3, c + 1), -1, -1), c + 5) for x, _ in _pairs(m) for c in x.shape[1:2]
    ],
    "weight_importance": lambda m: [(*_weights(m), r) for r in reference.WEIGHT_REDUCTIONS],
}


def calls_of(op: str, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> list[Call]:
    """The calls of an op; an op that was forgotten is a KeyError that names it."""
    if op not in INPUTS:
        raise KeyError(f"{op} has no entry in tests/ops/inputs.py: add one, and what holds of every op is tested of it")
    return INPUTS[op](Maker(dtype, device, seed))


def tensors(value: Any) -> list[Tensor]:
    """Every tensor in arguments or results, in order."""
    if isinstance(value, Tensor):
        return [value]
    return [each for entry in value for each in tensors(entry)] if isinstance(value, (list, tuple)) else []


def run(implementation: Callable[..., Any], calls: list[Call]) -> list[Tensor]:
    """What all the calls return and what they leave in their arguments."""
    return [each for call in calls for each in tensors((implementation(*call), call))]


def same_bits(left: list[Tensor], right: list[Tensor]) -> bool:
    """Whether two runs left the same bits."""
    return len(left) == len(right) and all(
        a.shape == b.shape and a.dtype == b.dtype and torch.equal(_bytes(a), _bytes(b))
        for a, b in zip(left, right, strict=True)
    )


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8)
