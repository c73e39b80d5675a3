"""Inputs of ``batch_norm_relu``, what float64 makes of them and the bounds that its backends keep. No pytest here.

``python -m tests.ops.norm_cases FILE`` runs the Triton kernels in Triton's interpreter and writes what is wrong as
JSON: a process of its own, because TRITON_INTERPRET is read when a kernel is decorated.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.gpu.cases import DTYPES, Source, difference, source

LAYOUTS: dict[str, Callable[[Source], Tensor]] = {
    "nhwc 7x7": lambda m: m(3, 7, 7, 16).movedim(-1, 1),
    "nhwc 13 channels": lambda m: m(2, 5, 6, 13).movedim(-1, 1),
    "nhwc 72 channels": lambda m: m(2, 3, 3, 72).movedim(-1, 1),
    "nhwc 20x20": lambda m: m(2, 20, 20, 24).movedim(-1, 1),
    "nchw 7x7": lambda m: m(3, 9, 7, 7),
    "nchw 8x8": lambda m: m(2, 16, 8, 8),
    "long rows": lambda m: m(2, 3, 2503),
    "[N, C]": lambda m: m(9, 24),
    "[N, C] odd": lambda m: m(5, 7),
    "[N, L, C]": lambda m: m(2, 10, 24).mT,
    "one channel": lambda m: m(4, 1, 5, 5),
    "5d": lambda m: m(2, 4, 3, 5, 2),
    "cropped": lambda m: m(2, 7, 8, 16)[:, 1:-1, 1:-1].movedim(-1, 1),
    "channels cut": lambda m: m(3, 9, 6, 6)[:, 1:6],
    "every second": lambda m: m(2, 6, 5, 14)[..., ::2],
    "one off": lambda m: m(3 * 4 * 36 + 1)[1:].view(3, 4, 6, 6),
}


@dataclass(frozen=True)
class Case:
    """One call. ``far`` puts the mean at a thousand standard deviations; ``sums`` says what is accumulated."""

    layout: str = "nhwc 7x7"
    dtype: str = "fp32"
    training: bool = True
    residual: bool = True
    relu: bool = True
    affine: bool = True
    sums: str = "[N, C]"
    far: bool = False
    other_layout: bool = False  # of the residual and the gradient

    @property
    def name(self) -> str:
        """The name under which the case is reported."""
        flags = ("training", "residual", "relu", "affine", "far", "other_layout")
        return ", ".join([self.layout, self.dtype, self.sums, *(flag for flag in flags if getattr(self, flag))])


MODES = [Case(training=t, residual=r, relu=u, affine=a) for t, r, u, a in product((True, False), repeat=4)]
EVERY = [
    *MODES,  # of which the first is the plain case of its layout
    *(replace(mode, layout="nchw 7x7", sums="[C]") for mode in MODES[::5]),
    *(Case(layout) for layout in list(LAYOUTS)[1:]),
    *(Case(layout, ("bf16", "fp16")[i % 2]) for i, layout in enumerate(list(LAYOUTS)[::3])),
    *(Case(layout, residual=False, sums="none") for layout in ("nhwc 7x7", "nchw 8x8")),
    *(Case(layout, far=True) for layout in ("nhwc 20x20", "[N, C]")),
    *(Case(layout, other_layout=True) for layout in ("nhwc 7x7", "every second")),
]


@dataclass(frozen=True)
class Inputs:
    """The tensors of a case: statistics, weight and bias are fp32 (fp64 for fp64), the others of its dtype."""

    x: Tensor
    residual: Tensor | None
    gradient: Tensor
    weight: Tensor | None
    bias: Tensor | None
    running: tuple[Tensor, Tensor]
    sums: Tensor | None


def make_inputs(case: Case, seed: int = 0, device: str = "cpu") -> Inputs:
    """Random tensors in storages full of NaN."""
    dtype = DTYPES[case.dtype]
    wide = torch.promote_types(dtype, torch.float32)
    make, vector = source(dtype, seed, device), source(wide, seed + 1, device)
    x, residual, gradient = (LAYOUTS[case.layout](make) for _ in range(3))
    if case.far:
        x.add_(1000)
    if case.other_layout:
        residual, gradient = residual.clone(memory_format=torch.contiguous_format), gradient[:1, :, :1].expand_as(x)
        residual = residual.movedim(1, -1).contiguous().movedim(-1, 1) if x.is_contiguous() else residual
    n, c = x.shape[:2]
    shapes = {"[C]": (c,), "[N, C]": (n, c)}
    given = Inputs(
        x,
        residual if case.residual else None,
        gradient,
        vector(c) if case.affine else None,
        vector(c) if case.affine else None,
        (vector(c) + (1000 if case.far else 0), vector(c).abs() + 0.5),
        vector(*shapes[case.sums]) if case.sums in shapes else None,
    )
    if 0 not in gradient.stride():  # fp32 can't tell on which side of 0 an output is that lies so near
        expected = expected_of(case, given, 0.25, 1e-3)
        gradient.masked_fill_((expected["z"][0].abs() <= expected["y"][1]).to(device), 0)
    return given


def _sum(values: Tensor) -> Tensor:
    """Σ_l, [N, C]."""
    return values.reshape(*values.shape[:2], -1).sum(2)


def expected_of(case: Case, given: Inputs, momentum: float, eps: float) -> dict[str, tuple[Tensor, Tensor]]:
    """Every result in float64 by autograd of PyTorch's own ops, and by how much fp32 arithmetic may miss it."""
    x, gradient, mean, var = (t.cpu().double() for t in (given.x, given.gradient, *given.running))
    c, column = x.shape[1], (1, -1, *[1] * (x.dim() - 2))
    gamma = torch.ones(c) if given.weight is None else given.weight.cpu()
    beta = torch.zeros(c) if given.bias is None else given.bias.cpu()
    zeros = torch.zeros_like(x) if given.residual is None else given.residual.cpu().double()
    leaves = [t.double().requires_grad_() for t in (x, zeros, gamma, beta)]
    running = mean.clone(), var.clone()
    branch = F.batch_norm(leaves[0], *running, leaves[2], leaves[3], case.training, momentum, eps)
    branch.retain_grad()
    z = branch + leaves[1]
    y = F.relu(z) if case.relu else z
    y.backward(gradient)
    assert branch.grad is not None

    u = (8 if case.dtype == "fp64" else 16) * torch.finfo(torch.float64 if case.dtype == "fp64" else torch.float32).eps
    rounding = torch.finfo(DTYPES[case.dtype]).eps
    axes = [0, *range(2, x.dim())]
    if case.training:
        var, mean = torch.var_mean(x, axes, correction=0)
    invstd = (var + eps).rsqrt()
    scale = (invstd * leaves[2].detach().abs()).view(column)
    reach = x.abs() + mean.abs().view(column)  # x - mean is formed of these
    masked = branch.grad.abs()
    far = (masked * reach).mean(axes).view(column) * invstd.view(column)
    inner = (
        masked
        + masked.mean(axes).view(column)
        + (reach * invstd.view(column))
        * ((masked * invstd.view(column) * (x - mean.view(column)).abs()).mean(axes).view(column) + u * far)
    )
    inner = inner + far * invstd.view(column) * (x - mean.view(column)).abs()
    gates = _sum(branch.detach() * branch.grad)
    per_gate = _sum((scale * reach + leaves[3].detach().abs().view(column)) * masked)
    start = None if given.sums is None else given.sums.cpu().double()
    results = {
        "y": (
            y.detach(),
            u * (scale * reach + leaves[3].detach().abs().view(column) + zeros.abs()) + rounding * y.abs(),
        ),
        "gx": (leaves[0].grad, u * scale * inner + rounding * leaves[0].grad.abs()),
        "weight": (leaves[2].grad, u * (masked * reach).sum(axes) * invstd),
        "bias": (leaves[3].grad, u * masked.sum(axes)),
        "running_mean": (running[0], u * (running[0].abs() + reach.amax(axes))),
        "running_var": (running[1], u * (running[1].abs() + var)),
        "invstd": (invstd, u * invstd),
        "z": (z, torch.zeros_like(z)),
    }
    if given.residual is not None:
        results["residual"] = (leaves[1].grad, torch.zeros_like(x))
    if start is not None:
        total, allowed = (gates, per_gate) if start.dim() == 2 else (gates.sum(0), per_gate.sum(0))
        results["sums"] = (start + total, u * (allowed + start.abs()))
    return {name: (value.detach(), allowed.detach()) for name, (value, allowed) in results.items()}


