"""Labelled images: scikit-learn's digits, which ship with the library, and folders of image files.

Batches are ``(images fp32 [N, C, H, W], labels int64 [N])`` on the host. The order of an epoch depends on the seed and
the epoch's number alone, and an epoch can begin at any batch: that is what lets a run go on where it was interrupted.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from taylor_cuda.errors import InputError

Batch = tuple[Tensor, Tensor]

DIGITS_TEST_SIZE = 450
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Data(Protocol):
    """What a run needs to know of its data.

    Attributes:
        name: for reports.
        classes: names, in the order of the labels.
        shape: of one example, ``(C, H, W)``.
        train_size: training examples.
        val_size: validation examples.
        steps_per_epoch: batches in one call of ``train``.
    """

    name: str
    classes: tuple[str, ...]
    shape: tuple[int, ...]
    train_size: int
    val_size: int
    steps_per_epoch: int

    def train(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch in its own random order, from batch ``start`` on; full ones, if there is one."""

    def val(self) -> Iterator[Batch]:
        """All of the validation set, in a fixed order."""

    def unaugmented(self) -> Iterator[Batch]:
        """All of the training set as the validation set is read, in one random order: to measure on.

        In batches as long as asked for or a little shorter, all alike: where each batch counts the same, so does then
        each example.
        """


def load_data(
    source: str, batch: int, seed: int = 0, image_size: int = 224, workers: int = 2, pin_memory: bool = False
) -> Data:
    """``"digits"``, or a folder with ``train/CLASS/*.jpg`` and ``val/CLASS/*.jpg``.

    Args:
        source: which of them.
        batch: examples in a batch, at least 2.
        seed: of the order of training examples.
        image_size: height and width that image files are brought to; digits are 8×8.
        workers: processes that decode image files; 0 decodes in this one.
        pin_memory: put batches of image files where a GPU copies them from without waiting.

    Raises:
        InputError: the folder isn't there or isn't laid out so, a class is empty, or a size makes no sense.
    """
    for name, value, least in (("batch", batch, 2), ("image_size", image_size, 1), ("workers", workers, 0)):
        if value < least:
            raise InputError(f"{name}: wanted a number >= {least}, got {value}")
    if source == "digits":
        return load_digits(batch, seed)
    return load_image_folder(Path(source), batch, seed, image_size, workers, pin_memory)


def epoch_order(size: int, seed: int, epoch: int) -> Tensor:
    """A permutation of ``size`` examples that depends on nothing else."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(size, generator=generator)


def full_batches(size: int, batch: int) -> int:
    """Batches an epoch gives: full ones only (a rest of one would break BatchNorm), or one short one."""
    return max(1, size // batch)


def even_batches(size: int, batch: int, seed: int) -> tuple[Tensor, ...]:
    """The order of epoch 0 in as few batches of at most ``batch`` as there can be, whose lengths differ by one."""
    return epoch_order(size, seed, 0).tensor_split(-(-size // batch))


# -- in memory ---------------------------------------------------------------------------------------------------------


@dataclass
class TensorData:
    """A data set small enough to hold as two pairs of tensors; every training image is moved by up to one pixel.

    Args:
        name: for reports.
        classes: names, in the order of the labels.
        train_set: images fp32 ``[N, C, H, W]`` and labels int64 ``[N]``.
        val_set: the same.
        batch: examples in a batch.
        seed: of the order and of the moves.
    """

    name: str
    classes: tuple[str, ...]
    train_set: Batch
    val_set: Batch
    batch: int
    seed: int = 0

    def __post_init__(self) -> None:
        self.shape = tuple(self.train_set[0].shape[1:])
        self.train_size, self.val_size = len(self.train_set[1]), len(self.val_set[1])
        self.steps_per_epoch = full_batches(self.train_size, self.batch)

    def train(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch in its own random order, from batch ``start`` on."""
        images, labels = self.train_set
        order = epoch_order(self.train_size, self.seed, epoch)
        for step, index in enumerate(torch.split(order, self.batch)[: self.steps_per_epoch]):
            if step >= start:
                yield move_by_one(images[index], seed=(self.seed * 1_000_003 + epoch) * 1_000_003 + step), labels[index]

    def val(self) -> Iterator[Batch]:
        """All of the validation set, in a fixed order."""
        return zip(torch.split(self.val_set[0], 256), torch.split(self.val_set[1], 256), strict=True)

    def unaugmented(self) -> Iterator[Batch]:
        """All of the training set as it is, in the order of epoch 0."""
        images, labels = self.train_set
        for index in even_batches(self.train_size, self.batch, self.seed):
            yield images[index], labels[index]


