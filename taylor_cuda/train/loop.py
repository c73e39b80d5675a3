"""A training loop: epochs and evaluation. What a step does is passed in; the run says when."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from taylor_cuda.distributed import total
from taylor_cuda.errors import InputError, TaylorError
from taylor_cuda.train.data import Batch, Data
from taylor_cuda.train.modes import eval_mode
from taylor_cuda.train.objective import main_output
from taylor_cuda.train.state import Position
from taylor_cuda.train.waits import Waits


class Step(Protocol):
    """What is done with a part of a minibatch; ``TrainingStep`` trains on it.

    Attributes:
        micro: parts that a minibatch has.
    """

    micro: int

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """``(images, labels) -> (mean loss, logits)``, detached."""


@dataclass(frozen=True)
class Quality:
    """How well a model does on a set of examples: mean cross-entropy, share of right answers, how many."""

    loss: float
    accuracy: float
    examples: int


class Meter:
    """Sums loss and right answers on the device; reading them is what synchronises."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(2, dtype=torch.float64 if device.type != "mps" else torch.float32, device=device)
        self.examples = 0

    @torch.no_grad()
    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Count one batch; ``loss`` is its mean."""
        right = (logits.argmax(1) == labels).sum()
        self._sums += torch.stack((loss.detach() * len(labels), right)).to(self._sums)
        self.examples += len(labels)

    def quality(self, group: Any = None) -> Quality:
        """The means over everything that all ranks of a group counted."""
        sums = torch.cat([self._sums, self._sums.new_tensor([self.examples])])
        loss, right, examples = total(sums, group).tolist()
        return Quality(loss / max(1, examples), right / max(1, examples), int(examples))


@dataclass
class Stage:
    """One stretch of training.

    Attributes:
        name: for the log and the progress bar.
        epochs: how many.
        steps: minibatches in one, at most ``data.steps_per_epoch``.
        first_epoch: number of its first epoch among all of the run's, which decides the order of the examples.
        rate: learning rate at a step of the stage.
        step: what is done with each part of a minibatch.
        after_step: called after each minibatch; raises ``KeyboardInterrupt`` to stop between two of them.
        after_epoch: called with a record for the log.
        done: ends the stage early, between two minibatches.
        group: the ranks that train together.
    """

    name: str
    epochs: int
    steps: int
    first_epoch: int
    rate: Callable[[int], float]
    step: Step
    after_step: Callable[[], None] = lambda: None
    after_epoch: Callable[[dict[str, Any]], None] = lambda _: None
    done: Callable[[], bool] = lambda: False
    group: Any = None


def train_stage(
    stage: Stage,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Data,
    position: Position,
    device: torch.device,
    progress: bool = False,
) -> None:
    """Train from ``position`` (moved along, so that it is right whenever an exception leaves) to the end of the stage.

    Raises:
        TaylorError: the loss is no longer finite.
    """
    while position.epoch < stage.epochs and not stage.done():
        model.train()
        meter, waits, started, first = Meter(device), Waits(), time.perf_counter(), position.batch
        parts = itertools.islice(
            data.train(stage.first_epoch + position.epoch, first), (stage.steps - first) * stage.step.micro
        )
        label, number = f"{stage.name} {position.epoch + 1}/{stage.epochs}", position.epoch + 1
        with tqdm(total=stage.steps, initial=first, desc=label, leave=False, disable=not progress) as bar:
            for part, batch in enumerate(waits.timed(parts), 1):
                _set_rate(optimizer, stage.rate(position.epoch * stage.steps + position.batch))
                images, labels = to_device(batch, device)
                meter.add(*stage.step(images, labels), labels)
                if part % stage.step.micro:
                    continue
                position.batch += 1
                bar.update()
                if progress:
                    bar.set_postfix_str(f"waits for data {waits.share(time.perf_counter() - started):.0%}", False)
                stage.after_step()
                if stage.done():
                    break
        quality = meter.quality(stage.group)
        seen = quality.examples > 0  # nothing where a run goes on from an epoch's last minibatch
        seconds = time.perf_counter() - started
        if position.batch >= stage.steps or not stage.done():
            position.epoch, position.batch = number, 0
        if not math.isfinite(quality.loss):
            raise TaylorError(
                f"{stage.name}: the training loss of epoch {number} is {quality.loss}; try a smaller --lr"
            )
        stage.after_epoch(
            {
                "event": "epoch",
                "stage": stage.name,
                "epoch": number,
                "loss": quality.loss if seen else None,
                "accuracy": quality.accuracy if seen else None,
                "lr": optimizer.param_groups[0]["lr"],
                "seconds": seconds,
                "images_per_s": quality.examples / seconds,
                "data_wait": waits.share(seconds),
            }
        )


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)  # timm's layers may have a share of it


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Both tensors of a batch on ``device``; pinned ones are copied without waiting."""
    images, labels = batch
    return images.to(device, non_blocking=True), labels.to(device, non_blocking=True)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    device: torch.device,
    limit: int | None = None,
    group: Any = None,
) -> Quality:
    """Mean loss and accuracy in eval mode over at most ``limit`` batches of each rank of a group.

    Raises:
        InputError: there is no batch.
    """
    meter = Meter(device)
    with eval_mode(model):
        for batch in itertools.islice(batches, limit):
            images, labels = to_device(batch, device)
            logits = main_output(model(images))
            meter.add(F.cross_entropy(logits, labels), logits, labels)
    quality = meter.quality(group)
    if quality.examples == 0:
        raise InputError("evaluate: wanted at least one batch, got none")
    return quality
