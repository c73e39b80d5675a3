"""A training loop: epochs, evaluation, BatchNorm recalibration. What a step does is passed in; the recipe says when."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from taylor_cuda.errors import InputError, TaylorError
from taylor_cuda.train.data import Batch, Data
from taylor_cuda.train.state import Position

Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""``(images, labels) -> (loss, logits)``: one optimizer step, everything included. What comes back is detached."""


class Backward(Protocol):
    """Runs a backward pass; ``tc.Pruner`` and ``tc.Importance`` have one that takes scores on the way."""

    def backward(self, loss: Tensor, outputs: Any = None) -> None:
        """Leave the gradients of ``loss`` in the parameters."""


class Updates(Protocol):
    """Reads the gradients of a step before the optimizer uses them."""

    def update(self) -> None:
        """Called after the backward pass."""


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

    def quality(self) -> Quality:
        """The means over everything counted."""
        loss, right = (self._sums / max(1, self.examples)).tolist()
        return Quality(loss, right, self.examples)


def main_output(outputs: Any) -> Tensor:
    """The logits in what a model returns: itself, ``.logits``, ``["logits"]``, ``["out"]`` or the first of a tuple."""
    if isinstance(outputs, Tensor):
        return outputs
    logits = getattr(outputs, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    if isinstance(outputs, Mapping):
        for key in ("logits", "out"):
            if isinstance(outputs.get(key), Tensor):
                return outputs[key]  # type: ignore[no-any-return]
    if isinstance(outputs, (tuple, list)) and outputs and isinstance(outputs[0], Tensor):
        return outputs[0]
    raise InputError(
        f"model: wanted logits as output (a tensor, a tuple or a dict with 'logits'), got {type(outputs).__name__}"
    )


def plain_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    backward: Backward | None = None,
    watchers: Iterable[Updates] = (),
) -> Step:
    """One step of training on cross-entropy.

    Args:
        model: in train mode.
        optimizer: of the model's parameters.
        backward: runs the backward pass in place of ``loss.backward()``.
        watchers: read the gradients before the optimizer changes the parameters.
    """
    watchers = tuple(watchers)

    def step(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = main_output(model(images))
        loss = F.cross_entropy(logits, labels)
        if backward is None:
            loss.backward()
        else:
            backward.backward(loss, logits)
        for watcher in watchers:
            watcher.update()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach(), logits.detach()

    return step


def cosine(step: int, total: int) -> float:
    """From 1 at step 0 to 0 at ``total``, half a cosine. Source: Loshchilov and Hutter, "SGDR", ICLR 2017."""
    return 0.5 * (1 + math.cos(math.pi * min(step, total) / max(1, total)))


@dataclass
class Stage:
    """One stretch of training.

    Attributes:
        name: for the log and the progress bar.
        epochs: how many.
        steps: minibatches in one, at most ``data.steps_per_epoch``.
        first_epoch: number of its first epoch among all of the run's, which decides the order of the examples.
        rate: learning rate at a step of the stage.
        step: what is done with a minibatch.
        after_step: called after each step; raises ``KeyboardInterrupt`` to stop between two of them.
        after_epoch: called with a record for the log.
        done: ends the stage early.
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
        meter, started = Meter(device), time.perf_counter()
        batches = itertools.islice(
            data.train(stage.first_epoch + position.epoch, position.batch), stage.steps - position.batch
        )
        label = f"{stage.name} {position.epoch + 1}/{stage.epochs}"
        with tqdm(total=stage.steps, initial=position.batch, desc=label, leave=False, disable=not progress) as bar:
            for images, labels in batches:
                taken = position.epoch * stage.steps + position.batch
                rate = stage.rate(taken)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                images, labels = to_device((images, labels), device)
                meter.add(*stage.step(images, labels), labels)
                position.batch += 1
                bar.update()
                stage.after_step()
                if stage.done():
                    break
        quality = meter.quality()
        position.epoch, position.batch = position.epoch + 1, 0
        if not math.isfinite(quality.loss):
            raise TaylorError(
                f"{stage.name}: the training loss of epoch {position.epoch} is {quality.loss}; try a smaller --lr"
            )
        stage.after_epoch(
            {
                "event": "epoch",
                "stage": stage.name,
                "epoch": position.epoch,
                "loss": quality.loss,
                "accuracy": quality.accuracy,
                "lr": optimizer.param_groups[0]["lr"],
                "seconds": time.perf_counter() - started,
            }
        )


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Both tensors of a batch on ``device``; pinned ones are copied without waiting."""
    images, labels = batch
    return images.to(device, non_blocking=True), labels.to(device, non_blocking=True)


@contextmanager
def eval_mode(*models: nn.Module) -> Iterator[None]:
    """Eval mode for a while; train or eval mode of every single module is put back."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Batch], device: torch.device, limit: int | None = None) -> Quality:
    """Mean loss and accuracy in eval mode over at most ``limit`` batches.

    Raises:
        InputError: there is no batch.
    """
    meter = Meter(device)
    with eval_mode(model):
        for batch in itertools.islice(batches, limit):
            images, labels = to_device(batch, device)
            logits = main_output(model(images))
            meter.add(F.cross_entropy(logits, labels), logits, labels)
    if meter.examples == 0:
        raise InputError("evaluate: wanted at least one batch, got none")
    return meter.quality()


@torch.no_grad()
def recalibrate_batch_norm(model: nn.Module, batches: Iterable[Any], limit: int = 50) -> int:
    """Take the running statistics of every BatchNorm anew: the plain average over ``batches``.

    After channels are gone, and weights have moved fast, the moving averages lag behind. Everything but the BatchNorms
    runs in eval mode; train or eval mode and ``momentum`` of each module are put back. On an exception the old
    statistics are.

    Args:
        model: on the device of the batches, or the other way round.
        batches: tensors, tuples whose first entry is the model's input (labels may follow), or dicts of keyword
            arguments.
        limit: batches to use at most.

    Returns:
        The number of batches used; 0, and nothing is changed, where the model has no BatchNorm with running statistics.

    Raises:
        InputError: there is no batch.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.running_mean is not None]
    if not norms:
        return 0
    momenta = [norm.momentum for norm in norms]
    old = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers(recurse=False)]
    device = next(model.parameters()).device
    used = 0
    with eval_mode(model):
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum, norm.training = None, True
            for batch in itertools.islice(batches, limit):
                _call(model, batch, device)
                used += 1
            if used == 0:
                raise InputError("recalibrate_batch_norm: wanted at least one batch, got none")
        except BaseException:
            for buffer, value in old:
                buffer.copy_(value)
            raise
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
    return used


def _call(model: nn.Module, batch: Any, device: torch.device) -> None:
    if isinstance(batch, Mapping):
        model(**{key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()})
        return
    images = batch[0] if isinstance(batch, (tuple, list)) else batch
    model(images.to(device))
