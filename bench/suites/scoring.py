"""One activation and its gradient: ``channel_importance`` and ``channel_sums`` against PyTorch and a dot product."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from taylor_cuda import ops
from taylor_cuda.bench.cases import ActivationCase, flat_in_memory, input_sets, resnet_gates
from taylor_cuda.bench.environment import cache_bytes
from taylor_cuda.bench.race import ALLOWED, Entry, Key, Options, Provider, Race, of_square, worst_share
from taylor_cuda.bench.suites.peers import compiled, our_names, ours, using
from taylor_cuda.ops import reference

REDUCTIONS = ("batch", "sample", "abs", "element")
Inputs = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Exact:
    """What a result has to be, in float64: t[n, c] = Σ_l a·g, m[n, c] = Σ_l |a·g|, and Σ_{n,l} (a·g)²."""

    sums: Tensor
    magnitudes: Tensor
    squares: Tensor
    length: int

    def of(self, op: str, dtype: str) -> tuple[Tensor, Tensor]:
        """The expected result of ``op``, and how far off it may be when computed in ``dtype``."""
        allowed = ALLOWED[dtype] * self.magnitudes
        if op == "channel_sums":
            return self.sums, allowed
        reduction = op.partition(":")[2] or "batch"
        if reduction == "batch":
            total = self.sums.sum(0)
            return total.square(), of_square(total, allowed.sum(0))
        if reduction == "sample":
            return self.sums.square().sum(0), of_square(self.sums, allowed).sum(0)
        if reduction == "abs":
            return (self.sums / self.length).abs().mean(0), (allowed / self.length).mean(0)
        return self.squares, ALLOWED[dtype] * self.squares


def exact(inputs: Inputs) -> Exact:
    """The float64 results, from the definition in ``taylor_cuda.ops.reference``."""
    a, g = (x.double() for x in inputs)
    return Exact(
        reference.channel_sums(a, g),
        reference.channel_sums(a.abs(), g.abs()),
        reference.channel_importance(a, g, "element"),
        a[0, 0].numel(),
    )


def torch_line(op: str) -> Callable[[Tensor, Tensor], Tensor]:
    """What somebody without this package writes."""

    def sums(a: Tensor, g: Tensor) -> Tensor:
        return (a * g).sum(tuple(range(2, a.dim()))) if a.dim() > 2 else a * g

    if op == "channel_sums":
        return sums
    reduction = op.partition(":")[2] or "batch"
    if reduction == "batch":
        return lambda a, g: sums(a, g).sum(0).square()
    if reduction == "sample":
        return lambda a, g: sums(a, g).square().sum(0)
    if reduction == "abs":
        return lambda a, g: (sums(a, g) / a[0, 0].numel()).abs().mean(0)
    return lambda a, g: (a * g).square().sum([0, *range(2, a.dim())])


def our_op(op: str) -> Callable[[Inputs], Tensor]:
    """The public function."""
    if op == "channel_sums":
        return lambda inputs: ops.channel_sums(*inputs)
    reduction = op.partition(":")[2] or "batch"
    return lambda inputs: ops.channel_importance(*inputs, reduction)


def build(key: Key, case: ActivationCase, options: Options, *, compile_too: bool, rounds: int) -> Race:
    """The race for one op on one case."""
    op = key.op
    count = input_sets(case.bytes(op), cache_bytes(options.device), least=1 if options.quick else 2)
    inputs = [case.inputs(options.device, seed) for seed in range(count)]
    truth = [exact(pair) for pair in inputs]

    def check(dtype: str) -> Callable[[Tensor, int], float]:
        return lambda result, index: worst_share(result, *truth[index].of(op, dtype))

    def check_dot(result: Tensor, index: int) -> float:
        return worst_share(result, truth[index].sums.sum(), ALLOWED[key.dtype] * truth[index].magnitudes.sum())

    line = torch_line(op)
    providers, skipped = [], []
    for name, backend in ours(op.partition(":")[0], options).items():
        if backend is None:
            skipped.append((name, "not built here"))
        else:
            providers.append(Provider(name, our_op(op), check("float32"), context=using(backend)))
    providers.append(Provider("torch", lambda pair: line(*pair), check(key.dtype)))
    if compile_too:
        fast = compiled(line, *inputs[0])
        if isinstance(fast, str):
            skipped.append(("torch.compile", fast))
        else:
            providers.append(Provider("torch.compile", lambda pair: fast(*pair), check(key.dtype)))
    # A dot product reads the same numbers once and keeps one: nothing that reads both tensors can be much faster.
    flat = {id(pair): (flat_in_memory(pair[0]), flat_in_memory(pair[1])) for pair in inputs}
    note = "one sum over all channels: a ceiling"
    providers.append(Provider("torch.dot", lambda pair: torch.dot(*flat[id(pair)]), check_dot, note))
    return Race(
        key,
        providers,
        inputs,
        case.bytes(op),
        case.flops,
        peer="torch",
        skipped=skipped,
        timers=("graph", "eager"),
        rounds=rounds,
    )


class Entries:
    """Collects the races of one run."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.found: list[Entry] = []

    def add(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        layout: str,
        priority: int,
        *,
        op: str = "channel_importance",
        compile_too: bool = False,
        rounds: int = 50,
    ) -> None:
        """One race more."""
        case = ActivationCase(shape, dtype, layout)
        made = partial(build, case=case, options=self.options, compile_too=compile_too, rounds=rounds)
        peers = ["torch", "torch.compile", "torch.dot"] if compile_too else ["torch", "torch.dot"]
        names = [*our_names(op.partition(":")[0], self.options), *peers]
        self.found.append(Entry(Key("scoring", op, case.name, case.dtype_name, layout), made, names, priority))


