"""How narrow may each layer be? ``tc.sensitivity``: the loss against the width of one group at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from taylor_cuda.errors import InputError
from taylor_cuda.files import replacing
from taylor_cuda.graph.groups import ChannelGroup, Groups, named_tensors
from taylor_cuda.study.batches import LossFn, evaluating, mini_batches
from taylor_cuda.study.compare import score
from taylor_cuda.study.comparison import plain
from taylor_cuda.study.naive import loss_without
from taylor_cuda.study.oracle import check_study
from taylor_cuda.study.tally import study_key
from taylor_cuda.text import table

__all__ = ["FRACTIONS", "Sensitivity", "sensitivity"]

FRACTIONS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)


@dataclass(frozen=True)
class Sensitivity:
    """The loss with one group narrowed and all others whole.

    Attributes:
        intact: the mean loss of the model as it is.
        fractions: of a group's units that were kept, falling.
        sizes: units of each group.
        kept: ``{group: units kept at each fraction}``.
        losses: ``{group: mean loss at each fraction}``; NaN where narrowing stopped early.
    """

    intact: float
    fractions: tuple[float, ...]
    sizes: dict[str, int]
    kept: dict[str, list[int]]
    losses: dict[str, list[float]]

    def table(self) -> str:
        """The loss of each group at each fraction."""
        rows = [[name, *(_number(loss) for loss in losses)] for name, losses in self.losses.items()]
        head = f"loss with one group narrowed (intact {_number(self.intact)})"
        return table([head, *(f"{fraction:g}" for fraction in self.fractions)], rows)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values that JSON can hold; a number that isn't finite is ``None``."""
        result: dict[str, Any] = plain(self)
        return result

    def save(self, path: str | Path) -> None:
        """Write ``to_dict`` as JSON, whole or not at all."""
        _write(Path(path), self.to_dict())


def _number(loss: float) -> str:
    return "-" if math.isnan(loss) else f"{loss:.4g}"


def sensitivity(
    model: nn.Module,
    groups: Groups,
    loss_fn: LossFn,
    batches: Iterable[Any],
    scores: Mapping[str, Tensor] | None = None,
    *,
    criterion: str = "taylor_fo",
    fractions: Sequence[float] = FRACTIONS,
    stop_above: float = math.inf,
    cache: str | Path | None = None,
    loss: Any = None,
    seed: int = 0,
    progress: bool = False,
) -> Sensitivity:
    """Narrow each group alone, least valued units first, and take the loss at every width; nothing is fine-tuned.

    A unit goes with everything coupled to it, so a group is a layer, or all layers of a residual stream at once.
    Removed means what ``tc.cut`` makes of it. The model runs in eval mode and is left as it was.

    Args:
        model: the traced module itself.
        groups: from ``tc.trace`` of this model.
        loss_fn: ``loss_fn(outputs, targets)``, the mean loss of a mini-batch as a scalar tensor.
        batches: ``(inputs, targets)`` pairs as ``tc.oracle`` takes them; read into memory once.
        scores: for every group a tensor ``[size]``, higher = keep; ``None``: those of ``criterion`` on these batches.
        criterion: see ``tc.Importance``.
        fractions: of a group's units to keep, in (0, 1); at least one unit stays.
        stop_above: a group whose loss exceeds this isn't narrowed any further.
        cache: a JSON file to keep results in and to take them from, group by group, under a hash of weights, groups,
            scores, batches and options: a run that was interrupted goes on from there.
        loss: what ``tc.Importance`` is told of the loss; ``None``: ``loss_fn``.
        seed: see ``tc.Importance``.
        progress: show a bar.

    Raises:
        InputError: an argument that can't be used, or a cache that this didn't write.
    """
    check_study(model, groups, loss_fn, "sensitivity")
    falling = _falling(fractions)
    held = list(batches)
    if scores is None:
        scores, _ = score(model, groups, loss_fn, held, criterion, loss=loss, seed=seed)
    drops = {group.name: _drops(group, scores, falling) for group in groups}
    device = next(iter(named_tensors(model).values())).device
    with evaluating(model):
        there = list(mini_batches(held, device))
        if not there:
            raise InputError("sensitivity: batches: wanted at least one example, got none")

        def mean_loss(without: Mapping[str, Tensor]) -> float:
            parts = [batch.examples * loss_without(model, groups, loss_fn, batch, without).double() for batch in there]
            return float(torch.stack(parts).sum()) / sum(batch.examples for batch in there)

        intact = mean_loss({})
        chosen = {name: [drop.tolist() for drop in rows] for name, rows in drops.items()}
        digests = [batch.digest() for batch in there]
        key = study_key(model, groups, "sensitivity", chosen, stop_above, intact, digests)
        known = _Cache(None if cache is None else Path(cache), key)
        with tqdm(groups, desc="sensitivity", leave=False, disable=not progress) as bar:
            for group in bar:
                bar.set_postfix_str(group.name)
                if group.name not in known.losses:
                    known.add(group.name, _narrow(group.name, drops[group.name], intact, stop_above, mean_loss))
    kept = {name: [int((~drop).sum()) for drop in rows] for name, rows in drops.items()}
    return Sensitivity(intact, falling, groups.sizes(), kept, {name: known.losses[name] for name in drops})


