"""Weights and activations of every layout with keep lists, and what is wrong with results of the ops on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from taylor_cuda.ops import reference

Maker = Callable[..., Tensor]  # (*shape) -> random numbers

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp64": torch.float64}


def maker(dtype: torch.dtype, seed: int = 0, device: str = "cpu") -> Maker:
    """Random tensors that lie 16-byte aligned."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator).to(dtype).to(device)


def cropped(make: Maker, *shape: int) -> Tensor:
    """A tensor with gaps on all sides."""
    return make(*(size + 2 for size in shape))[tuple(slice(1, size + 1) for size in shape)]


def nhwc(x: Tensor) -> Tensor:
    """The same numbers seen with the last dimension as the second."""
    return x.movedim(-1, 1)


# Activations, [N, C, ...]; lists for them are made by ``lists_for``.
ACTIVATIONS: dict[str, Callable[[Maker], Tensor]] = {
    "nchw 7x7": lambda m: m(3, 16, 7, 7),
    "nchw 8x8": lambda m: m(2, 9, 8, 8),
    "nchw 28x28": lambda m: m(2, 40, 28, 28),
    "nchw 1x1": lambda m: m(5, 12, 1, 1),
    "one sample": lambda m: m(1, 33, 5, 5),
    "one long channel": lambda m: m(1, 1, 300, 301),
    "nhwc 7x7": lambda m: nhwc(m(3, 7, 7, 64)),
    "nhwc 13 channels": lambda m: nhwc(m(2, 5, 6, 13)),
    "nhwc 28x28": lambda m: nhwc(m(2, 28, 28, 48)),
    "nhwc 700 channels": lambda m: nhwc(m(1, 3, 3, 700)),
    "nhwc cropped": lambda m: nhwc(cropped(m, 2, 4, 5, 12)),
    "nchw cropped": lambda m: cropped(m, 2, 5, 6, 7),
    "channels cut": lambda m: m(3, 9, 6, 6)[:, 1:6],
    "every second": lambda m: m(2, 6, 5, 14)[..., ::2],
    "every second channel": lambda m: m(9, 24)[:, ::2],
    "one off": lambda m: m(3 * 4 * 36 + 1)[1:].view(3, 4, 6, 6),
    "expanded": lambda m: m(1, 6, 1, 5).expand(3, 6, 4, 5),
    "[N, C]": lambda m: m(37, 24),
    "[N, C] turned": lambda m: m(7, 40).t(),
    "[N, C, L]": lambda m: m(3, 6, 19),
    "[N, L, C]": lambda m: m(2, 10, 24).mT,
    "[N, L, C] turned": lambda m: m(10, 2, 24).permute(1, 2, 0),
    "5d": lambda m: m(2, 4, 3, 5, 2),
    "5d, channels last": lambda m: nhwc(m(2, 3, 2, 3, 10)),
    "width before channels": lambda m: m(4, 6, 3, 5).permute(1, 2, 3, 0),
    "channels first of all": lambda m: m(8, 3, 4, 4).transpose(0, 1),
    "no samples": lambda m: m(0, 3, 4, 4),
    "no pixels": lambda m: m(2, 3, 0, 4),
    "no channels": lambda m: m(2, 0, 4, 4),
}

WEIGHTS: dict[str, Callable[[Maker], Tensor]] = {
    "3x3": lambda m: m(16, 8, 3, 3),
    "3x3, nhwc": lambda m: nhwc(m(16, 3, 3, 8)),
    "3x3, broad": lambda m: m(40, 70, 3, 3),
    "1x1": lambda m: m(24, 64, 1, 1),
    "1x1, nhwc": lambda m: nhwc(m(24, 1, 1, 64)),
    "7x7": lambda m: m(10, 3, 7, 7),
    "4x4": lambda m: m(9, 6, 4, 4),
    "large filters": lambda m: m(5, 4, 20, 20),
    "linear": lambda m: m(24, 33),
    "linear, broad": lambda m: m(12, 1100),
    "linear, tall": lambda m: m(1100, 24),
    "linear, turned": lambda m: m(24, 40).t(),
    "vector": lambda m: m(300),
    "vector, every third": lambda m: m(300)[::3],
    "depthwise": lambda m: m(12, 1, 3, 3),
    "depthwise, nhwc": lambda m: nhwc(m(12, 3, 3, 1)),
    "one row": lambda m: m(1, 50),
    "3d": lambda m: m(8, 6, 5),
    "5d": lambda m: m(6, 4, 2, 3, 2),
    "5d, channels last": lambda m: nhwc(m(6, 2, 3, 2, 4)),
    "cut": lambda m: cropped(m, 6, 5, 3),
    "cut, nhwc": lambda m: nhwc(cropped(m, 6, 3, 3, 5)),
    "every second": lambda m: m(8, 12)[:, ::2],
    "one off": lambda m: m(4 * 9 + 1)[1:].view(4, 9),
    "height before rows": lambda m: m(3, 8, 3, 6).permute(1, 3, 0, 2),
    "no rows": lambda m: m(0, 4),
    "no columns": lambda m: m(4, 0),
}

