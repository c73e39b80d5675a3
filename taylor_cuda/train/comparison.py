"""The run behind ``taylor-cuda compare``: a trained network, then every criterion against the oracle on its data."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from taylor_cuda.errors import InputError
from taylor_cuda.graph import Groups, trace
from taylor_cuda.study import Comparison, Sensitivity, compare, sensitivity
from taylor_cuda.study.compare import BUDGETS, criteria_named
from taylor_cuda.train.config import RunConfig
from taylor_cuda.train.environment import environment
from taylor_cuda.train.launch import rank_of_environment
from taylor_cuda.train.objective import main_output
from taylor_cuda.train.pruning import Stages
from taylor_cuda.train.session import Session
from taylor_cuda.train.state import Position

ORACLE = "oracle.pt"


@dataclass(frozen=True)
class Question:
    """What is to be compared.

    Attributes:
        criteria: see ``tc.compare``.
        budgets: see ``tc.compare``.
        batches: of training images, as validation images are read; ``None``: all there are.
        sensitivity: the criterion whose scores decide what goes first when each group is narrowed alone; ``None``: that
            isn't measured.
        stop_above: see ``tc.sensitivity``.
    """

    criteria: Sequence[str] | str | None = None
    budgets: Mapping[str, float | Sequence[float]] = field(default_factory=lambda: dict(BUDGETS))
    batches: int | None = None
    sensitivity: str | None = None
    stop_above: float = float("inf")

    def __post_init__(self) -> None:
        criteria_named(self.criteria)
        if self.sensitivity is not None:
            criteria_named(self.sensitivity)
        if self.batches is not None and self.batches < 1:
            raise InputError(f"batches: wanted a number of at least 1, got {self.batches}")


@dataclass(frozen=True)
class Answer:
    """What came of it, on what, where."""

    comparison: Comparison
    sensitivity: Sensitivity | None
    facts: dict[str, Any]


def run(
    config: RunConfig,
    question: Question,
    resume: bool = False,
    tell: Callable[[str], None] = lambda _: None,
    finish: Callable[[Answer], None] = lambda _: None,
    progress: bool = False,
) -> Answer:
    """Train a network, or take the weights that are given, and compare criteria on it.

    Args:
        config: model, data, base training, seed and ``out``; what it says of pruning isn't used.
        question: what is compared.
        resume: go on from the state that an interrupted run of the same ``config`` left in ``config.out``.
        tell: gets a line at the end of base training.
        finish: gets the answer before the run counts as finished, to write reports with.
        progress: show progress bars.

    Raises:
        TaylorError: something in ``config`` or ``question`` can't be used, or training diverged.
        RunInterruptedError: Ctrl-C; the state was saved.
    """
    if rank_of_environment()[1] > 1:
        raise InputError("compare: wanted one process, got several of torchrun")
    session = Session(config)
    groups = trace(session.model, session.probe[:2], ignore=config.ignore)
    if not session.restore(resume):
        session.begin_log()
        (config.out / ORACLE).unlink(missing_ok=True)
    with session.interruptible():
        if session.position.stage == "base":
            Stages(session, tell, progress).base()
            session.position = Position("compare")
        answer = _ask(session, groups, question, progress)
        finish(answer)
    session.checkpoints.clear()
    (config.out / ORACLE).unlink(missing_ok=True)
    return answer


def _ask(session: Session, groups: Groups, question: Question, progress: bool) -> Answer:
    config, model = session.config, session.model
    batches = list(itertools.islice(session.data.unaugmented(), question.batches))
    common: dict[str, Any] = {"loss": "cross_entropy", "seed": config.seed, "progress": progress}

    def cross_entropy(outputs: Any, labels: Tensor) -> Tensor:
        session.check_stop()
        return F.cross_entropy(main_output(outputs), labels)

    def accuracy(outputs: Any, labels: Tensor) -> Tensor:
        return (main_output(outputs).argmax(1) == labels).double().mean()

    comparison = compare(
        model,
        groups,
        cross_entropy,
        batches,
        question.criteria,
        budgets=question.budgets,
        metric=accuracy,
        resume=config.out / ORACLE,
        **common,
    )
    narrowed = None
    if question.sensitivity is not None:
        narrowed = sensitivity(
            model,
            groups,
            cross_entropy,
            batches,
            criterion=question.sensitivity,
            stop_above=question.stop_above,
            cache=config.out / "sensitivity-cache.json",
            **common,
        )
    facts = {
        "model": config.model,
        "data": session.data.name,
        "seed": config.seed,
        "base_epochs": config.base_epochs,
        "weights": config.weights,
        "base_accuracy": session.measured.base_accuracy,
        "seconds": session.seconds(),
        "environment": environment(session.device),
    }
    return Answer(comparison, narrowed, facts)
