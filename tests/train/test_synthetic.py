import itertools
import time

import pytest
import torch

from taylor_cuda.errors import InputError
from taylor_cuda.train.data import load_data
from taylor_cuda.train.shares import Share


def test_it_looks_like_imagenet():
    data = load_data("synthetic", 64, image_size=8, share=Share(1, 2, 2))
    assert (data.name, data.shape, data.train_size, data.val_size) == ("synthetic", (3, 8, 8), 1_281_167, 50_000)
    assert (len(data.classes), data.steps_per_epoch, data.unreadable) == (1000, 1_281_167 // 64, {})
    images, labels = next(data.train(0))
    assert (images.shape, images.dtype, labels.shape, labels.dtype) == (
        (16, 3, 8, 8),
        torch.float32,
        (16,),
        torch.int64,
    )
    assert abs(float(images.std()) - 1) < 0.1
    assert len(load_data("synthetic", 64, image_size=8, num_classes=7).classes) == 7
    labels = torch.cat(
        [part for _, part in itertools.islice(load_data("synthetic", 64, num_classes=7, image_size=8).train(0), 4)]
    )
    assert sorted(set(labels.tolist())) == list(range(7))


def test_a_few_batches_come_again_and_again():
    data, again = (load_data("synthetic", 8, seed=2, image_size=8) for _ in range(2))
    batches = list(itertools.islice(data.train(0), 10))
    assert len({images.data_ptr() for images, _ in batches}) == 4
    assert all(torch.equal(a[0], b[0]) for a, b in zip(batches, again.train(0), strict=False))
    first = torch.stack([images for images, _ in batches[:4]])
    assert (first[1:] != first[0]).any()
    for other in (
        load_data("synthetic", 8, seed=3, image_size=8),
        load_data("synthetic", 16, seed=2, image_size=8, share=Share(1, 2)),
    ):
        assert not torch.equal(next(other.train(0))[0], batches[0][0])


def test_an_epoch_can_begin_in_its_middle():
    data = load_data("synthetic", 300_000, image_size=1, share=Share(0, 1, 3))
    whole = [images.data_ptr() for images, _ in data.train(0)]
    assert len(whole) == data.steps_per_epoch * 3 == 12
    assert [images.data_ptr() for images, _ in data.train(0, start=3)] == whole[9:]


@pytest.mark.parametrize("ranks", [1, 3])
def test_ranks_share_the_validation_set(ranks):
    shares = [load_data("synthetic", 3000, image_size=1, share=Share(rank, ranks)) for rank in range(ranks)]
    counts = [sum(len(labels) for _, labels in data.val()) for data in shares]
    assert sum(counts) == 50_000
    assert max(counts) - min(counts) <= 1
    assert sum(len(labels) for _, labels in shares[-1].unaugmented()) == 1_281_167


def test_a_batch_costs_nothing():
    data = load_data("synthetic", 64, image_size=64)
    started = time.process_time()
    assert sum(1 for _ in data.train(0)) == 20_018
    assert (time.process_time() - started) / 20_018 < 50e-6  # making one would take ten milliseconds


def test_batches_are_pinned_where_asked(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor.dtype) or tensor)
    load_data("synthetic", 8, image_size=8, pin_memory=True)
    assert pinned == [torch.float32, torch.int64] * 4


def test_num_classes_has_to_make_sense():
    with pytest.raises(InputError, match="num_classes: wanted a number >= 1, got 0"):
        load_data("synthetic", 8, num_classes=0)
