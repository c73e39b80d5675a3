import itertools

import pytest
import torch
from PIL import Image

from taylor_cuda.errors import InputError
from taylor_cuda.train.data import load_data
from taylor_cuda.train.digits import move_by_one
from tests.train.image_folders import make_image_folder


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


@pytest.mark.parametrize("workers", [0, 2])
def test_image_folder(tmp_path, workers):
    data = load_data(str(make_image_folder(tmp_path)), 4, seed=1, image_size=32, workers=workers)
    assert (data.classes, data.shape, data.train_size, data.val_size) == (("ant", "bee"), (3, 32, 32), 10, 6)
    for _ in range(2):  # persistent workers serve a second epoch
        batches = list(data.train(0))
        assert [images.shape for images, _ in batches] == [(4, 3, 32, 32)] * data.steps_per_epoch
    images, labels = next(data.val())
    assert images.dtype == torch.float32
    assert labels.tolist() == [0, 0, 0, 1]
    red = images[:, 0].mean((1, 2))
    assert (red[3] - red[:3]).min() > 1.0  # 90 levels of 255, over a deviation of 0.229: 1.54


def test_the_training_set_to_measure_on_is_whole_and_unaugmented(tmp_path):
    data = load_data("digits", 64, seed=3)
    batches = list(data.unaugmented())
    images, labels = (torch.cat(part) for part in zip(*batches, strict=True))
    assert [len(labels) for _, labels in batches] == [62] * 5 + [61] * 17
    assert not torch.equal(labels, data.train_set[1])  # a few batches hold every class
    order = torch.randperm(1347, generator=torch.Generator().manual_seed(3 * 1_000_003))
    assert torch.equal(images, data.train_set[0][order])
    assert torch.equal(labels, data.train_set[1][order])
    files = load_data(str(make_image_folder(tmp_path, train=5)), 4, image_size=16, workers=0)
    first, again = list(files.unaugmented()), list(files.unaugmented())
    assert [len(labels) for _, labels in first] == [4, 3, 3]
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
    assert torch.bincount(torch.cat([labels for _, labels in first])).tolist() == [5, 5]


def test_an_epoch_of_files_can_begin_in_its_middle(tmp_path):
    data = load_data(str(make_image_folder(tmp_path, train=6)), 3, image_size=16, workers=0)
    whole = [labels.tolist() for _, labels in data.train(5)]
    assert [labels.tolist() for _, labels in data.train(5, start=2)] == whole[2:]


def test_a_short_data_set_gives_one_short_batch(tmp_path):
    data = load_data(str(make_image_folder(tmp_path)), 64, image_size=16, workers=0)
    assert data.steps_per_epoch == 1
    assert [len(labels) for _, labels in data.train(0)] == [10]


@pytest.mark.parametrize("workers", [0, 1])
def test_corrupt_image_is_named(tmp_path, workers):
    bad = make_image_folder(tmp_path) / "val" / "bee" / "1.jpg"
    bad.write_bytes(bad.read_bytes()[:100])
    data = load_data(str(tmp_path), 4, image_size=16, workers=workers)
    with pytest.raises(InputError, match=r"val/bee/1\.jpg is not an image that can be read"):
        list(data.val())


def test_layouts_that_cannot_be_used(tmp_path):
    with pytest.raises(InputError, match=r"no folder .*nowhere"):
        load_data(str(tmp_path / "nowhere"), 4)
    with pytest.raises(InputError, match=r"no folder .*train"):
        load_data(str(tmp_path), 4)
    make_image_folder(tmp_path / "a", val=0)
    with pytest.raises(InputError, match=r"class folder .*val/ant holds no images"):
        load_data(str(tmp_path / "a"), 4)
    make_image_folder(tmp_path / "b")
    (tmp_path / "b" / "train" / "cow").mkdir()
    with pytest.raises(InputError, match="cow holds no images"):
        load_data(str(tmp_path / "b"), 4)
    Image.new("RGB", (8, 8)).save(tmp_path / "b" / "train" / "cow" / "1.png")
    with pytest.raises(InputError, match=r"same classes; only one has \['cow'\]"):
        load_data(str(tmp_path / "b"), 4)
    (tmp_path / "c" / "train").mkdir(parents=True)
    with pytest.raises(InputError, match="holds no class folders"):
        load_data(str(tmp_path / "c"), 4)


@pytest.mark.parametrize(("name", "value"), [("batch", 1), ("image_size", 0), ("workers", -1)])
def test_sizes_that_make_no_sense(name, value):
    with pytest.raises(InputError, match=f"{name}: wanted a number >="):
        load_data("digits", **{"batch": 4, name: value})