def move_by_one(images: Tensor, seed: int) -> Tensor:
    """Every image moved by -1, 0 or 1 pixel along each axis; background (the least value) moves in. Same shape."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    count, _, height, width = images.shape
    padded = F.pad(images, (1, 1, 1, 1), value=float(images.min())).movedim(1, -1)
    down, right = torch.randint(0, 3, (2, count, 1), generator=generator)
    rows = (down + torch.arange(height))[:, :, None]
    columns = (right + torch.arange(width))[:, None, :]
    return padded[torch.arange(count)[:, None, None], rows, columns].movedim(-1, 1)


def load_digits(batch: int, seed: int = 0) -> TensorData:
    """1797 handwritten digits of 8×8 pixels in one fixed stratified split: 1347 to train on, 450 to validate on.

    Source: Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits" (UCI), the part that ships with
        scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits as sklearn_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise InputError(f"data: 'digits' needs scikit-learn ({error}); pip install scikit-learn") from error
    digits: Any = sklearn_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 16
    labels = torch.from_numpy(digits.target).long()
    train, val = train_test_split(
        torch.arange(len(labels)).numpy(), test_size=DIGITS_TEST_SIZE, stratify=digits.target, random_state=0
    )
    images = (images - images[train].mean()) / images[train].std()
    classes = tuple(str(name) for name in digits.target_names)
    return TensorData("digits", classes, (images[train], labels[train]), (images[val], labels[val]), batch, seed)


# -- folders of image files --------------------------------------------------------------------------------------------


class EpochBatches(Sampler[list[int]]):
    """Index batches of one epoch in its own order, from batch ``start`` on: set both before iterating."""

    def __init__(self, size: int, batch: int, seed: int) -> None:
        self.size, self.batch, self.seed = size, batch, seed
        self.epoch = self.start = 0

    def __iter__(self) -> Iterator[list[int]]:
        batches = torch.split(epoch_order(self.size, self.seed, self.epoch), self.batch)
        for index in batches[self.start : full_batches(self.size, self.batch)]:
            yield index.tolist()

    def __len__(self) -> int:
        return full_batches(self.size, self.batch) - self.start


@dataclass(frozen=True)
class Unreadable:
    """An image file that could not be decoded, sent in place of the batch it was in."""

    path: str
    reason: str


class ImageFiles(Dataset[Any]):
    """``(path, label)`` samples decoded to RGB and transformed; one that can't be read comes back as ``Unreadable``."""

    def __init__(self, samples: Sequence[tuple[str, int]], transform: Any) -> None:
        self.samples, self.transform = samples, transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        from PIL import Image

        path, label = self.samples[index]
        try:
            with Image.open(path) as image:
                pixels = image.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for damaged files
            return Unreadable(path, str(error))
        return self.transform(pixels), label


def _collate(samples: list[Any]) -> Any:
    for sample in samples:
        if isinstance(sample, Unreadable):
            return sample
    return default_collate(samples)


