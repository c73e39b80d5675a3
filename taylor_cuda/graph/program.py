"""Which ReLUs of a model hand their output, as it is or pooled, to readers: found by running a copy of it once.

Σ_l a·g at the inputs of a reader is what a scoring gate there adds up in a pass of its own. Where the reader's input
is the output z of a ReLU, the ReLU's backward pass reads z and its gradient anyway. Functions that are linear in each
channel, or homogeneous as max pooling is, leave Σ_l a·g as it is and may stand between the two (Euler's identity).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taylor_cuda.graph.groups import Groups
from taylor_cuda.graph.recorder import DROPOUT, copy_model, leaves, map_tensors, set_mode, undisturbed
from taylor_cuda.graph.sites import ReaderInputs

__all__ = [
    "ADDITIONS",
    "GRADIENT_ASKED",
    "KEEPERS",
    "RELUS",
    "Program",
    "Ride",
    "in_place",
    "record_programs",
    "sum_kept",
]

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
Layout = tuple[int, int, int]
"""Of a reader's input: its channel dimension, its L, and how many of its channels one channel of the ReLU became."""

RELUS = frozenset({F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_})
ADDITIONS = frozenset({torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__iadd__, Tensor.__radd__})

_POOLS: dict[Any, int] = {
    function: dims
    for dims in (1, 2, 3)
    for name in (f"max_pool{dims}d", f"avg_pool{dims}d", f"adaptive_avg_pool{dims}d", f"adaptive_max_pool{dims}d")
    for function in (getattr(F, name), getattr(torch, name, None))
    if function is not None
}
_MEANS = frozenset({torch.mean, Tensor.mean})
_VIEWS = frozenset({torch.flatten, Tensor.flatten, torch.reshape, Tensor.reshape, Tensor.view, Tensor.contiguous})
_VIEWS |= frozenset({torch.squeeze, Tensor.squeeze})
_NOISE = DROPOUT - {F.alpha_dropout, F.feature_alpha_dropout, torch.alpha_dropout, torch.feature_alpha_dropout}
KEEPERS = frozenset(_POOLS) | _MEANS | _VIEWS | _NOISE
"""Functions whose result may have the Σ_l a·g of their first argument."""
GRADIENT_ASKED = frozenset({Tensor.retain_grad, Tensor.register_hook})
"""Who calls one of these wants the whole gradient of the tensor, not that of one of its uses."""

_INPLACE_AT = {F.relu: 1} | dict.fromkeys((F.dropout, F.dropout1d, F.dropout2d, F.dropout3d), 3)


