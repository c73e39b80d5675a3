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
from taylor_cuda.bench.suites.peers import compiled, our_names, our_providers
from taylor_cuda.ops import reference

REDUCTIONS = ("batch", "sample", "abs", "element")
VIT_B = (768, 3072)
"""Widths of its residual stream and of the inside of an MLP."""

WIDE = (16384, 4096)
"""A linear layer's output."""

BY_SIZE = ((256, 56, 56), (64, 56, 56), (512, 28, 28), (256, 14, 14), (512, 7, 7))
"""Gates of 822, 206, 411, 51 and 26 MB of activation and gradient at batch 256 in 16 bits."""

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
        if reduction == "all":
            each = [self.of(f"channel_importance:{name}", dtype) for name in REDUCTIONS]
            return torch.stack([one[0] for one in each]), torch.stack([one[1] for one in each])
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
    if reduction == "all":
        lines = [torch_line(f"channel_importance:{name}") for name in REDUCTIONS]
        return lambda a, g: torch.stack([line(a, g) for line in lines])
    if reduction == "batch":
        return lambda a, g: sums(a, g).sum(0).square()
    if reduction == "sample":
        return lambda a, g: sums(a, g).square().sum(0)
    if reduction == "abs":
        return lambda a, g: (sums(a, g) / a[0, 0].numel()).abs().mean(0)
    return lambda a, g: (a * g).square().sum([0, *range(2, a.dim())])


def hook_in_float32(a: Tensor, g: Tensor) -> Tensor:
    """Σ_n (Σ_l a·g)² by a hook that converts first, as one does who has seen what 16-bit products lose."""
    dims = tuple(range(2, a.dim()))
    products = a.float() * g.float()
    return (products.sum(dims) if dims else products).square().sum(0)


def gate_and_hook(a: Tensor, g: Tensor) -> Tensor:
    """Σ_n (Σ_l a·g)² from a gate parameter z = 1 in the network and a hook on what it gives (arXiv:1906.10771, eq. 8).

    The gate's own gradient, which autograd computes too, is that of the whole batch and says nothing about an example.
    """
    gate = torch.ones(1, a.shape[1], *(1 for _ in a.shape[2:]), dtype=a.dtype, device=a.device, requires_grad=True)
    before = a.detach().requires_grad_()
    gated = before * gate
    torch.autograd.grad(gated, (before, gate), g)
    return torch_line("channel_importance:sample")(gated.detach(), g)


def four_calls(a: Tensor, g: Tensor) -> Tensor:
    """All reductions by this package without the one that gives all: a pass for each."""
    return torch.stack([ops.channel_importance(a, g, name) for name in REDUCTIONS])


