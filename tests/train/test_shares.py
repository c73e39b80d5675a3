import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from taylor_cuda.errors import InputError
from taylor_cuda.train.digits import TensorData
from taylor_cuda.train.shares import Share, epoch_order, epoch_steps, seed_of

SPLITS = [(1, 1), (2, 1), (2, 2), (4, 1)]


def numbered(size, batch, share, seed=0, val=7):
    """Examples whose label is their number, and whose image shows it everywhere."""
    images = torch.arange(max(size, val)).float()[:, None, None, None].expand(-1, 1, 3, 3) + 1
    labels = torch.arange(max(size, val))
    train, held = ((images[:count], labels[:count]) for count in (size, val))
    return TensorData("numbers", ("only",), train, held, batch, seed, share)


def steps_over_ranks(size, batch, ranks, micro, epoch=0, start=0):
    """``[step][part]`` labels of all ranks' micro-batches, in the order of the minibatch's slices."""
    of_rank = [
        list(numbered(size, batch, Share(rank, ranks, micro), seed=5).train(epoch, start)) for rank in range(ranks)
    ]
    assert len({len(batches) for batches in of_rank}) == 1
    steps = []
    for first in range(0, len(of_rank[0]), micro):
        steps.append([of_rank[rank][first + m] for m in range(micro) for rank in range(ranks)])
    return steps


@given(st.integers(1, 90), st.integers(1, 6), st.integers(1, 4), st.integers(1, 4), st.integers(0, 3))
def test_ranks_and_micro_batches_cover_an_epoch_exactly(size, slice_size, ranks, micro, epoch):
    parts = ranks * micro
    batch = slice_size * parts
    if size < parts:
        with pytest.raises(InputError, match=f"at least {parts} training examples"):
            numbered(size, batch, Share(0, ranks, micro))
        return
    steps = steps_over_ranks(size, batch, ranks, micro, epoch)
    whole = numbered(size, batch, Share(0, ranks, micro), seed=5)
    assert len(steps) == whole.steps_per_epoch == max(1, size // batch)
    expected = slice_size if size >= batch else size // parts
    assert {len(labels) for step in steps for _, labels in step} == {expected}
    seen = torch.cat([labels for step in steps for _, labels in step])
    assert torch.equal(seen, epoch_order(size, 5, epoch)[: len(seen)])  # so none comes twice
    assert len(seen) == len(steps) * expected * parts


@pytest.mark.parametrize("epoch", [0, 3])
def test_a_step_takes_the_same_examples_however_it_is_split(epoch):
    def joined(ranks, micro, start=0):
        steps = steps_over_ranks(50, 12, ranks, micro, epoch, start)
        return [tuple(torch.cat(part) for part in zip(*step, strict=True)) for step in steps]

    whole = joined(1, 1)
    assert len(whole) == 4
    for ranks, micro in SPLITS[1:]:
        for start in (0, 3):
            steps = joined(ranks, micro, start)
            assert len(steps) == 4 - start
            for (a, x), (b, y) in zip(whole[start:], steps, strict=True):
                assert torch.equal(x, y)
                assert torch.equal(a, b)  # and they were moved alike


def test_each_step_and_each_epoch_moves_its_images_anew():
    images = torch.rand(1, 1, 5, 5).expand(32, -1, -1, -1)
    moved = set()
    for seed in range(2):
        data = TensorData(
            "same", ("only",), (images, torch.zeros(32).long()), (images, torch.zeros(32).long()), 16, seed
        )
        moved |= {batch.numpy().tobytes() for epoch in range(2) for batch, _ in data.train(epoch)}
    assert len(moved) == 2 * 2 * 2


def test_micro_batches_are_contiguous_slices_ranks_apart():
    step = torch.arange(12)
    assert [part.tolist() for part in Share(1, 2, 3).of(step)] == [[2, 3], [6, 7], [10, 11]]
    assert [part.tolist() for part in Share(0, 1, 2).of(step)] == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]


def test_a_short_set_drops_what_does_not_split():
    assert [len(step) for step in epoch_steps(10, 64, 0, 0, Share(0, 2, 2))] == [8]
    assert [len(step) for step in epoch_steps(70, 64, 0, 0, Share(0, 2, 2))] == [64]


@pytest.mark.parametrize("ranks", [1, 2, 3, 9])
def test_all_ranks_together_validate_on_each_example_once(ranks):
    seen = []
    for rank in range(ranks):
        batches = list(numbered(20, 18, Share(rank, ranks)).val())
        assert all(len(labels) for _, labels in batches)
        seen += [label for _, labels in batches for label in labels.tolist()]
    assert sorted(seen) == list(range(7))


def test_every_rank_measures_on_all_of_the_training_set():
    for rank in range(2):
        batches = list(numbered(20, 12, Share(rank, 2, 2)).unaugmented())
        assert [len(labels) for _, labels in batches] == [3] * 6 + [2]
        assert sorted(torch.cat([labels for _, labels in batches]).tolist()) == list(range(20))


def test_shares_that_make_no_sense():
    for share in ({"ranks": 0}, {"micro": 0}, {"rank": 2, "ranks": 2}, {"rank": -1}):
        with pytest.raises(InputError, match=r"(ranks|micro|rank): wanted a number"):
            Share(**share)
    with pytest.raises(InputError, match=r"multiple of 6, for 2 ranks with 3 micro-batches each, got 16"):
        Share(0, 2, 3).micro_batch(16)


def test_seeds_differ():
    seeds = {seed_of(seed, epoch, index) for seed in range(4) for epoch in range(4) for index in range(4)}
    assert len(seeds) == 64
    assert all(0 <= seed_of(seed, 10**6, 10**6) < 2**63 for seed in (-5, 10**30))
