"""Running a copy of the model under the rules: one recorded forward pass."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

import taylor_cuda.graph.rules_attention
import taylor_cuda.graph.rules_layers
import taylor_cuda.graph.rules_pointwise
import taylor_cuda.graph.rules_shape  # noqa: F401  (importing fills the table of rules)
from taylor_cuda.graph.flow import Flow
from taylor_cuda.graph.labels import Reason
from taylor_cuda.graph.rules import Op, find_rule, tensors_in
from taylor_cuda.graph.rules_layers import rms_norm
from taylor_cuda.graph.rules_pointwise import created, created_like
from taylor_cuda.graph.sites import READER_FUNCTIONS, RMS_NORMS

# dropout leaves every shape and channel as it is, but draws its noise in a different way in every release and device
DROPOUT = frozenset(
    {
        F.dropout,
        F.dropout1d,
        F.dropout2d,
        F.dropout3d,
        F.alpha_dropout,
        F.feature_alpha_dropout,
        torch.dropout,
        torch.feature_dropout,
        torch.alpha_dropout,
        torch.feature_alpha_dropout,
    }
)

DEPENDS = "what the code does depends on values of the input: only what it does for the example is traced"
_TO_PYTHON = frozenset({Tensor.tolist, Tensor.numpy, Tensor.__array__})

_UNFLATTEN = frozenset({Tensor.unflatten, torch.unflatten})
_VIEWS = frozenset({Tensor.view, Tensor.reshape, torch.reshape}) | _UNFLATTEN


class Dispatched(TorchDispatchMode):
    """Hands every ATen op, after it ran, to its rule."""

    def __init__(self, flow: Flow) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._flow = flow

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._flow.paused:
            return self._run(func, args, kwargs)
        namespace, _, name = str(getattr(func, "overloadpacket", func)).rpartition(".")
        known = name if namespace in ("aten", "prim") else f"{namespace}.{name}"
        found = None if "out" in kwargs else find_rule(known)
        if found is None and isinstance(func, OpOverload):
            with self:  # in inference mode composite ops arrive whole
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs) if found in (created, created_like) else self._run(func, args, kwargs)
        op = Op(known, args, kwargs, out)
        self._flow.steps.append(_step(op))
        if found is None:
            self._unknown(func, op, f"no rule for {namespace or 'op'}.{name}")
            return out
        try:
            found(self._flow, op)
        except Exception as error:  # a form of the op that its rule wasn't written for freezes like an unknown op
            self._unknown(func, op, f"the rule for {name} failed: {type(error).__name__}: {error}")
        return out

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The op itself; what it makes of values that depend on the inputs depends on them too."""
        out = func(*args, **kwargs)
        if any(self._flow.varies(tensor) for tensor in tensors_in(args, kwargs)):
            self._flow.put_varying(tensors_in(out))
            if isinstance(out, (bool, int, float, complex)) or func is torch.ops.aten.nonzero.default:
                self._flow.note(DEPENDS)
        return out

    def _unknown(self, func: Any, op: Op, text: str) -> None:
        from torch.utils.flop_counter import flop_registry

        flow = self._flow
        flow.freeze_tensors(tensors_in(op.args, op.kwargs, op.out), text)
        for out in tensors_in(op.out):
            flow.put(out, [None] * out.dim())
        packet = getattr(func, "overloadpacket", None)
        if packet in flop_registry:
            flow.call(None, op.name, flop_registry[packet](*op.args, **op.kwargs, out_val=op.out) // 2)


def _step(op: Op) -> tuple[Any, ...]:
    """What tells one op of a forward pass from another: its name, the shape of its result, the numbers it was given."""
    numbers = [value for value in op.args if not any(True for _ in tensors_in(value))]
    return op.name, tuple(tuple(tensor.shape) for tensor in tensors_in(op.out)), repr(numbers)


class Called(TorchFunctionMode):
    """Above autograd: which weights are readers' (``sites.py`` meets the same calls), what shape a view was asked for.

    Leaves dropout out.
    """

    def __init__(self, model: nn.Module, flow: Flow) -> None:
        super().__init__()
        self._flow = flow
        self._name_of = {id(parameter): name for name, parameter in model.named_parameters()}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in READER_FUNCTIONS:
            weight = args[1] if len(args) > 1 else kwargs.get("weight")
            name = self._name_of.get(id(weight))
            if name is not None:
                self._flow.reached.add(name)
        elif func in _TO_PYTHON and self._flow.varies(args[0]):
            self._flow.note(DEPENDS)
        elif func in DROPOUT:
            return args[0] if args else kwargs["input"]
        elif func in RMS_NORMS:
            self._flow.paused = True
            try:
                out = func(*args, **kwargs)
            finally:
                self._flow.paused = False
            rms_norm(self._flow, *args, **kwargs, out=out)
            return out
        elif func in _VIEWS:
            self._flow.asked = _asked_shape(func, args, kwargs)
            try:
                return func(*args, **kwargs)
            finally:
                self._flow.asked = ()
        return func(*args, **kwargs)


def _asked_shape(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...]:
    """The whole shape that a call of one of ``_VIEWS`` gives, its -1 still in it; empty where it gives none."""
    x, *rest = [*args, *kwargs.values()]
    if func in _UNFLATTEN:
        dim, sizes = rest[0], rest[1]
        if not isinstance(dim, int):
            return ()
        dim %= x.dim()
        return (*x.shape[:dim], *sizes, *x.shape[dim + 1 :])
    shape = rest[0] if len(rest) == 1 and isinstance(rest[0], (tuple, list)) else rest
    return tuple(shape) if all(isinstance(size, int) for size in shape) else ()


def leaves(value: Any) -> Iterator[Tensor]:
    """Every tensor in what a model returns: nested containers, dataclasses, objects with attributes."""
    stack, seen = [value], set()
    while stack:
        item = stack.pop()
        if isinstance(item, Tensor):
            yield item
            continue
        if id(item) in seen or isinstance(item, (str, bytes, type, nn.Module)) or callable(item):
            continue
        seen.add(id(item))
        if isinstance(item, Mapping):
            stack.extend(reversed(list(item.values())))
        elif isinstance(item, (Sequence, set, frozenset)):
            stack.extend(reversed(list(item)))
        elif hasattr(item, "__dict__"):
            stack.extend(reversed(list(vars(item).values())))


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """``value`` with ``change`` applied to every tensor in nested containers; other objects are deep copies."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(item, change) for item in value))
    if type(value) in (list, tuple):
        return type(value)(map_tensors(item, change) for item in value)
    if type(value) is dict:
        return {key: map_tensors(item, change) for key, item in value.items()}
    return copy.deepcopy(value)


def copied(value: Any) -> Any:
    """``value`` with copies of its tensors, so that a forward pass can't change the caller's."""
    return map_tensors(value, lambda tensor: tensor.detach().clone())


def copy_model(model: nn.Module) -> nn.Module:
    """A deep copy; results of a computation kept as plain attributes (old weight norm) are copied as constants.

    A ``SyncBatchNorm`` of the copy takes the statistics of its own process, whose ranks need not make the same pass.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                memo[id(value)] = value.detach().clone()
            elif dist.is_available() and isinstance(value, dist.ProcessGroup):
                memo[id(value)] = value  # no copy can be made of it
    twin = copy.deepcopy(model, memo)
    for module in twin.modules():
        if type(module).forward is nn.SyncBatchNorm.forward and "forward" not in vars(module):
            vars(module)["forward"] = MethodType(_BatchNorm.forward, module)
    return twin


def set_mode(model: nn.Module, training: bool) -> None:
    """Train or eval mode; batch normalisations stay in eval mode, which needs no batch and gives them the same rule.

    So do layers that draw a number for every element, which would draw others for another number of channels.
    """
    model.train(training)
    for module in model.modules():
        if isinstance(module, (_BatchNorm, nn.RReLU)):
            module.eval()


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """No gradients, no autocast, no fused attention; afterwards random states are as they were."""
    devices = {tensor.device for tensor in model.parameters()}
    python, numpy = random.getstate(), np.random.get_state()
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([device for device in devices if device.type == "cuda"]))
        stack.enter_context(torch.no_grad())
        for kind in {"cpu"} | {device.type for device in devices}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)
            random.setstate(python)
            np.random.set_state(numpy)


