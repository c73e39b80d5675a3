"""What a run is asked to do."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from taylor_cuda.errors import InputError

AMP = ("off", "bf16", "fp16")
LR_SCHEDULES = ("cosine", "step", "constant")
NOT_OF_THE_RESULT = {
    *("out", "device", "workers", "measure_seconds", "checkpoint_every", "checkpoints", "tensorboard"),
    *("batch", "global_batch"),  # how a minibatch is divided is free; its size is the session's to compare
}
"""Settings with which a run may go on under other values than it began with."""


@dataclass(frozen=True)
class RunConfig:
    """One pruning run; the defaults are those of the job on digits.

    A minibatch is what one optimizer step takes: ``global_batch`` examples, over all ranks and micro-batches.

    Attributes:
        model: see ``taylor_cuda.train.models.load_model``.
        data: see ``taylor_cuda.train.data.load_data``.
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
        momentum: of the scores, see ``tc.Importance``.
        shared_norm: see ``tc.Importance``.
        epochs: of base training.
        finetune_epochs: after pruning; ``None``: as many as ``epochs``.
        total_epochs: of pruning and fine-tuning together, under one schedule of the learning rate; the epoch in which
            pruning ends is finished in fine-tuning. ``None``: fine-tuning begins a new epoch and a new schedule.
        batch: examples in one forward pass of one rank; ``None``: 64, or what ``global_batch`` leaves to each rank.
        global_batch: examples in a minibatch; ``None``: ``batch`` times the ranks. More than that: gradients of
            several passes are accumulated.
        optimizer: ``"sgd"`` (momentum 0.9), ``"adamw"``, or the name of one of timm's.
        lr: peak learning rate of base training.
        finetune_lr: while pruning, and peak of fine-tuning; ``None``: a fifth of ``lr`` after base training, ``lr``
            itself with weights.
        lr_per: examples in a minibatch that the learning rates are meant for: they are multiplied by
            ``global_batch / lr_per``. ``None``: taken as they are. Source: Goyal et al., "Accurate, Large Minibatch
            SGD", 2017, section 2.1.
        lr_schedule: ``"cosine"`` to 0, ``"step"``, ``"constant"``.
        lr_step_epochs: epochs between the steps of ``"step"``.
        lr_step_factor: what each of them multiplies the rate by.
        warmup_epochs: over which the rate rises linearly at the run's beginning.
        weight_decay: of every stage.
        label_smoothing: of the cross-entropy.
        mixup: both parameters of the Beta distribution that images are mixed by; 0: they aren't.
        cutmix: the same for patches; with both, each minibatch takes one of the two.
        distill: weight, in [0, 1], of the divergence from the unpruned network's predictions, while pruning and
            fine-tuning; the labels' loss has the rest.
        distill_temperature: of both predictions.
        ema: decay of a moving average of the weights from the first prune step on, which is then what is evaluated and
            saved; 0: there is none.
        clip: greatest norm of the gradients; ``None``: any.
        group_lasso: what is taken from the norm of each convolution filter before every step.
        reset_optimizer: forget momentum when pruning ends, as the paper's code does.
        amp: ``"off"``, ``"bf16"``, or ``"fp16"`` with a ``GradScaler``.
        channels_last: memory format of model and images.
        compile: ``torch.compile`` the network; it is compiled anew when widths change.
        sync_batch_norm: statistics of BatchNorm over all ranks; on GPUs.
        recalibrate: minibatches whose plain average becomes BatchNorm's statistics before every evaluation of a
            network that was trained here; 0: the moving averages stay.
        eval_every: epochs between evaluations within a stage; 0: at the end of stages only.
        checkpoint_every: minibatches between checkpoints; ``None``: one at the end of each epoch.
        checkpoints: how many are kept.
        tensorboard: write the log for TensorBoard too.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"``, …
        seed: of initialisation, the order of examples, and random criteria.
        image_size: height and width of images from folders.
        workers: processes that read image files, for each rank.
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
    momentum: float = 0.9
    shared_norm: str = "none"
    epochs: int = 12
    finetune_epochs: int | None = None
    total_epochs: int | None = None
    batch: int | None = None
    global_batch: int | None = None
    optimizer: str = "sgd"
    lr: float = 0.05
    finetune_lr: float | None = None
    lr_per: int | None = None
    lr_schedule: str = "cosine"
    lr_step_epochs: int = 10
    lr_step_factor: float = 0.1
    warmup_epochs: float = 0.0
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    distill: float = 0.0
    distill_temperature: float = 1.0
    ema: float = 0.0
    clip: float | None = None
    group_lasso: float = 0.0
    reset_optimizer: bool = False
    amp: str = "off"
    channels_last: bool = False
    compile: bool = False
    sync_batch_norm: bool = False
    recalibrate: int = 50
    eval_every: int = 0
    checkpoint_every: int | None = None
    checkpoints: int = 3
    tensorboard: bool = False
    device: str = "auto"
    seed: int = 0
    image_size: int = 224
    workers: int = 2
    steps_limit: int | None = None
    measure_seconds: float = 5.0
    oracle: int = 6

    def __post_init__(self) -> None:
        for names, least in (
            (("epochs", "workers", "seed", "oracle", "recalibrate", "eval_every", "finetune_epochs"), 0),
            (("every", "steps", "min_keep", "image_size", "steps_limit", "num_classes", "total_epochs"), 1),
            (("lr_per", "lr_step_epochs", "checkpoint_every", "checkpoints", "batch"), 1),
            (("global_batch",), 2),
        ):
            for name in names:
                value = getattr(self, name)
                if value is not None and value < least:
                    raise InputError(f"{name}: wanted a number of at least {least}, got {value}")
        for name in ("lr", "finetune_lr", "lr_step_factor", "clip", "distill_temperature"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise InputError(f"{name}: wanted a number above 0, got {value}")
        for name in ("weight_decay", "warmup_epochs", "mixup", "cutmix", "group_lasso"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"{name}: wanted a number of at least 0, got {getattr(self, name)}")
        for name in ("label_smoothing", "ema", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name}: wanted a number in [0, 1), got {getattr(self, name)}")
        if not 0 <= self.distill <= 1:
            raise InputError(f"distill: wanted a number in [0, 1], got {self.distill}")
        for name, choices in (("amp", AMP), ("lr_schedule", LR_SCHEDULES)):
            if getattr(self, name) not in choices:
                raise InputError(f"{name}: wanted one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if self.total_epochs is not None and self.finetune_epochs is not None:
            raise InputError("total_epochs: wanted it or finetune_epochs, got both")

    @property
    def base_epochs(self) -> int:
        """Epochs of base training: none where weights were given."""
        return self.epochs if self.weights is None else 0

    @property
    def epochs_after(self) -> int:
        """Epochs of fine-tuning; with ``total_epochs``, of pruning too."""
        if self.total_epochs is not None:
            return self.total_epochs
        return self.epochs if self.finetune_epochs is None else self.finetune_epochs

    @property
    def rate_after(self) -> float:
        """Learning rate of pruning and fine-tuning."""
        if self.finetune_lr is not None:
            return self.finetune_lr
        return self.lr if self.weights is not None else self.lr / 5

    def rounded_to(self, device: torch.device) -> int | str:
        """``round_to`` for ``tc.plan``, which can't see that parameters in fp32 will be computed with in 16 bits."""
        return 8 if self.round_to == "auto" and self.amp != "off" and device.type == "cuda" else self.round_to

    def split(self, ranks: int) -> tuple[int, int]:
        """How a minibatch is divided over ranks.

        Returns:
            Its examples, and the passes that each rank makes through its part of them.

        Raises:
            InputError: it can't be divided so.
        """
        if self.global_batch is None:
            whole, micro = (self.batch or 64) * ranks, 1
        else:
            whole = self.global_batch
            micro = 1 if self.batch is None else max(1, whole // (self.batch * ranks))
        if whole % (ranks * micro) or (self.batch is not None and whole != self.batch * ranks * micro):
            each = "" if self.batch is None else f" of {self.batch}"
            raise InputError(f"global_batch: wanted a multiple of {ranks} ranks{each}, got {whole}")
        part = whole // (ranks * micro)
        if part < 2:
            raise InputError(f"batch: wanted passes over at least 2 examples, got {part}")
        return whole, micro

    def identity(self) -> dict[str, Any]:
        """Everything that decides the result, as plain values: a state belongs to this run only if these are equal."""
        values = {key: value for key, value in dataclasses.asdict(self).items() if key not in NOT_OF_THE_RESULT}
        return {**values, "budget": dict(self.budget), "ignore": list(self.ignore)}
