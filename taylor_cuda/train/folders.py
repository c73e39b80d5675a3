"""Folders of image files, read by worker processes."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from taylor_cuda.errors import InputError
from taylor_cuda.train.messages import first_line
from taylor_cuda.train.shares import Batch, Share, check_enough, epoch_steps, even_batches, full_batches, seed_of

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

PREFETCH = 2
"""Batches that each worker reads ahead: one to wait while the next is made."""


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """This rank's micro-batches of one epoch, as ``(epoch, index)``, from step ``start`` on: set both first."""

    def __init__(self, size: int, batch: int, seed: int, share: Share) -> None:
        self.size, self.batch, self.seed, self.share = size, batch, seed, share
        self.epoch = self.start = 0

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.epoch
        for step in epoch_steps(self.size, self.batch, self.seed, epoch, self.share)[self.start :]:
            for part in self.share.of(step):
                yield [(epoch, index) for index in part.tolist()]


@dataclass(frozen=True)
class Unreadable:
    """An image file that could not be made an example, sent in its place."""

    path: str
    reason: str


class ImageFiles(Dataset[Any]):
    """``(path, label)`` samples decoded to RGB and transformed; one that can't be read comes back as ``Unreadable``."""

    def __init__(self, samples: Sequence[tuple[str, int]], transform: Any) -> None:
        # Two arrays: a worker that read a million Python objects would copy each of their pages, for it counts readers.
        self.paths = np.array([os.fsencode(path) for path, _ in samples])
        self.labels = np.array([label for _, label in samples])
        self.transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | Unreadable:
        from PIL import Image

        path, label = os.fsdecode(self.paths[index]), int(self.labels[index])
        try:
            with Image.open(path) as image:
                return self.transform(image.convert("RGB")), label
        # Damaged files make Pillow raise almost anything, a decompression bomb is a bare Exception; whatever it is, an
        # error in all files still ends the run.
        except Exception as error:
            return Unreadable(path, f"{type(error).__name__}: {first_line(error)}")


class AugmentedImageFiles(Dataset[Any]):
    """``ImageFiles`` by ``(epoch, index)``: what is random about an image follows from these two and the seed.

    So it is the same for any number of ranks and workers, and in a run that went on where it was interrupted.
    """

    def __init__(self, files: ImageFiles, seed: int) -> None:
        self.files, self.seed = files, seed

    def __getitem__(self, place: tuple[int, int]) -> tuple[Tensor, int] | Unreadable:
        epoch, index = place
        with _random_numbers(seed_of(self.seed, epoch, index)):
            return self.files[index]


