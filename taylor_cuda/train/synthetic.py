"""Made-up images, for dry runs and to measure throughput without a disk."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from taylor_cuda.train.shares import Batch, Share, full_batches, seed_of

IMAGENET_SIZES = 1_281_167, 50_000
"""Training and validation images of ILSVRC 2012."""

DISTINCT = 4
"""Batches that are made; more would only fill memory."""


class SyntheticData:
    """Normal noise with random labels: a few batches, made once, given again and again. Sizes are ImageNet's.

    Giving a batch costs no time, so what a step takes is the network's.

    Args:
        batch: examples in a step, over all ranks and micro-batches.
        seed: of images and labels, which are others on each rank.
        image_size: height and width.
        pin_memory: put them where a GPU copies them from without waiting.
        share: what part of them this rank takes.
        num_classes: labels are less than this.
    """

    name = "synthetic"
    train_size, val_size = IMAGENET_SIZES

    def __init__(
        self, batch: int, seed: int, image_size: int, pin_memory: bool, share: Share, num_classes: int
    ) -> None:
        self.classes = tuple(str(label) for label in range(num_classes))
        self.shape: tuple[int, ...] = (3, image_size, image_size)
        self.share, self.micro_batch = share, share.micro_batch(batch)
        self.steps_per_epoch = full_batches(self.train_size, batch)
        self.unreadable: dict[str, str] = {}
        generator = torch.Generator().manual_seed(seed_of(seed, share.rank))
        self._batches: list[Batch] = []
        for _ in range(DISTINCT):
            images = torch.randn(self.micro_batch, *self.shape, generator=generator)
            labels = torch.randint(num_classes, (self.micro_batch,), generator=generator)
            self._batches.append((images.pin_memory(), labels.pin_memory()) if pin_memory else (images, labels))

    def train(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """As many micro-batches as this rank would see of ImageNet, from step ``start`` on."""
        for place in range(start * self.share.micro, self.steps_per_epoch * self.share.micro):
            yield self._batches[place % DISTINCT]

    def val(self) -> Iterator[Batch]:
        """As many examples as this rank's share of ImageNet's validation set."""
        return self._examples(len(range(self.share.rank, self.val_size, self.share.ranks)))

    def unaugmented(self) -> Iterator[Batch]:
        """As many examples as ImageNet's training set."""
        return self._examples(self.train_size)

    def _examples(self, count: int) -> Iterator[Batch]:
        for images, labels in itertools.cycle(self._batches):
            if count <= 0:
                return
            yield images[:count], labels[:count]
            count -= len(labels)
