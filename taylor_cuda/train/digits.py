"""Data sets that fit into memory, and the one that ships with scikit-learn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from taylor_cuda.errors import InputError
from taylor_cuda.train.shares import WHOLE, Batch, Share, check_enough, epoch_steps, even_batches, full_batches, seed_of

DIGITS_TEST_SIZE = 450


@dataclass
class TensorData:
    """A data set small enough to hold as two pairs of tensors; every training image is moved by up to one pixel.

    Args:
        name: for reports.
        classes: names, in the order of the labels.
        train_set: images fp32 ``[N, C, H, W]`` and labels int64 ``[N]``.
        val_set: the same.
        batch: examples in a step, over all ranks and micro-batches.
        seed: of the order and of the moves.
        share: what part of them this rank takes.
    """

    name: str
    classes: tuple[str, ...]
    train_set: Batch
    val_set: Batch
    batch: int
    seed: int = 0
    share: Share = WHOLE
    unreadable: dict[str, str] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.shape = tuple(self.train_set[0].shape[1:])
        self.train_size, self.val_size = len(self.train_set[1]), len(self.val_set[1])
        self.micro_batch = self.share.micro_batch(self.batch)
        check_enough(self.train_size, self.share)
        self.steps_per_epoch = full_batches(self.train_size, self.batch)

    def train(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """This rank's micro-batches of an epoch, from step ``start`` on: slices of the step's minibatch as moved."""
        images, labels = self.train_set
        steps = epoch_steps(self.train_size, self.batch, self.seed, epoch, self.share)
        for step, index in enumerate(steps[start:], start):
            moved = move_by_one(images[index], seed_of(self.seed, epoch, step))
            yield from zip(self.share.of(moved), self.share.of(labels[index]), strict=True)

    def val(self) -> Iterator[Batch]:
        """This rank's share of the validation set, in a fixed order."""
        images, labels = (part[self.share.rank :: self.share.ranks] for part in self.val_set)
        if len(labels):
            yield from zip(images.split(256), labels.split(256), strict=True)

    def unaugmented(self) -> Iterator[Batch]:
        """All of the training set as it is, in the order of epoch 0."""
        images, labels = self.train_set
        for index in even_batches(self.train_size, self.micro_batch, self.seed):
            yield images[index], labels[index]


def move_by_one(images: Tensor, seed: int) -> Tensor:
    """Every image moved by -1, 0 or 1 pixel along each axis; background (the least value) moves in. Same shape."""
    generator = torch.Generator().manual_seed(seed)
    count, _, height, width = images.shape
    padded = F.pad(images, (1, 1, 1, 1), value=float(images.min())).movedim(1, -1)
    down, right = torch.randint(0, 3, (2, count, 1), generator=generator)
    rows = (down + torch.arange(height))[:, :, None]
    columns = (right + torch.arange(width))[:, None, :]
    return padded[torch.arange(count)[:, None, None], rows, columns].movedim(-1, 1)


def load_digits(batch: int, seed: int = 0, share: Share = WHOLE) -> TensorData:
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
    return TensorData("digits", classes, (images[train], labels[train]), (images[val], labels[val]), batch, seed, share)
