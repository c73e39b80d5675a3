"""What a run measures about itself: is the cut what the mask promised, do the sources agree, what does scoring cost."""

from __future__ import annotations

import copy
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taylor_cuda.errors import InputError, TaylorError
from taylor_cuda.graph.groups import Groups
from taylor_cuda.graph.mask import masked
from taylor_cuda.importance import Importance
from taylor_cuda.study import compare
from taylor_cuda.surgery import cut
from taylor_cuda.train.data import Batch
from taylor_cuda.train.loop import Step
from taylor_cuda.train.modes import eval_mode
from taylor_cuda.train.objective import main_output
from taylor_cuda.train.step import TrainingStep


class CutWitness:
    """Follows a model through its prune steps and compares each of them with the mask, on real images.

    It keeps a copy of its own, so what it checks is independent of what ``tc.cut`` and ``tc.compact`` verify.

    Args:
        copy_of_model: same widths as the model, free of hooks; it is changed.
        groups: the model's groups now; not changed.
        images: one batch on the model's device.
        follows: the model is cut, and so is the copy; otherwise both stay dense.
    """

    def __init__(self, copy_of_model: nn.Module, groups: Groups, images: Tensor, follows: bool = True) -> None:
        self._copy = copy_of_model.eval()
        self._groups = dataclasses.replace(groups)
        self._images = images
        self._follows = follows

    def follow(self, keep: dict[str, Tensor]) -> None:
        """Make the cuts of an earlier run."""
        if self._follows and any(kept.numel() < self._groups[name].size for name, kept in keep.items()):
            cut(self._copy, self._groups, keep, verify=False)

    def before(self, model: nn.Module) -> None:
        """Take over the weights as they are right before a cut."""
        self._copy.load_state_dict(model.state_dict())

    @torch.no_grad()
    def after(self, model: nn.Module, keep: dict[str, Tensor]) -> tuple[float, float]:
        """Compare the model as it runs now with the masked copy, in eval mode; then cut the copy where that follows.

        Returns:
            The greatest absolute difference of an output, and the greatest absolute output.
        """
        with masked(self._copy, self._groups, keep):
            expected = main_output(self._copy(self._images))
        with eval_mode(model):
            actual = main_output(model(self._images))
        self.follow(keep)
        return float((actual - expected).abs().max()), float(expected.abs().max())


class SourceComparison:
    """Taylor-FO from parameters and from activations, side by side on the same backward passes.

    Args:
        model: the model in training.
        groups: its groups.

    Attributes:
        reason: why the two can't be compared on this model, or ``None``.
    """

    def __init__(self, model: nn.Module, groups: Groups) -> None:
        self.reason: str | None = None
        self._estimators: list[Importance] = []
        try:
            for source in ("parameters", "activations"):
                self._estimators.append(Importance(model, groups, "taylor_fo", source=source))
        except InputError as error:
            self.reason = str(error)
            self.close()

    def update(self) -> None:
        """Take the scores of one step."""
        for estimator in self._estimators:
            estimator.update()

    def greatest_difference(self) -> float | None:
        """The greatest |p - a| / max(p, a) over all units; ``None`` before any step.

        A score below a millionth of its group's mean is compared with that millionth: it is the square of terms that
        cancel, and all rounding.
        """
        if not self._estimators or self._estimators[0].steps == 0:
            return None
        first, second = (estimator.scores() for estimator in self._estimators)
        return max(_relative(p, second[name]) for name, p in first.items())

    def close(self) -> None:
        """Take the gates out of the model."""
        for estimator in self._estimators:
            estimator.close()
        self._estimators = []


def _relative(p: Tensor, a: Tensor) -> float:
    greater = torch.maximum(p, a)
    floor = max(1e-6 * float(greater.mean()), torch.finfo(greater.dtype).tiny)
    return float(((p - a).abs() / greater.clamp_min(floor)).max())


@dataclasses.dataclass(frozen=True)
class OracleAgreement:
    """Spearman correlations with the oracle over all units: of the criterion, of magnitude; or why there are none."""

    estimate: float | None = None
    magnitude: float | None = None
    note: str | None = None


