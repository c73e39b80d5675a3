"""Inputs of every layout, the sums in float64 and the bound that the kernels promise. No pytest and no GPU here.

Every input is cut from a storage full of NaN, so that one element read from outside it makes the result NaN.
"""

from __future__ import annotations

import itertools
import mmap
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

REDUCTIONS = ("batch", "sample", "abs", "element")
WEIGHT_REDUCTIONS = ("sum", "square", "abs")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp64": torch.float64}

Source = Callable[..., Tensor]  # (*shape) -> random numbers in a NaN-framed storage


def source(dtype: torch.dtype, seed: int, device: str = "cpu") -> Source:
    """A maker of contiguous random tensors that lie 16-byte aligned within NaN."""
    generator = torch.Generator().manual_seed(seed)

    def make(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        frame = torch.full((values.numel() + 128,), float("nan"), dtype=dtype, device=device)
        inside = frame[64 : 64 + values.numel()].view(shape)
        return inside.copy_(values)

    return make


def _both(make: Source, *shape: int) -> tuple[Tensor, Tensor]:
    return make(*shape), make(*shape)


def _nhwc(x: Tensor) -> Tensor:
    """The same numbers in other places: the channels of the result are the last dimension of x."""
    return x.movedim(-1, 1)


def _cropped(make: Source, *shape: int) -> Tensor:
    whole = make(*(size + 2 for size in shape))
    return whole[tuple(slice(1, size + 1) for size in shape)]


PAIRS: dict[str, Callable[[Source], tuple[Tensor, Tensor]]] = {
    "nchw 7x7": lambda m: _both(m, 3, 16, 7, 7),
    "nchw 8x8": lambda m: _both(m, 2, 9, 8, 8),
    "nchw 14x14": lambda m: _both(m, 2, 24, 14, 14),
    "nchw 24x24": lambda m: _both(m, 2, 5, 24, 24),
    "nchw 33x31": lambda m: _both(m, 2, 3, 33, 31),
    "nchw 1x1": lambda m: _both(m, 5, 12, 1, 1),
    "long rows": lambda m: _both(m, 1, 2, 5003),
    "one channel": lambda m: _both(m, 4, 1, 9, 9),
    "one number": lambda m: _both(m, 1, 1, 1, 1),
    "nhwc 7x7": lambda m: (_nhwc(m(3, 7, 7, 64)), _nhwc(m(3, 7, 7, 64))),
    "nhwc 24 channels": lambda m: (_nhwc(m(2, 5, 5, 24)), _nhwc(m(2, 5, 5, 24))),
    "nhwc 13 channels": lambda m: (_nhwc(m(2, 5, 6, 13)), _nhwc(m(2, 5, 6, 13))),
    "nhwc 520 channels": lambda m: (_nhwc(m(1, 3, 3, 520)), _nhwc(m(1, 3, 3, 520))),
    "nhwc 40x40": lambda m: (_nhwc(m(1, 40, 40, 16)), _nhwc(m(1, 40, 40, 16))),
    "nhwc cropped": lambda m: (_nhwc(m(2, 7, 8, 16)[:, 1:-1, 1:-1]), _nhwc(m(2, 7, 8, 16)[:, 1:-1, 1:-1])),
    "nchw cropped": lambda m: (_cropped(m, 2, 5, 6, 7), _cropped(m, 2, 5, 6, 7)),
    "channels cut": lambda m: (m(3, 9, 6, 6)[:, 1:6], m(3, 9, 6, 6)[:, 1:6]),
    "channels cut, long": lambda m: (m(2, 9, 23, 29)[:, 1:6], m(2, 9, 23, 29)[:, 1:6]),
    "nhwc, channels cut": lambda m: (_nhwc(m(2, 5, 6, 20)[..., :16]), _nhwc(m(2, 5, 6, 20)[..., :16])),
    "nhwc, samples cut": lambda m: (
        _nhwc(m(3, 44)[:, :40].unflatten(1, (5, 8))),
        _nhwc(m(3, 44)[:, :40].unflatten(1, (5, 8))),
    ),
    "rows cut": lambda m: (m(3, 5, 19)[..., :16], m(3, 5, 19)[..., :16]),
    "every second channel": lambda m: (m(9, 12), m(9, 24)[:, ::2]),
    "one off": lambda m: (m(3 * 4 * 36 + 1)[1:].view(3, 4, 6, 6), m(3 * 4 * 36 + 1)[1:].view(3, 4, 6, 6)),
    "one of two off": lambda m: (m(2 * 3 * 600 + 1)[1:].view(2, 3, 600), m(2, 3, 600)),
    "every second": lambda m: (m(2, 6, 5, 14)[..., ::2], m(2, 6, 5, 14)[..., ::2]),
    "expanded pixels": lambda m: (m(2, 6, 5, 5), m(2, 6, 1, 1).expand(2, 6, 5, 5)),
    "expanded pixels, nhwc": lambda m: (_nhwc(m(2, 5, 5, 16)), m(2, 16, 1, 1).expand(2, 16, 5, 5)),
    "expanded samples": lambda m: (m(4, 6, 5, 5), m(1, 6, 5, 5).expand(4, 6, 5, 5)),
    "expanded whole": lambda m: (m(2, 6, 5, 5), m(1, 1, 1, 1).expand(2, 6, 5, 5)),
    "two layouts": lambda m: (_nhwc(m(2, 6, 7, 16)), m(2, 16, 6, 7)),
    "[N, C]": lambda m: _both(m, 37, 24),
    "[N, C] odd": lambda m: _both(m, 5, 7),
    "[N, C] turned": lambda m: (m(7, 40).t(), m(7, 40).t()),
    "[N, C, L]": lambda m: _both(m, 3, 6, 19),
    "[N, L, C]": lambda m: (m(2, 10, 24).mT, m(2, 10, 24).mT),
    "[N, L, C] turned": lambda m: (m(10, 2, 24).permute(1, 2, 0), m(10, 2, 24).permute(1, 2, 0)),
    "5d": lambda m: _both(m, 2, 4, 3, 5, 2),
    "5d cropped": lambda m: (_cropped(m, 2, 3, 2, 3, 4), _cropped(m, 2, 3, 2, 3, 4)),
    "9d cropped": lambda m: (_cropped(m, *[2] * 9), _cropped(m, *[2] * 9)),
    "no samples": lambda m: _both(m, 0, 3, 4, 4),
    "no pixels": lambda m: _both(m, 2, 3, 0, 4),
    "no channels": lambda m: _both(m, 2, 0, 4, 4),
}


# Layouts in which every kernel keeps samples apart for every reduction and splits no sum, and those of [N, C], where
# none keeps them apart: "all" has the bits of the four reductions there.
CUT_ALIKE = (
    *("nchw 7x7", "nchw 8x8", "nchw 14x14", "nchw cropped", "channels cut", "nchw 1x1", "nhwc cropped"),
    *("rows cut", "one off", "every second", "two layouts", "[N, C]", "[N, C] odd", "[N, C, L]"),
    *("every second channel", "5d", "5d cropped", "9d cropped", "no samples", "no pixels", "no channels"),
)


FAR = 2**31 + 64  # elements: past what 32 bits with a sign hold; twice that, past 32 bits without one
FAR_APART: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {  # shape, strides
    "nchw, samples": ((3, 2, 3, 5), (FAR, 15, 5, 1)),
    "nchw, channels": ((1, 3, 3, 5), (15, FAR, 5, 1)),
    "nchw, one channel": ((1, 2, 3, 5), (10, 5, FAR, 1)),
    "nhwc, samples": ((3, 8, 2, 5), (FAR, 1, 40, 8)),
    "nhwc, one channel": ((1, 8, 3, 5), (40, 1, FAR, 8)),
    "[N, C]": ((3, 8), (FAR, 1)),
}


def make_far_pair(name: str) -> tuple[Tensor, Tensor]:
    """Activation and gradient whose elements lie further apart than 32 bits can say, in memory that is not there.

    Both lie in pages of zeros, of which only those that are written exist. What is read at an offset that wrapped
    around is 0, so that the result is wrong and nothing crashes.
    """
    before, after = FAR + 1024, 2 * FAR + 1024
    no_reserve = 0x4000  # mmap.MAP_NORESERVE, which Python names from 3.13 on
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    memory = torch.frombuffer(mmap.mmap(-1, 2 * (before + after), flags=flags), dtype=torch.bfloat16)
    shape, strides = FAR_APART[name]
    pair = [memory.as_strided(shape, strides, before + start) for start in (0, 512)]
    for i, tensor in enumerate(pair):
        tensor.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(i)))
    return pair[0], pair[1]


