"""The objects of one pruning run, and how they are put away and brought back.

Where a run stands is in ``Position`` and ``Measured``. A run that was interrupted builds its objects anew, loads those
two and the tensors, and enters the same stages where it left them.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import time
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from taylor_cuda.distributed import by_value, gathered, together, total
from taylor_cuda.errors import InputError, TaylorError
from taylor_cuda.files import remove_remains
from taylor_cuda.importance.criteria import find_criterion
from taylor_cuda.planning.cost import Cost, original_cost
from taylor_cuda.pruner import Pruner
from taylor_cuda.train.checks import CutWitness
from taylor_cuda.train.config import RunConfig
from taylor_cuda.train.data import Batch, Share, load_data
from taylor_cuda.train.environment import environment, find_device
from taylor_cuda.train.launch import Launch
from taylor_cuda.train.logs import RunLog
from taylor_cuda.train.loop import to_device
from taylor_cuda.train.messages import first_line
from taylor_cuda.train.models import load_model
from taylor_cuda.train.objective import Objective, main_output, mixing_of
from taylor_cuda.train.optimizers import new_optimizer
from taylor_cuda.train.snapshot import put_back, state_of, state_of_rank
from taylor_cuda.train.state import Checkpoints, Position, load_state
from taylor_cuda.train.step import Backward, Precision, TrainingStep, Updates, moving_average
from taylor_cuda.train.stopping import RunInterruptedError, StopRequest, stop_between_steps
from taylor_cuda.train.summary import Measured

CHECKPOINTS, MODEL, LOG = "checkpoints", "model.safetensors", "log.jsonl"
PROBE = 64
"""Images on which a cut is compared with its mask."""
ASK_EVERY = 10
"""Minibatches after which ranks ask each other whether one of them was told to stop."""


class Session:
    """Model, data, optimizer and pruner of one run. Making it refuses a model, data or device that can't be used.

    Args:
        config: what the run is to do.
        launch: the processes of the run.

    Attributes:
        model: the network itself.
        trained: what a training step calls: the network, or ``DistributedDataParallel`` around it.
        original: the model as it was made, to compare with; never trained.
        average: the moving average of the weights, or ``None``.
        teacher: the network before pruning, where its predictions are to be kept, or ``None``.
        steps: minibatches an epoch.
        prune_epochs: epochs, whole or begun, that the prune steps take.
        micro: parts of a minibatch on each rank.
        taken: minibatches trained on so far.
        probe: a few validation images on the device.
        pruner: there once pruning has begun; ``witness`` likewise.
    """

    witness: CutWitness

    def __init__(self, config: RunConfig, launch: Launch | None = None) -> None:
        self.config = config
        self.started = time.perf_counter()
        self.launch = launch or Launch(find_device(config.device))
        self.device, self.group = self.launch.device, self.launch.group
        find_criterion(config.criterion)
        if config.ema and config.mode != "cut":
            raise InputError(f"ema: wanted mode='cut' with it, got mode={config.mode!r}")
        self.global_batch, self.micro = config.split(self.launch.ranks)
        self.log_file = RunLog(config.out / LOG, config.tensorboard)
        self.checkpoints = Checkpoints(config.out / CHECKPOINTS, config.checkpoints)
        self._load_data()
        torch.manual_seed(config.seed)
        self.model = load_model(config.model, config.num_classes, config.weights).to(self.device)
        if config.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)
        self.probe = self._probe()
        self.mixing = mixing_of(config.mixup, config.cutmix, self._check_fit())
        self.original = copy.deepcopy(self.model)
        self.trained = self._wrapped()
        self.position, self.taken = Position("base"), 0
        self.measured = Measured()
        self.precision = Precision(config.amp, self.device)
        self.optimizer = self.new_optimizer()
        self.average: AveragedModel | None = None
        self.teacher: nn.Module | None = None
        self.pruner: Pruner | None = None
        self.stop = StopRequest()
        if self.launch.rank:
            torch.manual_seed(config.seed + self.launch.rank)  # what is random in training differs over ranks

    def _load_data(self) -> None:
        config, launch = self.config, self.launch
        self.data = load_data(
            config.data,
            self.global_batch,
            config.seed,
            config.image_size,
            config.workers,
            pin_memory=self.device.type == "cuda",
            share=Share(launch.rank, launch.ranks, self.micro),
            num_classes=config.num_classes,
        )
        self.steps = min(self.data.steps_per_epoch, config.steps_limit or self.data.steps_per_epoch)
        self.prune_epochs = math.ceil(config.every * config.steps / self.steps)
        if config.total_epochs is not None and self.prune_epochs > config.total_epochs:
            raise InputError(
                f"total_epochs: wanted enough for {config.steps} prune steps every {config.every} of {self.steps} "
                f"minibatches an epoch, at least {self.prune_epochs}, got {config.total_epochs}"
            )

    def _probe(self) -> Tensor:
        first = next(self.data.val(), None)
        if first is None:
            raise InputError(
                f"data: wanted validation images for each of {self.launch.ranks} ranks, got {self.data.val_size}"
            )
        return to_device(first, self.device)[0][:PROBE]

    def _wrapped(self) -> nn.Module:
        config, device = self.config, self.device
        if config.sync_batch_norm and self.launch.ranks > 1:
            if device.type != "cuda":
                raise InputError(f"sync_batch_norm: wanted GPUs, got device {device}")
            self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        if config.compile:
            self.model.compile()
        if self.launch.ranks == 1:
            return self.model
        ids = [device.index] if device.type == "cuda" else None
        return DistributedDataParallel(self.model, device_ids=ids, gradient_as_bucket_view=True)

    def _check_fit(self) -> int:
        """The network's outputs; raise unless it turns these images into logits for these classes."""
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
        return logits.shape[1]

    # -- making --------------------------------------------------------------------------------------------------------

    def new_pruner(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None, average: AveragedModel | None = None
    ) -> Pruner:
        """A pruner as the configuration says."""
        config = self.config
        warmer = config.distill > 0 and config.distill_temperature != 1  # no cross-entropy of these logits any more
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
            round_to=config.rounded_to(self.device),
            min_keep=config.min_keep,
            momentum=config.momentum,
            shared_norm=config.shared_norm,
            seed=config.seed,
            ema=average,
            loss="any" if warmer else "cross_entropy",
        )

    def new_optimizer(self) -> torch.optim.Optimizer:
        """An optimizer over the model's parameters as the configuration says."""
        config = self.config
        return new_optimizer(config.optimizer, self.model, config.lr, config.weight_decay)

    def new_step(self, backward: Backward | None = None, watchers: Iterable[Updates] = ()) -> TrainingStep:
        """What is done with a minibatch, as the configuration says."""
        config = self.config
        objective = Objective(config.label_smoothing, self.teacher, config.distill, config.distill_temperature)
        return TrainingStep(
            self.trained,
            self.optimizer,
            backward,
            watchers,
            objective=objective,
            precision=self.precision,
            micro=self.micro,
            mixing=self.mixing,
            clip=config.clip,
            average=self.average,
            group_lasso=config.group_lasso,
            channels_last=config.channels_last,
        )

    def begin(self) -> None:
        """Refuse now what would only show after base training; then start the log of a new run."""
        self.new_pruner(copy.deepcopy(self.model), None).importance.close()
        self.begin_log()

    def begin_log(self) -> None:
        """The log of a new run.

        Raises:
            InputError: there are checkpoints of another one, which would be lost.
        """
        with together("the start", self.group):
            if self.launch.first and self.checkpoints.newest() is not None:
                raise InputError(
                    f"out: {self.config.out} holds checkpoints of a run that has not ended; go on with --resume, give "
                    f"another --out, or remove {self.checkpoints.folder}"
                )
            if self.launch.first:
                self.log_file.begin()
        here = {"ranks": self.launch.ranks, "environment": environment(self.device)}
        self.log({"event": "start", **self.identity(), **here})

    def prepare_pruning(self) -> Pruner:
        """A fresh optimizer, the pruner, and what goes along with it. The model has its original widths."""
        config = self.config
        self.optimizer = self.new_optimizer()
        if config.ema:
            self.average = moving_average(self.model, config.ema)
        if config.distill:
            self.teacher = copy.deepcopy(self.original)
            self.teacher.load_state_dict(self.model.state_dict())
        pruner = self.new_pruner(self.trained, self.optimizer, self.average)
        cuts = config.mode == "cut"
        self.witness = CutWitness(copy.deepcopy(self.original), pruner.groups, self.probe, follows=cuts)
        self.pruner = pruner
        return pruner

    def take_the_average(self) -> None:
        """Let the network have the average of its weights, which is what is kept of the run."""
        if self.average is not None:
            self.model.load_state_dict(self.average.module.state_dict())
            self.average = None

    @property
    def evaluated(self) -> nn.Module:
        """The network whose accuracy counts: the average of its weights, where there is one."""
        return self.model if self.average is None else self.average.module

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
            self.check_stop()
            yield batch

    def check_stop(self) -> None:
        """Raise ``KeyboardInterrupt`` if there was one. Ranks have to agree first, and do so between minibatches."""
        if self.group is None:
            self.stop.check()

    def between_minibatches(self) -> None:
        """Write a checkpoint if it is time; stop here if that was asked for, on any rank."""
        every = self.config.checkpoint_every
        if every is not None and self.taken % every == 0:
            self.save()
        self.check_stop()
        if self.group is not None and self.taken % ASK_EVERY == 0:
            asked = total(torch.tensor(float(self.stop.asked or self.launch.abandoned), device=self.device), self.group)
            if asked > 0:
                raise KeyboardInterrupt

    def check_in_sync(self) -> None:
        """Raise unless all ranks have the same parameters, bit for bit.

        Raises:
            TaylorError: they have come apart.
        """
        if self.group is None:
            return
        kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        pieces = [parameter.detach().flatten() for parameter in self.model.parameters()]
        bits = [piece.view(kinds[piece.element_size()]).sum(dtype=torch.int64) for piece in pieces]
        parties = by_value(str(torch.stack(bits).tolist()), self.group)
        other = sorted(rank for ranks in parties.values() if 0 not in ranks for rank in ranks)
        if other:
            raise TaylorError(f"ranks {other} no longer have the parameters of rank 0; go on from a checkpoint")

    def note_unreadable(self) -> None:
        """Log the files that could not be read since the last time, on any rank."""
        known = self.measured.unreadable
        fresh = {path: why for path, why in self.data.unreadable.items() if path not in known}
        for found in gathered(fresh, self.group):
            for path in found.keys() - known.keys():
                known[path] = found[path]
                self.log({"event": "unreadable", "path": path, "reason": found[path]})

    def identity(self) -> dict[str, Any]:
        """The settings that decide the result, with the size that minibatches come to."""
        return {**self.config.identity(), "global_batch": self.global_batch}

    def costs(self, pruner: Pruner) -> tuple[Cost, Cost]:
        """What the model cost as it was made, and what it costs now."""
        return original_cost(pruner.groups), pruner.cost

    def seconds(self) -> float:
        """Time spent on this run, earlier parts included."""
        return self.measured.seconds + time.perf_counter() - self.started

    def log(self, record: dict[str, Any]) -> None:
        """Append one event to the log."""
        if self.launch.first:
            self.log_file.write(record, self.taken)

    # -- stopping and going on -----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Ctrl-C ends the body between two steps, and the state is saved. A second one ends it at once.

        Raises:
            RunInterruptedError: in its place.
            KeyboardInterrupt: there is nothing to go on from.
        """
        with stop_between_steps(alone=self.group is None) as self.stop:
            try:
                yield
            except KeyboardInterrupt:
                with contextlib.suppress(KeyboardInterrupt):
                    if not self.stop.at_once:  # else a step or a cut may be half done
                        self.save()
                if self.stop.at_once and self.checkpoints.newest() is None:
                    raise
                kept = "the last checkpoint is" if self.stop.at_once else "state saved"
                raise RunInterruptedError(
                    f"interrupted in stage {self.position.stage!r}; {kept} in {self.checkpoints.folder}"
                ) from None

    def save(self) -> None:
        """Write everything into one checkpoint, from which ``restore`` goes on. All ranks call it."""
        ranks = gathered(state_of_rank(self), self.group)
        with together("the checkpoint", self.group):
            if self.launch.first:
                self.checkpoints.save(self.taken, {**state_of(self), "ranks": ranks})

    def restore(self, resume: bool | Literal["auto"] = True) -> bool:
        """Bring every object to where the newest checkpoint that is whole left it.

        Args:
            resume: whether to; ``"auto"``: if there is one.

        Returns:
            It was done.

        Raises:
            InputError: there is none, or it belongs to a run with other settings.
            CheckpointError: it can't be read.
        """
        if not resume:
            return False
        if self.launch.first:
            remove_remains(self.config.out)
        path = gathered(self.checkpoints.newest() if self.launch.first else None, self.group)[0]
        if path is None:
            if resume == "auto":
                return False
            raise InputError(f"resume: there is nothing to go on from in {self.config.out} (start without --resume)")
        put_back(self, load_state(path, self.device))
        return True
