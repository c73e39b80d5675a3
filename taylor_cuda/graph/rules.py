"""The table of rules: for each ATen op, what its output's labels are and which labels it makes equal.

A rule is a small function of the :class:`~taylor_cuda.graph.flow.Flow` and one :class:`Op`, registered under the op's
name without its overload. An in-place op (``relu_``) takes the rule of the op without the underscore. An op without a
rule freezes everything that reaches it.

A rule may only say what holds for every size: that the op, run on tensors that lost some of a unit's positions, gives
the old output without those positions (whatever the dropped positions held, if they're zeroed before the unit's
readers).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from taylor_cuda.graph.flow import Flow

__all__ = ["RULES", "Op", "Rule", "find_rule", "rule", "tensors_in"]


@dataclass(frozen=True)
class Op:
    """One call of an ATen op.

    Attributes:
        name: without namespace and overload, ``add_``; ops of other libraries as ``namespace.name``.
        args: positional arguments as the dispatcher gives them (trailing defaults left out).
        kwargs: keyword arguments.
        out: what it returned.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any

    def arg(self, position: int, name: str, default: Any = None) -> Any:
        """One argument, wherever it was given."""
        if position < len(self.args):
            return self.args[position]
        return self.kwargs.get(name, default)

    @property
    def said(self) -> str:
        """The op's name for a message."""
        return self.name.strip("_")

    @property
    def x(self) -> Tensor:
        """The first argument."""
        first: Tensor = self.args[0]
        return first

    def dims(self, position: int, name: str, rank: int) -> list[int]:
        """An argument that lists dimensions, as sorted numbers >= 0; none or an empty list means all."""
        given = self.arg(position, name)
        if given is None or isinstance(given, bool) or (isinstance(given, (list, tuple)) and not given):
            return list(range(rank))
        return sorted({int(dim) % max(rank, 1) for dim in (given if isinstance(given, (list, tuple)) else [given])})


Rule = Callable[[Flow, Op], None]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule under these op names; a string may hold several, with spaces between."""

    def register(function: Rule) -> Rule:
        for name in " ".join(names).split():
            RULES[name] = function
        return function

    return register


def find_rule(name: str) -> Rule | None:
    """The rule of an op, or of the op it is the in-place form of."""
    found = RULES.get(name)
    if found is None and name.endswith("_"):
        found = RULES.get(name[:-1])
    return found


def tensors_in(*values: Any) -> Iterator[Tensor]:
    """The tensors in arguments or results of an op: bare, or in (nested) lists and tuples."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(*value)
        elif isinstance(value, dict):
            yield from tensors_in(*value.values())