@contextmanager
def _random_numbers(seed: int) -> Iterator[None]:
    """The CPU's random numbers start at ``seed``; afterwards they go on as if nothing had been."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach the GPU's too
    try:
        yield
    finally:
        torch.set_rng_state(state)


Read = tuple[Any, dict[str, str]]
"""What a worker sends: images and labels, or None where nothing could be read; and why which file could not."""


def _collate(samples: list[Any], refill: bool) -> Read:
    """Put examples together; the place of one that could not be read stays empty, or another of the batch takes it."""
    unreadable = {sample.path: sample.reason for sample in samples if isinstance(sample, Unreadable)}
    readable = [sample for sample in samples if not isinstance(sample, Unreadable)]
    if not readable:
        return None, unreadable
    if refill:
        places = enumerate(samples)
        readable = [readable[i % len(readable)] if isinstance(sample, Unreadable) else sample for i, sample in places]
    return default_collate(readable), unreadable


def _leave_interrupts_to_the_main_process(_worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class FolderData:
    """``train/CLASS/*`` and ``val/CLASS/*`` under one folder, read by worker processes that live as long as the run.

    Training images are cropped and flipped at random, validation images are cropped in the centre, both to
    ``image_size`` and normalised as the zoos' ImageNet models expect.

    A file that can't be read is noted in ``unreadable``. While training another image of its micro-batch takes its
    place, so that all stay alike; elsewhere it is left out.
    """

    def __init__(
        self, root: Path, batch: int, seed: int, image_size: int, workers: int, pin_memory: bool, share: Share
    ) -> None:
        train, self.classes = find_images(root / "train")
        val, val_classes = find_images(root / "val")
        if val_classes != self.classes:
            odd = sorted(set(val_classes) ^ set(self.classes))
            raise InputError(f"data: train/ and val/ of {root} must hold the same classes; only one has {odd}")
        check_enough(len(train), share)
        self.name = str(root)
        self.shape: tuple[int, ...] = (3, image_size, image_size)
        self.train_size, self.val_size = len(train), len(val)
        self.steps_per_epoch = full_batches(len(train), batch)
        self.unreadable: dict[str, str] = {}
        train_transform, val_transform = image_transforms(image_size)
        micro_batch = share.micro_batch(batch)
        self._order = EpochBatches(len(train), batch, seed, share)
        common: dict[str, Any] = {
            "num_workers": workers,
            "prefetch_factor": PREFETCH if workers else None,
            "persistent_workers": workers > 0,
            "pin_memory": pin_memory,
            "worker_init_fn": _leave_interrupts_to_the_main_process,
            # Seeds the workers with numbers that nothing uses; the global one would have to give them otherwise.
            "generator": torch.Generator(),
        }
        augmented = AugmentedImageFiles(ImageFiles(train, train_transform), seed)
        refill, leave_out = (functools.partial(_collate, refill=refill) for refill in (True, False))
        self._train = DataLoader(augmented, batch_sampler=self._order, collate_fn=refill, **common)
        mine = ImageFiles(val[share.rank :: share.ranks], val_transform)
        self._val = DataLoader(mine, batch_size=micro_batch, collate_fn=leave_out, **common)
        # Read once if at all: its workers need not stay.
        common["persistent_workers"] = False
        order = [index.tolist() for index in even_batches(len(train), micro_batch, seed)]
        whole = ImageFiles(train, val_transform)
        self._unaugmented = DataLoader(whole, batch_sampler=order, collate_fn=leave_out, **common)

    def train(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """This rank's micro-batches of an epoch, from step ``start`` on.

        Raises:
            InputError: not one image of a micro-batch can be read.
        """
        self._order.epoch, self._order.start = epoch, start
        for batch, unreadable in self._read(self._train):
            if batch is None:
                path, reason = next(iter(unreadable.items()))
                raise InputError(f"data: not one image of a batch can be read, {path} among them: {reason}")
            yield batch[0], batch[1]

    def val(self) -> Iterator[Batch]:
        """This rank's share of the validation set, in a fixed order."""
        return self._readable(self._val)

    def unaugmented(self) -> Iterator[Batch]:
        """All of the training set, cropped in the centre, in the order of epoch 0."""
        return self._readable(self._unaugmented)

    def _read(self, loader: DataLoader[Any]) -> Iterator[Read]:
        for batch, unreadable in loader:
            self.unreadable.update(unreadable)
            yield batch, unreadable

    def _readable(self, loader: DataLoader[Any]) -> Iterator[Batch]:
        for batch, _ in self._read(loader):
            if batch is not None:
                yield batch[0], batch[1]


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
        files = sorted(
            os.path.join(inner, file)  # not Path: there may be a million of them
            for inner, _, found in os.walk(folder / name, followlinks=True)
            for file in found
            if os.path.splitext(file)[1].lower() in IMG_EXTENSIONS
        )
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
    root: Path, batch: int, seed: int, image_size: int, workers: int, pin_memory: bool, share: Share
) -> FolderData:
    """``FolderData``, with torchvision installed."""
    try:
        import torchvision  # noqa: F401
    except ImportError as error:
        raise InputError(f"data: image folders need torchvision ({error}); pip install torchvision") from error
    return FolderData(root, batch, seed, image_size, workers, pin_memory, share)
