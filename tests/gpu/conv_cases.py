"""Inputs of the two ops of masked_conv2d, and what float64 makes of them. No pytest here.

Numbers are -1, 0 and 1, so that every sum is exact and results have to be equal; those of ``random`` cases are not, and
keep a bound instead. All that is dropped holds NaN. ``python -m tests.gpu.conv_cases FILE`` runs the Triton kernels in
Triton's interpreter and writes what is wrong as JSON: a process of its own, because TRITON_INTERPRET is read when a
kernel is decorated.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from taylor_cuda.ops import reference_conv
from tests.gpu.cases import DTYPES

NAN = float("nan")


@dataclass(frozen=True)
class Case:
    """One convolution; ``keep`` says what outputs and inputs keep: all, none, mask, list, or list and some -1."""

    inputs: int = 8
    outputs: int = 8
    window: tuple[int, int] = (3, 3)
    size: tuple[int, int] = (5, 6)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    keep: tuple[str, str] = ("all", "all")
    packed: bool = False
    dtype: str = "fp32"
    layout: str = "nhwc"
    epilogue: str = "scale bias relu"
    samples: int = 2
    tiny: bool = False  # small tiles, splits of two of them, and lists made 16 positions at a time
    wide: bool = False
    random: bool = False

    @property
    def name(self) -> str:
        """What differs from the plain case."""
        plain = Case()
        changed = [f"{k}={v}" for k, v in vars(self).items() if v != getattr(plain, k)]
        return ", ".join(changed) or "plain"


STRIDED = Case(stride=(2, 2), size=(7, 6))
DEPTHWISE = Case(inputs=24, outputs=24, groups=24)
GROUPED = Case(inputs=12, outputs=15, groups=3, size=(4, 5))
SPARSE = [("mask", "all"), ("all", "mask"), ("list-", "list"), ("none", "all"), ("all", "none")]
PACKED = [
    ("list", "all"),
    ("all", "list-"),
    ("list-", "list-"),
    ("none", "list"),
    ("list", "none"),
    ("list-8", "list-8"),
]
EVERY = [
    Case(),
    Case(inputs=12, outputs=20, size=(4, 4), tiny=True),
    Case(inputs=20, outputs=18, size=(4, 3), keep=("mask", "mask"), tiny=True),
    Case(inputs=20, outputs=18, size=(4, 3), keep=("list-", "list-"), packed=True, tiny=True),
    Case(inputs=8, outputs=72, window=(1, 1), padding=(0, 0)),
    *(Case(inputs=12, outputs=10, keep=keep) for keep in SPARSE),
    *(Case(inputs=12, outputs=10, keep=keep, packed=True) for keep in PACKED),
    Case(inputs=20, outputs=18, keep=("list-", "list-"), packed=True, layout="nchw"),
    Case(window=(1, 1), padding=(0, 0), inputs=40, outputs=24, epilogue="bias"),
    Case(window=(1, 1), padding=(0, 0), inputs=40, outputs=24, keep=("mask", "mask"), epilogue="scale"),
    Case(window=(1, 1), padding=(0, 0), stride=(2, 2), inputs=24, keep=("list", "list"), packed=True, epilogue=""),
    Case(inputs=3, window=(7, 7), stride=(2, 2), padding=(3, 3), size=(11, 9), outputs=20),
    Case(inputs=2, window=(3, 3), outputs=17, tiny=True),
    Case(inputs=3, window=(7, 7), stride=(2, 2), padding=(3, 3), size=(9, 9), keep=("mask", "mask")),
    replace(STRIDED, keep=("mask", "mask"), tiny=True),
    replace(STRIDED, keep=("list", "list"), packed=True),
    replace(STRIDED, window=(3, 2), stride=(3, 2), dilation=(2, 2), padding=(2, 1), keep=("mask", "mask")),
    replace(STRIDED, window=(2, 2), stride=(4, 3), padding=(0, 0), size=(9, 8)),
    Case(dilation=(1, 2), padding=(1, 2), size=(5, 7), keep=("list", "mask")),
    Case(samples=1, inputs=1, outputs=1, size=(1, 1)),
    Case(samples=1, inputs=1, outputs=3, layout="nchw"),
    Case(inputs=12, outputs=20, dtype="bf16"),
    Case(inputs=24, outputs=16, dtype="bf16", keep=("list-", "list"), packed=True),
    Case(inputs=24, outputs=16, dtype="fp16", keep=("mask", "list")),
    Case(layout="nchw", keep=("mask", "mask")),
    Case(layout="cropped"),
    Case(keep=("mask", "mask"), wide=True),
    replace(STRIDED, wide=True),
    Case(inputs=40, outputs=24, random=True, epilogue="scale bias"),
    Case(inputs=40, outputs=24, random=True, keep=("list-", "list-"), packed=True, epilogue="scale bias"),
    GROUPED,
    replace(GROUPED, keep=("mask", "mask"), stride=(2, 1), tiny=True),
    replace(GROUPED, keep=("list-", "list-"), packed=True),
    replace(GROUPED, keep=("list-", "all"), packed=True, dtype="bf16"),
    replace(GROUPED, inputs=96, outputs=6, size=(3, 3), keep=("all", "mask")),
    replace(GROUPED, inputs=3, outputs=6),
    DEPTHWISE,
    replace(DEPTHWISE, size=(9, 7), tiny=True),
    replace(DEPTHWISE, keep=("mask", "list-"), stride=(2, 2), epilogue="bias"),
    replace(DEPTHWISE, keep=("list-", "list"), packed=True, dilation=(2, 1), padding=(2, 1)),
    replace(DEPTHWISE, keep=("same", "same"), packed=True, stride=(2, 3), size=(8, 7)),
    replace(DEPTHWISE, keep=("same", "same, cut"), packed=True),
    replace(DEPTHWISE, keep=("list-", "all"), packed=True, dtype="bf16"),
    replace(DEPTHWISE, keep=("none", "all"), layout="nchw", inputs=70, outputs=70, groups=70),
    replace(DEPTHWISE, keep=("all", "list"), wide=True, dtype="fp16"),
]


def keep_of(kind: str, channels: int, generator: torch.Generator, device: str) -> Tensor | None:
    """A mask or a keep list, or None."""
    if kind == "all":
        return None
    order = torch.randperm(channels, generator=generator)
    kept = order[: 0 if kind == "none" else -(-channels // 2)].sort().values
    if kind == "mask" or (kind == "none" and channels % 2 == 0 and channels > 60):
        return torch.zeros(channels, dtype=torch.bool).index_fill_(0, kept, True).to(device)
    if kind == "list-8":
        kept = kept[: max(len(kept) - 2, 1)]
    rest = {"list-": 3, "same": 2, "list-8": -len(kept) % 8, "none": 1}.get(kind, 0)
    return torch.cat([kept, torch.full((rest,), -1)]).to(device)


@dataclass(frozen=True)
class Inputs:
    """The arguments of both ops."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None
    gradient: Tensor
    common: tuple[Any, ...]
    relu: bool

    def forward(self, run: Callable[..., Tensor], dtype: torch.dtype | None = None) -> Tensor:
        """What an implementation makes of them."""
        x, weight, bias, scale = (None if t is None else t.to(dtype or t.dtype) for t in self._vectors())
        return run(x, weight, bias, *self.common, scale, self.relu)

    def backward(self, run: Callable[..., Any], needs: list[bool], dtype: torch.dtype | None = None) -> list[Tensor]:
        """Likewise, the gradients."""
        gradient, x, weight = (t.to(dtype or t.dtype) for t in (self.gradient, self.x, self.weight))
        return list(run(gradient, x, weight, *self.common, needs))

    def _vectors(self) -> tuple[Tensor | None, ...]:
        return self.x, self.weight, self.bias, self.scale


