import pytest
import torch
from torch.utils.data.distributed import DistributedSampler

from taylor_cuda.errors import InputError
from taylor_cuda.train.data import Share, load_data

LOADERS = """
import torch
from torch.utils.data import BatchSampler, DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from taylor_cuda.train.digits import TensorData

SEEN = {}
NUMBER = 3


class Numbered(TensorDataset):
    classes = ["ant", "bee"]

    def __init__(self, size):
        super().__init__(torch.arange(size).float()[:, None, None, None].expand(-1, 1, 2, 2), torch.arange(size) % 2)


def loaders(batch, rank, ranks, seed, **rest):
    SEEN.update(rest, batch=batch, rank=rank, ranks=ranks, seed=seed)
    sampler = DistributedSampler(Numbered(48), ranks, rank, shuffle=True, seed=seed)
    train = DataLoader(Numbered(48), batch, sampler=sampler)
    val = DataLoader(torch.utils.data.Subset(Numbered(10), range(rank, 10, ranks)), batch)
    return train, val


def by_batch_sampler(batch):
    class Batches(BatchSampler):
        epoch = 0

        def set_epoch(self, epoch):
            self.epoch = epoch

        def __iter__(self):
            return iter([[self.epoch], [self.epoch + 1]])

    data = Numbered(9)
    return DataLoader(data, batch_sampler=Batches(range(2), 1, False)), DataLoader(data, batch)


def whole_object(batch, micro, rank, ranks):
    images = torch.rand(30, 1, 8, 8)
    return TensorData("mine", ("a", "b"), (images, torch.arange(30) % 2), (images, torch.arange(30) % 2), batch)


def lists(num_classes=5):
    SEEN["num_classes"] = num_classes
    batches = [(torch.rand(4, 3, 6), torch.zeros(4, dtype=torch.int64)) for _ in range(5)]
    return batches, batches[:2]


def wants_more(batch, colour, depth=3):
    pass


def trouble():
    raise KeyError("no such disk")


def three():
    return 1, 2, 3


def text():
    return "loaders"


def once():
    train, val = lists()
    return iter(train), val


def endless():
    class Endless:
        def __iter__(self):
            return iter(())

    return Endless(), lists()[1]


def no_val():
    return lists()[0], []


def short():
    class Short(list):
        def __len__(self):
            return 9

    train, val = lists()
    return Short(train), val


def int32():
    return lists()[0], [(torch.rand(4, 3), torch.zeros(4, dtype=torch.int32))]


def longer():
    return lists()[0], [(torch.rand(5, 3), torch.zeros(4, dtype=torch.int64))]


def dictionary():
    return lists()[0], [{"image": torch.rand(4, 3)}]


def triple():
    return lists()[0], [(torch.rand(4, 3), torch.zeros(4), "a path")]
"""


@pytest.fixture
def module(tmp_path):
    path = tmp_path / "my_loaders.py"
    path.write_text(LOADERS, encoding="utf-8")
    return path


def seen():
    return __import__("sys").modules["my_loaders"].SEEN


def test_a_pair_of_loaders(module):
    data = load_data(f"{module}:loaders", 12, seed=3, image_size=9, workers=5, share=Share(1, 2, 3))
    assert seen() == {"batch": 2, "micro": 3, "rank": 1, "ranks": 2, "seed": 3, "image_size": 9, "workers": 5}
    assert (data.name, data.classes, data.shape) == (f"{module}:loaders", ("ant", "bee"), (1, 2, 2))
    assert (data.train_size, data.steps_per_epoch, data.unreadable) == (48, 4, {})
    for epoch in (0, 2):
        sampler = DistributedSampler(range(48), 2, 1, shuffle=True, seed=3)
        sampler.set_epoch(epoch)
        order = [images[:, 0, 0, 0].tolist() for images, _ in data.train(epoch)]
        assert [number for part in order for number in part] == list(sampler)
        assert [images[:, 0, 0, 0].tolist() for images, _ in data.train(epoch, start=3)] == order[9:]
    assert torch.cat([images[:, 0, 0, 0] for images, _ in data.val()]).tolist() == [1, 3, 5, 7, 9]
    first = DistributedSampler(range(48), 2, 1, shuffle=True, seed=3)
    assert torch.cat([images[:, 0, 0, 0] for images, _ in data.unaugmented()]).tolist() == list(first)


