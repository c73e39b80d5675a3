"""How well an estimate agrees with the truth: Pearson, Spearman and Kendall, over all units and group by group.

Everything is computed in float64, in time O(n log n), on the device of the values. A correlation is NaN where it isn't
defined: fewer than two values, a vector that is constant, or one with a NaN in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from taylor_cuda.errors import InputError

__all__ = ["Agreement", "Correlation", "agreement", "kendall", "pearson", "spearman"]


def pearson(x: Tensor, y: Tensor) -> float:
    """Pearson's r: the covariance over the product of the standard deviations.

    Args:
        x: ``[n]``, any real dtype.
        y: ``[n]``.

    Raises:
        InputError: not two vectors of one length.
    """
    x, y = _checked(x, y)
    if not _defined(x, y):
        return math.nan
    x, y = _direction(x), _direction(y)
    return max(-1.0, min(1.0, float(x @ y)))


def spearman(x: Tensor, y: Tensor) -> float:
    """Spearman's ρ: Pearson's r of the ranks; equal values share the mean of their ranks. See ``pearson``."""
    x, y = _checked(x, y)
    return pearson(_ranks(x), _ranks(y)) if _defined(x, y) else math.nan


def kendall(x: Tensor, y: Tensor) -> float:
    """Kendall's τ_b: pairs in the same order less those in the opposite one, over √((pairs untied in x)(… in y)).

    See ``pearson``. Source: Kendall, "The treatment of ties in ranking problems", Biometrika 1945.
    """
    x, y = _checked(x, y)
    if not _defined(x, y):
        return math.nan
    first, second = _dense_ranks(x), _dense_ranks(y)
    pairs = len(x) * (len(x) - 1) // 2
    tied_x, tied_y = _tied_pairs(first), _tied_pairs(second)
    both = _tied_pairs(first * len(x) + second)
    # In the order of x, and of y where x is tied, exactly the pairs of opposite order are inversions of y.
    order = torch.argsort(first * len(x) + second)
    opposite = _inversions(second[order])
    same = pairs - tied_x - tied_y + both - opposite
    return (same - opposite) / math.sqrt((pairs - tied_x) * (pairs - tied_y))


def _checked(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if x.dim() != 1 or x.shape != y.shape:
        raise InputError(f"correlation: wanted two vectors of one length, got {list(x.shape)} and {list(y.shape)}")
    return x.detach().double(), y.detach().to(x.device).double()


def _defined(x: Tensor, y: Tensor) -> bool:
    return len(x) > 1 and all(bool(v.isfinite().all()) and bool((v != v[0]).any()) for v in (x, y))


def _direction(x: Tensor) -> Tensor:
    """The vector less its mean, at length one. Scaled first: squares of values like 1e-200 would be zero."""
    x = x / x.abs().max()
    x = x - x.mean()
    direction: Tensor = x / x.norm()
    return direction


def _dense_ranks(x: Tensor) -> Tensor:
    """int64 ``[n]``: the number of distinct smaller values."""
    ranks: Tensor = torch.unique(x, return_inverse=True)[1]
    return ranks


def _ranks(x: Tensor) -> Tensor:
    """float64 ``[n]``: ranks from 1 on, the mean of them where values are equal."""
    dense = _dense_ranks(x)
    counts = torch.bincount(dense)
    last = counts.cumsum(0)
    means: Tensor = (last - (counts - 1) / 2).double()
    return means[dense]


def _tied_pairs(dense: Tensor) -> int:
    _, counts = torch.unique(dense, return_counts=True)
    return int((counts * (counts - 1) // 2).sum())


def _inversions(dense: Tensor) -> int:
    """Pairs i < j with dense[i] > dense[j].

    Bit by bit from the highest: of values that agree in all higher bits, a pair is an inversion exactly where the
    earlier one has a 1 and the later one a 0.
    """
    total = torch.zeros((), dtype=torch.int64, device=dense.device)
    for bit in range(int(dense.max()).bit_length() - 1, -1, -1):
        higher, order = torch.sort(dense >> (bit + 1), stable=True)
        ones = (dense[order] >> bit) & 1
        before = ones.cumsum(0) - ones
        counts = torch.unique_consecutive(higher, return_counts=True)[1]
        start = counts.cumsum(0) - counts
        inside = before - before[start].repeat_interleave(counts)
        total += (inside * (1 - ones)).sum()
    return int(total)


@dataclass(frozen=True)
class Correlation:
    """The three of them; NaN where one isn't defined."""

    pearson: float
    spearman: float
    kendall: float


_KINDS: dict[str, Callable[[Tensor, Tensor], float]] = {"pearson": pearson, "spearman": spearman, "kendall": kendall}


@dataclass(frozen=True)
class Agreement:
    """How an estimate agrees with the truth.

    Attributes:
        overall: over the units of all groups together: can groups be ranked against each other?
        by_group: of each group alone.
        mean: the mean over groups, of those where it is defined.
        defined: in how many groups all three are.
    """

    overall: Correlation
    by_group: dict[str, Correlation]
    mean: Correlation
    defined: int


def agreement(estimate: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> Agreement:
    """Correlate two values of every unit, over all groups together and in each of them.

    Args:
        estimate: ``{group: [size]}``, as ``tc.Importance.scores`` gives.
        truth: the same groups and sizes.

    Raises:
        InputError: the groups or their sizes differ, or there is none.
    """
    names = list(truth)
    if not names or set(names) != set(estimate):
        raise InputError(
            f"correlation: wanted the same groups on both sides, at least one; got {list(estimate)} and {names}"
        )
    for name in names:
        if estimate[name].shape != truth[name].shape:
            got = f"{list(estimate[name].shape)} and {list(truth[name].shape)}"
            raise InputError(f"correlation: wanted as many units on both sides of group {name!r}, got {got}")
    by_group = {name: _correlation(estimate[name], truth[name]) for name in names}
    overall = _correlation(*(torch.cat([side[name].double().cpu() for name in names]) for side in (estimate, truth)))
    found = {kind: [getattr(each, kind) for each in by_group.values()] for kind in _KINDS}
    there = {kind: [value for value in values if not math.isnan(value)] for kind, values in found.items()}
    means = {kind: math.fsum(values) / len(values) if values else math.nan for kind, values in there.items()}
    return Agreement(overall, by_group, Correlation(**means), min(len(values) for values in there.values()))


def _correlation(x: Tensor, y: Tensor) -> Correlation:
    return Correlation(**{kind: function(x, y) for kind, function in _KINDS.items()})
