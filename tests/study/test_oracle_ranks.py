"""Two ranks share the units out and get what one process gets."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import taylor_cuda as tc
from taylor_cuda.study.evaluate import Evaluator
from tests.loops.loop import Net, batches
from tests.ranks import check_passed, on_ranks

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="no gloo")


def start() -> tuple[Net, tc.Groups]:
    torch.manual_seed(0)
    model = Net().eval()
    return model, tc.trace(model, torch.zeros(2, 3, 6, 6))


def two_ranks_equal_one(rank: int, folder: Path) -> None:
    model, groups = start()
    data = batches(2)
    expected = tc.oracle(model, groups, F.cross_entropy, data, per="batch", form="squared")
    asked = []
    losses = Evaluator.losses
    Evaluator.losses = lambda self, name, units: (asked.append(len(units)), losses(self, name, units))[1]
    try:
        found = tc.oracle(
            model,
            groups,
            F.cross_entropy,
            data,
            per="batch",
            form="squared",
            process_group=dist.group.WORLD,
            resume=folder / "oracle.pt",
        )
    finally:
        Evaluator.losses = losses
    assert sum(asked) == 2 * sum((group.size + 1 - rank) // 2 for group in groups)
    for name, value in expected.items():
        assert (value - found[name]).abs().max() < 1e-7, name
    both = torch.cat(list(found.values()))
    other = [torch.empty_like(both) for _ in range(2)]
    dist.all_gather(other, both)
    assert torch.equal(other[0], other[1])
    assert (folder / f"oracle.pt.{rank}of2").exists()


def other_batches_are_refused(rank: int, folder: Path) -> None:
    model, groups = start()
    with pytest.raises(tc.InputError, match="the same on every rank"):
        tc.oracle(model, groups, F.cross_entropy, batches(1, seed=rank), process_group=dist.group.WORLD)


def a_failure_on_one_rank_reaches_the_other(rank: int, folder: Path) -> None:
    model, groups = start()
    data = batches(1) if rank == 0 else [3]
    with pytest.raises(tc.TaylorError, match=r"wanted \(inputs, targets\)"):
        tc.oracle(model, groups, F.cross_entropy, data, process_group=dist.group.WORLD)


CASES: dict[str, Callable[[int, Path], None]] = {
    "equal": two_ranks_equal_one,
    "batches": other_batches_are_refused,
    "failure": a_failure_on_one_rank_reaches_the_other,
}


def cases(rank: int, folder: Path) -> dict[str, Callable[[], None]]:
    return {name: partial(case, rank, folder) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    on_ranks(cases, folder, seconds=60)
    return folder


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("case", CASES)
def test_two_ranks(case: str, rank: int, outcomes: Path) -> None:
    check_passed(case, rank, outcomes)