PEERS: dict[str, dict[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "channel_importance:sample": {"hook.float32": hook_in_float32, "nvlabs-style": gate_and_hook},
    "channel_importance:all": {"four calls": four_calls},
}
"""Further peers of a reduction; ``torch`` is there the hook that multiplies what it gets as it is."""


def our_op(op: str) -> Callable[[Inputs], Tensor]:
    """The public function."""
    if op == "channel_sums":
        return lambda inputs: ops.channel_sums(*inputs)
    reduction = op.partition(":")[2] or "batch"
    return lambda inputs: ops.channel_importance(*inputs, reduction)


def _apply(run: Callable[[Tensor, Tensor], Tensor], pair: Inputs) -> Tensor:
    return run(*pair)


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
    providers, skipped = our_providers(op.partition(":")[0], options, our_op(op), check("float32"))
    providers.append(Provider("torch", lambda pair: line(*pair), check(key.dtype)))
    if compile_too:
        fast = compiled(line, *inputs[0])
        if isinstance(fast, str):
            skipped.append(("torch.compile", fast))
        else:
            providers.append(Provider("torch.compile", lambda pair: fast(*pair), check(key.dtype)))
    if op in PEERS:
        dtypes = {"hook.float32": "float32", "four calls": "float32"}
        providers += [
            Provider(name, partial(_apply, run), check(dtypes.get(name, key.dtype))) for name, run in PEERS[op].items()
        ]
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
        names = [*our_names(op.partition(":")[0], self.options), *peers, *PEERS.get(op, ())]
        self.found.append(Entry(Key("scoring", op, case.name, case.dtype_name, layout), made, names, priority))


def entries(options: Options) -> list[Entry]:
    """Every activation case of this device."""
    races = Entries(options)
    if options.quick:
        _quick(races)
    elif options.cuda:
        _on_a_gpu(races)
    else:
        _on_a_cpu(races)
    return races.found


def _on_a_cpu(races: Entries) -> None:
    """One shape in every way; every gate shape of ResNet-50, which are those of ResNet-101 too; ViT-B; a wide layer."""
    shape, batch = (64, 256, 28, 28), 16
    for layout in ("nchw", "channels_last"):
        races.add(shape, torch.float32, layout, 5, compile_too=True)
        races.add(shape, torch.bfloat16, layout, 15)
        for dtype in (torch.float32, torch.bfloat16):
            races.add(shape, dtype, layout, 16, op="channel_sums")
    for reduction in (*REDUCTIONS[1:], "all"):
        races.add(shape, torch.float32, "nchw", 35, op=f"channel_importance:{reduction}", rounds=20)
    for width in VIT_B:
        races.add((batch, width, 197), torch.float32, "tokens", 30, rounds=15)
    for layout, priority in (("nchw", 50), ("channels_last", 51)):
        for gate in gate_shapes(8):
            races.add(gate, torch.float32, layout, priority, rounds=15)
    races.add((256, 4096), torch.float32, "rows", 60, rounds=15)


def _on_a_gpu(races: Entries) -> None:
    """The same at the batch of a GPU, what is promised first: all gates in bfloat16, all layouts, both 16-bit types."""
    batch, half = 256, torch.bfloat16
    for gate in gate_shapes(batch):
        races.add(gate, half, "channels_last", 5, compile_too=True, rounds=30)
    for gate in gate_shapes(batch):
        races.add(gate, half, "nchw", 14, rounds=30)
    for width in VIT_B:
        races.add((batch, width, 197), half, "tokens", 16, compile_too=True, rounds=30)
    for gate in BY_SIZE:
        races.add((batch, *gate), half, "channels_last", 12, op="channel_importance:sample", rounds=30)
        races.add((batch, *gate), torch.float16, "channels_last", 17, rounds=30)
        races.add((batch, *gate), torch.float16, "nchw", 18, rounds=30)
        races.add((batch, *gate), half, "channels_last", 19, op="channel_sums", rounds=30)
        races.add((batch, *gate), half, "nchw", 47, op="channel_sums", rounds=30)
    races.add(WIDE, half, "rows", 20, rounds=30)
    for reduction in (*REDUCTIONS[2:], "all"):
        races.add((batch, *BY_SIZE[1]), half, "channels_last", 46, op=f"channel_importance:{reduction}", rounds=20)
    for layout in ("channels_last", "nchw"):
        for gate in gate_shapes(batch):
            races.add(gate, torch.float32, layout, 80, rounds=15)


def gate_shapes(batch: int) -> list[tuple[int, ...]]:
    """Every gate of ResNet-50 and ResNet-101, which have the same ones."""
    gates = sorted(resnet_gates("resnet50") | resnet_gates("resnet101"))
    return [(batch, channels, height, height) for channels, height in gates]


def _quick(races: Entries) -> None:
    for layout in ("nchw", "channels_last"):
        for dtype in (torch.float32, torch.bfloat16):
            races.add((4, 32, 14, 14), dtype, layout, 5)
        races.add((4, 32, 14, 14), torch.float32, layout, 5, op="channel_sums")
    for reduction in (*REDUCTIONS[1:], "all"):
        races.add((4, 32, 7, 7), torch.float32, "nchw", 5, op=f"channel_importance:{reduction}")
    races.add((4, 48, 17), torch.float32, "tokens", 5)
    races.add((8, 64), torch.float32, "rows", 5)
