"""Ranks that have a part of each batch decide what one process decides on whole batches, from the same scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.loops.loop import Net
from tests.loops.replicated import GroupNormNet, Run, Told
from tests.loops.synced import on_cpu
from tests.ranks import check_passed, on_ranks

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="no gloo")

RANKS = 4
ALONE = {
    f"{net.__name__}, {criterion}": Run(net, criterion)
    for net in (Net, GroupNormNet)
    for criterion in ("taylor_fo", "taylor_fg", "taylor_so")
}
IN_TRAIN_MODE = {
    f"{criterion}, SyncBatchNorm": Run(Net, criterion, prepare=nn.Module.train)
    for criterion in ("taylor_fo", "taylor_fg", "taylor_so")
}
COMPACT = Run(Net, "taylor_so", options={"mode": "compact"})
VARIANTS = {
    "bucket views": Run(Net, "taylor_so", 2, wrapping={"gradient_as_bucket_view": True}),
    "unused parameters": Run(Net, "taylor_so", 2, wrapping={"find_unused_parameters": True}),
    "static graph": Run(Net, "taylor_so", wrapping={"static_graph": True}),
    "static graph, accumulated": Run(
        Net, "taylor_so", 2, wrapping={"static_graph": True, "gradient_as_bucket_view": True}
    ),
    "compact": COMPACT,
    "static graph, from parameters": Run(Net, micro=2, wrapping={"static_graph": True}),
}
"""Each on one pair of ranks, two at a time."""
LONG = {
    "50 steps, four ranks": [Run(Net, "taylor_so", 2, {"every": 50}, after=50)],
    "50 steps, two ranks": [
        Run(Net, criterion, 1, {"every": 50}, after=50) for criterion in ("taylor_fo", "taylor_fg")
    ],
}
"""Cuts far apart, after each of which the ranks have to stay one model."""


TWO_AT_A_TIME = tuple(zip(list(VARIANTS)[::2], list(VARIANTS)[1::2], strict=True))
CASES = [*ALONE, *(" and ".join(names) for names in TWO_AT_A_TIME), *IN_TRAIN_MODE, *LONG]


def equals_one_process(name: str, pair: Any, told: dict[str, Told]) -> None:
    """On four ranks and on two, one micro-batch and two."""
    for micro in (1, 2):
        replace(ALONE[name], micro=micro).go(dist.group.WORLD).check(told[name])
    replace(ALONE[name], micro=1 + dist.get_rank() // 2).go(pair).check(told[name])


def however_it_is_wrapped(names: tuple[str, str], pair: Any, told: dict[str, Told]) -> None:
    run = VARIANTS[names[dist.get_rank() // 2]]
    run.go(pair).check(told["compact" if run is COMPACT else f"{run.net.__name__}, {run.criterion}"])


def of_the_statistics_of_all(name: str, told: dict[str, Told]) -> None:
    """With ``nn.SyncBatchNorm``, train mode on parts of a batch is train mode on the batch."""
    with on_cpu():
        run = replace(IN_TRAIN_MODE[name], prepare=lambda net: nn.SyncBatchNorm.convert_sync_batchnorm(net).train())
        run.go(dist.group.WORLD).check(told[name])


def cases(rank: int, folder: Path) -> dict[str, Callable[[], None]]:
    told = torch.load(folder / "told.pt", weights_only=False)
    pair = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]
    found: dict[str, Callable[[], None]] = {name: partial(equals_one_process, name, pair, told) for name in ALONE}
    found |= {" and ".join(names): partial(however_it_is_wrapped, names, pair, told) for names in TWO_AT_A_TIME}
    found |= {name: partial(of_the_statistics_of_all, name, told) for name in IN_TRAIN_MODE}
    for name, runs in LONG.items():
        group = pair if len(runs) > 1 else dist.group.WORLD
        found[name] = partial(runs[rank // 2 % len(runs)].go, group)
    return found


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    alone = {**ALONE, **IN_TRAIN_MODE, "compact": COMPACT}
    torch.save({name: run.go() for name, run in alone.items()}, folder / "told.pt")
    on_ranks(cases, folder, seconds=300, ranks=RANKS)
    return folder


@pytest.mark.parametrize("rank", range(RANKS))
@pytest.mark.parametrize("case", CASES)
def test_ranks_decide_what_one_process_does(case: str, rank: int, outcomes: Path) -> None:
    check_passed(case, rank, outcomes)
