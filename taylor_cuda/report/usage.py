"""Which parameters a model's forward pass meets, in which mode, and how often it calls which module."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from taylor_cuda.graph.recorder import copied, copy_model, set_mode, undisturbed
from taylor_cuda.graph.rules import tensors_in

__all__ = ["Usage", "modules_of", "observe_usage"]


@dataclass(frozen=True)
class Usage:
    """What one forward pass in each mode does with a model.

    Attributes:
        in_eval: names of the parameters that some op of the pass in eval mode takes.
        in_train: the same in train mode; of a pass that raises, what came before.
        calls: times that a pass calls each module that owns parameters, the greater of both modes.
    """

    in_eval: frozenset[str]
    in_train: frozenset[str]
    calls: dict[str, int]


class _Meeting(TorchDispatchMode):
    """Notes the parameters that ops take."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.met: set[str] = set()
        self._name_of = {id(parameter): name for name, parameter in model.named_parameters()}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        ids = {id(tensor) for tensor in tensors_in(args, kwargs or {})}
        self.met.update(self._name_of[one] for one in ids & self._name_of.keys())
        return func(*args, **(kwargs or {}))


def observe_usage(model: nn.Module, inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> Usage:
    """Run a copy of ``model`` once in each mode and see what it meets.

    Args:
        model: a module that ``tc.trace`` took; left as it is.
        inputs: ``(args, kwargs)``, not changed.
    """
    twin = copy_model(model)
    calls: Counter[str] = Counter()
    now: Counter[str] = Counter()

    def count(name: str, module: nn.Module) -> None:
        def enter(_module: nn.Module, _args: Any) -> None:
            now[name] += 1

        module.register_forward_pre_hook(enter)

    for name, module in twin.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            count(name, module)
    met = {}
    with undisturbed(model):
        for training in (False, True):
            now.clear()
            set_mode(twin, training)
            meeting = _Meeting(twin)
            args, kwargs = copied(inputs)
            try:
                with meeting:
                    twin(*args, **kwargs)
            except Exception:
                if not training:
                    raise
            met[training] = frozenset(meeting.met)
            calls |= now
    return Usage(met[False], met[True], dict(calls))


def modules_of(model: nn.Module, parameters: Iterable[str]) -> dict[str, list[str]]:
    """``{module: its parameters}`` for these parameters, each under the outermost module that owns no others.

    A parameter beside others in its module, or of the model itself, stands under its own name.
    """
    wanted = set(parameters)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, list[str]] = {}
    placed: set[str] = set()
    for prefix, module in model.named_modules():
        inside = [names[id(parameter)] for parameter in module.parameters()]
        if prefix and inside and wanted.issuperset(inside):
            fresh = [name for name in inside if name not in placed]
            if fresh:
                found[prefix] = fresh
                placed.update(fresh)
    found.update({name: [name] for name in names.values() if name in wanted - placed})
    return found
