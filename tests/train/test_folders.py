import pytest
import torch
from PIL import Image
from torch.utils.data._utils.pin_memory import pin_memory

from taylor_cuda.errors import InputError
from taylor_cuda.train.data import Share, load_data
from taylor_cuda.train.folders import AugmentedImageFiles, ImageFiles, Unreadable, _collate
from tests.train.image_folders import make_image_folder


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
    files = load_data(str(make_image_folder(tmp_path, train=5)), 4, image_size=16, workers=0)
    first, again = list(files.unaugmented()), list(files.unaugmented())
    assert [len(labels) for _, labels in first] == [4, 3, 3]
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
    assert torch.bincount(torch.cat([labels for _, labels in first])).tolist() == [5, 5]


def same(first, second):
    return all(torch.equal(a, b) and torch.equal(x, y) for (a, x), (b, y) in zip(first, second, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_goes_on_with_the_same_pixels(tmp_path, workers):
    root = str(make_image_folder(tmp_path, train=6))
    data = load_data(root, 3, seed=4, image_size=16, workers=0)
    whole, other_epoch = list(data.train(5)), list(data.train(6))
    assert not same(whole, other_epoch)
    fresh = load_data(root, 3, seed=4, image_size=16, workers=workers)  # as after an interruption
    assert same(fresh.train(5, start=2), whole[2:])
    next(fresh.train(5))  # given up in its middle
    assert same(fresh.train(5, start=1), whole[1:])
    assert list(fresh.train(5, start=4)) == []
    assert not same(load_data(root, 3, seed=5, image_size=16, workers=0).train(5), whole)


def test_every_crop_is_another_one(tmp_path):
    data = load_data(str(make_image_folder(tmp_path, train=8)), 16, image_size=16, workers=0)
    (first, labels), (second, _) = next(data.train(0)), next(data.train(1))
    order = [torch.argsort(torch.randperm(16, generator=torch.Generator().manual_seed(epoch))) for epoch in (0, 1)]
    for index in range(16):  # the same file in both epochs
        assert not torch.equal(first[order[0][index]], second[order[1][index]])
    assert len({image.numpy().tobytes() for image in first}) == 16
    assert labels.sum() == 8


def test_equal_files_get_crops_of_their_own(tmp_path):
    root = make_image_folder(tmp_path, train=8)
    content = (root / "train" / "ant" / "7.jpg").read_bytes()
    for path in (root / "train").rglob("*.jpg"):
        path.write_bytes(content)
    crops = set()
    for seed in range(2):
        images, _ = next(load_data(str(root), 16, seed=seed, image_size=16, workers=0).train(0))
        crops |= {image.numpy().tobytes() for image in images}
    assert len(crops) == 2 * 16


@pytest.mark.parametrize(("ranks", "micro"), [(2, 1), (2, 2), (4, 1)])
def test_pixels_do_not_depend_on_the_ranks(tmp_path, ranks, micro):
    root = str(make_image_folder(tmp_path, train=9))
    whole = list(load_data(root, 8, image_size=16, workers=0).train(1))
    shares = [
        list(load_data(root, 8, image_size=16, workers=0, share=Share(rank, ranks, micro)).train(1))
        for rank in range(ranks)
    ]
    for step, (images, labels) in enumerate(whole):
        parts = [shares[rank][step * micro + m] for m in range(micro) for rank in range(ranks)]
        assert torch.equal(torch.cat([part[0] for part in parts]), images)
        assert torch.equal(torch.cat([part[1] for part in parts]), labels)


@pytest.mark.parametrize("ranks", [2, 7])
def test_ranks_share_the_validation_files(tmp_path, ranks):
    root = str(make_image_folder(tmp_path, train=9))
    (everything, labels), *_ = load_data(root, 14, image_size=16, workers=0).val()
    parts = [list(load_data(root, 14, image_size=16, workers=0, share=Share(r, ranks)).val()) for r in range(ranks)]
    assert [sum(len(x) for _, x in part) for part in parts] == [len(range(rank, 6, ranks)) for rank in range(ranks)]
    for rank, part in enumerate(parts):
        if part:
            assert torch.equal(torch.cat([images for images, _ in part]), everything[rank::ranks])
            assert torch.equal(torch.cat([x for _, x in part]), labels[rank::ranks])


@pytest.mark.parametrize("workers", [0, 2])
def test_reading_leaves_the_global_generator_alone(tmp_path, workers):
    data = load_data(str(make_image_folder(tmp_path)), 4, image_size=16, workers=workers)
    torch.manual_seed(11)
    state = torch.get_rng_state()
    list(data.train(0)), list(data.val()), next(data.unaugmented())
    assert torch.equal(state, torch.get_rng_state())


def test_random_numbers_come_back_after_an_interruption(tmp_path):
    def interrupt(pixels):
        torch.rand(1)
        raise KeyboardInterrupt

    files = ImageFiles([(str(make_image_folder(tmp_path) / "val" / "bee" / "1.jpg"), 1)], interrupt)
    state = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        AugmentedImageFiles(files, seed=3)[0, 0]
    assert torch.equal(state, torch.get_rng_state())


def test_a_short_data_set_gives_one_short_batch(tmp_path):
    data = load_data(str(make_image_folder(tmp_path)), 64, image_size=16, workers=0)
    assert data.steps_per_epoch == 1
    assert [len(labels) for _, labels in data.train(0)] == [10]


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


DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-200]),
    "text": lambda path: path.write_text("not an image"),
    "empty": lambda path: path.write_bytes(b""),
    "gone": lambda path: path.unlink(),
    "bomb": lambda path: path.write_bytes(BOMB),
}