def oracle_agreement(
    model: nn.Module,
    groups: Groups,
    batches: Sequence[Batch],
    criterion: str,
    seed: int = 0,
    check: Callable[[], None] = lambda: None,
    progress: bool = False,
) -> OracleAgreement:
    """How well the criterion, and magnitude, rank the units of a network as it is. See ``tc.compare``.

    Args:
        model: left as it is.
        groups: of the model.
        batches: images and labels, on which scores and truth are taken.
        criterion: see ``tc.Importance``.
        seed: see ``tc.Importance``.
        check: called again and again; what it raises ends this.
        progress: show bars.
    """

    def loss_fn(outputs: Any, labels: Tensor) -> Tensor:
        check()
        return F.cross_entropy(main_output(outputs), labels)

    try:
        found = compare(
            model, groups, loss_fn, batches, [criterion, "magnitude"], budgets={}, seed=seed, progress=progress
        )
    except TaylorError as error:  # a line of the report is no reason to lose a run
        return OracleAgreement(note=str(error))
    rows = [found[name] for name in (criterion, "magnitude")]
    values = [None if row.agreement is None else row.agreement.overall.spearman for row in rows]
    return OracleAgreement(values[0], values[1], rows[0].reason or None)


@dataclasses.dataclass(frozen=True)
class ScoringCost:
    """Median milliseconds of a training step without scores, and what scores add to it in per cent."""

    step_ms: float
    percent: float


def scoring_cost(
    model: nn.Module,
    groups: Groups,
    batch: Batch,
    criterion: str,
    source: Any = "auto",
    pairs: int = 40,
    seconds: float = 5.0,
) -> ScoringCost:
    """What scoring adds to a training step: steps with and without it in turns, median difference of neighbours.

    Args:
        model: in train mode and free of hooks; two copies of it are trained, itself is left alone.
        groups: of the model.
        batch: images and labels on the model's device.
        criterion: see ``tc.Importance``.
        source: see ``tc.Importance``.
        pairs: neighbours at most.
        seconds: stop after this long, but not before three pairs.
    """
    plain, scored = copy.deepcopy(model).train(), copy.deepcopy(model).train()
    estimator = Importance(scored, groups, criterion, source=source)
    without = TrainingStep(plain, torch.optim.SGD(plain.parameters(), lr=1e-4, momentum=0.9))
    with_scores = TrainingStep(scored, torch.optim.SGD(scored.parameters(), lr=1e-4, momentum=0.9), backward=estimator)

    def run(step: Step) -> float:
        return _step_ms(step, batch)

    base: list[float] = []
    extra: list[float] = []
    begin = time.perf_counter()
    with _random_numbers_apart(batch[0].device):
        run(without), run(with_scores)
        while len(base) < pairs and (len(base) < 3 or time.perf_counter() - begin < seconds):
            if len(base) % 2:
                b = run(with_scores)
                a = run(without)
            else:
                a = run(without)
                b = run(with_scores)
            base.append(a)
            extra.append(b - a)
    estimator.close()
    median = statistics.median(base)
    return ScoringCost(median, 100 * statistics.median(extra) / median)


def training_step_ms(model: nn.Module, batch: Batch, steps: int = 40, seconds: float = 5.0) -> float:
    """Median milliseconds of a training step of a model, compact or masked ones included; a copy of it is trained.

    Args:
        model: on the batch's device.
        batch: images and labels.
        steps: at most.
        seconds: stop after this long, but not before three steps.
    """
    trained = copy.deepcopy(model).train()
    step = TrainingStep(trained, torch.optim.SGD(trained.parameters(), lr=1e-4, momentum=0.9))
    times: list[float] = []
    begin = time.perf_counter()
    with _random_numbers_apart(batch[0].device):
        _step_ms(step, batch)
        while len(times) < steps and (len(times) < 3 or time.perf_counter() - begin < seconds):
            times.append(_step_ms(step, batch))
    return statistics.median(times)


def _random_numbers_apart(device: torch.device) -> AbstractContextManager[None]:
    """How many steps there are is no matter of the run's numbers; other GPUs' aren't drawn, nor even looked at."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def _step_ms(step: Step, batch: Batch) -> float:
    start = time.perf_counter()
    step(*batch)
    device = batch[0].device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) * 1e3