def _in_layout(values: Tensor, layout: str) -> Tensor:
    if layout == "nchw":
        return values.contiguous()
    values = values.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "cropped":
        wide = torch.nn.functional.pad(values, (1, 1, 1, 1), value=NAN)
        return wide[:, :, 1:-1, 1:-1]
    return values


def make_inputs(case: Case, seed: int = 0, device: str = "cpu") -> Inputs:
    """The arguments of a case, NaN in all that is dropped, 0 in packed channels without a name."""
    generator, dtype = torch.Generator().manual_seed(seed), DTYPES[case.dtype]

    def draw(*shape: int) -> Tensor:
        if case.random:
            return torch.randn(shape, generator=generator).to(dtype).to(device)
        return torch.randint(-1, 2, shape, generator=generator).to(dtype).to(device)

    keeps = [
        keep_of(kind, channels, torch.Generator().manual_seed(seed + (0 if kind == "same" else i)), device)
        for i, (kind, channels) in enumerate(zip(case.keep, (case.outputs, case.inputs), strict=True))
    ]
    if case.keep[0] == "same" and keeps[0] is not None:
        keeps[1] = keeps[0][:7] if "cut" in case.keep[1] else keeps[0]
    counts = [
        keep.shape[0] if case.packed and keep is not None else channels
        for keep, channels in zip(keeps, (case.outputs, case.inputs), strict=True)
    ]
    x = draw(case.samples, counts[1], *case.size)
    weight = draw(case.outputs, case.inputs // case.groups, *case.window)
    bias = draw(case.outputs) if "bias" in case.epilogue else None
    scale = draw(case.outputs) if "scale" in case.epilogue else None
    lines = zip(case.size, case.window, case.stride, case.padding, case.dilation, strict=True)
    target = [(n + 2 * pad - d * (taps - 1) - 1) // stride + 1 for n, taps, stride, pad, d in lines]
    gradient = draw(case.samples, counts[0], *target)
    dropped = [
        torch.zeros(channels, dtype=torch.bool, device=device)
        if keep is None
        else ~reference_conv.kept_mask(keep, channels)
        for keep, channels in zip(keeps, (case.outputs, case.inputs), strict=True)
    ]
    for vector in (weight, bias, scale):
        if vector is not None:
            vector[dropped[0]] = NAN
    for i in dropped[1].nonzero().flatten().tolist():
        per_group, rows = case.inputs // case.groups, case.outputs // case.groups
        weight[i // per_group * rows : (i // per_group + 1) * rows, i % per_group] = NAN
    for image, keep, gone in ((gradient, keeps[0], dropped[0]), (x, keeps[1], dropped[1])):
        if keep is not None:
            image[:, keep < 0 if case.packed else gone] = 0.0 if case.packed else NAN
    common = (*keeps, list(case.stride), list(case.padding), list(case.dilation), case.groups, case.packed)
    x, gradient = _in_layout(x, case.layout), _in_layout(gradient, "nchw" if case.layout == "cropped" else case.layout)
    return Inputs(x, weight, bias, scale, gradient, common, "relu" in case.epilogue)


def _sizes(given: Inputs) -> Inputs:
    """Of every number its size, in float64; NaN stays where it is dropped."""
    tensors = {k: v.double().abs() for k, v in vars(given).items() if isinstance(v, Tensor)}
    return replace(given, **tensors, relu=False)


def allowed_of(given: Inputs, dtype: torch.dtype) -> list[Tensor]:
    """By how much y, gx, gw and gb may differ: each addition rounds a sum of at most all sizes, the end once.

    An addition, or the product and addition of a tensor core, which may truncate, is off by eps32 of the sizes so far.
    """
    sizes, eps = _sizes(given), torch.finfo(torch.float32).eps
    needs = [True] * 3
    sums = [
        sizes.forward(reference_conv.masked_conv2d_forward),
        *sizes.backward(reference_conv.masked_conv2d_backward, needs),
    ]
    taps = given.weight.shape[2] * given.weight.shape[3]
    pixels = given.gradient.shape[0] * given.gradient.shape[2] * given.gradient.shape[3]
    additions = [taps * given.weight.shape[1] + 3, taps * given.weight.shape[0], pixels, pixels]
    return [(n * eps + torch.finfo(dtype).eps) * total for n, total in zip(additions, sums, strict=True)]


def check(ops: SimpleNamespace, case: Case, seed: int = 0, device: str = "cpu", twice: bool = False) -> list[str]:
    """What is wrong with a case: against float64, in layout, and between two runs."""
    given, needs = make_inputs(case, seed, device), [True] * 3
    dtype = given.x.dtype
    wanted = [
        given.forward(reference_conv.masked_conv2d_forward, torch.float64),
        *given.backward(reference_conv.masked_conv2d_backward, needs, torch.float64),
    ]
    laid = [
        reference_conv.empty_laid_as(given.x, wanted[0].shape),
        torch.empty_like(given.x),
        torch.empty_like(given.weight),
    ]
    runs = [[given.forward(ops.forward), *given.backward(ops.backward, needs)] for _ in range(1 + twice)]
    problems = []
    for i, name in enumerate(("y", "gx", "gw", "gb")):
        actual, expected = runs[0][i], wanted[i]
        if actual.shape != expected.shape or actual.dtype != dtype:
            problems.append(f"{name}: {actual.dtype} {tuple(actual.shape)}, wanted {dtype} {tuple(expected.shape)}")
            continue
        if i < 3 and actual.stride() != laid[i].stride():
            problems.append(f"{name}: strides {actual.stride()}, wanted {laid[i].stride()}")
        error = (actual.double() - expected.to(torch.float64 if case.random else dtype).double()).abs()
        bound = allowed_of(given, dtype)[i] if case.random else torch.zeros(())
        if not bool((error <= bound.to(error.device)).all()):
            wrong = ~(error <= bound.to(error.device))
            at = tuple(wrong.nonzero()[0].tolist())
            problems.append(f"{name}: {int(wrong.sum())} wrong, {actual[at]} at {at}, wanted {expected[at]}")
        if not torch.equal(runs[0][i], runs[-1][i]):
            problems.append(f"{name}: two runs differ")
    return problems


def check_needs(ops: SimpleNamespace, case: Case) -> list[str]:
    """What is not asked for is empty, and what is has the bits of a call for everything."""
    given = make_inputs(case)
    everything = given.backward(ops.backward, [True] * 3)
    problems = []
    for i in range(3):
        needs = [j == i for j in range(3)]
        for j, result in enumerate(given.backward(ops.backward, needs)):
            good = torch.equal(result, everything[j]) if needs[j] else result.numel() == 0
            problems += [] if good else [f"needs {needs}: result {j} of shape {tuple(result.shape)}"]
    return problems


def check_nameless(ops: SimpleNamespace, case: Case) -> list[str]:
    """Packed channels without a name are zeros even where everything that is kept is NaN."""
    given = make_inputs(case)
    given.x[:, given.common[1] >= 0], given.gradient[:, given.common[0] >= 0] = NAN, NAN
    y, (gx, *_) = given.forward(ops.forward), given.backward(ops.backward, [True, False, False])
    images = (("y", y, given.common[0]), ("gx", gx, given.common[1]))
    return [
        f"{name}: {'not NaN' if named else 'not 0'}"
        for name, image, keep in images
        for named, part in ((True, image[:, keep >= 0]), (False, image[:, keep < 0]))
        if part.numel() == 0 or not bool((part.isnan() if named else part == 0).all())
    ]


def check_skips(ops: SimpleNamespace) -> list[str]:
    """Of three tiny tiles of outputs, or of inputs, one is loaded where the device knows that it alone is kept."""
    from taylor_cuda.kernels import _conv

    loaded, gathered, problems = [0], _conv._gathered, []

    def counted(*arguments: Any, **others: Any) -> Any:
        loaded[0] += 1
        return gathered(*arguments, **others)

    x, weight = torch.ones(1, 48, 3, 3), torch.ones(48, 48, 1, 1)
    one = torch.arange(48) % 3 == 0
    needs = {"gx": [True, False, False], "gw": [False, True, False]}
    wanted = {"y": (9, 3, 3), "gx": (9, 3, 3), "gw": (6, 3, 2)}  # tiles of gw have 32 outputs
    _conv._gathered = counted
    for i, keeps in enumerate(((None, None), (one, None), (None, one))):
        common = (*keeps, [1, 1], [0, 0], [1, 1], 1, False)
        for name, counts in wanted.items():
            loaded[0] = 0
            if name == "y":
                ops.forward(x, weight, None, *common, None, False)
            else:
                ops.backward(x, x, weight, *common, needs[name])
            problems += [] if loaded[0] == counts[i] else [f"{name}, {i}: {loaded[0]} tiles loaded, not {counts[i]}"]
    _conv._gathered = gathered
    return problems


def triton_ops() -> SimpleNamespace:
    """The two ops of taylor_cuda.kernels."""
    from taylor_cuda.kernels import masked_conv2d as kernels

    return SimpleNamespace(forward=kernels.masked_conv2d_forward, backward=kernels.masked_conv2d_backward)


NAMELESS = Case(inputs=20, outputs=18, keep=("list-", "list-"), packed=True, epilogue="")
MORE: dict[str, Callable[[SimpleNamespace], list[str]]] = {
    "needs": lambda ops: check_needs(ops, Case(keep=("mask", "list"))),
    "needs, depthwise": lambda ops: check_needs(ops, replace(DEPTHWISE, keep=("mask", "list"))),
    "nameless": lambda ops: check_nameless(ops, NAMELESS),
    "nameless, groups": lambda ops: check_nameless(ops, replace(GROUPED, keep=("list-", "list-"), packed=True)),
    "nameless, depthwise": lambda ops: check_nameless(ops, replace(DEPTHWISE, keep=("same", "same"), packed=True)),
    "no samples": lambda ops: check(ops, Case(samples=0)),
    "no samples, depthwise": lambda ops: check(ops, replace(DEPTHWISE, samples=0)),
}


def interpreted() -> dict[str, list[str]]:
    """What is wrong, by case."""
    from taylor_cuda.kernels import _conv_depthwise, _conv_lists, _conv_shape, _conv_tiles

    ops, problems = triton_ops(), {}
    table, narrow, longest = dict(vars(_conv_tiles)), _conv_shape.NARROW, _conv_lists.LONGEST
    programs = _conv_depthwise.TARGET_PROGRAMS
    tiny = _conv_tiles.Tile(32, 16, 16, 4, 1)
    small = {"conv_tile": lambda *_: tiny, "weight_tile": lambda *_: tiny, "splits_of": _splits_of_two}
    for case in EVERY:
        vars(_conv_tiles).update(small if case.tiny else {name: table[name] for name in small})
        _conv_lists.LONGEST = 16 if case.tiny else longest
        _conv_depthwise.TARGET_PROGRAMS = 9 if case.tiny else programs  # of nine taps: two splits
        _conv_shape.NARROW = 0 if case.wide else narrow
        try:
            problems[case.name] = check(ops, case, twice=case.tiny)
        except Exception:
            problems[case.name] = [traceback.format_exc()]
    vars(_conv_tiles).update(small)
    _conv_shape.NARROW = narrow
    problems["skips"] = check_skips(ops)
    return problems | {name: run(ops) for name, run in MORE.items()}


def _splits_of_two(tiles: int, pixels: int, block: int) -> tuple[int, int]:
    return -(-pixels // (2 * block)), 2


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)  # and so memory from empty() is NaN until it is written
    Path(sys.argv[1]).write_text(json.dumps(interpreted()))
