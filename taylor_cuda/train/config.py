"""What a run is asked to do, and what it found out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from taylor_cuda.errors import InputError


@dataclass(frozen=True)
class RunConfig:
    """One pruning run; the defaults are those of the job on digits.

    Attributes:
        model: see ``taylor_cuda.train.models.load_model``.
        data: ``"digits"`` or a folder with ``train/CLASS/*`` and ``val/CLASS/*``.
        out: folder for everything the run writes.
        weights: see ``load_model``; with weights there is no base training.
        num_classes: see ``load_model``.
        budget: fractions of the original model, as for ``tc.plan``.
        criterion: see ``tc.Importance``.
        schedule: see ``tc.Pruner``.
        mode: see ``tc.Pruner``; what it has left out is cut at the end of fine-tuning.
        every: minibatches between prune steps.
        steps: prune steps.
        ignore: globs of module names whose outputs stay.
        round_to: see ``tc.plan``. 8 on digits, because a CPU's convolutions take channels in blocks of 8 or 16.
        min_keep: see ``tc.plan``.
        epochs: of base training.
        finetune_epochs: after pruning; ``None``: as many as ``epochs``.
        batch: examples in a minibatch.
        lr: peak learning rate of base training.
        finetune_lr: while pruning, and peak of fine-tuning; ``None``: a fifth of ``lr`` after base training, ``lr``
            itself with weights.
        weight_decay: of every stage.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"``, …
        seed: of initialisation, the order of examples, and random criteria.
        image_size: height and width of images from folders.
        workers: processes that read image files.
        steps_limit: at most so many minibatches an epoch, for a trial run.
        measure_seconds: time to spend on each measurement of time.
        oracle: minibatches of training images on which the scores of the trained network are compared with what
            removing each unit does to the loss; 0: they aren't. Costs forward passes for every unit.
    """

    model: str = "digits"
    data: str = "digits"
    out: Path = Path("runs/digits")
    weights: str | None = None
    num_classes: int | None = None
    budget: Mapping[str, float] = field(default_factory=lambda: {"macs": 0.5})
    criterion: str = "taylor_fo"
    schedule: str = "cubic"
    mode: str = "cut"
    every: int = 10
    steps: int = 10
    ignore: tuple[str, ...] = ()
    round_to: int | str = 8
    min_keep: int = 1
    epochs: int = 12
    finetune_epochs: int | None = None
    batch: int = 64
    lr: float = 0.05
    finetune_lr: float | None = None
    weight_decay: float = 5e-4
    device: str = "auto"
    seed: int = 0
    image_size: int = 224
    workers: int = 2
    steps_limit: int | None = None
    measure_seconds: float = 5.0
    oracle: int = 6

    def __post_init__(self) -> None:
        whole = {
            "every": 1,
            "steps": 1,
            "epochs": 0,
            "batch": 2,
            "min_keep": 1,
            "image_size": 1,
            "workers": 0,
            "seed": 0,
            "oracle": 0,
        }
        for name, least in whole.items():
            _check_at_least(name, getattr(self, name), least)
        for name, least in {"finetune_epochs": 0, "steps_limit": 1, "num_classes": 1}.items():
            if getattr(self, name) is not None:
                _check_at_least(name, getattr(self, name), least)
        for name in ("lr", "finetune_lr"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise InputError(f"{name}: wanted a number above 0, got {value}")
        if not 0 <= self.weight_decay < float("inf"):
            raise InputError(f"weight_decay: wanted a number of at least 0, got {self.weight_decay}")

    @property
    def base_epochs(self) -> int:
        """Epochs of base training: none where weights were given."""
        return self.epochs if self.weights is None else 0

    @property
    def epochs_after(self) -> int:
        """Epochs of fine-tuning."""
        return self.epochs if self.finetune_epochs is None else self.finetune_epochs

    @property
    def rate_after(self) -> float:
        """Learning rate of pruning and fine-tuning."""
        if self.finetune_lr is not None:
            return self.finetune_lr
        return self.lr if self.weights is not None else self.lr / 5

    def identity(self) -> dict[str, Any]:
        """Everything that decides the result, as plain values: a state belongs to this run only if these are equal."""
        free = {"out", "device", "workers", "measure_seconds"}
        values = {key: value for key, value in dataclasses.asdict(self).items() if key not in free}
        return {**values, "budget": dict(self.budget), "ignore": list(self.ignore)}


def _check_at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise InputError(f"{name}: wanted a number of at least {least}, got {value}")


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
    seconds: float
    config: dict[str, Any]
    environment: dict[str, Any]
