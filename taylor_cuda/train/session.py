"""The objects of one pruning run, and how they are put away and brought back.

Where a run stands is in ``Position`` and ``Measured``. A run that was interrupted builds its objects anew, loads those
two and the tensors, and enters the same stages where it left them.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from taylor_cuda.errors import InputError
from taylor_cuda.importance.criteria import find_criterion
from taylor_cuda.planning.cost import Cost, original_cost
from taylor_cuda.pruner import Pruner
from taylor_cuda.train.checks import CutWitness
from taylor_cuda.train.config import RunConfig
from taylor_cuda.train.data import Batch, load_data
from taylor_cuda.train.environment import environment, find_device
from taylor_cuda.train.loop import main_output, to_device
from taylor_cuda.train.messages import first_line
from taylor_cuda.train.models import load_model
from taylor_cuda.train.state import (
    Position,
    RunInterruptedError,
    StopRequest,
    load_state,
    restore_rng,
    save_state,
    stop_between_steps,
)

CHECKPOINT, MODEL, LOG = "checkpoint.pt", "model.safetensors", "log.jsonl"
PROBE = 64
"""Images on which a cut is compared with its mask."""


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
    scoring_percent: float = math.nan
    step_ms: float = math.nan
    pruned_step_ms: float = math.nan
    seconds: float = 0.0


class Session:
    """Model, data, optimizer and pruner of one run. Making it refuses a model, data or device that can't be used.

    Attributes:
        original: the model as it was made, to compare with; never trained.
        steps: minibatches an epoch.
        prune_epochs: epochs, whole or begun, that the prune steps take.
        probe: a few validation images on the device.
        pruner: there once pruning has begun; ``witness`` likewise.
    """

    witness: CutWitness

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.started = time.perf_counter()
        self.device = find_device(config.device)
        find_criterion(config.criterion)
        pin_memory = self.device.type == "cuda"
        self.data = load_data(
            config.data, config.split(ranks=1)[0], config.seed, config.image_size, config.workers, pin_memory
        )
        torch.manual_seed(config.seed)
        self.model = load_model(config.model, config.num_classes, config.weights).to(self.device)
        self.steps = min(self.data.steps_per_epoch, config.steps_limit or self.data.steps_per_epoch)
        self.prune_epochs = math.ceil(config.every * config.steps / self.steps)
        self.probe = to_device(next(self.data.val()), self.device)[0][:PROBE]
        self._check_fit()
        self.original = copy.deepcopy(self.model)
        self.position = Position("base")
        self.measured = Measured()
        self.optimizer = self.new_optimizer()
        self.pruner: Pruner | None = None
        self.stop = StopRequest()

    def _check_fit(self) -> None:
        """Raise unless the model turns these images into logits for these classes."""
        shape, classes = self.data.shape, len(self.data.classes)
        try:
            with torch.no_grad():
                logits = main_output(self.model.eval()(self.probe[:2]))
        except InputError:
            raise
        except Exception as error:  # whatever a model's own code raises
            hint = "; give --data" if self.config.data == "digits" and self.config.model != "digits" else ""
            raise InputError(
                f"model: {self.config.model} can't run on images of shape {list(shape)}: {first_line(error)}{hint}"
            ) from error
        finally:
            self.model.train()
        if logits.dim() != 2 or logits.shape[1] < classes:
            raise InputError(
                f"model: wanted logits [N, {classes} or more] for the {classes} classes of {self.data.name}, "
                f"got {list(logits.shape)}; set --num-classes"
            )

    # -- making --------------------------------------------------------------------------------------------------------

    def new_pruner(self, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> Pruner:
        """A pruner as the configuration says."""
        config = self.config
        return Pruner(
            model,
            self.probe[:2],
            optimizer,
            budget=config.budget,
            criterion=config.criterion,
            every=config.every,
            steps=config.steps,
            schedule=config.schedule,
            mode=config.mode,
            ignore=config.ignore,
            round_to=config.round_to,
            min_keep=config.min_keep,
            seed=config.seed,
        )

    def new_optimizer(self) -> torch.optim.SGD:
        """SGD with momentum 0.9 over the model's parameters."""
        config = self.config
        return torch.optim.SGD(self.model.parameters(), lr=config.lr, momentum=0.9, weight_decay=config.weight_decay)

    def begin(self) -> None:
        """Refuse now what would only show after base training; then start the log of a new run."""
        self.new_pruner(copy.deepcopy(self.model), None).importance.close()
        self.begin_log()

    def begin_log(self) -> None:
        """The log of a new run."""
        self.config.out.mkdir(parents=True, exist_ok=True)
        (self.config.out / LOG).unlink(missing_ok=True)
        self.log({"event": "start", **self.config.identity(), "environment": environment(self.device)})

    def prepare_pruning(self) -> Pruner:
        """A fresh optimizer, the pruner, and what watches it. The model has its original widths."""
        self.optimizer = self.new_optimizer()
        pruner = self.new_pruner(self.model, self.optimizer)
        cuts = self.config.mode == "cut"
        self.witness = CutWitness(copy.deepcopy(self.original), pruner.groups, self.probe, follows=cuts)
        self.pruner = pruner
        return pruner

    # -- reading -------------------------------------------------------------------------------------------------------

    def val(self) -> Iterator[Batch]:
        """The validation batches; Ctrl-C stops between two of them."""
        return self._stoppable(itertools.islice(self.data.val(), self.config.steps_limit))

    def train_batches(self) -> Iterator[Batch]:
        """Training batches of the first epoch of pruning; Ctrl-C stops between two of them."""
        return self._stoppable(itertools.islice(self.data.train(self.config.base_epochs), self.steps))

    def oracle_batches(self) -> list[Batch]:
        """What the scores are compared with the oracle on; Ctrl-C stops between two of them."""
        return list(self._stoppable(itertools.islice(self.data.unaugmented(), self.config.oracle)))

    def _stoppable(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        for batch in batches:
            self.stop.check()
            yield batch

    def costs(self, pruner: Pruner) -> tuple[Cost, Cost]:
        """What the model cost as it was made, and what it costs now."""
        return original_cost(pruner.groups), pruner.cost

    def seconds(self) -> float:
        """Time spent on this run, earlier parts included."""
        return self.measured.seconds + time.perf_counter() - self.started

    def log(self, record: dict[str, Any]) -> None:
        """Append one JSON line to the log."""
        with open(self.config.out / LOG, "a", encoding="utf-8") as lines:
            lines.write(json.dumps(record) + "\n")

    # -- stopping and going on -----------------------------------------------------------------------------------------

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Ctrl-C ends the body between two steps, and the state is saved.

        Raises:
            RunInterruptedError: in its place.
        """
        with stop_between_steps() as self.stop:
            try:
                yield
            except KeyboardInterrupt:
                self.save()
                raise RunInterruptedError(
                    f"interrupted in stage {self.position.stage!r}; state saved in {self.config.out / CHECKPOINT}"
                ) from None

    def save(self) -> None:
        """Write everything into one file, from which ``restore`` goes on."""
        pruner = self.pruner
        measured = dataclasses.replace(self.measured, seconds=self.seconds())
        state = {
            "config": self.config.identity(),
            "position": dataclasses.asdict(self.position),
            "measured": dataclasses.asdict(measured),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "pruner": None if pruner is None else pruner.state_dict(),
        }
        save_state(self.config.out / CHECKPOINT, state)

    def restore(self) -> None:
        """Bring every object to where the interrupted run left it.

        Raises:
            InputError: there is nothing to go on from, or it belongs to a run with other settings.
            CheckpointError: the file is damaged.
        """
        state = load_state(self.config.out / CHECKPOINT, self.device)
        then, now = state["config"], self.config.identity()
        other = [f"{key} was {then.get(key)!r}, is {now[key]!r}" for key in now if then.get(key) != now[key]]
        if other:
            raise InputError(f"resume: the state belongs to a run with other settings: {'; '.join(other)}")
        self.position, self.measured = Position(**state["position"]), Measured(**state["measured"])
        if state["pruner"] is not None:
            self.prepare_pruning().load_state_dict(state["pruner"])
            self.witness.follow(state["pruner"]["kept"])
        self.model.load_state_dict(state["model"])
        if state["pruner"] is not None or self.position.stage == "base":
            self.optimizer.load_state_dict(state["optimizer"])
        restore_rng(state)