def _falling(fractions: Sequence[float]) -> tuple[float, ...]:
    falling = tuple(sorted({float(fraction) for fraction in fractions}, reverse=True))
    if not falling or not all(0 < fraction < 1 for fraction in falling):
        raise InputError(f"fractions: wanted numbers above 0 and below 1, at least one, got {list(fractions)}")
    return falling


def _drops(group: ChannelGroup, scores: Mapping[str, Tensor], fractions: Sequence[float]) -> list[Tensor]:
    """For each fraction a mask ``[size]`` on the CPU, True = removed; of equal scores the later units go first."""
    values = scores.get(group.name)
    got = "none" if values is None else f"shape {list(values.shape)}" if values.shape != (group.size,) else ""
    if values is None or got or bool(values.isnan().any()):
        got = got or "NaN among them"
        raise InputError(f"scores: wanted {group.size} numbers for group {group.name!r}, got {got}")
    best = values.detach().cpu().double().sort(descending=True, stable=True).indices
    masks = []
    for fraction in fractions:
        mask = torch.ones(group.size, dtype=torch.bool)
        mask[best[: max(1, math.floor(fraction * group.size + 0.5))]] = False
        masks.append(mask)
    return masks


def _narrow(
    name: str,
    drops: Sequence[Tensor],
    intact: float,
    stop_above: float,
    mean_loss: Callable[[Mapping[str, Tensor]], float],
) -> list[float]:
    """The loss at each width; a width that came before isn't measured again."""
    losses: list[float] = []
    count, last = 0, intact
    for drop in drops:
        if last > stop_above or math.isnan(last):
            losses.append(math.nan)
            continue
        if int(drop.sum()) != count:
            count, last = int(drop.sum()), mean_loss({name: drop})
        losses.append(last)
    return losses


class _Cache:
    """Losses by group under one key of a JSON file, or nowhere."""

    def __init__(self, path: Path | None, key: str) -> None:
        self._path, self._key = path, key
        self._all: dict[str, dict[str, list[float | None]]] = {}
        if path is not None and path.is_file():
            try:
                self._all = dict(json.loads(path.read_text(encoding="utf-8"))["sensitivity"])
                mine = {str(name): [_loss(loss) for loss in row] for name, row in self._all.get(key, {}).items()}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise InputError(f"cache: {path} isn't what tc.sensitivity writes: {error!r}") from error
            self.losses = mine
        else:
            self.losses = {}

    def add(self, group: str, losses: list[float]) -> None:
        """Remember one group, in the file too."""
        self.losses[group] = losses
        if self._path is not None:
            self._all[self._key] = plain(self.losses)
            _write(self._path, {"sensitivity": self._all})


def _loss(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _write(path: Path, value: Any) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