def make_pair(name: str, dtype: torch.dtype, seed: int = 0, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Activation and gradient of a named layout."""
    return PAIRS[name](source(dtype, seed, device))


def terms_of(activation: Tensor, gradient: Tensor) -> Tensor:
    """The products a·g in float64, [N, C, L], on the CPU."""
    n, c = activation.shape[:2]
    terms = activation.detach().cpu().double() * gradient.detach().cpu().double()
    length = terms.numel() // (n * c) if n * c else 0
    return terms.reshape(n, c, length)


def tolerance(dtype: torch.dtype) -> float:
    """Eight rounding errors of the type that sums are formed in."""
    return 8 * torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


def importance_of(terms: Tensor, reduction: str, eps: float) -> tuple[Tensor, Tensor]:
    """The importance in float64, and by how much a result may differ when each sum differs by eps·Σ|a·g|."""
    sums, spread = terms.sum(2), eps * terms.abs().sum(2)
    if reduction == "batch":
        total, error = sums.sum(0), spread.sum(0)
        return total.square(), (2 * total.abs() + error) * error
    if reduction == "sample":
        return sums.square().sum(0), ((2 * sums.abs() + spread) * spread + eps * sums.square()).sum(0)
    if reduction == "element":
        return terms.square().sum((0, 2)), eps * terms.square().sum((0, 2))
    count = max(terms.shape[0] * terms.shape[2], 1)
    return sums.abs().sum(0) / count, spread.sum(0) / count


def difference(name: str, actual: Tensor, expected: Tensor, allowed: Tensor) -> str:
    """Empty when actual is expected to within what is allowed; NaN never is."""
    wanted = torch.float64 if actual.dtype == torch.float64 else torch.float32
    actual = actual.detach().cpu()
    if actual.shape != expected.shape or actual.dtype != wanted:
        return f"{name}: {actual.dtype} {tuple(actual.shape)}, wanted {tuple(expected.shape)}"
    error = (actual.double() - expected).abs()
    if bool((error <= allowed + torch.finfo(torch.float32).tiny).all()):
        return ""
    at = (
        int((error / (allowed + torch.finfo(torch.float32).tiny)).nan_to_num(float("inf")).argmax())
        if error.numel()
        else 0
    )
    return f"{name}: {actual.flatten()[at]:.9g}, wanted {expected.flatten()[at]:.9g} within {allowed.flatten()[at]:.3g}"


class Ops:
    """The ops of one implementation, by name."""

    def __init__(self, namespace: object) -> None:
        self.channel_sums = getattr(namespace, "channel_sums", None)
        self.channel_importance = getattr(namespace, "channel_importance", None)
        self.accumulate_channel_sums = getattr(namespace, "accumulate_channel_sums", None)
        self.weight_importance = getattr(namespace, "weight_importance", None)
        self.accumulate_importance = getattr(namespace, "accumulate_importance", None)
        self.keep_mask = getattr(namespace, "keep_mask", None)
        self.score_relu_backward = getattr(namespace, "score_relu_backward", None)
        self.pack_channels = getattr(namespace, "pack_channels", None)
        self.unpack_channels = getattr(namespace, "unpack_channels", None)
        self.gather_kept = getattr(namespace, "gather_kept", None)
        self.scatter_kept = getattr(namespace, "scatter_kept", None)


def check_channel_ops(
    ops: Ops, activation: Tensor, gradient: Tensor, twice: bool = True, together: bool = True
) -> list[str]:
    """What is wrong with the channel ops on one pair: against float64, in what they add to, and between two runs.

    ``together``: the reductions from one pass as well.
    """
    terms, eps = terms_of(activation, gradient), tolerance(activation.dtype)
    expected, allowed = terms.sum(2), eps * terms.abs().sum(2)
    sums = ops.channel_sums(activation, gradient)
    found = [difference("channel_sums", sums, expected, allowed)]
    if twice and not torch.equal(sums, ops.channel_sums(activation, gradient)):
        found.append("channel_sums: two runs differ")
    for reduction in REDUCTIONS:
        result = ops.channel_importance(activation, gradient, reduction)
        found.append(difference(reduction, result, *importance_of(terms, reduction, eps)))
        if twice and not torch.equal(result, ops.channel_importance(activation, gradient, reduction)):
            found.append(f"{reduction}: two runs differ")
    rows = ops.channel_importance(activation, gradient, "all") if together else []
    for row, reduction in zip(rows, REDUCTIONS, strict=together):
        found.append(difference(f"{reduction} of all", row, *importance_of(terms, reduction, eps)))
    for shape, total, error in ((sums.shape, expected, allowed), (sums.shape[1:], expected.sum(0), allowed.sum(0))):
        before = (
            torch.linspace(-1, 1, max(total.numel(), 1), dtype=sums.dtype)[: total.numel()].view(shape).to(sums.device)
        )
        after = before.clone()
        ops.accumulate_channel_sums(activation, gradient, after)
        start = before.cpu().double()
        found.append(difference(f"accumulate {list(shape)}", after, start + total, error + eps * start.abs()))
    return [problem for problem in found if problem]


WEIGHTS: dict[str, tuple[Callable[[Source], Tensor], Callable[[Source], Tensor], int]] = {
    "filters": (lambda m: m(16, 8, 3, 3), lambda m: m(16, 8, 3, 3), 0),
    "filters, input side": (lambda m: m(16, 8, 3, 3), lambda m: m(16, 8, 3, 3), 1),
    "filters, nhwc": (lambda m: _nhwc(m(16, 3, 3, 8)), lambda m: _nhwc(m(16, 3, 3, 8)), 0),
    "filters, nhwc, input side": (lambda m: _nhwc(m(16, 3, 3, 8)), lambda m: _nhwc(m(16, 3, 3, 8)), 1),
    "many filters, input side": (lambda m: m(70, 20, 3, 3), lambda m: m(70, 20, 3, 3), 1),
    "1x1": (lambda m: m(24, 64, 1, 1), lambda m: m(24, 64, 1, 1), 0),
    "1x1, input side": (lambda m: m(24, 88, 1, 1), lambda m: m(24, 88, 1, 1), 1),
    "7x7": (lambda m: m(10, 3, 7, 7), lambda m: m(10, 3, 7, 7), 0),
    "7x7, input side": (lambda m: m(10, 3, 7, 7), lambda m: m(10, 3, 7, 7), 1),
    "linear": (lambda m: m(24, 33), lambda m: m(24, 33), 0),
    "linear, input side": (lambda m: m(24, 33), lambda m: m(24, 33), 1),
    "tall, input side": (lambda m: m(1100, 24), lambda m: m(1100, 24), 1),
    "linear, turned": (lambda m: m(24, 40).t(), lambda m: m(24, 40).t(), 0),
    "vector": (lambda m: m(300), lambda m: m(300), 0),
    "long vector": (lambda m: m(5000), lambda m: m(5000), 0),
    "depthwise": (lambda m: m(12, 1, 3, 3), lambda m: m(12, 1, 3, 3), 0),
    "depthwise, input side": (lambda m: m(12, 1, 3, 3), lambda m: m(12, 1, 3, 3), 1),
    "3d, middle": (lambda m: m(4, 6, 2, 8, 2), lambda m: m(4, 6, 2, 8, 2), 3),
    "long filters": (lambda m: m(3, 9000), lambda m: m(3, 9000), 0),
    "long filters, odd": (lambda m: m(2, 8193), lambda m: m(2, 8193), 0),
    "broad rows, input side": (lambda m: m(5, 3, 300), lambda m: m(5, 3, 300), 1),
    "two layouts": (lambda m: m(8, 6, 3, 3), lambda m: _nhwc(m(8, 3, 3, 6)), 0),
    "two layouts, input side": (lambda m: m(8, 6, 3, 3), lambda m: _nhwc(m(8, 3, 3, 6)), 1),
    "expanded gradient": (lambda m: m(8, 6, 3, 3), lambda m: m(1, 6, 1, 1).expand(8, 6, 3, 3), 1),
    "gradient with gaps": (lambda m: m(8, 6), lambda m: m(8, 9)[:, :6], 1),
    "cut": (lambda m: _cropped(m, 6, 5, 3), lambda m: _cropped(m, 6, 5, 3), 1),
    "cut, 7d": (lambda m: _cropped(m, *[2] * 7), lambda m: _cropped(m, *[2] * 7), 3),
    "one off": (lambda m: m(4 * 9 + 1)[1:].view(4, 9), lambda m: m(4 * 9 + 1)[1:].view(4, 9), 0),
    "one number": (lambda m: m(1, 1), lambda m: m(1, 1), 1),
    "no filters": (lambda m: m(0, 4), lambda m: m(0, 4), 0),
    "nothing to sum": (lambda m: m(0, 4), lambda m: m(0, 4), 1),
}

WEIGHT_DTYPES = {
    "fp32": ("fp32", "fp32"),
    "fp32 and bf16": ("fp32", "bf16"),
    "fp32 and fp16": ("fp32", "fp16"),
    "bf16": ("bf16", "bf16"),
    "fp16": ("fp16", "fp16"),
    "fp64": ("fp64", "fp64"),
}


def make_weights(
    names: Sequence[str], types: str, seed: int = 0, device: str = "cpu"
) -> tuple[list[Tensor], list[Tensor], list[int]]:
    """Weights, gradients and dims of named cases."""
    weight, gradient = (source(DTYPES[name], seed + i, device) for i, name in enumerate(WEIGHT_DTYPES[types]))
    made = [(WEIGHTS[name][0](weight), WEIGHTS[name][1](gradient), WEIGHTS[name][2]) for name in names]
    weights, gradients, dims = (list(column) for column in zip(*made, strict=True))
    return weights, gradients, dims


def check_weight_importance(
    ops: Ops,
    weights: list[Tensor],
    gradients: list[Tensor],
    dims: list[int],
    reductions: Sequence[str] = WEIGHT_REDUCTIONS,
) -> list[str]:
    """What is wrong with weight_importance on one list: against float64 and between two runs."""
    found = []
    for reduction in reductions:
        results = ops.weight_importance(weights, gradients, dims, reduction)
        again = ops.weight_importance(weights, gradients, dims, reduction)
        found += [] if len(results) == len(weights) else [f"{len(results)} results of {len(weights)}"]
        for i, (result, repeated, weight, gradient, dim) in enumerate(
            zip(results, again, weights, gradients, dims, strict=True)
        ):
            products = weight.cpu().double() * gradient.cpu().double()
            terms = products.movedim(dim, 0).reshape(weight.shape[dim], weight.numel() // max(weight.shape[dim], 1))
            terms = {"sum": terms, "square": terms.square(), "abs": terms.abs()}[reduction]
            allowed = tolerance(weight.dtype) * terms.abs().sum(1)
            found.append(difference(f"{reduction} {i} {tuple(weight.shape)} dim {dim}", result, terms.sum(1), allowed))
            found += [] if torch.equal(result, repeated) else [f"{reduction} {i}: two runs differ"]
    return [problem for problem in found if problem]


UNIT_REDUCTIONS = ("batch", "sample", "abs", "sum")

# Positions of each tensor, rows (None: [C]), and how many entries each unit has.
UNITS: dict[str, tuple[list[int], int | None, list[int]]] = {
    "one tensor": ([5], None, [1] * 5),
    "several tensors": ([7, 3, 12], None, [2, 0, 1, 5, 0, 3]),
    "tensors without positions": ([4, 0, 0, 3, 0], 3, [2, 1, 4]),
    "one row": ([6, 9], 1, [3, 1, 2, 7]),
    "two rows": ([6, 9], 2, [3, 1, 2, 7]),
    "many rows": ([30, 11, 8], 67, [2] * 40),
    "no rows": ([6, 9], 0, [3, 1, 2]),
    "long units": ([40, 300], None, [700, 3, 513]),
    "long units, rows": ([40, 300], 9, [700, 3]),
    "more units than a block has": ([150, 600], None, [1, 2, 3] * 300),
    "more units than a block has, rows": ([150, 600], 3, [3, 2, 1] * 100),
    "no tensors": ([], None, [0, 0, 0, 0]),
    "no units": ([5], None, []),
}


def make_units(
    name: str, dtype: torch.dtype, seed: int = 0, device: str = "cpu"
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Sums, entries and offsets of a named case, and a window that holds something."""
    sizes, rows, widths = UNITS[name]
    make, generator = source(dtype, seed, device), torch.Generator().manual_seed(seed)
    sums = [make(size) if rows is None else make(rows, size) for size in sizes]
    entries = torch.randint(0, max(sum(sizes), 1), (sum(widths),), generator=generator).to(device)
    offsets = torch.tensor([0, *widths]).cumsum(0).to(device)
    return sums, entries, offsets, make(len(widths))


def units_of(
    sums: list[Tensor], entries: Tensor, offsets: Tensor, reduction: str, added: Tensor | None, scale: float, eps: float
) -> tuple[Tensor, Tensor]:
    """The importance in float64, and by how much a result may differ when each sum differs by eps times its terms."""
    flat = [x.detach().cpu().double().view(x.shape if x.dim() == 2 else (1, -1)) for x in sums]
    side_by_side = torch.cat(flat, 1) if flat else torch.zeros(0, 0, dtype=torch.float64)
    borders = offsets.tolist()
    terms = [side_by_side[:, entries.cpu()[a:b]] / scale for a, b in itertools.pairwise(borders)]
    nothing = torch.zeros(len(side_by_side), 0, dtype=torch.float64)
    joint = torch.stack([x.sum(1) for x in terms], 1) if terms else nothing
    spread = eps * torch.stack([x.abs().sum(1) for x in terms], 1) if terms else nothing
    more = torch.zeros(len(terms), dtype=torch.float64) if added is None else added.cpu().double()
    if reduction == "sample":
        return joint.square().sum(0), ((2 * joint.abs() + spread) * spread + eps * joint.square()).sum(0)
    if reduction == "abs":
        return joint.abs().sum(0), spread.sum(0)
    total, error = joint.sum(0) + more, spread.sum(0) + eps * more.abs()
    if reduction == "sum":
        return total, error
    return total.square(), (2 * total.abs() + error) * error + eps * total.square()


def check_accumulate_importance(ops: Ops, name: str, dtype: torch.dtype, device: str = "cpu") -> list[str]:
    """What is wrong with accumulate_importance in one case: against float64, in what it counts, between two runs."""
    sums, entries, offsets, window = make_units(name, dtype, device=device)
    more, factor = source(dtype, 7, device)(window.numel()), torch.tensor(3.0, dtype=dtype, device=device)
    found, eps = [], tolerance(dtype)
    for reduction in UNIT_REDUCTIONS:
        choices = [(None, None), (factor, None)] + ([(factor, more)] if reduction in ("batch", "sum") else [])
        for scale, added in choices:
            after, again, free = window.clone(), window.clone(), window.clone()
            counts = torch.tensor([3, 5], device=device)
            arguments = (reduction, scale, added, None, 0.75, 0.5)
            ops.accumulate_importance(sums, entries, offsets, after, counts, *arguments)
            ops.accumulate_importance(sums, entries, offsets, again, counts, *arguments)
            ops.accumulate_importance(sums, entries, offsets, free, None, *arguments)
            values, error = units_of(
                sums, entries, offsets, reduction, added, 1.0 if scale is None else float(scale), eps
            )
            before, case = window.cpu().double(), f"{name}, {reduction}, {scale is None}, {added is None}"
            expected = 0.75 * before + 0.5 * values
            allowed = 0.5 * error + eps * (before.abs() + values.abs())
            found.append(difference(case, after, expected, allowed))
            found += [] if torch.equal(after, again) else [f"{case}: two runs differ"]
            found += [] if torch.equal(after, free) else [f"{case}: not the same without counts"]
            found += [] if counts.tolist() == [5, 5] else [f"{case}: counts {counts.tolist()}"]
    return [problem for problem in found if problem]


def expected_mask(scores: Sequence[float], keep: int) -> list[bool]:
    """The ``keep`` largest, as sorting with Python says; NaN before all numbers, then the lower index."""
    order = sorted(
        range(len(scores)), key=lambda i: (scores[i] == scores[i], -scores[i] if scores[i] == scores[i] else 0)
    )
    kept = set(order[: max(keep, 0)])
    return [i in kept for i in range(len(scores))]


def check_keep_mask(
    keep_mask: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], scores: Tensor, keep: int
) -> list[str]:
    """What is wrong with one mask and its threshold, and between two runs."""
    count = torch.tensor(keep, device=scores.device)
    mask, threshold = keep_mask(scores, count)
    again, repeated = keep_mask(scores, count)
    values = scores.tolist()
    wanted = expected_mask(values, keep)
    kept = [value for value, stays in zip(values, wanted, strict=True) if stays]
    missing = any(value != value for value in values)
    least = torch.tensor(float("nan") if missing else min(kept, default=float("inf")), dtype=scores.dtype)
    found = [] if mask.tolist() == wanted else [f"keep {keep} of {len(values)}: wrong mask"]
    if not torch.allclose(threshold.cpu(), least, rtol=0, atol=0, equal_nan=True):
        found.append(f"keep {keep} of {len(values)}: threshold {threshold.item()}, wanted {least.item()}")
    same = torch.equal(mask, again) and torch.allclose(threshold, repeated, rtol=0, atol=0, equal_nan=True)
    return found if same else [*found, "two runs differ"]


