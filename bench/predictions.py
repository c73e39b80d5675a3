"""What the byte model predicts for an H200: written down before the first run there, to stand beside what it measures.

Model: a pass takes its least bytes at 4,300 GB/s, the copy rate known of that GPU, over the share of it that is
promised for its size, or 4 microseconds more than that rate allows for the smallest. Nothing here was measured.
"""

from __future__ import annotations

from taylor_cuda.bench import predicted_conv
from taylor_cuda.bench.race import PACKED
from taylor_cuda.bench.rows import Row

GATES = {
    "256x256x56x56": 201.0,
    "256x512x28x28": 101.0,
    "256x128x56x56": 101.0,
    "256x64x56x56": 50.0,
    "256x256x28x28": 50.0,
    "256x1024x14x14": 50.0,
    "256x128x28x28": 28.0,
    "256x512x14x14": 28.0,
    "256x2048x7x7": 28.0,
    "256x256x14x14": 14.0,
    "256x512x7x7": 10.0,
}
"""One pass over activation and gradient in 16 bits."""

TOKENS = {"256x768x197": 38.0, "256x3072x197": 152.0}
"""The same, of ViT-B."""

RELU = {
    "256x256x56x56": 312.0,
    "256x512x28x28": 156.0,
    "256x128x56x56": 156.0,
    "256x64x56x56": 78.0,
    "256x256x28x28": 78.0,
    "256x1024x14x14": 79.0,
    "256x128x28x28": 39.0,
    "256x512x14x14": 39.0,
    "256x2048x7x7": 40.0,
    "256x256x14x14": 20.0,
    "256x512x7x7": 10.0,
}
"""Output and gradient in, gradient out, at 92 % of the copy rate."""

WEIGHTS = {"resnet50": 59.0, "resnet101": 103.0}
"""All weights and float32 gradients of a network in one launch, at 80 % of the copy rate."""

RANK = {"resnet50": 12.0, "resnet101": 13.0, "64Ki": 15.0}
"""The mask of the largest scores: one block, a few passes over a second-level cache."""

MICROSECONDS: dict[str, dict[str, float]] = {
    "channel_importance": GATES | TOKENS,
    "channel_importance:sample": GATES,
    "channel_sums": GATES,
    "score_relu_backward": RELU,
    "weight_importance": {f"{name}:{side}": us for name, us in WEIGHTS.items() for side in ("readers", "writers")},
    "keep_mask": RANK,
}

STEP_US = 45_000.0
"""A plain eager step of ResNet-50 at batch 256: 30,200 by bytes and FLOPs, at two thirds of both ceilings."""

SCORING_US = {"ours:taylor_fo": 60.0, "ours:taylor_weight": 60.0, "ours:magnitude": 60.0, "ours:taylor_fg": 600.0}
"""What scoring adds to it: a pass over the parameters; or sums that ride on the backward passes of 49 ReLUs, 2 % of
those, and some ten small kernels for each of 37 groups. By passes of its own over activations it would be 2,300."""

ROOFLINE = 30_000.0 / 14_700.0
"""A step of all channels by bytes and FLOPs, over one that keeps half of every group: 2.04 times faster at best."""

GATHER_US, SCATTER_US = predicted_conv.gather_us("resnet50")

CUT_US = STEP_US / ROOFLINE
MODES_US = {
    "ours:cut": CUT_US,
    "ours:compact": CUT_US + GATHER_US + SCATTER_US - predicted_conv.dense_cast_us("resnet50"),
}
"""The same step at one half. Compact: kept weights are gathered and cast in one, which spares it the cast of autocast,
and their gradients are scattered."""

MEASURED_STEP_US = 55_400.0
"""The plain step in the rows of such a GPU, from which what follows was reckoned before any of it was measured."""

DEEPER = 1.57
"""A step of ResNet-101 over one of ResNet-50: 1.91 times the 15.8 ms of its convolutions (by MACs), 1.46 times the
rest (by elements of all activations)."""

