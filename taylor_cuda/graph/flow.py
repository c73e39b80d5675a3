"""What a forward pass says about labels, while it runs: the state that the rules read and write."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from taylor_cuda.graph.groups import HEAD_COUNTS, HEAD_WIDTHS, Call, Number, Role, named_tensors
from taylor_cuda.graph.labels import FREE, Array, Bools, Dims, Labels, Reason

HERE = os.path.dirname(os.path.abspath(__file__)) + os.sep
TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep

# attributes on tensors of the copy: they live exactly as long as the tensor, and no table has to be kept
_DIMS = "_taylor_cuda_dims"
_SOURCE = "_taylor_cuda_source"
_VARIES = "_taylor_cuda_varies"


@dataclass(frozen=True)
class Place:
    """One dimension of one parameter or buffer: nodes ``start`` up to ``start + size``."""

    tensor: str
    dim: int
    start: int
    size: int


@dataclass(frozen=True)
class Source:
    """A tensor that is a parameter or buffer of the model, perhaps with its dimensions permuted."""

    name: str
    dims: tuple[int, ...]
    trainable: bool

    @property
    def in_order(self) -> bool:
        """Dimensions as the model has them."""
        return self.dims == tuple(range(len(self.dims)))


@dataclass(frozen=True)
class Read:
    """One use of a weight that contracts channels away.

    Attributes:
        labels: of its input's channels.
        place: the dimension of the weight.
        reason: why they stay if ``sites.py`` can't meet this use.
    """

    labels: Array | None
    place: tuple[str, int]
    reason: Reason


@dataclass(frozen=True)
class Counted:
    """An attribute of a module that says how many units there are, times a constant.

    Attributes:
        labels: of the units.
        number: the attribute.
    """

    labels: Array
    number: Number


@dataclass(frozen=True)
class Outside:
    """A layer whose weight is no parameter of the model: its channels have no place to be listed under."""

    module: str
    size: int
    reason: Reason


def code_line() -> str:
    """``file.py:12`` of the innermost frame that is neither torch's nor this package's."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if frame.f_code.co_name == "record" and path.startswith(HERE):
            return ""  # whoever called trace is no part of the model
        if not path.startswith((HERE, TORCH, "<")):
            return f"{os.path.basename(path)}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