def _leave_interrupts_to_the_main_process(_worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class FolderData:
    """``train/CLASS/*`` and ``val/CLASS/*`` under one folder, read by worker processes that live as long as the run.

    Training images are cropped and flipped at random, validation images are cropped in the centre, both to
    ``image_size`` and normalised as the zoos' ImageNet models expect.
    """

    def __init__(
        self, root: Path, batch: int, seed: int, image_size: int, workers: int, pin_memory: bool = False
    ) -> None:
        train, self.classes = find_images(root / "train")
        val, val_classes = find_images(root / "val")
        if val_classes != self.classes:
            odd = sorted(set(val_classes) ^ set(self.classes))
            raise InputError(f"data: train/ and val/ of {root} must hold the same classes; only one has {odd}")
        self.name = str(root)
        self.shape: tuple[int, ...] = (3, image_size, image_size)
        self.train_size, self.val_size = len(train), len(val)
        self.steps_per_epoch = full_batches(len(train), batch)
        train_transform, val_transform = image_transforms(image_size)
        self._order = EpochBatches(len(train), batch, seed)
        # Worker seeds come from a generator of its own; the global one is left alone.
        common: dict[str, Any] = {
            "num_workers": workers,
            "collate_fn": _collate,
            "persistent_workers": workers > 0,
            "pin_memory": pin_memory,
            "worker_init_fn": _leave_interrupts_to_the_main_process,
            "generator": torch.Generator().manual_seed(seed),
        }
        self._train = DataLoader(ImageFiles(train, train_transform), batch_sampler=self._order, **common)
        self._val = DataLoader(ImageFiles(val, val_transform), batch_size=batch, **common)
        # Read once if at all: its workers need not stay.
        common["persistent_workers"] = False
        order = [index.tolist() for index in even_batches(len(train), batch, seed)]
        self._unaugmented = DataLoader(ImageFiles(train, val_transform), batch_sampler=order, **common)

    def train(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch in its own random order, from batch ``start`` on."""
        self._order.epoch, self._order.start = epoch, start
        return _readable(self._train)

    def val(self) -> Iterator[Batch]:
        """All of the validation set, in a fixed order."""
        return _readable(self._val)

    def unaugmented(self) -> Iterator[Batch]:
        """All of the training set, cropped in the centre, in the order of epoch 0."""
        return _readable(self._unaugmented)


def _readable(loader: DataLoader[Any]) -> Iterator[Batch]:
    for item in loader:
        if isinstance(item, Unreadable):
            raise InputError(f"data: {item.path} is not an image that can be read: {item.reason}")
        yield item[0], item[1]


def find_images(folder: Path) -> tuple[list[tuple[str, int]], tuple[str, ...]]:
    """Every image file under ``folder/CLASS/`` with its label, and the classes, both sorted by name."""
    if not folder.is_dir():
        raise InputError(f"data: no folder {folder} (wanted train/CLASS/*.jpg and val/CLASS/*.jpg under --data)")
    from torchvision.datasets.folder import IMG_EXTENSIONS

    classes = tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir()))
    if not classes:
        raise InputError(f"data: {folder} holds no class folders")
    samples: list[tuple[str, int]] = []
    for label, name in enumerate(classes):
        files = sorted(str(path) for path in (folder / name).rglob("*") if path.suffix.lower() in IMG_EXTENSIONS)
        if not files:
            raise InputError(f"data: class folder {folder / name} holds no images")
        samples.extend((path, label) for path in files)
    return samples, classes


def image_transforms(image_size: int) -> tuple[Any, Any]:
    """The usual ImageNet transforms at another size, to train and to validate: PIL image to fp32 ``[3, S, S]``."""
    from torchvision.transforms import v2

    tail = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(IMAGENET_MEAN), list(IMAGENET_STD))]
    train = v2.Compose([v2.RandomResizedCrop(image_size), v2.RandomHorizontalFlip(), *tail])
    val = v2.Compose([v2.Resize(round(image_size * 256 / 224)), v2.CenterCrop(image_size), *tail])
    return train, val


def load_image_folder(
    root: Path, batch: int, seed: int, image_size: int, workers: int, pin_memory: bool = False
) -> FolderData:
    """``FolderData`` of a folder that is there, with torchvision installed."""
    if not root.is_dir():
        raise InputError(f"data: no folder {root} (wanted 'digits' or a folder with train/ and val/)")
    try:
        import torchvision  # noqa: F401
    except ImportError as error:
        raise InputError(f"data: image folders need torchvision ({error}); pip install torchvision") from error
    return FolderData(root, batch, seed, image_size, workers, pin_memory)