def test_a_batch_sampler_is_told_the_epoch(module):
    data = load_data(f"{module}:by_batch_sampler", 4)
    assert [float(images.max()) for images, _ in data.train(3)] == [3, 4]
    assert [float(images.max()) for images, _ in data.unaugmented()] == [0, 1]


def test_a_whole_object_is_taken_as_it_is(module, monkeypatch):
    monkeypatch.chdir(module.parent)
    data = load_data("my_loaders:whole_object", 8, share=Share(0, 1, 2))
    assert (data.name, data.steps_per_epoch) == ("mine", 7)
    assert next(data.train(0))[0].shape == (4, 1, 8, 8)


def test_lists_of_batches_do(module):
    data = load_data(f"{module}:lists", 8, share=Share(0, 2, 2), num_classes=2)
    assert seen()["num_classes"] == 2
    assert (data.classes, data.shape, data.steps_per_epoch) == (("0", "1"), (3, 6), 2)
    assert (data.train_size, data.val_size) == (5 * 4 * 2, 2 * 4 * 2)
    assert len(list(data.train(0))) == 4  # the fifth is no whole step
    assert len(list(data.unaugmented())) == 5


def test_who_says_what_classes_there_are(module):
    assert load_data(f"{module}:loaders", 12, num_classes=2).classes == ("ant", "bee")
    assert load_data(f"{module}:loaders", 12, num_classes=3).classes == ("0", "1", "2")
    with pytest.raises(InputError, match=r"num_classes: wanted a number, as the train loader of .* no dataset.classes"):
        load_data(f"{module}:lists", 8)
    assert seen()["num_classes"] == 5  # its own default, not our None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("loader", "no data named 'loader'; the nearest are loaders"),
        ("NUMBER", "is a int, wanted a function"),
        ("wants_more", r"wants colour; there is batch, micro, seed, rank, ranks, image_size, workers, num_classes"),
        ("trouble", r"failed: KeyError: 'no such disk' at .*my_loaders.py:\d+"),
        ("three", r"wanted a pair \(train, val\) of loaders .* got 3 things"),
        ("text", r"got a str without name, classes, shape, train_size"),
        ("once", r"train loader .* read again and again, got a list_iterator"),
        ("endless", r"train loader .* that has a length: .*has no len"),
        ("no_val", r"wanted a batch at least from the val loader .*, got none"),
        ("int32", r"val loader of .*, got \[4, 3\] and torch.int32 \[4\]"),
        ("longer", r"val loader of .*, got \[5, 3\] and torch.int64 \[4\]"),
        ("dictionary", r"val loader of .*, got a dict"),
        ("triple", r"val loader of .*, got \(Tensor, Tensor, str\)"),
    ],
)
def test_what_cannot_be_used_is_named(module, name, message):
    with pytest.raises(InputError, match=message):
        load_data(f"{module}:{name}", 8, num_classes=2)


def test_too_few_batches(module):
    with pytest.raises(InputError, match=r"at least 6 batches, one optimizer step, .* got 5"):
        load_data(f"{module}:lists", 12, share=Share(0, 1, 6), num_classes=2)
    data = load_data(f"{module}:short", 8, num_classes=2)
    with pytest.raises(InputError, match=r"wanted 9 batches from the train loader of .*, got 5"):
        list(data.train(0))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere.at_all:make", r"no module named 'nowhere'; wanted 'digits', 'synthetic', a folder"),
        ("missing.py:make", "data: no file missing.py"),
        ("my_loaders:", r"wanted 'digits', 'synthetic', .* got 'my_loaders:'"),
        ("torch:no_such_thing", "torch has no data named 'no_such_thing'"),
        ("builtins:iter", "builtins:iter doesn't say which arguments it takes"),
    ],
)
def test_unknown_functions_are_named(spec, message):
    with pytest.raises(InputError, match=message):
        load_data(spec, 4)


def test_one_file_makes_model_and_data_of_the_same_classes(module):
    first = load_data(f"{module}:loaders", 12)
    second = load_data(f"{module}:loaders", 12)
    assert type(first._train.dataset) is type(second._train.dataset)


def test_a_file_with_an_error_leaves_no_module_behind(tmp_path):
    path = tmp_path / "half_a_module.py"
    path.write_text("def make():\n    pass\n\n\nvalue = 1 / 0\n", encoding="utf-8")
    for _ in range(2):
        with pytest.raises(InputError, match=r"ZeroDivisionError: division by zero at .*half_a_module.py:5"):
            load_data(f"{path}:make", 4)
