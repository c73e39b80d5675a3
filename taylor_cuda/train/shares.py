"""Which examples an optimizer step takes, and which of them one rank takes in which of its backward passes.

The order of an epoch depends on the seed and the epoch's number alone, and the examples of a step on that order alone:
a run may go on with another number of ranks or of micro-batches, and sees the same steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from taylor_cuda.errors import InputError

Batch = tuple[Tensor, Tensor]
"""Images fp32 ``[N, C, H, W]`` and labels int64 ``[N]``, on the host."""


@dataclass(frozen=True)
class Share:
    """Which part of every minibatch one rank trains on.

    Attributes:
        rank: this process among the ranks.
        ranks: processes that train together.
        micro: backward passes (micro-batches) one optimizer step is made of, on each rank.

    Raises:
        InputError: there is no such rank, or a number is less than 1.
    """

    rank: int = 0
    ranks: int = 1
    micro: int = 1

    def __post_init__(self) -> None:
        for name, value in (("ranks", self.ranks), ("micro", self.micro)):
            if value < 1:
                raise InputError(f"{name}: wanted a number >= 1, got {value}")
        if not 0 <= self.rank < self.ranks:
            raise InputError(f"rank: wanted a number from 0 to {self.ranks - 1}, got {self.rank}")

    @property
    def parts(self) -> int:
        """Micro-batches of one step on all ranks together."""
        return self.ranks * self.micro

    def micro_batch(self, batch: int) -> int:
        """Examples of a minibatch of ``batch`` that go through the network at once.

        Raises:
            InputError: they can't be the same number everywhere.
        """
        if batch % self.parts:
            raise InputError(
                f"batch: wanted a multiple of {self.parts}, for {self.ranks} ranks with {self.micro} micro-batches "
                f"each, got {batch}"
            )
        return batch // self.parts

    def of(self, step: Tensor) -> tuple[Tensor, ...]:
        """This rank's micro-batches of one step: equal slices of its first dimension, ``ranks`` slices apart."""
        return step.chunk(self.parts)[self.rank :: self.ranks]


WHOLE = Share()
"""All of every minibatch in one backward pass."""


def epoch_order(size: int, seed: int, epoch: int) -> Tensor:
    """A permutation of ``size`` examples that depends on nothing else."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed_of(seed, epoch)))


def seed_of(*numbers: int) -> int:
    """One seed from several numbers, the seed of the run first."""
    mixed = 0
    for number in numbers:
        mixed = mixed * 1_000_003 + number
    return mixed % 2**63


def full_batches(size: int, batch: int) -> int:
    """Steps an epoch gives: full ones only (a rest of one would break BatchNorm), or one short one."""
    return max(1, size // batch)


def epoch_steps(size: int, batch: int, seed: int, epoch: int, share: Share) -> tuple[Tensor, ...]:
    """The examples of each step of an epoch, int64 ``[batch]`` each; all ranks together.

    Where there are fewer examples than a batch, the one step takes as many as split evenly.
    """
    length = min(size, batch) // share.parts * share.parts
    order = epoch_order(size, seed, epoch)
    return torch.split(order, length)[: full_batches(size, batch)]


def even_batches(size: int, batch: int, seed: int) -> tuple[Tensor, ...]:
    """The order of epoch 0 in as few batches of at most ``batch`` as there can be, whose lengths differ by one."""
    return epoch_order(size, seed, 0).tensor_split(-(-size // batch))


def check_enough(size: int, share: Share) -> None:
    """Refuse a training set of which some rank would get nothing.

    Raises:
        InputError: there are fewer examples than micro-batches in a step.
    """
    if size < share.parts:
        raise InputError(
            f"data: wanted at least {share.parts} training examples, for {share.ranks} ranks with {share.micro} "
            f"micro-batches each, got {size}"
        )
