"""What a run found out."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Measured:
    """What the run has found out so far; plain values. See ``Summary``."""

    base_accuracy: float = math.nan
    cut_accuracy: float = math.nan
    cut_difference: float = 0.0
    cut_scale: float = 0.0
    cuts: int = 0
    sources_compared: bool = False
    source_difference: float | None = None
    source_note: str | None = None
    estimate_spearman: float | None = None
    magnitude_spearman: float | None = None
    oracle_examples: int = 0
    oracle_note: str | None = None
    unreadable: dict[str, str] = field(default_factory=dict)
    scoring_percent: float = math.nan
    step_ms: float = math.nan
    pruned_step_ms: float = math.nan
    seconds: float = 0.0


@dataclass(frozen=True)
class Summary:
    """What a run found out.

    Latencies are medians in milliseconds, measured in turns; ``None`` where memory did not suffice.

    Attributes:
        base_accuracy: on the validation set, before pruning.
        cut_accuracy: right after pruning, before fine-tuning.
        pruned_accuracy: at the end.
        latency_ms_before: at batch 256.
        latency_ms_after: at batch 256.
        widths: per layer, outputs before and after.
        cut_difference: greatest absolute difference of an output between the cut and the masked model, over all cuts.
        cut_scale: the greatest absolute output in that comparison.
        source_difference: greatest relative difference of a score of the first window, from parameters against from
            activations.
        source_note: why there is none.
        estimate_spearman: rank correlation, over all units of the trained, unpruned network, of the criterion's scores
            with the squared change of the loss that removing each unit makes (``tc.compare``).
        magnitude_spearman: the same of the filters' magnitudes.
        oracle_examples: training images that the two were measured on; 0: they weren't.
        oracle_note: why there is no correlation.
        scoring_percent: what taking scores adds to a training step.
        step_ms: a training step without it, of the network as it was.
        pruned_step_ms: a training step after pruning, in the mode of the run.
        unreadable: image files that could not be read.
    """

    model: str
    data: str
    criterion: str
    budget: dict[str, float]
    seed: int
    base_accuracy: float
    cut_accuracy: float
    pruned_accuracy: float
    macs_before: int
    macs_after: int
    params_before: int
    params_after: int
    channels_before: int
    channels_after: int
    latency_ms_before: float | None
    latency_ms_after: float | None
    latency_ms_batch1_before: float | None
    latency_ms_batch1_after: float | None
    widths: dict[str, tuple[int, int]]
    cut_difference: float
    cut_scale: float
    cuts: int
    source_difference: float | None
    source_note: str | None
    estimate_spearman: float | None
    magnitude_spearman: float | None
    oracle_examples: int
    oracle_note: str | None
    scoring_percent: float
    step_ms: float
    pruned_step_ms: float
    unreadable: int
    seconds: float
    config: dict[str, Any]
    environment: dict[str, Any]
