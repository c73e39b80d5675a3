"""What is promised where: on a CPU, and on an H200."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import torch

from taylor_cuda.bench.cases import ActivationCase
from taylor_cuda.bench.check import Bandwidth, Faster, FasterInSum, Memory, Promise, Takes, Within, WithinOurs
from taylor_cuda.bench.predicted_conv import cases_of
from taylor_cuda.bench.predictions import AT_HALF
from taylor_cuda.bench.race import PACKED, Key
from taylor_cuda.bench.suites import conv, curvature, modes, relu, step, throughput
from taylor_cuda.bench.suites.scoring import BY_SIZE, VIT_B, WIDE, gate_shapes

WITHIN = 1 / 1.3
"""A ratio of at least this is "within 1.3 times the peer's time"."""

BATCH = 256
MEGABYTE = 1_000_000


def promises(device: str) -> list[Promise]:
    """Those about ``"cpu"`` or ``"cuda"``."""
    if device == "cpu":
        return _on_a_cpu()
    return [*_channels(), *_per_example(), *_weights(), *_steps(), _throughput(), *_relu(), *_convolutions(), *_modes()]


def _on_a_cpu() -> list[Promise]:
    found: list[Promise] = []
    for layout in ("nchw", "channels_last"):
        key = Key("scoring", "channel_importance", "64x256x28x28", "float32", layout)
        found += [Faster(key, peer="torch", least=3.5), Faster(key, peer="torch.dot", least=WITHIN)]
        case = replace(conv.DONE_WHEN, layout=layout)
        key = Key("conv", conv.FORWARD, case.name, case.dtype_name, layout)
        found += [
            Faster(key, peer=conv.MASK, least=2.0),
            Faster(key, PACKED, peer=conv.MASK, least=3.0),
            Faster(key, PACKED, peer=conv.PRUNED, least=1 / 1.1),
        ]
    for side in ("readers", "writers"):
        key = Key("scoring", "weight_importance", f"resnet50:{side}")
        found += [Faster(key, peer="torch.dot", least=WITHIN), Faster(key, peer="torch", least=1.3)]
    return [
        *found,
        _second_order(),
        _throughput_on_a_cpu(),
        Faster(Key("network", "taylor_fo", "resnet50"), peer="torch-pruning", least=15.0),
        Takes(Key("planner", "plan", "resnet101"), most_us=50e3),
        Takes(Key("graph", "trace", "resnet50"), most_us=1000e3),
        Takes(Key("graph", "trace", "densenet201"), most_us=3000e3),
    ]


def least_share(case: ActivationCase) -> float | None:
    """Of the copy rate, by the size of activation and gradient; ``None`` where launching counts more than moving."""
    size = 2 * prod(case.shape) * case.dtype.itemsize
    return 0.95 if size >= 128 * MEGABYTE else 0.85 if size >= 48 * MEGABYTE else None


def _channels() -> list[Promise]:
    """One pass over activation and gradient, in every layout and both 16-bit types."""
    shapes = gate_shapes(BATCH)
    cases = [ActivationCase(shape, torch.bfloat16, layout) for layout in ("channels_last", "nchw") for shape in shapes]
    cases += [ActivationCase((BATCH, width, 197), torch.bfloat16, "tokens") for width in VIT_B]
    cases += [
        ActivationCase((BATCH, *gate), torch.float16, layout)
        for layout in ("channels_last", "nchw")
        for gate in BY_SIZE
    ]
    cases.append(ActivationCase(WIDE, torch.bfloat16, "rows"))
    found: list[Promise] = []
    for case in cases:
        least = least_share(case)
        if least is None:
            continue
        key = Key("scoring", "channel_importance", case.name, case.dtype_name, case.layout)
        found.append(Bandwidth(key, timer="graph", least=least))
        if case.dtype == torch.bfloat16 and case.layout in ("channels_last", "tokens"):
            found.append(Faster(key, timer="graph", peer="torch.compile", least=1.0))
    return found


def _per_example() -> list[Promise]:
    cases = [ActivationCase((BATCH, *gate), torch.bfloat16, "channels_last") for gate in BY_SIZE]
    return [
        Faster(
            Key("scoring", "channel_importance:sample", case.name, case.dtype_name, case.layout),
            timer="graph",
            peer="nvlabs-style",
            least=5.5,
        )
        for case in cases
        if least_share(case)
    ]


def _weights() -> list[Promise]:
    found: list[Promise] = []
    for network, most in (("resnet50", 60.0), ("resnet101", 105.0)):
        for side in ("readers", "writers"):
            key = Key("scoring", "weight_importance", f"{network}:{side}")
            found.append(Takes(key, timer="graph", most_us=most))
            found.append(Faster(key, timer="eager", peer="torch", least=20.0))
    return found


def _steps() -> list[Promise]:
    key = Key("step", "training_step", step.ON_A_GPU, "bfloat16", "channels_last")
    return [
        Within(key, "ours:taylor_fo", peer="torch", most=1.005),
        Within(key, "ours:taylor_fg", peer="torch", most=1.02),
        Memory(key, "ours:taylor_fo", peer="torch", most_bytes=MEGABYTE),
    ]


def _throughput() -> Promise:
    """The pruning loop's images per second beside the plain loop's."""
    key = Key("throughput", throughput.TRAINING, throughput.ON_A_GPU, "bfloat16", "channels_last")
    return Faster(key, throughput.SCORED, peer=throughput.WHOLE, least=0.98)


def _throughput_on_a_cpu() -> Promise:
    key = Key("throughput", throughput.TRAINING, throughput.ON_A_CPU, "float32", "nchw")
    return Faster(key, throughput.SCORED, peer=throughput.WHOLE, least=0.9)


def _second_order() -> Promise:
    key = Key("curvature", curvature.OP, curvature.ON_A_CPU, "float32", "nchw")
    few, more = map(curvature.rows_of_hessian, curvature.ROWS)
    return WithinOurs(key, curvature.named("taylor_so"), peer=curvature.named("taylor_fo"), most=1.9, rows=(few, more))


def _relu() -> list[Promise]:
    cases = [ActivationCase(shape, torch.bfloat16, "channels_last") for shape in gate_shapes(BATCH)]
    return [
        Within(Key("relu", relu.OP, case.name, case.dtype_name, case.layout), timer="graph", peer=relu.ALONE, most=1.02)
        for case in cases
    ]


def _convolutions() -> list[Promise]:
    """ResNet-50's forward convolutions together, between packed tensors."""
    name = Key("conv", conv.FORWARD, AT_HALF, "bfloat16", "channels_last")
    counts = tuple(
        (Key("conv", conv.FORWARD, case.name, case.dtype_name, case.layout), count)
        for case, count in cases_of("resnet50", batch=BATCH).items()
    )
    wanted = ((conv.DENSE, 1.7), (conv.FILLED, 1 / 1.05), (conv.PRUNED, 1.3))
    return [FasterInSum(name, PACKED, "graph", peer=peer, least=least, counts=counts) for peer, least in wanted]


def _modes() -> list[Promise]:
    key = Key("modes", modes.OP, modes.ON_A_GPU, "bfloat16", "channels_last")
    return [Faster(key, modes.named("compact"), peer=modes.named("dense"), least=1.6)]
