"""The run behind ``taylor-cuda prune``: base training, pruning while training, recalibration, fine-tuning, saving."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Literal

from taylor_cuda.distributed import together
from taylor_cuda.errors import TaylorError
from taylor_cuda.graph import trace
from taylor_cuda.importance.criteria import find_criterion
from taylor_cuda.pruner import Pruner
from taylor_cuda.surgery import save
from taylor_cuda.train.batch_norm import average_statistics, recalibrate_batch_norm
from taylor_cuda.train.checks import SourceComparison, oracle_agreement, scoring_cost, training_step_ms
from taylor_cuda.train.config import RunConfig
from taylor_cuda.train.environment import environment
from taylor_cuda.train.latency import latency_ms
from taylor_cuda.train.launch import launched
from taylor_cuda.train.loop import Stage, Step, evaluate, to_device, train_stage
from taylor_cuda.train.models import layer_widths
from taylor_cuda.train.modes import compiler_for, uncompiled
from taylor_cuda.train.rates import Schedule
from taylor_cuda.train.session import MODEL, Session
from taylor_cuda.train.state import Position
from taylor_cuda.train.summary import Summary

COMPILE_FROM = 200
"""Minibatches between prune steps for which it pays to compile the network at each of its widths."""


def run(
    config: RunConfig,
    resume: bool | Literal["auto"] = False,
    tell: Callable[[str], None] = lambda _: None,
    finish: Callable[[Summary], None] = lambda _: None,
    progress: bool = False,
) -> Summary:
    """Prune one model as ``config`` says and save it to ``config.out``.

    Everything that can be refused is refused before any training. Under ``torchrun`` every process calls this; the
    first one writes and tells.

    Args:
        config: what to do.
        resume: go on from the newest whole checkpoint that an unfinished run of the same ``config`` left in
            ``config.out``; ``"auto"``: if there is one.
        tell: gets a line at the end of each stage.
        finish: gets the summary before the run counts as finished, to write reports with.
        progress: show progress bars.

    Raises:
        TaylorError: something in ``config`` can't be used, or training diverged.
        RunInterruptedError: Ctrl-C; the state was saved.
    """
    with launched(config.device) as launch:
        stages = Stages(Session(config, launch), tell if launch.first else lambda _: None, progress and launch.first)
        try:
            return _run(stages, resume, finish)
        finally:
            del stages  # what holds on to the process group goes before the group does


def _run(stages: Stages, resume: bool | Literal["auto"], finish: Callable[[Summary], None]) -> Summary:
    session = stages.session
    launch = session.launch
    if not session.restore(resume):
        session.begin()
    with session.interruptible(), _compiler(session.config):
        summary = stages.run()
        with together("writing the reports", launch.group):
            if launch.first:
                finish(summary)
                session.checkpoints.clear()
    return summary


def _compiler(config: RunConfig) -> AbstractContextManager[None]:
    if not config.compile:
        return contextlib.nullcontext()
    return compiler_for(config.steps, find_criterion(config.criterion).outputs)


class Stages:
    """The stages of a run, each entered where the session's position says."""

    def __init__(self, session: Session, tell: Callable[[str], None], progress: bool) -> None:
        self.session, self.tell, self.progress = session, tell, progress
        self.config = session.config

    def run(self) -> Summary:
        """Run every stage that is left."""
        session = self.session
        if session.position.stage == "base":
            self.base()
            self._enter("oracle")
        if session.position.stage == "oracle":
            self._ask_oracle()
            self._enter("prune")
        pruner = session.pruner or session.prepare_pruning()
        if session.position.stage == "prune":
            self._prune(pruner)
            within = self.config.total_epochs is not None
            self._enter("finetune", session.position if within else None)
        if session.position.stage == "finetune":
            self._finetune()
            pruner.finish()
            session.take_the_average()
            self._enter("measure")
        return self._measure(pruner)

    def _enter(self, stage: str, at: Position | None = None) -> None:
        session = self.session
        session.position = Position(stage) if at is None else Position(stage, at.epoch, at.batch)

    def _train(
        self,
        name: str,
        epochs: int,
        first_epoch: int,
        rate: Callable[[int], float],
        step: Step,
        after_step: Callable[[], None] = lambda: None,
        done: Callable[[], bool] = lambda: False,
    ) -> None:
        session, every = self.session, self.config.eval_every

        def after_minibatch() -> None:
            session.taken += 1
            after_step()
            session.between_minibatches()

        def after_epoch(record: dict[str, object]) -> None:
            session.log(record)
            session.note_unreadable()
            session.check_in_sync()
            if every and session.position.epoch % every == 0 and session.position.epoch < epochs:
                self._evaluate("validation", f"{name}: epoch {session.position.epoch}")
            if self.config.checkpoint_every is None:
                session.save()

        stage = Stage(name, epochs, session.steps, first_epoch, rate, step, after_minibatch, after_epoch, done)
        stage.group = session.group
        train_stage(
            stage, session.model, session.optimizer, session.data, session.position, session.device, self.progress
        )

    def _evaluate(self, event: str, before: str, trained: bool = True) -> float:
        session, config = self.session, self.config
        model = session.evaluated
        with session.precision.autocast():
            if trained and config.recalibrate:
                recalibrate_batch_norm(model, session.train_batches(), config.recalibrate, session.group)
            else:
                average_statistics(model, session.group)
            quality = evaluate(model, session.val(), session.device, group=session.group)
        session.note_unreadable()
        session.log({"event": event, "loss": quality.loss, "accuracy": quality.accuracy})
        self.tell(f"{before}: accuracy {quality.accuracy:.4f}")
        return quality.accuracy

    def _schedule(self, peak: float, epochs: int, first: bool, kind: str = "") -> Schedule:
        """The learning rate of a number of epochs, which the run may begin with."""
        config, steps = self.config, self.session.steps
        scale = 1.0 if config.lr_per is None else self.session.global_batch / config.lr_per
        return Schedule(
            peak * scale,
            epochs * steps,
            kind or config.lr_schedule,
            round(config.warmup_epochs * steps) if first else 0,
            config.lr_step_epochs * steps,
            config.lr_step_factor,
        )

    def _schedule_after(self) -> Schedule:
        """The one of fine-tuning; with ``total_epochs``, of pruning too."""
        within = self.config.total_epochs is not None and self.config.base_epochs == 0
        return self._schedule(self.config.rate_after, self.config.epochs_after, within)

    def base(self) -> None:
        """Base training, from where the session stands in it."""
        session, epochs = self.session, self.config.base_epochs
        rate = self._schedule(self.config.lr, epochs, first=True)
        self._train("base", epochs, 0, rate, session.new_step())
        session.measured.base_accuracy = self._evaluate("base", f"base: {epochs} epochs", trained=epochs > 0)

    def _ask_oracle(self) -> None:
        session, config, measured = self.session, self.config, self.session.measured
        if config.oracle == 0:
            return
        batches = session.oracle_batches()
        groups = trace(session.model, session.probe[:2], ignore=config.ignore)
        found = oracle_agreement(
            session.model, groups, batches, config.criterion, config.seed, session.check_stop, self.progress
        )
        measured.estimate_spearman, measured.magnitude_spearman = found.estimate, found.magnitude
        measured.oracle_examples, measured.oracle_note = sum(len(labels) for _, labels in batches), found.note

    def _prune(self, pruner: Pruner) -> None:
        session, config, measured = self.session, self.config, self.session.measured
        if session.launch.first and math.isnan(measured.scoring_percent):
            self._measure_scoring(pruner)
        comparison = self._comparison(pruner)
        watchers = [] if comparison is None else [comparison]
        epochs, rate = session.prune_epochs, self._schedule(config.rate_after, 0, config.base_epochs == 0, "constant")
        if config.total_epochs is not None:
            epochs, rate = config.total_epochs, self._schedule_after()
        try:
            with uncompiled(session.model) if config.every < COMPILE_FROM else contextlib.nullcontext():
                self._train(
                    "prune",
                    epochs,
                    config.base_epochs,
                    rate,
                    session.new_step(pruner, watchers),
                    lambda: self._prune_step(pruner, comparison),
                    lambda: pruner.done,
                )
        finally:
            if comparison is not None:
                comparison.close()
        if not pruner.done:
            raise TaylorError(f"prune: only {pruner.prunes} of {pruner.steps} prune steps had usable scores")
        if config.reset_optimizer:
            session.optimizer.state.clear()
        before, after = session.costs(pruner)
        told = f"prune: {pruner.steps} steps to {after.macs / before.macs:.3f} of the MACs"
        measured.cut_accuracy = self._evaluate("pruned", told)
        if session.launch.first:
            batch = to_device(next(session.train_batches()), session.device)
            measured.pruned_step_ms = training_step_ms(session.model, batch, seconds=config.measure_seconds)

    def _comparison(self, pruner: Pruner) -> SourceComparison | None:
        """Whether scores agree, where what they are computed from is exact and on one device."""
        session, config = self.session, self.config
        if session.measured.sources_compared:
            return None
        if session.group is not None or config.amp != "off" or session.micro > 1:
            session.measured.sources_compared = True
            session.measured.source_note = "under AMP, with several ranks or with accumulated gradients they aren't"
            return None
        return SourceComparison(session.model, pruner.groups)

    def _prune_step(self, pruner: Pruner, comparison: SourceComparison | None) -> None:
        session, measured = self.session, self.session.measured
        if pruner.batches + 1 >= pruner.every * (pruner.prunes + 1):
            if comparison is not None and not measured.sources_compared:
                measured.source_difference = comparison.greatest_difference()
                measured.source_note = comparison.reason
                measured.sources_compared = True
                comparison.close()
            session.witness.before(session.model)
        plan = pruner.step()
        if plan is None:
            return
        kept = plan.keep if pruner.mode == "cut" else pruner.keep
        difference, scale = session.witness.after(session.model, dict(kept))
        measured.cut_difference = max(measured.cut_difference, difference)
        measured.cut_scale = max(measured.cut_scale, scale)
        measured.cuts += 1
        session.log({"event": "prune", "plan": plan.digest, "cut_difference": difference, **pruner.history[-1]})

    def _measure_scoring(self, pruner: Pruner) -> None:
        session = self.session
        model = copy.deepcopy(session.original)
        model.load_state_dict(session.model.state_dict())
        batch = to_device(next(session.train_batches()), session.device)
        cost = scoring_cost(model, pruner.groups, batch, self.config.criterion, seconds=self.config.measure_seconds)
        session.measured.scoring_percent, session.measured.step_ms = cost.percent, cost.step_ms

    def _finetune(self) -> None:
        session, config = self.session, self.config
        first = config.base_epochs + (session.prune_epochs if config.total_epochs is None else 0)
        self._train("finetune", config.epochs_after, first, self._schedule_after(), session.new_step())

    def _measure(self, pruner: Pruner) -> Summary:
        session, config, measured = self.session, self.config, self.session.measured
        accuracy = self._evaluate("finetuned", f"finetune: {config.epochs_after} epochs")
        models = {"before": session.original, "after": session.model}
        times: dict[int, dict[str, float | None]] = {}
        for batch in (1, 256):
            session.check_stop()
            found = None
            if session.launch.first:
                found = latency_ms(models, session.data.shape, batch, session.device, config.measure_seconds)
            times[batch] = {**found} if found else dict.fromkeys(models)
        session.check_stop()
        before, after = session.costs(pruner)
        if session.launch.first:
            save(session.model, config.out / MODEL, metadata={"model": config.model, "data": config.data})
        return Summary(
            model=config.model,
            data=session.data.name,
            criterion=config.criterion,
            budget=dict(config.budget),
            seed=config.seed,
            base_accuracy=measured.base_accuracy,
            cut_accuracy=measured.cut_accuracy,
            pruned_accuracy=accuracy,
            macs_before=before.macs,
            macs_after=after.macs,
            params_before=before.params,
            params_after=after.params,
            channels_before=before.channels,
            channels_after=after.channels,
            latency_ms_before=times[256]["before"],
            latency_ms_after=times[256]["after"],
            latency_ms_batch1_before=times[1]["before"],
            latency_ms_batch1_after=times[1]["after"],
            widths=layer_widths(session.original, session.model),
            cut_difference=measured.cut_difference,
            cut_scale=measured.cut_scale,
            cuts=measured.cuts,
            source_difference=measured.source_difference,
            source_note=measured.source_note,
            estimate_spearman=measured.estimate_spearman,
            magnitude_spearman=measured.magnitude_spearman,
            oracle_examples=measured.oracle_examples,
            oracle_note=measured.oracle_note,
            scoring_percent=measured.scoring_percent,
            step_ms=measured.step_ms,
            pruned_step_ms=measured.pruned_step_ms,
            unreadable=len(measured.unreadable),
            seconds=session.seconds(),
            config=config.identity(),
            environment=environment(session.device),
        )
