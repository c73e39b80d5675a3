"""One optimizer step: autocast, accumulation, loss scaling, clipping, an average of the weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from taylor_cuda.errors import InputError
from taylor_cuda.train.objective import Mixing, Objective, main_output
from taylor_cuda.train.optimizers import shrink_filters

__all__ = ["Backward", "Precision", "TrainingStep", "Updates", "moving_average"]


class Backward(Protocol):
    """Runs a backward pass; ``tc.Pruner`` and ``tc.Importance`` have one that takes scores on the way."""

    def backward(self, loss: Tensor, outputs: Any = None, scaler: Any = None, accumulate: bool = False) -> None:
        """Leave the gradients of ``loss`` in the parameters."""


class Updates(Protocol):
    """Reads the gradients of a step before the optimizer uses them."""

    def update(self) -> None:
        """Called after the backward pass."""


class Precision:
    """What forward passes compute in.

    Args:
        amp: ``"off"``, ``"bf16"``, or ``"fp16"``, which has a ``GradScaler``.
        device: of the model.

    Attributes:
        scaler: the ``GradScaler``, or ``None``.
    """

    def __init__(self, amp: str, device: torch.device) -> None:
        self._device = device.type
        self._dtype = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
        self.scaler = torch.amp.GradScaler(device.type) if amp == "fp16" else None

    def autocast(self) -> AbstractContextManager[Any]:
        """For forward passes."""
        if self._dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self._device, self._dtype)


def moving_average(model: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of parameters and buffers; in the beginning, with less of the past.

    After t updates the past counts ``min(decay, (1 + t) / (10 + t))``, so that a short run doesn't end where it began.

    Args:
        model: copied.
        decay: in (0, 1).
    """

    @torch.no_grad()
    def update(averages: Any, currents: Any, _count: Any) -> None:
        if not averages[0].is_floating_point():
            torch._foreach_copy_(averages, currents)
            return
        count = int(averaged.n_averaged)  # of the host, where the one that is passed may be the device's
        torch._foreach_lerp_(averages, currents, 1 - min(decay, (1 + count) / (10 + count)))

    averaged = AveragedModel(model, multi_avg_fn=update, use_buffers=True)
    return averaged


class TrainingStep:
    """Trains a network on minibatches, each of which may come in several parts.

    Args:
        model: in train mode; ``DistributedDataParallel`` averages over ranks with the last part of a minibatch.
        optimizer: of its parameters.
        backward: runs the backward passes in place of ``loss.backward()``.
        watchers: read the gradients before anything changes them; not with a ``GradScaler``.
        objective: see ``Objective``; cross-entropy where it is left out.
        precision: see ``Precision``.
        micro: parts of a minibatch.
        mixing: mixes the images of a part.
        clip: greatest norm of the gradients.
        average: follows the weights after each step.
        group_lasso: see ``shrink_filters``.
        channels_last: memory format of the images.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        backward: Backward | None = None,
        watchers: Iterable[Updates] = (),
        *,
        objective: Objective | None = None,
        precision: Precision | None = None,
        micro: int = 1,
        mixing: Mixing | None = None,
        clip: float | None = None,
        average: AveragedModel | None = None,
        group_lasso: float = 0.0,
        channels_last: bool = False,
    ) -> None:
        self._model, self._optimizer, self._backward = model, optimizer, backward
        self._watchers = tuple(watchers)
        self._objective = objective or Objective()
        self._precision = precision or Precision("off", torch.device("cpu"))
        if self._watchers and self._precision.scaler is not None:
            raise InputError("watchers: wanted none with a GradScaler, whose factor they would read as gradient")
        self._mixing, self._clip, self._average, self._group_lasso = mixing, clip, average, group_lasso
        self._channels_last = channels_last
        self.micro = micro
        self._part = 0

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Train on one part of a minibatch; with its last one, the optimizer takes a step.

        Args:
            images: ``[N, C, H, W]``; as many in each part, and on each rank.
            labels: int64 ``[N]``.

        Returns:
            The mean loss of the part and its logits, detached.
        """
        last = self._part + 1 == self.micro
        targets = labels
        if self._channels_last and images.dim() == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        if self._mixing is not None:
            images, targets = self._mixing(images, labels)
        with self._communicating(last):
            with self._precision.autocast():
                logits = main_output(self._model(images))
                loss = self._objective(logits, targets, images)
            self._go_back(loss / self.micro if self.micro > 1 else loss, logits, last)
        self._part = 0 if last else self._part + 1
        if last:
            self._finish()
        return loss.detach(), logits.detach()

    def _communicating(self, last: bool) -> AbstractContextManager[Any]:
        if last or not isinstance(self._model, DistributedDataParallel):
            return contextlib.nullcontext()
        return self._model.no_sync()

    def _go_back(self, loss: Tensor, logits: Tensor, last: bool) -> None:
        scaler = self._precision.scaler
        if self._backward is not None:
            self._backward.backward(loss, logits, scaler=scaler, accumulate=not last)
        else:
            (loss if scaler is None else scaler.scale(loss)).backward()

    def _finish(self) -> None:
        scaler, parameters = self._precision.scaler, self._model.parameters
        for watcher in self._watchers:
            watcher.update()
        if self._clip is not None:
            if scaler is not None:
                scaler.unscale_(self._optimizer)
            nn.utils.clip_grad_norm_(parameters(), self._clip)
        if self._group_lasso:
            shrink_filters((weight for weight in parameters() if weight.dim() == 4), self._group_lasso)
        if scaler is None:
            self._optimizer.step()
        else:
            scaler.step(self._optimizer)
            scaler.update()
        self._optimizer.zero_grad()
        if self._average is not None:
            self._average.update_parameters(_module_of(self._model))


def _module_of(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model