SPECIAL_SCORES = [0.0, -0.0, 1.0, -1.0, *(float(name) for name in ("inf", "-inf", "nan"))]
SPECIAL_SCORES += [1e-45, -1e-45, 1.1754943508222875e-38, 3.4028234663852886e38]  # the ends of float32


def make_scores(n: int, kinds: int, seed: int, device: str = "cpu") -> Tensor:
    """Scores with ties, of up to so many different numbers, some of them special."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(kinds, generator=generator)
    special = torch.tensor(SPECIAL_SCORES)[:kinds]
    values[: len(special)] = special
    return values[torch.randint(kinds, (n,), generator=generator)].to(device)


def make_relu(name: str, dtype: torch.dtype, seed: int = 0, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """A ReLU's output and its gradient in a named layout, and a skip connection that lies as the output does."""
    output, gradient = make_pair(name, dtype, seed, device)
    skip, _ = make_pair(name, dtype, seed + 1, device)
    return output.relu_(), gradient, skip


RELU_FORMS = ((True, False), (False, True), (True, True), (False, False))  # sums of samples apart; with a skip


def check_score_relu_backward(
    ops: Ops,
    output: Tensor,
    gradient: Tensor,
    skip: Tensor,
    forms: Sequence[tuple[bool, bool]] = RELU_FORMS,
    twice: bool = True,
) -> list[str]:
    """What is wrong with score_relu_backward: gx bit by bit against PyTorch, sums against float64, between two runs."""
    expected = torch.ops.aten.threshold_backward(gradient, output, 0)
    eps, found = tolerance(output.dtype), []
    for per_sample, with_skip in forms:
        terms = [terms_of(output, gradient), *([terms_of(skip, expected)] if with_skip else [])]
        dims = 2 if per_sample else (0, 2)
        totals, spreads = [t.sum(dims) for t in terms], [eps * t.abs().sum(dims) for t in terms]
        wide = torch.float64 if output.dtype == torch.float64 else torch.float32
        start = torch.linspace(-1, 1, max(totals[0].numel(), 1), dtype=wide)[: totals[0].numel()].view(totals[0].shape)
        runs = []
        for _ in range(1 + twice):
            sums = [start.to(output.device, copy=True) for _ in terms]
            rest = (skip, sums[1]) if with_skip else ()
            runs.append([ops.score_relu_backward(output, gradient, sums[0], *rest), *sums])
        name = f"{'[N, C]' if per_sample else '[C]'}{', skip' if with_skip else ''}"
        gx, *sums = runs[0]
        if not torch.equal(gx, expected) or gx.dtype != expected.dtype:
            found.append(f"{name}: gx is not that of PyTorch")
        if gx.stride() != torch.empty_like(output).stride():
            found.append(f"{name}: gx has strides {gx.stride()}, wanted those of empty_like(output)")
        for i, (result, total, spread) in enumerate(zip(sums, totals, spreads, strict=True)):
            allowed = spread + eps * start.double().abs()
            found.append(difference(f"{name}, sums {i}", result, start.double() + total, allowed))
        if not all(map(torch.equal, runs[0], runs[-1])):
            found.append(f"{name}: two runs differ")
    return [problem for problem in found if problem]
