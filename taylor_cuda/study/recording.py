"""One forward pass and its loss as a list of ATen ops: those that come after an input of a reader, or of a norm.

The pass runs under ``torch.func.functionalize``, so what is recorded has no in-place ops: each value is written once.
Where units would be removed, at inputs of readers and in normalisations whose statistics change, the list has marks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from taylor_cuda.errors import TaylorError
from taylor_cuda.graph.groups import Groups, named_tensors
from taylor_cuda.graph.mask import MaskedForward, position_masks
from taylor_cuda.graph.observe import reader_weights
from taylor_cuda.graph.recorder import copied
from taylor_cuda.graph.sites import READER_FUNCTIONS
from taylor_cuda.study.batches import Batch, LossFn, scalar_loss

__all__ = ["Mark", "Node", "Recording", "Ref", "Span", "UnrecordableError", "record"]

_LIBRARY = torch.library.Library("taylor_cuda_study", "DEF")
_LIBRARY.define("mark(Tensor x, int place) -> Tensor")
_LIBRARY.impl("mark", lambda x, place: x.clone(), "CompositeExplicitAutograd")
_mark: Callable[[Tensor, int], Tensor] = torch.ops.taylor_cuda_study.mark.default
_LOSS = -1
Inputs = tuple[tuple[Any, ...], dict[str, Any]]
_aten = torch.ops.aten


class UnrecordableError(TaylorError):
    """An op that a list of ops can't hold: it changes something, draws numbers, or its result isn't a tensor."""


@dataclass(frozen=True)
class Ref:
    """The place of a value among those of the pass, where an op's argument is one."""

    value: int