class Flow:
    """Labels of every tensor of a forward pass, and what the layers do with them.

    Attributes:
        module: path of the module that runs now.
        places: every dimension of every parameter and buffer, in the model's order.
        roles: what a place is used as.
        reads: uses of weights that end units.
        affine: the bias of each weight of a normalisation whose output starts at that weight's own nodes.
        calls: what costs MACs, each with the labels along which it does where these are no weight's; the caller takes
            them after each forward pass.
        asked: the shape that the view being made was asked for, with its -1; empty outside of one.
        steps: what was done, op by op; the caller takes it after each forward pass.
        paused: no op has a rule now, for a function that they are part of has one.
        counted: attributes of modules that hold the number of units.
        outside: layers whose weight is computed.
        reached: parameters that ``sites.py`` meets as the weight of a reader.
        ran: modules to be ignored whose outputs were seen.
        notes: what a user should know about the passes, each once.
    """

    def __init__(self, model: nn.Module) -> None:
        self.labels = Labels()
        self.module = ""
        self.places: list[Place] = []
        self.roles: dict[tuple[str, int], Role] = {}
        self.reads: list[Read] = []
        self.affine: dict[str, str] = {}
        self.calls: list[tuple[Call, Array | None]] = []
        self.asked: tuple[int, ...] = ()
        self.steps: list[tuple[Any, ...]] = []
        self.paused = False
        self.counted: list[Counted] = []
        self._modules = dict(model.named_modules())
        self.outside: list[Outside] = []
        self.reached: set[str] = set()
        self.ran: set[str] = set()
        self.notes: list[str] = []
        self._dims_of: dict[str, Dims] = {}
        for name, tensor in named_tensors(model).items():
            dims: Dims = []
            for dim, size in enumerate(tensor.shape):
                self.places.append(Place(name, dim, self.labels.count, size))
                dims.append(self.labels.new(size))
            self._dims_of[name] = dims
            setattr(tensor, _DIMS, dims)
            setattr(tensor, _SOURCE, Source(name, tuple(range(tensor.dim())), isinstance(tensor, nn.Parameter)))
        # one entry more, so that FREE (-1) stays FREE
        self._plain = np.append(np.arange(self.labels.count, dtype=np.int64), FREE)
        self._is_origin = np.zeros(self.labels.count + 1, dtype=bool)
        self._cleared: list[Array] = []

    # -- labels of tensors -------------------------------------------------------------------------------------------

    def of(self, tensor: Tensor) -> Dims:
        """The labels of each dimension."""
        dims: Dims | None = getattr(tensor, _DIMS, None)
        if dims is None:
            return [None] * tensor.dim()
        if len(dims) != tensor.dim() or any(
            labels is not None and labels.size != size for labels, size in zip(dims, tensor.shape, strict=True)
        ):
            self.freeze(dims, "resized in place")
            return [None] * tensor.dim()
        return list(dims)

    def put(self, tensor: Tensor, dims: Dims) -> None:
        """Give a tensor its labels."""
        for labels, size in zip(dims, tensor.shape, strict=True):
            if labels is not None and labels.size != size:
                raise ValueError(f"{labels.size} labels for a dimension of {size}")
        setattr(tensor, _DIMS, dims)

    def parameter(self, tensor: Any) -> Source | None:
        """The parameter that ``tensor`` is; None for buffers and for what was computed."""
        source = self.source(tensor)
        return source if source is not None and source.trainable else None

    def source(self, tensor: Any) -> Source | None:
        """The parameter or buffer that ``tensor`` is, values unchanged; None for what was computed."""
        return getattr(tensor, _SOURCE, None)

    def put_source(self, tensor: Tensor, source: Source | None) -> None:
        """``tensor`` is this parameter or buffer."""
        if source is not None:
            setattr(tensor, _SOURCE, source)

    # -- values: which of them the inputs decide -----------------------------------------------------------------------

    def varies(self, tensor: Tensor) -> bool:
        """Whether the values of ``tensor`` depend on the inputs of the model."""
        return getattr(tensor, _VARIES, False)

    def put_varying(self, tensors: Iterable[Tensor]) -> None:
        """The values of ``tensors`` depend on the inputs of the model."""
        for tensor in tensors:
            setattr(tensor, _VARIES, True)

    def note(self, text: str) -> None:
        """Say ``text``, with the module that runs now and the line of the user's code."""
        said = str(self.reason(text))
        if said not in self.notes:
            self.notes.append(said)

    # -- what rules say ----------------------------------------------------------------------------------------------

    def reason(self, text: str, line: bool = True) -> Reason:
        """``text`` with the module that runs now and the line of the user's code."""
        return Reason(text, self.module, code_line() if line else "")

    def equal(self, a: Array | None, b: Array | None, text: str) -> None:
        """``a`` and ``b`` are the same channels, index by index."""
        if a is not b:
            self.labels.equal(a, b, self.reason(text, line=a is None or b is None))

    def freeze(self, dims: Iterable[Array | None], text: str) -> None:
        """All these channels stay."""
        for labels in dims:
            if labels is not None:
                self.labels.freeze(labels, self.reason(text))

    def freeze_tensors(self, tensors: Iterable[Tensor], text: str) -> None:
        """All channels that reach these tensors stay."""
        for tensor in tensors:
            self.freeze(self.of(tensor), text)

    def free(self, dims: Sequence[Array | None], text: str) -> Dims:
        """Freeze ``dims``; what comes out of the operation carries no labels there."""
        self.freeze(dims, text)
        return [None] * len(dims)

    def join(self, candidates: Sequence[Array | None], text: str) -> Array | None:
        """One dimension that several tensors share: all labelled and equal, or frozen."""
        first = candidates[0]
        if all(labels is first for labels in candidates):
            return first
        if any(labels is None for labels in candidates):
            return self.free(candidates, text)[0]
        cleared = [self.clear(labels) for labels in candidates]
        for labels in cleared[1:]:
            self.equal(cleared[0], labels, text)
        return cleared[0]

    def role(self, source: Source | None, dim: int, role: Role) -> None:
        """Say what dimension ``dim`` of a parameter is used as; two uses that differ freeze it."""
        if source is None:
            return
        place = (source.name, source.dims[dim])
        if self.roles.setdefault(place, role) != role:
            self.freeze([self._dims_of[place[0]][place[1]]], f"a parameter used as {self.roles[place]} and as {role}")

    def read(self, labels: Array | None, weight: Tensor, dim: int) -> None:
        """A plain convolution or product contracts ``labels`` away with dimension ``dim`` of ``weight``."""
        source = self.parameter(weight)
        assert source is not None
        self.role(source, dim, "read")
        unreached = self.reason("read by a product that is neither a convolution nor a linear layer")
        self.reads.append(Read(labels, (source.name, source.dims[dim]), unreached))
        self.equal(labels, self.of(weight)[dim], "reads channels that stay")

    def heads(self, count: int) -> bool:
        """Whether the module that runs has an attribute that says it has ``count`` heads."""
        return any(name in HEAD_COUNTS and value == count for name, value in self._numbers())

    def count_heads(self, labels: Array) -> None:
        """Note the attributes of the module that runs which follow the number of these heads."""
        for name, value in self._numbers():
            if (name in HEAD_COUNTS and value == labels.size) or (name in HEAD_WIDTHS and value % labels.size == 0):
                self.counted.append(Counted(labels, Number(self.module, name, value // labels.size)))

    def _numbers(self) -> list[tuple[str, int]]:
        """The whole numbers among the attributes of the module that runs; none of torch's own, which check them."""
        module = self._modules.get(self.module)
        if module is None or type(module).__module__.startswith("torch."):
            return []
        return [(name, value) for name, value in vars(module).items() if type(value) is int and value > 0]

    def call(self, weight: Tensor | None, op: str, macs_per_weight: int, along: Array | None = None) -> None:
        """Note a use of a weight that costs MACs; without a weight, ``macs_per_weight`` is the whole cost.

        ``along``: units to whose number the cost is proportional.
        """
        source = self.parameter(weight)
        name = "" if source is None else source.name
        if weight is not None and source is None:
            macs_per_weight *= weight.numel()
        self.calls.append((Call(name, self.module, op, macs_per_weight), along))

    def computed(self, weight: Tensor, size: int, text: str) -> None:
        """A layer whose weight isn't a parameter of the model: its ``size`` outputs stay."""
        self.freeze(self.of(weight), text)
        self.outside.append(Outside(self.module, size, self.reason(text)))

    # -- origins: which labels left a normalisation and met nothing but positively homogeneous maps since -------------

    def start(self, labels: Array | None, weight: Tensor, bias: Tensor) -> Array | None:
        """The output of an affine normalisation: from here on its weight's own nodes, until :meth:`clear`."""
        scale, shift = self.parameter(weight), self.parameter(bias)
        own = self.of(weight)[0]
        if labels is None or own is None or scale is None or shift is None:
            return labels
        plain = self.clear(labels)
        assert plain is not None
        self.affine[scale.name] = shift.name
        self._plain[own] = np.where(plain >= 0, plain, own)
        self._is_origin[own] = True
        return own

    def clear(self, labels: Array | None) -> Array | None:
        """The same channels after a map that isn't positively homogeneous."""
        if labels is None or not self._is_origin[labels].any():
            return labels
        self._cleared.append(labels)
        return self._plain[labels]

    def plain(self, labels: Array | None) -> Array | None:
        """The same channels in a tensor that takes nothing but its shape from these."""
        return labels if labels is None else self._plain[labels]

    def origins(self) -> Bools:
        """Bool ``[nodes + 1]``: nodes whose normalisation's outputs were never cleared (the last is for FREE)."""
        intact: Bools = self._is_origin.copy()
        for labels in self._cleared:
            intact[labels] = False
        intact[FREE] = False
        return intact