BOMB = b"P6 60000 60000 255 "
"""The header of a picture of 10 GB, which Pillow refuses to unpack."""


def damage(root, part, kind):
    path = root / part / "bee" / "1.jpg"
    DAMAGE[kind](path)
    return str(path)


@pytest.mark.parametrize(
    ("kind", "workers"),
    [(kind, 0) for kind in DAMAGE] + [("truncated", 2), ("text", 2), ("empty", 2)],
)
def test_another_image_of_the_batch_takes_the_place_of_a_corrupt_one(tmp_path, kind, workers):
    root = make_image_folder(tmp_path)
    intact = list(load_data(str(root), 5, seed=2, image_size=16, workers=0).train(0))
    data = load_data(str(root), 5, seed=2, image_size=16, workers=workers)
    path = damage(root, "train", kind)
    batches = list(data.train(0))
    assert list(data.unreadable) == [path]
    order = torch.randperm(10, generator=torch.Generator().manual_seed(2 * 1_000_003)).tolist()
    step, place = divmod(order.index(6), 5)  # the second of the second five files
    for number, ((images, labels), (old_images, old_labels)) in enumerate(zip(batches, intact, strict=True)):
        assert images.shape == old_images.shape
        others = [i for i in range(5) if number != step or i != place]
        assert torch.equal(images[others], old_images[others])
        assert torch.equal(labels[others], old_labels[others])
    images, labels = batches[step]
    twice = [i for i in range(5) if i != place and torch.equal(images[i], images[place])]
    assert len(twice) == 1
    assert labels[place] == labels[twice[0]]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["truncated", "text", "empty"])
def test_a_corrupt_image_is_left_out_of_what_is_measured(tmp_path, kind, workers):
    root = make_image_folder(tmp_path)
    (intact, *_), *_ = load_data(str(root), 6, image_size=16, workers=0).val()
    path, other = damage(root, "val", kind), damage(root, "train", kind)
    data = load_data(str(root), 2, image_size=16, workers=workers)
    assert data.unreadable == {}
    batches = list(data.val())
    assert list(data.unreadable) == [path]
    assert torch.equal(torch.cat([images for images, _ in batches]), intact[[0, 1, 2, 3, 5]])
    assert torch.cat([labels for _, labels in batches]).tolist() == [0, 0, 0, 1, 1]
    assert sum(len(labels) for _, labels in data.unaugmented()) == 9
    assert set(data.unreadable) == {path, other}


def test_reasons_say_what_is_wrong(tmp_path):
    reasons = {}
    for kind in DAMAGE:
        root = make_image_folder(tmp_path / kind)
        data = load_data(str(root), 4, image_size=16, workers=0)
        path = damage(root, "val", kind)
        list(data.val())
        reasons[kind] = data.unreadable[path]
    assert "truncated" in reasons["truncated"]
    assert all("cannot identify image file" in reasons[kind] for kind in ("text", "empty"))
    assert reasons["gone"].startswith("FileNotFoundError")
    assert reasons["bomb"].startswith("DecompressionBombError")


def test_what_is_measured_comes_in_micro_batches(tmp_path):
    data = load_data(str(make_image_folder(tmp_path, train=9)), 8, image_size=16, workers=0, share=Share(1, 2, 2))
    assert [len(labels) for _, labels in data.unaugmented()] == [2] * 9
    assert [len(labels) for _, labels in data.val()] == [2, 1]


def test_each_rank_needs_a_file(tmp_path):
    root = str(make_image_folder(tmp_path))
    with pytest.raises(InputError, match=r"at least 12 training examples, for 3 ranks with 4 micro-batches .* got 10"):
        load_data(root, 24, share=Share(0, 3, 4))


def test_an_image_that_the_transform_refuses_is_unreadable(tmp_path):
    def refuse(pixels):
        raise ZeroDivisionError("as flat as a line")

    path = str(make_image_folder(tmp_path) / "val" / "bee" / "1.jpg")
    assert ImageFiles([(path, 1)], refuse)[0] == Unreadable(path, "ZeroDivisionError: as flat as a line")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_of_nothing_but_corrupt_images(tmp_path, workers):
    root = make_image_folder(tmp_path)
    for part in ("train", "val"):
        for path in (root / part / "bee").iterdir():
            DAMAGE["empty"](path)
    data = load_data(str(root), 2, image_size=16, workers=workers)
    assert [labels.tolist() for _, labels in data.val()] == [[0, 0], [0]]
    with pytest.raises(InputError, match=r"not one image of a batch can be read, .*train/bee/\d.jpg among them: Unid"):
        list(data.train(0))
    assert len(data.unreadable) >= 5


def test_what_workers_send_can_be_pinned(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, *_: tensor.clone())
    good, bad = (torch.zeros(3, 2, 2), 1), Unreadable("a.jpg", "torn")
    for samples in ([good, bad], [bad, bad]):
        sent = _collate(samples, refill=True)
        batch, unreadable = pin_memory(sent)
        assert unreadable == {"a.jpg": "torn"}
        assert (batch is None) == (sent[0] is None)
        if batch is not None:
            assert [part.shape for part in batch] == [(2, 3, 2, 2), (2,)]
            assert batch[0].data_ptr() != sent[0][0].data_ptr()