# How much of a dimension of n places is kept: entries, given those of a random half.
LISTS: dict[str, Callable[[list[int], int], list[int]]] = {
    "half": lambda half, n: half,
    "half and none": lambda half, n: [*half, -1, -1, -1],
    "all": lambda half, n: list(range(n)),
    "first and last": lambda half, n: sorted({0, n - 1}) if n else [-1],
    "all, and none": lambda half, n: [*range(n), -1],
    "none": lambda half, n: [-1, -1],
    "nones among half": lambda half, n: [entry for i, each in enumerate(half) for entry in [-1] * (i % 3) + [each]],
}


def kept_of(n: int, kind: str, seed: int = 0) -> list[int]:
    """A keep list of a kind for a dimension of n places."""
    half = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[: (n + 1) // 2]
    return LISTS[kind](sorted(half.tolist()), n)


def lists_for(
    tensors: Sequence[Tensor], kinds: Sequence[tuple[str | None, str | None]], device: str = "cpu"
) -> tuple[Tensor, list[int]]:
    """``keep`` and ``bounds``: for tensor i rows and columns of the kinds ``kinds[i]``, None for no list."""
    keep: list[int] = []
    bounds = [0]
    for i, (tensor, pair) in enumerate(zip(tensors, kinds, strict=True)):
        for dim, kind in enumerate(pair):
            if kind is not None and dim < tensor.dim():
                keep += kept_of(tensor.shape[dim], kind, 2 * i + dim)
            bounds.append(len(keep))
    return torch.tensor(keep, dtype=torch.int64, device=device), bounds


KINDS: list[tuple[str | None, str | None]] = [
    ("half", "half"),
    ("half and none", None),
    (None, "half and none"),
    ("first and last", "all, and none"),
    ("all", "half"),
    ("none", "half"),
    (None, None),
    ("nones among half", "nones among half"),
]


def exactly(name: str, actual: Tensor, expected: Tensor) -> list[str]:
    """What differs: dtype, shape, strides (where they matter) or any bit."""
    found = []
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        return [f"{name}: {actual.dtype} {tuple(actual.shape)}, wanted {expected.dtype} {tuple(expected.shape)}"]
    if actual.stride() != expected.stride():
        found.append(f"{name}: strides {actual.stride()}, wanted {expected.stride()}")
    if not torch.equal(bits(actual), bits(expected)):
        found.append(f"{name}: other numbers")
    return found


def bits(tensor: Tensor) -> Tensor:
    """The bytes of the elements, in order."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)


def check_pack(ops: Any, x: Tensor, entries: list[int]) -> list[str]:
    """What is wrong with pack_channels of one list, and with unpack_channels of what it should give."""
    keep = torch.tensor(entries, dtype=torch.int64, device=x.device)
    y = reference.pack_channels(x, keep)
    found = exactly("pack", ops.pack_channels(x, keep), y)
    channels = x.shape[1]
    whole = reference.unpack_channels(y, keep, channels)
    found += exactly("unpack", ops.unpack_channels(y, keep, channels), whole)
    apart = torch.empty_strided(y.shape, [3 * stride for stride in y.stride()], dtype=y.dtype, device=y.device).copy_(y)
    expected = reference.unpack_channels(apart, keep, channels)
    return found + exactly("unpack with gaps", ops.unpack_channels(apart, keep, channels), expected)


def check_gather(
    ops: Any, tensors: list[Tensor], keep: Tensor, bounds: list[int], cast: list[bool], dtype: torch.dtype
) -> list[str]:
    """What is wrong with gather_kept of one list of tensors."""
    expected = reference.gather_kept(tensors, keep, bounds, cast, dtype)
    results = ops.gather_kept(tensors, keep, bounds, cast, dtype)
    found = [] if len(results) == len(expected) else [f"{len(results)} results of {len(expected)}"]
    for i, (result, wanted) in enumerate(zip(results, expected, strict=False)):
        found += exactly(f"{i} {tuple(tensors[i].shape)}", result, wanted)
    return found


def check_scatter(ops: Any, values: list[Tensor], targets: list[Tensor], keep: Tensor, bounds: list[int]) -> list[str]:
    """What is wrong with scatter_kept into tensors that lie as ``targets`` do, with and without clearing."""
    found = []
    for clear in (True, False):
        expected, results = ([like(target) for target in targets] for _ in "12")
        reference.scatter_kept(values, expected, keep, bounds, clear)
        ops.scatter_kept(values, results, keep, bounds, clear)
        for i, (result, wanted) in enumerate(zip(results, expected, strict=True)):
            whole, unharmed = frame_of(result), frame_of(wanted)
            found += exactly(f"clear={clear} {i} {tuple(result.shape)}", whole, unharmed)
    return found


def like(tensor: Tensor) -> Tensor:
    """A copy with the same strides, in a storage of its own whose other elements count too."""
    return torch.as_strided(frame_of(tensor).clone(), tensor.shape, tensor.stride(), tensor.storage_offset())


def frame_of(tensor: Tensor) -> Tensor:
    """The whole storage, with what lies between the elements."""
    return torch.as_strided(tensor, (tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)
