import itertools

import pytest
import torch

from taylor_cuda.errors import InputError
from taylor_cuda.train.data import Share, load_data
from taylor_cuda.train.digits import move_by_one


def test_digits_are_one_fixed_stratified_split():
    first, second = load_data("digits", 64, seed=0), load_data("digits", 64, seed=9)
    assert (first.train_size, first.val_size, first.shape) == (1347, 450, (1, 8, 8))
    assert torch.equal(first.val_set[0], second.val_set[0])
    counts = torch.bincount(first.val_set[1], minlength=10)
    assert counts.min() >= 43
    assert counts.max() <= 46
    train, val = ({tuple(image.flatten().tolist()) for image in part[0]} for part in (first.train_set, first.val_set))
    assert len(train & val) == 0
    assert abs(float(first.train_set[0].mean())) < 1e-5
    assert abs(float(first.train_set[0].std()) - 1) < 1e-5


def test_epochs_differ_and_repeat():
    data, again, other = (
        load_data("digits", 64, seed=3),
        load_data("digits", 64, seed=3),
        load_data("digits", 64, seed=4),
    )
    first = list(data.train(0))
    assert len(first) == data.steps_per_epoch == 1347 // 64
    assert {len(labels) for _, labels in first} == {64}
    for (a, x), (b, y) in zip(first, again.train(0), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(x, y)
    assert not torch.equal(first[0][1], next(data.train(1))[1])
    assert not torch.equal(first[0][1], next(other.train(0))[1])


def test_an_epoch_can_begin_in_its_middle():
    data = load_data("digits", 128)
    whole = list(data.train(2))
    for (a, x), (b, y) in zip(whole[4:], data.train(2, start=4), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(x, y)
    assert list(data.train(2, start=len(whole))) == []


def test_reading_data_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    data = load_data("digits", 128)
    list(data.train(0))
    assert torch.equal(state, torch.get_rng_state())


def test_moving_shifts_whole_images():
    images = torch.zeros(200, 2, 5, 6)
    images[:, 0, 2, 3] = 1.0
    images[:, 1, 2, 3] = 2.0
    images -= 1.0
    moved = move_by_one(images, seed=1)
    assert moved.shape == images.shape
    assert torch.equal(moved, move_by_one(images, seed=1))
    places = set()
    for image in moved:
        assert image.min() == -1.0
        row, column = divmod(int(image[0].argmax()), 6)
        assert image[0, row, column] == 0.0
        assert image[1, row, column] == 1.0  # both channels move together
        assert image.sum() == images[0].sum()
        places.add((row, column))
    assert places == set(itertools.product((1, 2, 3), (2, 3, 4)))


def test_the_training_set_to_measure_on_is_whole_and_unaugmented():
    data = load_data("digits", 64, seed=3)
    batches = list(data.unaugmented())
    images, labels = (torch.cat(part) for part in zip(*batches, strict=True))
    assert [len(labels) for _, labels in batches] == [62] * 5 + [61] * 17
    assert not torch.equal(labels, data.train_set[1])  # a few batches hold every class
    order = torch.randperm(1347, generator=torch.Generator().manual_seed(3 * 1_000_003))
    assert torch.equal(images, data.train_set[0][order])
    assert torch.equal(labels, data.train_set[1][order])


@pytest.mark.parametrize(("name", "value"), [("batch", 1), ("image_size", 0), ("workers", -1)])
def test_sizes_that_make_no_sense(name, value):
    with pytest.raises(InputError, match=f"{name}: wanted a number >="):
        load_data("digits", **{"batch": 4, name: value})


@pytest.mark.parametrize("source", ["digits", "synthetic"])
def test_a_batch_has_to_split_evenly(source):
    assert len(next(load_data(source, 24, image_size=8, share=Share(1, 2, 3)).train(0))[1]) == 4
    with pytest.raises(
        InputError, match=r"batch: wanted a multiple of 6, for 2 ranks with 3 micro-batches each, got 16"
    ):
        load_data(source, 16, image_size=8, share=Share(1, 2, 3))


def test_unknown_sources_say_what_there_is():
    with pytest.raises(
        InputError, match=r"no folder nowhere \(wanted 'digits', 'synthetic', a folder .*'package.module:"
    ):
        load_data("nowhere", 4)