def in_place(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call of one of ``RELUS`` or ``KEEPERS`` changes its first argument."""
    at = _INPLACE_AT.get(func, len(args))
    given = args[at] if at < len(args) else kwargs.get("inplace", False)
    return bool(given) or func in (torch.relu_, Tensor.relu_)


def sum_kept(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor, out: Any) -> tuple[bool, int] | None:
    """Whether ``out = func(*args)`` has the Σ_l a·g of x, its first argument, channel by channel.

    Returns:
        None if not; otherwise whether any dimension may be the channels (else it is dimension 1), and how many
        channels of ``out``, side by side, each one of x became.
    """
    if not isinstance(out, Tensor) or out.dtype != x.dtype or x.dim() < 2 or out.dim() < 2 or not x.numel():
        return None
    if func in _NOISE:
        return (True, 1) if out.shape == x.shape else None
    same = out.shape[:2] == x.shape[:2]
    if func in _POOLS:
        return (False, 1) if same and x.dim() == out.dim() == _POOLS[func] + 2 else None
    if func in _MEANS:
        return (False, 1) if same and _over_space(args, kwargs, x.dim()) else None
    if func in _VIEWS and out.numel() == x.numel() and out.shape[0] == x.shape[0] and not out.shape[1] % x.shape[1]:
        return False, out.shape[1] // x.shape[1]
    return None


def _over_space(args: tuple[Any, ...], kwargs: dict[str, Any], dims: int) -> bool:
    given = kwargs.get("dim", args[1] if len(args) > 1 else None)
    listed = [given] if isinstance(given, int) else given
    return isinstance(listed, (list, tuple)) and len(listed) > 0 and all(dim % dims >= 2 for dim in listed)


@dataclass
class Ride:
    """A tensor on its way from a ReLU to readers whose gates need no pass of their own.

    Attributes:
        dim: of its channels.
        skips: it has one more use, an addition whose result only goes into another ReLU that gives a ride.
        ways: for each call of one of ``KEEPERS`` with it, in order: the result, if that goes to readers too.
    """

    dim: int
    skips: bool
    ways: tuple[Ride | None, ...]


@dataclass
class Program:
    """What one forward pass does with the outputs of ReLUs.

    Attributes:
        rides: for each call of a ReLU, in order: its output, or None where the readers behind it need gates.
        fused: ``{weight of a reader: elements of its inputs}`` that no gate reads any more.
        gated: the same of those where a gate reads them.
        blocks: the ``(weight, width)`` of readers whose units take whole blocks of ``width`` of their channels, into
            each of which one channel of a ReLU was flattened.
    """

    rides: list[Ride | None] = field(default_factory=list)
    fused: dict[str, int] = field(default_factory=dict)
    gated: dict[str, int] = field(default_factory=dict)
    blocks: set[tuple[str, int]] = field(default_factory=set)


@dataclass(eq=False)
class _Node:
    """A tensor that is followed: the output of a ReLU, what one of ``KEEPERS`` made of one, or a sum with one."""

    tensor: Tensor  # held, so that no other tensor gets its id
    kind: Literal["relu", "kept", "sum"]
    any_dim: bool = True
    width: int = 1
    reads: list[tuple[str, Layout, int]] = field(default_factory=list)
    ways: list[_Node | None] = field(default_factory=list)
    sums: list[_Node] = field(default_factory=list)
    relus: list[_Node] = field(default_factory=list)
    others: int = 0
    changed: bool = False
    carries: _Node | None = None
    """Of a ReLU: the tensor whose share in a sum its backward pass tells."""
    ride: Ride | None = None

    def layouts(self) -> set[Layout]:
        """Of all inputs of readers that it rides to."""
        ways = [way.layouts() for way in self.ways if way is not None and way.ride is not None]
        return {layout for _, layout, _ in self.reads}.union(*ways)


class _Recorder(ReaderInputs):
    """Follows the outputs of ReLUs through every function that is called with them."""

    def __init__(self, model: nn.Module, groups: Groups, weights: Iterable[str]) -> None:
        super().__init__(model, weights, self._read)
        self._groups = groups
        self.relus: list[_Node] = []
        self.program = Program()
        self._nodes: dict[int, _Node] = {}
        self._every: list[_Node] = []
        self._noted = False

    def _read(self, name: str, x: Tensor, dim: int) -> Tensor:
        self._noted = True
        node = self._nodes.get(id(x))
        fits = node is not None and node.kind != "sum" and dim > 0 and (dim == 1 or node.any_dim)
        if node is not None and fits and (node.width == 1 or self._in_blocks(name, node.width)):
            layout = dim, x.numel() // max(x.shape[0] * x.shape[dim], 1), node.width
            node.reads.append((name, layout, x.numel()))
            return x
        if node is not None:
            node.others += 1
        _count(self.program.gated, name, x.numel())
        return x

    def _in_blocks(self, name: str, width: int) -> bool:
        """Whether units take whole blocks of the reader's channels: not those of tokens, whose channels lie last."""
        for group in self._groups:
            for member in group.role("read"):
                if member.tensor == name:
                    if member.width % width:
                        return False
                    blocks = member.index.sort(1).values.unflatten(1, (-1, width))
                    if not torch.equal(blocks, blocks[..., :1] // width * width + torch.arange(width)):
                        return False
        self.program.blocks.add((name, width))
        return True

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Every function, after its input was noted where it is a reader."""
        out = func(*args, **kwargs)
        noted, self._noted = self._noted, False
        if noted:
            return out
        first = args[0] if args else kwargs.get("input")
        node = self._nodes.get(id(first))
        if func in RELUS and isinstance(out, Tensor):
            self._relu(node, out, changed=out is first)
        elif func in KEEPERS and node is not None and node.kind != "sum":
            self._keep(func, args, kwargs, node, out)
        else:
            self._use(func, args, kwargs, first, out)
        return out

    def _follow(self, node: _Node) -> _Node:
        self._nodes[id(node.tensor)] = node
        self._every.append(node)
        return node

    def _relu(self, node: _Node | None, out: Tensor, *, changed: bool) -> None:
        relu = _Node(out, "relu")
        if node is not None and node.kind == "sum":
            node.relus.append(relu)
        elif node is not None:
            node.others += 1
            node.changed |= changed
        self.relus.append(self._follow(relu))

    def _keep(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], node: _Node, out: Any) -> None:
        if in_place(func, args, kwargs):
            node.changed = True
        kept = sum_kept(func, args, kwargs, node.tensor, out)
        if out is node.tensor or kept is None:  # dropout in eval mode and such give back what they got
            node.ways.append(None)
            node.others += out is not node.tensor
            return
        way = _Node(out, "kept", any_dim=node.any_dim and kept[0], width=node.width * kept[1])
        node.ways.append(self._follow(way))

    def _use(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], first: Any, out: Any) -> None:
        used = [node for tensor in leaves((args, kwargs)) if (node := self._nodes.get(id(tensor))) is not None]
        if out is first or out is None or func in GRADIENT_ASKED:
            for node in used:
                node.changed |= node.tensor is first
        if out is None or not any(True for _ in leaves(out)):
            return  # a shape, a dtype
        addends = [node for node in used if node.kind != "sum"]
        if func in ADDITIONS and isinstance(out, Tensor) and len(used) == len(addends) > 0:
            total = self._follow(_Node(out, "sum"))
            for node in addends:
                node.sums.append(total)
            return
        for node in used:
            node.others += 1

    def finish(self, output: Any) -> Program:
        """Decide for every ReLU, the last one first. ``output`` is what the model returned."""
        for tensor in leaves(output):
            if id(tensor) in self._nodes:
                self._nodes[id(tensor)].others += 1
        held = [weakref.ref(node.tensor) for node in self._every]
        for node in self._every:
            node.tensor = torch.empty(0)
        for node, tensor_of in zip(self._every, held, strict=True):
            # Whoever holds it after the forward pass, a hook or a module, may ask for its whole gradient.
            node.changed |= tensor_of() is not None
        for relu in reversed(self.relus):
            relu.ride = _ride(relu)
        for relu in self.relus:
            self.program.rides.append(relu.ride)
            self._account(relu, relu.ride is not None)
        return self.program

    def _account(self, node: _Node, fused: bool) -> None:
        for name, _, elements in node.reads:
            _count(self.program.fused if fused else self.program.gated, name, elements)
        for way in node.ways:
            if way is not None:
                self._account(way, fused and way.ride is not None)


def _count(counts: dict[str, int], name: str, elements: int) -> None:
    counts[name] = counts.get(name, 0) + elements


def _ride(node: _Node) -> Ride | None:
    """How a tensor goes to its readers; None where one of them, or another use, needs a gate at them.

    Autograd adds up the gradients of several uses in the order in which they come. Those of the readers are added up
    on their own here, so with other uses beside them the result has the same bits only if it is one and one.
    """
    for way in node.ways:
        if way is not None:
            way.ride = _ride(way)
    known = len(node.reads) + sum(way is not None and way.ride is not None for way in node.ways)
    others = node.others + len(node.sums) + sum(way is not None and way.ride is None for way in node.ways)
    layouts = node.layouts()
    if node.changed or not known or len(layouts) != 1:
        return None
    one_and_one = (known, others, len(node.sums), node.width) == (1, 1, 1, 1)
    if others and not (one_and_one and _carried(node, node.sums[0])):
        return None
    ((dim, _, _),) = layouts
    return Ride(dim, bool(others), tuple(None if way is None else way.ride for way in node.ways))


def _carried(node: _Node, total: _Node) -> bool:
    """Whether the sum goes into one ReLU that gives a ride, and that ReLU has no other share to tell."""
    if total.others or total.changed or len(total.relus) != 1:
        return False
    relu = total.relus[0]
    if relu.ride is None or relu.carries not in (None, node):
        return False
    relu.carries = node
    return True


def record_programs(model: nn.Module, groups: Groups, weights: Iterable[str]) -> dict[bool, Program]:
    """Run a copy of ``model`` once in train and once in eval mode, and see which gates at ``weights`` ReLUs can spare.

    Args:
        model: the traced module; neither it nor the random states change.
        groups: of this model; their ``example_inputs`` are taken in the model's dtype and on its device.
        weights: names of the readers' weights.

    Returns:
        ``{training: Program}``. A mode in which the copy raises is left out: everything needs gates there.
    """
    programs = {}
    try:
        twin = copy_model(model)
    except Exception:  # what can be traced but not copied any more needs gates as well
        return {}
    for training in (True, False):
        recorder = _Recorder(twin, groups, weights)
        try:
            set_mode(twin, training)
            args, kwargs = _at(model, groups.example_inputs)
            with undisturbed(model), recorder:
                output = twin(*args, **kwargs)
        except Exception:
            continue
        programs[training] = recorder.finish(output)
    return programs


def _at(model: nn.Module, inputs: Inputs) -> Inputs:
    """Copies of the inputs, floating-point ones in the model's dtype where it has one."""
    floats = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    device = next((parameter.device for parameter in model.parameters()), None)

    def move(tensor: Tensor) -> Tensor:
        dtype = next(iter(floats)) if len(floats) == 1 and tensor.is_floating_point() else tensor.dtype
        return tensor.detach().to(device, dtype, copy=True)

    moved: Inputs = map_tensors(inputs, move)
    return moved