def entries(options: Options) -> list[Entry]:
    """Every activation case of this device."""
    races = Entries(options)
    if options.quick:
        _quick(races)
        return races.found
    _headline(races)
    _gates(races)
    dtype, batch = (torch.bfloat16, 256) if options.cuda else (torch.float32, 16)
    for width in (768, 3072):  # ViT-B: the residual stream and the inside of an MLP
        races.add((batch, width, 197), dtype, "tokens", 30, compile_too=options.cuda, rounds=15)
    races.add((256, 4096), dtype, "rows", 60, rounds=15)
    return races.found


def _headline(races: Entries) -> None:
    """One shape in every way: all reductions, dtypes and layouts."""
    shape, cuda = (64, 256, 28, 28), races.options.cuda
    for layout in ("nchw", "channels_last"):
        races.add(shape, torch.float32, layout, 5, compile_too=True)
        races.add(shape, torch.bfloat16, layout, 15, compile_too=cuda)
        for dtype in (torch.float32, torch.bfloat16):
            races.add(shape, dtype, layout, 16, op="channel_sums")
    dtype, layout = (torch.bfloat16, "channels_last") if cuda else (torch.float32, "nchw")
    for reduction in REDUCTIONS[1:]:
        races.add(shape, dtype, layout, 35, op=f"channel_importance:{reduction}", compile_too=cuda, rounds=20)


def _gates(races: Entries) -> None:
    """Every gate shape of ResNet-50 and ResNet-101, which are the same ones."""
    if races.options.cuda:
        batch = 256
        ways = [(torch.bfloat16, "channels_last", 10), (torch.bfloat16, "nchw", 40)]
        ways += [(torch.float32, "channels_last", 80), (torch.float32, "nchw", 81)]
    else:
        batch, ways = 8, [(torch.float32, "nchw", 50), (torch.float32, "channels_last", 51)]
    for dtype, layout, priority in ways:
        for channels, height in sorted(resnet_gates("resnet50") | resnet_gates("resnet101")):
            shape = (batch, channels, height, height)
            races.add(shape, dtype, layout, priority, compile_too=priority == 10, rounds=15)


def _quick(races: Entries) -> None:
    for layout in ("nchw", "channels_last"):
        for dtype in (torch.float32, torch.bfloat16):
            races.add((4, 32, 14, 14), dtype, layout, 5)
        races.add((4, 32, 14, 14), torch.float32, layout, 5, op="channel_sums")
    for reduction in REDUCTIONS[1:]:
        races.add((4, 32, 7, 7), torch.float32, "nchw", 5, op=f"channel_importance:{reduction}")
    races.add((4, 48, 17), torch.float32, "tokens", 5)
    races.add((8, 64), torch.float32, "rows", 5)
