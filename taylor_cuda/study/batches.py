"""What is measured on: mini-batches on the model's device, and a model that measuring leaves as it was."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from taylor_cuda.errors import InputError
from taylor_cuda.graph.groups import call_arguments
from taylor_cuda.graph.recorder import leaves, map_tensors, undisturbed

__all__ = ["Batch", "LossFn", "evaluating", "hash_tensor", "mini_batches", "scalar_loss"]

LossFn = Callable[[Any, Any], Tensor]
"""``loss_fn(outputs of the model, targets)``: the mean loss of a mini-batch, a scalar tensor."""


@dataclass(frozen=True)
class Batch:
    """One mini-batch on the device of the model.

    Attributes:
        args: positional arguments of the model.
        kwargs: keyword arguments of the model.
        targets: what the loss function gets beside the outputs.
        examples: how many there are: the length of dimension 0 of the first input.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    targets: Any
    examples: int

    def digest(self) -> str:
        """A hash of every value in the batch."""
        found = hashlib.sha256()
        for tensor in leaves((self.args, self.kwargs, self.targets)):
            hash_tensor(found, tensor)
        return found.hexdigest()


def hash_tensor(found: hashlib._Hash, tensor: Tensor) -> None:
    """Take dtype, shape and every value of a tensor into a hash."""
    found.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    found.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy().tobytes())


def mini_batches(batches: Iterable[Any], device: torch.device) -> Iterator[Batch]:
    """The batches one by one on ``device``; examples without any are left out.

    Raises:
        InputError: one that isn't ``(inputs, targets)``, or whose inputs have no dimension of examples.
    """
    if isinstance(batches, (Tensor, str, bytes)) or not isinstance(batches, Iterable):
        raise InputError(
            f"batches: wanted a list or another iterable of (inputs, targets), got {type(batches).__name__}"
        )
    for index, pair in enumerate(batches):
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise InputError(f"batches: wanted (inputs, targets) at {index}, got {type(pair).__name__}")
        args, kwargs = call_arguments(pair[0])
        first = next((tensor for tensor in leaves((args, kwargs)) if tensor.dim()), None)
        if first is None:
            raise InputError(f"batches: wanted a tensor with a dimension of examples in the inputs at {index}")
        if not first.shape[0]:
            continue
        args, kwargs, targets = map_tensors((args, kwargs, pair[1]), lambda tensor: tensor.to(device))
        yield Batch(args, kwargs, targets, first.shape[0])


def scalar_loss(loss_fn: LossFn, outputs: Any, targets: Any) -> Tensor:
    """The loss of a mini-batch as ``loss_fn`` gives it, a tensor with one element.

    Raises:
        InputError: it gives something else.
    """
    loss: Any = loss_fn(outputs, targets)
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
        given = f"a tensor of {tuple(loss.shape)}, {loss.dtype}" if isinstance(loss, Tensor) else type(loss).__name__
        raise InputError(
            f"loss_fn: wanted the mean loss of the mini-batch, a floating-point scalar tensor, got {given}"
        )
    return loss.detach().reshape(())


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, no autocast; afterwards modes and random states are as they were."""
    modes = [(module, module.training) for module in model.modules()]
    with undisturbed(model):
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
