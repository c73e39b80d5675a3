"""Which criterion is right about a model? ``tc.compare``: every criterion against the oracle, with what it costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from taylor_cuda.errors import BudgetError, InputError, TaylorError
from taylor_cuda.graph.groups import Groups, named_tensors
from taylor_cuda.graph.mask import masked
from taylor_cuda.graph.recorder import copy_model, undisturbed
from taylor_cuda.importance import CRITERIA, Importance
from taylor_cuda.importance.criteria import find_criterion
from taylor_cuda.planning import parse_budget, plan
from taylor_cuda.study.batches import LossFn, evaluating, mini_batches
from taylor_cuda.study.comparison import After, Comparison, Row
from taylor_cuda.study.correlation import agreement
from taylor_cuda.study.oracle import check_study, oracle

__all__ = ["BUDGETS", "compare", "criteria_named", "score"]

BUDGETS: Mapping[str, Sequence[float]] = {"macs": (0.9, 0.75, 0.5)}

Metric = Callable[[Any, Any], Any]
"""``metric(outputs, targets)``: the mean of something over a mini-batch, a number or a scalar tensor."""


def compare(
    model: nn.Module,
    groups: Groups,
    loss_fn: LossFn,
    batches: Iterable[Any],
    criteria: Sequence[str] | str | None = None,
    *,
    budgets: Mapping[str, float | Sequence[float]] = BUDGETS,
    truth: Mapping[str, Tensor] | None = None,
    metric: Metric | None = None,
    loss: Any = None,
    seed: int = 0,
    progress: bool = False,
    resume: str | Path | None = None,
) -> Comparison:
    """Compare what criteria say about every unit with what its removal does to the loss.

    Scores are squares of a predicted change of the loss, so they are correlated with the square of the true change
    (ranks, and with them Spearman and Kendall, are those of its size). Each criterion sees the batches once, in eval
    mode, on a copy of the model with every parameter trainable; then the least valued units go, until each budget
    holds, and the loss is taken again without any fine-tuning. The model itself is left as it is.

    Args:
        model: the traced module itself.
        groups: from ``tc.trace`` of this model.
        loss_fn: ``loss_fn(outputs, targets)``, the mean loss of a mini-batch as a scalar tensor.
        batches: ``(inputs, targets)`` pairs as ``tc.oracle`` takes them; read into memory once.
        criteria: names; ``None``: all but those that take a backward pass a unit; ``"all"``: those too.
        budgets: fractions of the original model that stay, by ``"macs"``, ``"params"``, ``"channels"``; one or several
            each, met one at a time.
        truth: ``{group: signed loss change [size]}`` of ``tc.oracle`` on these batches; ``None``: measured here.
        metric: ``metric(outputs, targets)``, the mean of something else over a mini-batch, such as accuracy; taken
            wherever the loss is.
        loss: what ``tc.Importance`` is told of the loss; ``None``: ``loss_fn``.
        seed: of ``"random"`` and of random probes.
        progress: show bars.
        resume: see ``tc.oracle``, which takes most of the time.

    Raises:
        InputError: an argument that can't be used. A criterion that this model can't have is no error: its row says
            why.

    Source: the tables 1 and 2 of Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019.
    """
    check_study(model, groups, loss_fn, "compare")
    names, wanted = criteria_named(criteria), _single_budgets(budgets)
    held = list(batches)
    started = perf_counter()
    if truth is None:
        truth = oracle(model, groups, loss_fn, held, progress=progress, resume=resume)
    oracle_seconds = perf_counter() - started
    squares = {name: change.detach().double().square() for name, change in truth.items()}
    agreement(squares, {group.name: torch.empty(group.size) for group in groups})  # raises unless it fits
    job = _Job(model, groups, loss_fn, held, wanted, metric, loss if loss is not None else loss_fn, seed)
    intact, at_best = job.measure(None), job.after(squares)
    rows = []
    with tqdm(names, desc="compare", leave=False, disable=not progress) as bar:
        for name in bar:
            bar.set_postfix_str(name)
            rows.append(job.row(name, squares))
    return Comparison(
        rows=tuple(sorted(rows, key=_rank)),
        truth={name: truth[name].detach().double().cpu() for name in groups.sizes()},
        intact=intact,
        oracle_after=at_best,
        examples=job.examples,
        batches=len(held),
        oracle_seconds=oracle_seconds,
    )


def criteria_named(criteria: Sequence[str] | str | None) -> list[str]:
    """The names that ``compare`` is asked for, each once.

    Raises:
        InputError: one that there isn't, or none.
    """
    if criteria is None:
        return [name for name, criterion in CRITERIA.items() if criterion.curvature != "hessian"]
    if criteria == "all":
        return list(CRITERIA)
    given = [criteria] if isinstance(criteria, str) else list(criteria)
    names = list(dict.fromkeys(find_criterion(name).name for name in given))
    if not names:
        raise InputError("criteria: wanted at least one name")
    return names


def score(
    model: nn.Module,
    groups: Groups,
    loss_fn: LossFn,
    batches: Iterable[Any],
    criterion: str,
    *,
    loss: Any = None,
    seed: int = 0,
) -> tuple[dict[str, Tensor], float]:
    """What one criterion says after one pass over the batches, and the seconds that this took, all included.

    Args:
        model: left as it is: the pass runs on a copy, in eval mode, with every parameter trainable.
        groups: from ``tc.trace`` of this model.
        loss_fn: ``(outputs, targets)`` to the mean loss.
        batches: ``(inputs, targets)`` pairs as ``tc.oracle`` takes them.
        criterion: see ``tc.Importance``.
        loss: see ``tc.Importance``; ``None``: ``loss_fn``.
        seed: see ``tc.Importance``.
    """
    twin, device = _twin(model)
    with undisturbed(twin), torch.enable_grad():
        started = perf_counter()
        estimator = Importance(twin, groups, criterion, seed=seed, loss=loss_fn if loss is None else loss)
        try:
            if estimator.criterion.gradient:
                for batch in mini_batches(batches, device):
                    outputs = twin(*batch.args, **batch.kwargs)
                    estimator.backward(loss_fn(outputs, batch.targets), outputs)
                    twin.zero_grad()
            scores = {name: values.cpu() for name, values in estimator.scores().items()}
        finally:
            estimator.close()
        return scores, perf_counter() - started


def _twin(model: nn.Module) -> tuple[nn.Module, torch.device]:
    """A copy to differentiate, and its device."""
    twin = copy_model(model).eval()
    for parameter in twin.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
        parameter.grad = None
    return twin, next(iter(named_tensors(twin).values())).device


def _single_budgets(budgets: Mapping[str, float | Sequence[float]]) -> dict[str, dict[str, float]]:
    """``{"macs=0.9": {"macs": 0.9}, …}``."""
    single = {}
    for name, fractions in budgets.items():
        for fraction in fractions if isinstance(fractions, Sequence) else (fractions,):
            single[f"{name}={fraction:g}"] = parse_budget({name: fraction})
    return single


def _rank(row: Row) -> tuple[bool, float]:
    rho = math.nan if row.agreement is None else row.agreement.overall.spearman
    return row.agreement is None, math.inf if math.isnan(rho) else -rho


class _Job:
    """What is the same for all criteria."""

    def __init__(
        self,
        model: nn.Module,
        groups: Groups,
        loss_fn: LossFn,
        batches: Sequence[Any],
        budgets: Mapping[str, Mapping[str, float]],
        metric: Metric | None,
        loss: Any,
        seed: int,
    ) -> None:
        self._model, self._groups, self._loss_fn, self._batches = model, groups, loss_fn, batches
        self._budgets, self._metric, self._loss, self._seed = budgets, metric, loss, seed
        self.examples = sum(batch.examples for batch in mini_batches(batches, torch.device("meta")))
        if not self.examples:
            raise InputError("compare: batches: wanted at least one example, got none")

    def plain_seconds(self) -> float:
        """One forward and one backward pass of every batch; one batch more, to warm up, isn't counted."""
        twin, device = _twin(self._model)
        with undisturbed(twin), torch.enable_grad():
            started = perf_counter()
            for index, batch in enumerate(mini_batches([self._batches[0], *self._batches], device)):
                if index == 1:
                    _wait(device)
                    started = perf_counter()
                self._loss_fn(twin(*batch.args, **batch.kwargs), batch.targets).backward()
                twin.zero_grad()
            _wait(device)
            return perf_counter() - started

    def row(self, name: str, squares: Mapping[str, Tensor]) -> Row:
        """Everything about one criterion."""
        beside = self.plain_seconds()
        try:
            scores, seconds = score(
                self._model, self._groups, self._loss_fn, self._batches, name, loss=self._loss, seed=self._seed
            )
            return Row(name, "", seconds, beside, agreement(scores, squares), self.after(scores), scores)
        # Beside our own refusals: ops without a second derivative, and memory that doesn't suffice, are RuntimeErrors
        # of PyTorch. The model as such has run before.
        except (TaylorError, RuntimeError) as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            return Row(name, lines[0])

    def after(self, scores: Mapping[str, Tensor]) -> dict[str, After | None]:
        """Loss and metric when each budget was met by these scores; ``None`` where it can't be."""
        found: dict[str, After | None] = {}
        for label, budget in self._budgets.items():
            try:
                decided = plan(self._model, self._groups, scores, budget, round_to=1, min_keep=1)
            except BudgetError:
                found[label] = None
            else:
                found[label] = self.measure(decided)
        return found

    def measure(self, decided: Any) -> After:
        """Mean loss and metric over all examples, with what a plan drops off."""
        model, metric = self._model, self._metric
        device = next(iter(named_tensors(model).values())).device
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        keep = {} if decided is None else decided
        with evaluating(model), masked(model, self._groups, keep):
            for batch in mini_batches(self._batches, device):
                outputs = model(*batch.args, **batch.kwargs)
                values = [self._loss_fn(outputs, batch.targets)]
                values.append(torch.zeros(()) if metric is None else torch.as_tensor(metric(outputs, batch.targets)))
                sums += batch.examples * torch.stack([value.detach().reshape(()).to(sums) for value in values])
        mean_loss, mean_metric = (sums / self.examples).tolist()
        return After(mean_loss, None if metric is None else mean_metric)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