def run(ops: SimpleNamespace, case: Case, given: Inputs, momentum: float, eps: float) -> dict[str, Tensor]:
    """What the two ops of a backend make of a case."""
    running = [t.clone() for t in given.running]
    sums = None if given.sums is None else given.sums.clone()
    affine = (given.weight, given.bias)
    y, mean, invstd = ops.forward(given.x, *running, *affine, given.residual, case.training, momentum, eps, case.relu)
    output = y if case.relu and case.residual else None
    needs = [True, case.residual, True, True]
    results = ops.backward(
        given.gradient, given.x, output, mean, invstd, *affine, sums, case.training, case.relu, needs
    )
    names = ("gx", "residual", "weight", "bias")
    found = {"y": y, "invstd": invstd, **{n: r for n, r, needed in zip(names, results, needs, strict=True) if needed}}
    found |= {"running_mean": running[0], "running_var": running[1]} | ({} if sums is None else {"sums": sums})
    return found


def check(ops: SimpleNamespace, case: Case, seed: int = 0, device: str = "cpu", twice: bool = False) -> list[str]:
    """What is wrong with a case: against float64, in layout, and between two runs."""
    given = make_inputs(case, seed, device)
    expected = expected_of(case, given, 0.25, 1e-3)
    found = run(ops, case, given, 0.25, 1e-3)
    problems = []
    for name, actual in found.items():
        value, allowed = expected[name]
        image = name in ("y", "gx", "residual")
        if image and (actual.dtype != given.x.dtype or actual.stride() != torch.empty_like(given.x).stride()):
            problems.append(f"{name}: {actual.dtype}, strides {actual.stride()}")
        actual = actual.float() if image and actual.dtype != torch.float64 else actual
        problems.append(difference(name, actual, value, allowed + (6e-8 if case.dtype == "fp16" and image else 0)))
    if twice:
        again = run(ops, case, given, 0.25, 1e-3)
        problems += [f"{name}: two runs differ" for name in found if not torch.equal(found[name], again[name])]
    return [problem for problem in problems if problem]


