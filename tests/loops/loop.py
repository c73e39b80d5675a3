"""A small network that can be built at any widths, and a training loop made of the parts that people use."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

import taylor_cuda as tc
from taylor_cuda.graph.groups import ChannelGroup
from tests.surgery.state import all_tensors, kept_positions, pick

WIDTHS = (8, 12, 10)
EXAMPLE = torch.zeros(2, 3, 6, 6)
Batch = tuple[Tensor, Tensor]


class Net(nn.Module):
    """A stem, one residual block and a head on ``widths`` channels; 2,500 parameters."""

    def __init__(self, stream: int = WIDTHS[0], inner: int = WIDTHS[1], last: int = WIDTHS[2]) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, stream, 3, padding=1, bias=False), nn.BatchNorm2d(stream)
        self.conv1, self.bn1 = nn.Conv2d(stream, inner, 3, padding=1, bias=False), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = nn.Conv2d(inner, stream, 1), nn.BatchNorm2d(stream)
        self.conv3 = nn.Conv2d(stream, last, 3, stride=2)
        self.head = nn.Linear(last, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn0(self.stem(x)))
        x = F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return self.head(F.relu(self.conv3(x)).mean((2, 3)))

    def widths(self) -> list[int]:
        return [self.stem.out_channels, self.conv1.out_channels, self.conv3.out_channels]


def batches(count: int, seed: int = 0, size: int = 8) -> list[Batch]:
    """Four classes, told apart by the brightness of a colour."""
    generator = torch.Generator().manual_seed(seed)
    data = []
    for _ in range(count):
        target = torch.randint(0, 4, (size,), generator=generator)
        x = torch.randn(size, 3, 6, 6, generator=generator)
        x[torch.arange(size), target % 3] += target.view(-1, 1, 1)
        data.append((x, target))
    return data


class DictAverage:
    """An EMA as people write it by hand."""

    def __init__(self, model: nn.Module) -> None:
        self.values = {name: p.detach().clone() for name, p in model.named_parameters()}

    def update(self, model: nn.Module) -> None:
        for name, p in model.named_parameters():
            self.values[name].mul_(0.9).add_(p.detach(), alpha=0.1)


@dataclass(frozen=True)
class Parts:
    """What a training loop is made of.

    Attributes:
        optimizer: makes it from parameters.
        micro: micro-batches an optimizer step.
        scaler: makes a ``GradScaler``.
        autocast: dtype of ``torch.autocast``.
        clip: greatest norm of the gradients.
        update: the loop calls ``loss.backward()`` and ``pruner.update()`` itself, ``"before"`` or ``"after"``
            ``scaler.unscale_``.
        ema: makes an average of a model.
        schedule: makes a learning rate schedule.
        compile: backend of ``torch.compile``.
        source: see ``tc.Pruner``.
        criterion: see ``tc.Pruner``.
    """

    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] = lambda p: SGD(p, lr=0.05, momentum=0.9)
    micro: int = 1
    scaler: Callable[[], Any] | None = None
    autocast: torch.dtype | None = None
    clip: float | None = None
    update: str = ""
    ema: Callable[[nn.Module], Any] | None = None
    schedule: Callable[[Optimizer], Any] | None = None
    compile: str = ""
    source: Any = "auto"
    criterion: str = "taylor_fo"


class Loop:
    """A model in training."""

    def __init__(self, parts: Parts, model: nn.Module) -> None:
        self.parts, self.model = parts, model
        self.optimizer = parts.optimizer(model.parameters())
        self.scaler = parts.scaler() if parts.scaler else None
        self.average = parts.ema(model) if parts.ema else None
        self.schedule = parts.schedule(self.optimizer) if parts.schedule else None
        self.called = torch.compile(model, backend=parts.compile) if parts.compile else model
        self.overflows = 0

    @property
    def ema(self) -> Any:
        """The average as ``tc.Pruner`` takes it."""
        return self.average.values if isinstance(self.average, DictAverage) else self.average

    def pruner(self, **options: Any) -> tc.Pruner:
        options = {"budget": {"macs": 0.45, "channels": 0.6}, "every": 20, "steps": 2, "max_ratio": 0.5, **options}
        parts = self.parts
        self.model.train()
        return tc.Pruner(
            *(self.model, EXAMPLE, self.optimizer),
            **{"ema": self.ema, "source": parts.source, "criterion": parts.criterion, **options},
        )

    def step(self, batch: Batch, pruner: tc.Pruner | None = None) -> Tensor:
        """One optimizer step. Returns the last loss, with its graph."""
        parts, scaler = self.parts, self.scaler
        chunks = list(zip(batch[0].chunk(parts.micro), batch[1].chunk(parts.micro), strict=True))
        for i, (x, target) in enumerate(chunks):
            with torch.autocast("cpu", parts.autocast) if parts.autocast else contextlib.nullcontext():
                outputs = self.called(x)
                loss = F.cross_entropy(outputs, target) / len(chunks)
            if pruner is None or parts.update:
                (loss if scaler is None else scaler.scale(loss)).backward()
            else:
                pruner.backward(loss, outputs, scaler=scaler, accumulate=i + 1 < len(chunks))
        scale = scaler.get_scale() if scaler else 1.0
        if pruner is not None and parts.update == "before":
            pruner.update(scale)
        if scaler is not None and (parts.clip or parts.update == "after"):
            scaler.unscale_(self.optimizer)
        if pruner is not None and parts.update == "after":
            pruner.update(scale, unscaled=True)
        if parts.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), parts.clip)
        self._finish()
        return loss

    def _finish(self) -> None:
        if self.scaler is None:
            self.optimizer.step()
        else:
            before = self.scaler.get_scale()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.overflows += self.scaler.get_scale() < before
        self.optimizer.zero_grad()
        if self.schedule is not None:
            self.schedule.step()
        if self.average is not None:
            (getattr(self.average, "update_parameters", None) or self.average.update)(self.model)

    # -- what goes into a checkpoint -------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        parts = {"model": self.model, "optimizer": self.optimizer, "scaler": self.scaler, "schedule": self.schedule}
        state = {name: part.state_dict() for name, part in parts.items() if part is not None}
        if self.average is not None:
            state["ema"] = self.ema if isinstance(self.ema, dict) else self.ema.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in ("model", "optimizer", "scaler", "schedule"):
            if name in state:
                getattr(self, name).load_state_dict(state[name])
        if isinstance(self.ema, dict):
            self.ema.update({name: value.clone() for name, value in state["ema"].items()})
        elif self.average is not None:
            self.ema.load_state_dict(state["ema"])

    def results(self) -> dict[str, Tensor]:
        """Everything that training changed."""
        results = {f"model {name}": value.detach().clone() for name, value in all_tensors(self.model).items()}
        if self.average is not None:
            tensors = self.ema if isinstance(self.ema, dict) else self.ema.state_dict()
            results.update({f"ema {name}": value.clone() for name, value in tensors.items()})
        return results


def sliced_state(
    state: Mapping[str, Any], names: list[str], groups: Iterable[ChannelGroup], keep: Mapping[str, Tensor]
) -> tuple[list[int], dict[str, Any]]:
    """The widths and the checkpoint of the small network, position by position from a checkpoint of the large one.

    Args:
        state: ``Loop.state_dict`` from before the cut.
        names: of the parameters, in the optimizer's order.
        groups: as they were before the cut.
        keep: what the plan keeps.
    """
    large, small = state["model"], copy.deepcopy(dict(state))
    kept = kept_positions(list(groups), keep, large)  # type: ignore[arg-type]
    small["model"] = {name: pick(value, kept.get(name, {})) for name, value in large.items()}
    for index, entries in small["optimizer"]["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor) and value.shape == large[names[index]].shape:
                entries[key] = pick(value, kept.get(names[index], {}))
    if "ema" in state:
        small["ema"] = {n: pick(v, kept.get(n.removeprefix("module."), {})) for n, v in state["ema"].items()}
    return [small["model"][f"{name}.weight"].shape[0] for name in ("stem", "conv1", "conv3")], small
