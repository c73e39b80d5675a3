"""Ranks that ``torchrun`` starts anew find each other, whatever the ones before have left in the store."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from taylor_cuda.errors import TaylorError
from taylor_cuda.train import launch

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="no torch.distributed")


def come_together(store, order=(2, 0, 1)):
    with ThreadPoolExecutor(3) as pool:
        coming = {rank: pool.submit(launch.fresh_store, store, rank, 3) for rank in order}
        found = [coming[rank].result(timeout=60) for rank in range(3)]
    found[0].set("address", "of rank 0")
    assert [part.get("address") for part in found] == [b"of rank 0"] * 3
    return found[0]


def test_every_generation_has_a_part_of_its_own():
    store = dist.HashStore()
    for order in ((2, 0, 1), (0, 1, 2), (1, 2, 0)):
        come_together(store, order)
    first, second = come_together(store), come_together(store)
    first.set("address", "of the dead")
    assert second.get("address") == b"of rank 0"


def test_those_who_died_while_they_came_together_are_not_waited_for():
    """Rank 0 of before had named a part, and rank 1 had come; rank 2 of now is here first."""
    store = dist.HashStore()
    store.set("part", "dead")
    store.set("dead/1", "another")
    come_together(store)
    store.set("part", "dead")
    store.set("dead/present", "one another third")
    come_together(store)


def test_who_stays_away_is_an_error(monkeypatch):
    monkeypatch.setattr(launch, "TIMEOUT", timedelta(seconds=0.1))
    with pytest.raises(TaylorError, match="not all 2 ranks came"):
        launch.fresh_store(dist.HashStore(), 0, 2)
