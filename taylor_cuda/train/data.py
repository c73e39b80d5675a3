"""Labelled images: by name, from folders of image files, from loaders of one's own, or made up.

Batches are ``(images fp32 [N, C, H, W], labels int64 [N])`` on the host. An epoch can begin at any step: that is what
lets a run go on where it was interrupted.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from taylor_cuda.errors import InputError
from taylor_cuda.train.digits import TensorData, load_digits
from taylor_cuda.train.folders import load_image_folder
from taylor_cuda.train.own_loaders import load_own
from taylor_cuda.train.shares import WHOLE, Batch, Share
from taylor_cuda.train.synthetic import SyntheticData

__all__ = ["DATA_FORMS", "Batch", "Data", "Share", "TensorData", "load_data"]

DATA_FORMS = (
    "'digits', 'synthetic', a folder with train/ and val/, 'package.module:function' or 'path/to/file.py:function'"
)


class Data(Protocol):
    """What a run needs to know of its data, as one rank sees it.

    Attributes:
        name: for reports.
        classes: names, in the order of the labels.
        shape: of one example, ``(C, H, W)``.
        train_size: training examples, those of all ranks.
        val_size: validation examples, those of all ranks.
        steps_per_epoch: optimizer steps in an epoch.
        unreadable: files that could not be read so far on this rank, and why.
    """

    name: str
    classes: tuple[str, ...]
    shape: tuple[int, ...]
    train_size: int
    val_size: int
    steps_per_epoch: int
    unreadable: dict[str, str]

    def train(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """This rank's micro-batches of an epoch in its own random order, from optimizer step ``start`` on; all alike.

        Together those of all ranks and micro-batches are the full minibatches of the epoch; or one short one, where
        there are fewer examples than that.
        """

    def val(self) -> Iterator[Batch]:
        """This rank's share of the validation set in a fixed order: nothing, where there are fewer than ranks."""

    def unaugmented(self) -> Iterator[Batch]:
        """All of the training set on every rank, as the validation set is read, in one random order: to measure on.

        In batches as long as a micro-batch or a little shorter, all alike: where each batch counts the same, so does
        then each example.
        """


def load_data(
    source: str,
    batch: int,
    seed: int = 0,
    image_size: int = 224,
    workers: int = 2,
    pin_memory: bool = False,
    share: Share = WHOLE,
    num_classes: int | None = None,
) -> Data:
    """The data a user named.

    Args:
        source: ``"digits"``; ``"synthetic"``, of ImageNet's size and the same few batches again and again; a folder
            with ``train/CLASS/*.jpg`` and ``val/CLASS/*.jpg``; or ``"package.module:function"`` (also found from the
            current folder) or ``"path/to/file.py:function"``, see ``own_loaders``.
        batch: examples one optimizer step takes, over all ranks and micro-batches; at least 2.
        seed: of the order of training examples and of what is random in an image.
        image_size: height and width that image files are brought to; digits are 8×8.
        workers: processes that decode image files; 0 decodes in this one.
        pin_memory: put batches where a GPU copies them from without waiting.
        share: what part of them this rank takes.
        num_classes: classes of synthetic data (``None``: 1000) and of loaders that don't say.

    Raises:
        InputError: there is no such source, a folder isn't laid out so, a class is empty, a size makes no sense or
            doesn't split evenly, or there are fewer training examples than ranks times micro-batches.
    """
    for name, value, least in (("batch", batch, 2), ("image_size", image_size, 1), ("workers", workers, 0)):
        if value < least:
            raise InputError(f"{name}: wanted a number >= {least}, got {value}")
    if num_classes is not None and num_classes < 1:
        raise InputError(f"num_classes: wanted a number >= 1, got {num_classes}")
    if source == "digits":
        return load_digits(batch, seed, share)
    if source == "synthetic":
        return SyntheticData(batch, seed, image_size, pin_memory, share, num_classes or 1000)
    root = Path(source)
    if root.is_dir():
        return load_image_folder(root, batch, seed, image_size, workers, pin_memory, share)
    if ":" in source:
        return load_own(source, DATA_FORMS, batch, seed, image_size, workers, share, num_classes)
    raise InputError(f"data: no folder {root} (wanted {DATA_FORMS})")
