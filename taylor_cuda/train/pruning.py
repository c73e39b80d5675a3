"""The run behind ``taylor-cuda prune``: base training, pruning while training, recalibration, fine-tuning, saving."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

from taylor_cuda.errors import TaylorError
from taylor_cuda.graph import trace
from taylor_cuda.pruner import Pruner
from taylor_cuda.surgery import save
from taylor_cuda.train.checks import SourceComparison, oracle_agreement, scoring_cost, training_step_ms
from taylor_cuda.train.config import RunConfig
from taylor_cuda.train.environment import environment
from taylor_cuda.train.latency import latency_ms
from taylor_cuda.train.loop import (
    Stage,
    Step,
    cosine,
    evaluate,
    plain_step,
    recalibrate_batch_norm,
    to_device,
    train_stage,
)
from taylor_cuda.train.models import layer_widths
from taylor_cuda.train.session import CHECKPOINT, MODEL, Session
from taylor_cuda.train.state import Position
from taylor_cuda.train.summary import Summary


def run(
    config: RunConfig,
    resume: bool = False,
    tell: Callable[[str], None] = lambda _: None,
    finish: Callable[[Summary], None] = lambda _: None,
    progress: bool = False,
) -> Summary:
    """Prune one model as ``config`` says and save it to ``config.out``.

    Everything that can be refused is refused before any training.

    Args:
        config: what to do.
        resume: go on from the state that an interrupted run of the same ``config`` left in ``config.out``.
        tell: gets a line at the end of each stage.
        finish: gets the summary before the run counts as finished, to write reports with.
        progress: show progress bars.

    Raises:
        TaylorError: something in ``config`` can't be used, or training diverged.
        RunInterruptedError: Ctrl-C; the state was saved.
    """
    session = Session(config)
    if resume:
        session.restore()
    else:
        session.begin()
    stages = Stages(session, tell, progress)
    with session.interruptible():
        summary = stages.run()
        finish(summary)
    (config.out / CHECKPOINT).unlink(missing_ok=True)
    return summary


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
            session.position = Position("oracle")
        if session.position.stage == "oracle":
            self._ask_oracle()
            session.position = Position("prune")
        pruner = session.pruner or session.prepare_pruning()
        if session.position.stage == "prune":
            self._prune(pruner)
            session.position = Position("finetune")
        if session.position.stage == "finetune":
            self._finetune()
            pruner.finish()
            session.position = Position("measure")
        return self._measure(pruner)

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
        session = self.session

        def after() -> None:
            after_step()
            session.stop.check()

        stage = Stage(name, epochs, session.steps, first_epoch, rate, step, after, session.log, done)
        train_stage(
            stage, session.model, session.optimizer, session.data, session.position, session.device, self.progress
        )

    def _evaluate(self, event: str, before: str) -> float:
        session = self.session
        quality = evaluate(session.model, session.val(), session.device)
        session.log({"event": event, "loss": quality.loss, "accuracy": quality.accuracy})
        self.tell(f"{before}: accuracy {quality.accuracy:.4f}")
        return quality.accuracy

    def base(self) -> None:
        """Base training, from where the session stands in it."""
        session, epochs, peak = self.session, self.config.base_epochs, self.config.lr
        total = epochs * session.steps
        step = plain_step(session.model, session.optimizer)
        self._train("base", epochs, 0, lambda taken: peak * cosine(taken, total), step)
        session.measured.base_accuracy = self._evaluate("base", f"base: {epochs} epochs")

    def _ask_oracle(self) -> None:
        session, config, measured = self.session, self.config, self.session.measured
        if config.oracle == 0:
            return
        batches = session.oracle_batches()
        groups = trace(session.model, session.probe[:2], ignore=config.ignore)
        found = oracle_agreement(
            session.model, groups, batches, config.criterion, config.seed, session.stop.check, self.progress
        )
        measured.estimate_spearman, measured.magnitude_spearman = found.estimate, found.magnitude
        measured.oracle_examples, measured.oracle_note = sum(len(labels) for _, labels in batches), found.note

    def _prune(self, pruner: Pruner) -> None:
        session, rate = self.session, self.config.rate_after
        if math.isnan(session.measured.scoring_percent):
            self._measure_scoring(pruner)
        comparison = None if session.measured.sources_compared else SourceComparison(session.model, pruner.groups)
        watchers = [] if comparison is None else [comparison]
        try:
            self._train(
                "prune",
                session.prune_epochs,
                self.config.base_epochs,
                lambda _: rate,
                plain_step(session.model, session.optimizer, pruner, watchers),
                lambda: self._prune_step(pruner, comparison),
                lambda: pruner.done,
            )
        finally:
            if comparison is not None:
                comparison.close()
        if not pruner.done:
            raise TaylorError(f"prune: only {pruner.prunes} of {pruner.steps} prune steps had usable scores")
        recalibrate_batch_norm(session.model, session.train_batches())
        before, after = session.costs(pruner)
        told = f"prune: {pruner.steps} steps to {after.macs / before.macs:.3f} of the MACs"
        session.measured.cut_accuracy = self._evaluate("pruned", told)
        batch = to_device(next(session.train_batches()), session.device)
        seconds = self.config.measure_seconds
        session.measured.pruned_step_ms = training_step_ms(session.model, batch, seconds=seconds)

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
        session.log({"event": "prune", "cut_difference": difference, **pruner.history[-1]})

    def _measure_scoring(self, pruner: Pruner) -> None:
        session = self.session
        model = copy.deepcopy(session.original)
        model.load_state_dict(session.model.state_dict())
        batch = to_device(next(session.train_batches()), session.device)
        cost = scoring_cost(model, pruner.groups, batch, self.config.criterion, seconds=self.config.measure_seconds)
        session.measured.scoring_percent, session.measured.step_ms = cost.percent, cost.step_ms

    def _finetune(self) -> None:
        session, epochs, peak = self.session, self.config.epochs_after, self.config.rate_after
        total, first = epochs * session.steps, self.config.base_epochs + session.prune_epochs
        step = plain_step(session.model, session.optimizer)
        self._train("finetune", epochs, first, lambda taken: peak * cosine(taken, total), step)

    def _measure(self, pruner: Pruner) -> Summary:
        session, config, measured = self.session, self.config, self.session.measured
        accuracy = self._evaluate("finetuned", f"finetune: {config.epochs_after} epochs")
        models = {"before": session.original, "after": session.model}
        times: dict[int, dict[str, float | None]] = {}
        for batch in (1, 256):
            session.stop.check()
            found = latency_ms(models, session.data.shape, batch, session.device, config.measure_seconds)
            times[batch] = {**found} if found else dict.fromkeys(models)
        session.stop.check()
        before, after = session.costs(pruner)
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
            seconds=session.seconds(),
            config=config.identity(),
            environment=environment(session.device),
        )