@dataclass(frozen=True)
class Node:
    """One op.

    Attributes:
        func: the ATen op.
        flat: its flattened arguments, values of the pass as :class:`Ref`.
        spec: to unflatten them with, to ``(args, kwargs)``.
        inputs: the values among them.
        outputs: the value of each tensor in the flattened result.
        macs: products it computes.
    """

    func: Any
    flat: tuple[Any, ...]
    spec: TreeSpec
    inputs: frozenset[int]
    outputs: tuple[int, ...]
    macs: int

    def arguments(self, value_of: Callable[[int], Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """``(args, kwargs)`` with the values that ``value_of`` gives."""
        flat = [value_of(leaf.value) if isinstance(leaf, Ref) else leaf for leaf in self.flat]
        args, kwargs = tree_unflatten(flat, self.spec)
        return args, kwargs


@dataclass(eq=False)
class Span:
    """The call of a reader or of a normalisation.

    Attributes:
        kind: ``"read"`` or ``"norm"``.
        name: of the weight.
        dim: the dimension of its input that holds the channels.
        func: the function that was called.
        args: its arguments after the input.
        kwargs: its keyword arguments.
        base: of a normalisation: bool, its channels that aren't off in the recorded pass; ``None`` where all are on.
        first: the index of the node that enters it.
        last: the index of the node that leaves it.
    """

    kind: str
    name: str
    dim: int
    func: Any
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    base: Tensor | None = None
    first: int = -1
    last: int = -1


@dataclass(frozen=True)
class Mark:
    """Where a span is entered or left: ``output`` has the values of ``source``, a value or a tensor from before.

    ``dims`` are its dimensions.
    """

    span: Span
    source: Ref | Tensor
    output: int
    dims: int

    @property
    def inputs(self) -> frozenset[int]:
        """The value it reads, if it is one."""
        return frozenset([self.source.value]) if isinstance(self.source, Ref) else frozenset()

    @property
    def outputs(self) -> tuple[int, ...]:
        """The value it gives."""
        return (self.output,)


@dataclass
class Recording:
    """What came after marks in one pass.

    Attributes:
        nodes: in the order in which they ran.
        values: the tensor of each value.
        loss: the value of the loss; ``None`` if it doesn't depend on any mark.
        base: the loss.
        macs: products of the whole pass, also before the first mark.
    """

    nodes: list[Node | Mark] = field(default_factory=list)
    values: dict[int, Tensor] = field(default_factory=dict)
    loss: int | None = None
    base: Tensor = field(default_factory=lambda: torch.zeros(()))
    macs: int = 0


class _Ops(TorchDispatchMode):
    """Notes the ops of a pass and runs them."""

    def __init__(self, before: Iterable[Tensor]) -> None:
        from torch.utils.flop_counter import flop_registry  # imports Triton where there is one

        super().__init__()  # type: ignore[no-untyped-call]
        self._flops = flop_registry
        self._before = {tensor.untyped_storage()._cdata for tensor in before}
        self.recording = Recording()
        self.spans: list[Span] = []
        self.over = False
        self._value: dict[int, int] = {}

    def _new(self, tensor: Tensor) -> int:
        value = len(self.recording.values)
        self.recording.values[value] = tensor  # held, so that no other tensor gets its id
        self._value[id(tensor)] = value
        return value

    def _ref(self, leaf: Any) -> Any:
        value = self._value.get(id(leaf)) if isinstance(leaf, Tensor) else None
        return leaf if value is None else Ref(value)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _mark:
            return self._marked(*args)
        if func is _aten.copy.default:
            with self:  # torch.vmap has no rule for it
                return args[1].to(args[0]).expand(args[0].shape)
        if func._schema.is_mutable and not self.over:
            return self._in_place(func, args, kwargs)
        out = func(*args, **kwargs)
        packet = func.overloadpacket
        macs = self._flops[packet](*args, **kwargs, out_val=out) // 2 if packet in self._flops else 0
        self.recording.macs += macs
        leaves, spec = tree_flatten((args, kwargs))
        self._note(func, (args, kwargs), tuple(self._ref(leaf) for leaf in leaves), spec, out, macs)
        return out

    def _note(self, func: Any, given: Inputs, flat: tuple[Any, ...], spec: TreeSpec, out: Any, macs: int = 0) -> None:
        """Add an op, if it reads a value."""
        inputs = frozenset(leaf.value for leaf in flat if isinstance(leaf, Ref))
        if not inputs or self.over:
            return
        results = [leaf for leaf in tree_flatten(out)[0] if isinstance(leaf, Tensor)]
        _check(func, *given, results)
        outputs = tuple(self._new(tensor) for tensor in results)
        self.recording.nodes.append(Node(func, flat, spec, inputs, outputs, macs))

    def _in_place(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Ops that are part of another one change what that one made; noted is the op that gives a new tensor.

        Raises:
            UnrecordableError: something that was noted already, or that is older than the pass, would change with it.
        """
        target, value = args[0], self._value.get(id(args[0]))
        storage = target.untyped_storage()._cdata
        constants = [leaf for node in self.recording.nodes if isinstance(node, Node) for leaf in node.flat]
        held = [tensor for at, tensor in self.recording.values.items() if at != value]
        held += [leaf for leaf in constants if isinstance(leaf, Tensor)]
        if storage in self._before or any(tensor.untyped_storage()._cdata == storage for tensor in held):
            raise UnrecordableError(f"{func} changes a tensor that is used elsewhere")
        if func is _aten.as_strided_.default:
            if not _relabels(*args):
                raise UnrecordableError(f"{func} changes a layout")
            return func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::").removesuffix("_")
        fresh = getattr(getattr(_aten, name, None), func._overloadname, None)
        old = target.clone()
        if value is not None:
            self.recording.values[value] = old
        leaves, spec = tree_flatten((args, kwargs))
        flat = (old if value is None else Ref(value), *(self._ref(leaf) for leaf in leaves[1:]))
        if fresh is None and any(isinstance(leaf, Ref) for leaf in flat):
            raise UnrecordableError(f"{func} has no form that changes nothing")
        out = func(*args, **kwargs)
        self._note(fresh, (args, kwargs), flat, spec, target)
        return out

    def _marked(self, x: Tensor, place: int) -> Tensor:
        source = self._ref(x)
        if place == _LOSS:
            self.recording.loss = source.value if isinstance(source, Ref) else None
            self.recording.base = x
            return x
        out = _aten.alias.default(x)
        span, nodes = self.spans[place // 2], self.recording.nodes
        if place % 2:
            span.last = len(nodes)
        else:
            span.first = len(nodes)
        nodes.append(Mark(span, source, self._new(out), x.dim()))
        return cast(Tensor, out)


def _relabels(x: Tensor, size: Any, stride: Any, offset: int | None = None) -> bool:
    """Whether ``as_strided_`` leaves each element where it is: only strides along a single element change."""
    same = all(new == old for new, old, length in zip(stride, x.stride(), x.shape, strict=False) if length > 1)
    return tuple(size) == tuple(x.shape) and same and offset in (None, x.storage_offset())


def _check(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], results: list[Tensor]) -> None:
    """Raise unless the op, again with other values, gives tensors of the same shapes, and the same for the same."""
    tags = func.tags
    names = [argument.name for argument in func._schema.arguments]
    dropout = {**dict(zip(names, args, strict=False)), **kwargs}.get("dropout_p", 0.0)
    if torch.Tag.nondeterministic_seeded in tags and not ("dropout_p" in names and dropout == 0.0):
        raise UnrecordableError(f"{func} draws random numbers")
    if not results or torch.Tag.data_dependent_output in tags:
        raise UnrecordableError(f"{func} makes Python values out of tensors")
    by_number = func is _aten.index.Tensor and not any(
        index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
    )
    if torch.Tag.dynamic_output_shape in tags and not by_number:
        raise UnrecordableError(f"{func} gives a tensor whose shape depends on values")


class _Marking(MaskedForward):
    """The masked model, which also says where readers and normalisations are entered and left."""

    def __init__(self, model: nn.Module, groups: Groups, keep: Mapping[str, Tensor], ops: _Ops) -> None:
        super().__init__(model, groups, keep)
        tensors = named_tensors(model)
        self._name_of = {id(tensors[name]): name for name in reader_weights(groups)}
        norms = {member.tensor for group in groups for member in group.role("norm")}
        self._norm_name = {id(tensors[name]): name for name in norms}
        self._base = position_masks(model, groups, keep, "norm")
        self._ops = ops
        self._entered: Span | None = None

    def _enter(self, span: Span, x: Tensor) -> Tensor:
        self._ops.spans.append(span)
        return _mark(x, 2 * len(self._ops.spans) - 2)

    def _leave(self, span: Span, y: Tensor) -> Tensor:
        return _mark(y, 2 * self._ops.spans.index(span) + 1)

    def _zero_dropped(self, name: str, x: Tensor, dim: int) -> Tensor:
        if name in self._read:
            x = super()._zero_dropped(name, x, dim)
        self._entered = Span("read", name, dim, None)
        return self._enter(self._entered, x)

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Every function, between the marks of its span where it is a reader."""
        span, self._entered = self._entered, None
        if span is None or func not in READER_FUNCTIONS:
            return super().call(func, args, kwargs)
        span.func, span.args, span.kwargs = func, args[1:], kwargs
        return self._leave(span, func(*args, **kwargs))

    def _normalised(
        self, func: Any, input: Tensor, shape: Any, vectors: tuple[Tensor | None, ...], eps: float | None
    ) -> Tensor:
        weight = next((vector for vector in vectors if vector is not None), None)
        name = self._norm_name.get(id(weight))
        if name is None:
            return super()._normalised(func, input, shape, vectors, eps)
        span = Span("norm", name, input.dim() - 1, func, (vectors, eps), base=self._base.get(name))
        return self._leave(span, super()._normalised(func, self._enter(span, input), shape, vectors, eps))


def record(model: nn.Module, groups: Groups, loss_fn: LossFn, batch: Batch, keep: Mapping[str, Tensor]) -> Recording:
    """Run the model and the loss once, and note what comes after a reader's input.

    Args:
        model: a copy of the model, in eval mode: what it keeps of a pass is of no use afterwards.
        groups: of the model.
        loss_fn: ``(outputs, targets)`` to the mean loss.
        batch: on the model's device.
        keep: ``{group name: int64 indices}`` of the units that aren't off already.

    Raises:
        UnrecordableError: names the op that can't be recorded.
        Exception: whatever the pass raises under ``functionalize``.
    """
    ops = _Ops(named_tensors(model).values())
    marking = _Marking(model, groups, keep, ops)
    flat, spec = tree_flatten(copied((batch.args, batch.kwargs)))
    at = [index for index, leaf in enumerate(flat) if isinstance(leaf, Tensor)]

    def run(*tensors: Tensor) -> Tensor:
        whole = list(flat)
        for index, tensor in zip(at, tensors, strict=True):
            whole[index] = tensor
        args, kwargs = tree_unflatten(whole, spec)
        with cast(TorchFunctionMode, marking):
            outputs = model(*args, **kwargs)
        loss = _mark(scalar_loss(loss_fn, outputs, batch.targets), _LOSS)
        ops.over = True  # what functionalize writes back into the copied inputs is no part of the pass
        return loss

    torch.manual_seed(0)
    with ops:
        torch.func.functionalize(run)(*(flat[index] for index in at))
    return ops.recording