FORWARD_US = 15_600.0
"""ResNet-50's forward pass in eval mode: a third of the convolutions' time, 2 of the 8 passes that batch normalisation
makes in a step, 2 of a ReLU's 5, half of the additions."""

HALF_THE_MACS = 0.77
"""Of the time, at half of the MACs: every width times √½, on the line between the whole step and the 32.9 ms measured
with half of every width."""

# At batch 1 time goes by launches: 175 kernels at 3 us each in a graph, at 10 us from Python; twice that in ResNet-101.
LAUNCHES_US = {"graph": 525.0, "eager": 1_750.0}

TRAINING_US = {
    f"{network} batch 256 at 224": {
        "ours:taylor_fo": MEASURED_STEP_US * deeper + 60.0,
        "ours:cut": MEASURED_STEP_US * deeper * HALF_THE_MACS,
    }
    for network, deeper in (("resnet50", 1.0), ("resnet101", DEEPER))
}


def inference_us(case: str, timer: str) -> float | None:
    """A forward pass of the network cut to half of its MACs."""
    network, _, batch, *_ = case.split()
    if network not in ("resnet50", "resnet101") or not batch.isdecimal():
        return None
    deeper, launches = (1.0, 1.0) if network == "resnet50" else (DEEPER, 2.0)
    return max(FORWARD_US * deeper * HALF_THE_MACS * int(batch) / 256, LAUNCHES_US[timer] * launches)


AT_HALF = "resnet50 keep 50%"
GATHER = {"gather_kept": GATHER_US, "scatter_kept": SCATTER_US}


def _convolutions(*, packed: bool) -> dict[str, float]:
    """Of ResNet-50 at one half, each and all together."""
    one_by_one = predicted_conv.packed_us if packed else predicted_conv.unpacked_us
    found = {case.name: one_by_one(case) for case in predicted_conv.cases_of("resnet50")}
    return found | {AT_HALF: predicted_conv.sum_us("resnet50", packed=packed)}


PACKED_CONV, UNPACKED_CONV = _convolutions(packed=True), _convolutions(packed=False)
"""Forward. What the packed op gathers at each call is one more kernel in each of 53 convolutions: together 6 % more
than an aligned pruned network takes. A compacted network gathers once a step instead."""


def predicted_us(row: Row) -> float | None:
    """The median that was predicted for one of our rows in 16 bits, or over a network's parameters, on a GPU."""
    if row["device"] != "cuda":
        return None
    if row["op"] == "training_step":
        added = SCORING_US.get(row["provider"])
        return None if added is None else STEP_US + added
    if row["op"] == "training":
        return TRAINING_US.get(row["case"], {}).get(row["provider"])
    if row["op"] == "inference":
        return inference_us(row["case"], row["timer"]) if row["provider"] == "ours:cut" else None
    if row["op"] == "training_step:50%":
        return MODES_US.get(row["provider"]) if row["case"] == "resnet50 batch 256 at 224" else None
    if row["op"] == "masked_conv2d_forward":
        table = PACKED_CONV if row["provider"].endswith(PACKED) else UNPACKED_CONV
        return table.get(row["case"]) if row["dtype"] == "bfloat16" else None
    if row["op"] in GATHER and row["case"] == AT_HALF:
        return GATHER[row["op"]]
    fits = row["dtype"] == "float32" if row["op"] in ("weight_importance", "keep_mask") else row["dtype"] != "float32"
    return MICROSECONDS.get(row["op"], {}).get(row["case"]) if fits else None


def beside(row: Row) -> str:
    """`` (floor of this run 47.8 us, predicted 50 us, measured 49.1 us)``: what bytes allow, and what was expected.

    Empty on a CPU, where promises have been measured.
    """
    if row["device"] != "cuda":
        return ""
    facts = []
    if row["bytes"]:
        facts.append(f"floor of this run {row['bytes'] / row['ceiling_gb_per_s'] * 1e-3:.3g} us")
    if (expected := predicted_us(row)) is not None:
        facts.append(f"predicted {expected:.5g} us, measured {row['median_us']:.5g} us")
    return f" ({', '.join(facts)})" if facts else ""