def nan_case(ops: SimpleNamespace, case: Case) -> list[str]:
    """NaN in one channel must show there and in no other."""
    given = make_inputs(case)
    given.x[1, 2].flatten()[-1:] = float("nan")
    given.x[1, 2, ..., -1] = float("nan")
    results = run(ops, case, given, 0.25, 1e-3)
    problems = []
    for name, value in results.items():
        per_channel = value.isnan() if value.dim() == 1 else value.isnan().transpose(0, 1).flatten(1).any(1)
        constant = name in ("invstd", "bias", "running_mean", "running_var") and not case.training
        wanted = [] if name == "residual" or constant else [2]
        allowed = (wanted, []) if name in ("bias", "gx") else (wanted,)
        if per_channel.nonzero().flatten().tolist() not in allowed:
            problems.append(f"{name}: NaN in channels {per_channel.nonzero().flatten().tolist()}")
    return problems


def triton_ops() -> SimpleNamespace:
    """The two ops of taylor_cuda.kernels."""
    from taylor_cuda.kernels import batch_norm_relu as kernels

    return SimpleNamespace(forward=kernels.batch_norm_relu_forward, backward=kernels.batch_norm_relu_backward)


def interpreted() -> dict[str, list[str]]:
    """What is wrong, by case; those named "many trips" have several tiles for each program, and 64-bit offsets."""
    from taylor_cuda.kernels import batch_norm_relu as kernels

    ops, problems = triton_ops(), {}
    plan = [(case.name, case, kernels.TARGET_PROGRAMS, kernels.NARROW) for case in EVERY]
    plan += [(f"{case.name}, many trips", case, 1, 0) for case in TRIPS]
    for name, case, programs, narrow in plan:
        kernels.TARGET_PROGRAMS, kernels.NARROW = programs, narrow
        try:
            problems[name] = check(ops, case, twice=case in MODES[:2])
        except Exception:
            problems[name] = [traceback.format_exc()]
    problems["nan"] = [text for case in MODES[::7] for text in nan_case(ops, case)]
    return problems


TRIPS = [
    Case("nhwc 20x20"),
    Case("nhwc 20x20", sums="[C]", far=True),
    Case("long rows", sums="[C]", far=True),
]

if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)  # and so memory from empty() is NaN until it is written
    Path(sys.argv[1]).write_text(json.dumps(interpreted()))
