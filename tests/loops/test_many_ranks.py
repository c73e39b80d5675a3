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

from tests.loops.loop import Net
from tests.loops.replicated import GroupNormNet, Run
from tests.ranks import check_passed, on_ranks

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="no gloo")

RANKS = 4
ALONE = {
    f"{net.__name__}, {criterion}": Run(net, criterion)
    for net in (Net, GroupNormNet)
    for criterion in ("taylor_fo", "taylor_fg", "taylor_so")
}
LONG = {"options": {"every": 50}, "after": 50}
PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "bucket views": ({"wrapping": {"gradient_as_bucket_view": True}}, {"wrapping": {"find_unused_parameters": True}}),
}


def equals_one_process(name: str, groups: list[Any], told: dict[str, Any]) -> None:
    """Four ranks, then two pairs of them; one micro-batch and two."""
    run, mine = ALONE[name], groups[dist.get_rank() // 2]
    for micro in (1, 2):
        replace(run, micro=micro).go(dist.group.WORLD).check(told[name])
    replace(run, micro=1 + dist.get_rank() // 2).go(mine).check(told[name])


def cases(rank: int, folder: Path) -> dict[str, Callable[[], None]]:
    told = torch.load(folder / "told.pt", weights_only=False)
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    found: dict[str, Callable[[], None]] = {name: partial(equals_one_process, name, groups, told) for name in ALONE}
    return found


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory, one_thread_module: None = None) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    torch.save({name: run.go() for name, run in ALONE.items()}, folder / "told.pt")
    on_ranks(cases, folder, seconds=120, ranks=RANKS)
    return folder


@pytest.mark.parametrize("rank", range(RANKS))
@pytest.mark.parametrize("case", ALONE)
def test_ranks_decide_what_one_process_does(case: str, rank: int, outcomes: Path) -> None:
    check_passed(case, rank, outcomes)
