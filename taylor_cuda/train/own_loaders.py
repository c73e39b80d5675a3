"""Data from a function of one's own.

It is called with those of these keyword arguments that its signature takes: ``batch`` (examples of one rank's
micro-batch), ``micro`` (micro-batches of an optimizer step), ``seed``, ``rank``, ``ranks``, ``image_size``,
``workers``, ``num_classes`` (which may be None). It returns either an object with all that ``Data`` has, or a pair
``(train, val)`` of loaders of ``(images, labels)`` which are read again and again and give this rank's share, such as
a ``DataLoader`` with a ``DistributedSampler``.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from taylor_cuda.errors import InputError
from taylor_cuda.train.factories import call_factory, find_factory, split_spec
from taylor_cuda.train.shares import Batch, Share

if TYPE_CHECKING:
    from taylor_cuda.train.data import Data

MEMBERS = (
    *("name", "classes", "shape", "train_size", "val_size", "steps_per_epoch", "unreadable"),
    *("train", "val", "unaugmented"),
)
"""Of ``Data``."""


class LoaderPair:
    """A training and a validation loader of one's own as ``Data``.

    Each batch of the training loader is a micro-batch of this rank. What is random in it is the loader's own: an epoch
    repeats only where ``set_epoch`` and the loader's seeds make it so. Where an epoch begins in its middle, what goes
    before is read and thrown away. ``unaugmented`` is the training loader once, as it is.

    Sizes are those of the loaders' ``dataset``, where it has a length; else batches times the length of the first
    validation batch, times ranks.

    Args:
        name: for reports and errors.
        train: its ``sampler`` and ``batch_sampler`` are told the epoch where they have ``set_epoch``.
        val: this rank's share of the validation set.
        share: ``micro`` batches of the training loader are one optimizer step.
        num_classes: ``None`` asks ``train.dataset.classes``.

    Raises:
        InputError: a loader can be read only once, has no length or too short a one, gives something else, or nobody
            says what classes there are.
    """

    def __init__(
        self, name: str, train: Iterable[Any], val: Iterable[Any], share: Share, num_classes: int | None
    ) -> None:
        lengths = [_length(which, loader, name) for which, loader in (("train", train), ("val", val))]
        self.name, self.share = name, share
        self._train, self._val = train, val
        self.steps_per_epoch = lengths[0] // share.micro
        if self.steps_per_epoch < 1:
            raise InputError(
                f"data: wanted at least {share.micro} batches, one optimizer step, from the train loader of {name}, "
                f"got {lengths[0]}"
            )
        self.classes = _classes(name, train, num_classes)
        first = next(self.val(), None)
        if first is None:
            raise InputError(f"data: wanted a batch at least from the val loader of {name}, got none")
        self.shape = tuple(first[0].shape[1:])
        otherwise = [length * len(first[1]) * share.ranks for length in lengths]
        self.train_size, self.val_size = map(_examples, (train, val), otherwise)
        self.unreadable: dict[str, str] = {}

    def train(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """This rank's micro-batches of an epoch, from step ``start`` on.

        Raises:
            InputError: the loader gives fewer than its length says, or something else than batches.
        """
        self._set_epoch(epoch)
        wanted, given = self.steps_per_epoch * self.share.micro, 0
        for batch in itertools.islice(self._train, wanted):
            given += 1
            if given > start * self.share.micro:
                yield self._checked("train", batch)
        if given < wanted:
            raise InputError(f"data: wanted {wanted} batches from the train loader of {self.name}, got {given}")

    def val(self) -> Iterator[Batch]:
        """The validation loader once."""
        for batch in self._val:
            yield self._checked("val", batch)

    def unaugmented(self) -> Iterator[Batch]:
        """The training loader once, in the order of epoch 0."""
        self._set_epoch(0)
        for batch in self._train:
            yield self._checked("train", batch)

    def _set_epoch(self, epoch: int) -> None:
        for name in ("sampler", "batch_sampler"):
            set_epoch = getattr(getattr(self._train, name, None), "set_epoch", None)
            if set_epoch is not None:
                set_epoch(epoch)

    def _checked(self, which: str, batch: Any) -> Batch:
        """The batch, if it is one: types and shapes only, so that it costs nothing."""
        wanted = f"data: wanted (images [N, ...], labels int64 [N]) from the {which} loader of {self.name}, got "
        if not isinstance(batch, (tuple, list)):
            raise InputError(f"{wanted}a {type(batch).__name__}")
        kinds = [type(part).__name__ for part in batch]
        if len(batch) != 2 or not all(isinstance(part, Tensor) for part in batch):
            raise InputError(f"{wanted}({', '.join(kinds)})")
        images, labels = batch
        if images.ndim < 2 or labels.ndim != 1 or len(images) != len(labels) or labels.dtype != torch.int64:
            raise InputError(f"{wanted}{list(images.shape)} and {labels.dtype} {list(labels.shape)}")
        return images, labels


def _length(which: str, loader: Any, name: str) -> int:
    if not isinstance(loader, Iterable) or isinstance(loader, Iterator):
        raise InputError(
            f"data: wanted a {which} loader from {name} that can be read again and again, got a {type(loader).__name__}"
        )
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError as error:
        raise InputError(f"data: wanted a {which} loader from {name} that has a length: {error}") from error


def _examples(loader: Any, otherwise: int) -> int:
    try:
        return len(loader.dataset)
    except (AttributeError, TypeError):
        return otherwise


def _classes(name: str, loader: Any, num_classes: int | None) -> tuple[str, ...]:
    named = getattr(getattr(loader, "dataset", None), "classes", None)
    if named is not None and num_classes in (None, len(named)):
        return tuple(str(label) for label in named)
    if num_classes is None:
        raise InputError(f"num_classes: wanted a number, as the train loader of {name} has no dataset.classes")
    return tuple(str(label) for label in range(num_classes))


def load_own(
    spec: str, forms: str, batch: int, seed: int, image_size: int, workers: int, share: Share, num_classes: int | None
) -> Data:
    """What the function that ``spec`` names gives. ``forms``: what else could have been named, for the error.

    Raises:
        InputError: there is no such function, it fails, wants other arguments, or gives something else.
    """
    function = find_factory("data", *split_spec("data", spec, forms), forms)
    offered = {
        "batch": share.micro_batch(batch),
        "micro": share.micro,
        "seed": seed,
        "rank": share.rank,
        "ranks": share.ranks,
        "image_size": image_size,
        "workers": workers,
        "num_classes": num_classes,
    }
    given = call_factory("data", spec, function, _taken(spec, function, offered))
    if isinstance(given, (tuple, list)):
        if len(given) != 2:
            raise InputError(f"data: wanted a pair (train, val) of loaders from {spec}, got {len(given)} things")
        train, val = given
        return LoaderPair(spec, train, val, share, num_classes)
    missing = [member for member in MEMBERS if not hasattr(given, member)]
    if missing:
        raise InputError(
            f"data: wanted a pair (train, val) of loaders, or an object with {', '.join(MEMBERS)}, from {spec}; "
            f"got a {type(given).__name__} without {', '.join(missing)}"
        )
    return given  # type: ignore[no-any-return]


def _taken(spec: str, function: Callable[..., Any], offered: dict[str, Any]) -> dict[str, Any]:
    """What a function takes of what is offered; what is None only where it has no default of its own."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise InputError(f"data: {spec} doesn't say which arguments it takes: {error}") from error
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    defaults = {parameter.name: parameter.default for parameter in parameters if parameter.kind in kinds}
    unknown = [name for name, default in defaults.items() if name not in offered and default is inspect.Parameter.empty]
    if unknown:
        raise InputError(f"data: {spec} wants {', '.join(unknown)}; there is {', '.join(offered)}")
    everything = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
    required = {name for name, default in defaults.items() if default is inspect.Parameter.empty}
    return {
        name: value
        for name, value in offered.items()
        if name in required or (value is not None and (everything or name in defaults))
    }