def _follow_modules(model: nn.Module, flow: Flow, stay: set[str]) -> list[RemovableHandle]:
    """Hooks that keep ``flow.module`` up to date and freeze the outputs of modules in ``stay``."""
    path: list[str] = []
    handles = []

    def watch(name: str, module: nn.Module) -> None:
        def enter(_module: nn.Module, _args: Any) -> None:
            path.append(name)
            flow.module = name

        def leave(_module: nn.Module, _args: Any, output: Any) -> None:
            if name in stay:
                flow.ran.add(name)
                flow.freeze_tensors(leaves(output), "ignored")
            if path and path[-1] == name:
                path.pop()
            flow.module = path[-1] if path else ""

        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave, always_call=True))

    for name, module in model.named_modules():
        watch(name, module)
    return handles


def record(model: nn.Module, flow: Flow, inputs: tuple[tuple[Any, ...], dict[str, Any]], stay: set[str]) -> None:
    """Run ``model`` once; ``flow`` learns what it does.

    Args:
        model: the copy that ``flow`` was made for, in the mode to be traced.
        flow: the state, added to.
        inputs: ``(args, kwargs)``, not changed.
        stay: names of modules whose outputs stay.

    Raises:
        Exception: whatever the forward pass raises.
    """
    args, kwargs = copied(inputs)
    flow.put_varying(leaves((args, kwargs)))
    called = Called(model, flow)
    handles = _follow_modules(model, flow, stay)
    try:
        with called, Dispatched(flow):
            output = model(*args, **kwargs)
        flow.module = ""
        for tensor in leaves(output):
            for labels in flow.of(tensor):
                flow.labels.freeze(labels, Reason("an output of the network"))
    finally:
        for handle in handles:
            handle.remove()
