"""Proof of groups: on a copy with random parameters, a cut of some units of every group must equal their masking.

A rule can be wrong, and Python code can hold a number that the cut doesn't change (``x[:, :8]``). What the comparison
doesn't confirm isn't offered.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from taylor_cuda.graph.flow import HERE, TORCH
from taylor_cuda.graph.groups import ChannelGroup, Groups, named_tensors
from taylor_cuda.graph.observe import (
    Inputs,
    Observed,
    difference,
    observe_cut,
    observe_masked,
    reader_weights,
    tolerance,
)
from taylor_cuda.graph.randomise import jitter, randomise
from taylor_cuda.graph.recorder import leaves, map_tensors, set_mode
from taylor_cuda.graph.slicing import Keeps, slice_model, tensor_keeps

__all__ = ["prove", "random_keep"]


def random_keep(groups: Iterable[ChannelGroup], generator: torch.Generator) -> dict[str, Tensor]:
    """Random units to keep: of groups of one size another number each, as far as there are numbers.

    Code that wants two sets of channels to stay equally many (``chunk``) would hold if both lost as many by chance.
    """
    numbers: dict[int, list[int]] = {}
    keep = {}
    for group in groups:
        size = group.size
        if not numbers.get(size):
            # from a tenth to six tenths dropped; all that is possible where the group is small
            low, high = (1, size - 1) if size < 8 else (size // 10 + 1, size * 6 // 10)
            numbers[size] = (torch.randperm(high - low + 1, generator=generator) + low).tolist()
        dropped = numbers[size].pop()
        keep[group.name] = torch.randperm(size, generator=generator)[dropped:].sort().values
    return keep


MOST_TESTS = 100
"""Tests of sets of groups, a few forward passes each, after which what isn't proved yet is given up."""


@dataclass(frozen=True)
class Failure:
    """Why a set of groups failed, and the last reader that was met before it showed."""

    text: str
    weight: str


@dataclass
class Proof:
    """Tests sets of groups on one randomised copy.

    Attributes:
        model: the copy; whole again after every test.
        groups: all groups.
        inputs: ``(args, kwargs)``.
        keep: the units that every test keeps.
        modes: whether to test in train mode, once each.
        dead: whether some reader was given nothing but zeros: there, cut and masked agree whatever the code is.
    """

    model: nn.Module
    groups: Groups
    inputs: Inputs
    keep: dict[str, Tensor]
    modes: tuple[bool, ...]
    _good: list[ChannelGroup] = field(default_factory=list)
    _bad: dict[str, str] = field(default_factory=dict)
    _bad_kinds: dict[type, str] = field(default_factory=dict)
    dead: bool = False
    _tests: int = 0

    def failure(self, chosen: list[ChannelGroup]) -> Failure | None:
        """Why cutting the drawn units of these groups together isn't masking them; None where it is."""
        self._tests += 1
        part = replace(self.groups, groups=tuple(chosen))
        keep = {group.name: self.keep[group.name] for group in chosen}
        for training in self.modes:
            set_mode(self.model, training)
            found = self._failure_in_mode(part, keep, look=True)
            if found:
                return found
        set_mode(self.model, False)
        # code may ask how many channels there are: min, //, a branch
        return self._failure_in_mode(part, {group.name: torch.zeros(1, dtype=torch.int64) for group in chosen})

    def _cut(self, part: Groups, keep: dict[str, Tensor], keeps: Keeps, cut: Observed) -> Failure | None:
        """Cut, run, restore."""
        done = slice_model(self.model, part, keep, keeps)
        try:
            observe_cut(self.model, reader_weights(part), self.inputs, cut)
        except Exception as error:
            last = cut.inputs[-1][0] if cut.inputs else ""
            return Failure(f"the code can't run with fewer channels: {_where(error)}", last)
        finally:
            done.restore()
        return None

    def _failure_in_mode(self, part: Groups, keep: dict[str, Tensor], look: bool = False) -> Failure | None:
        """``look``: whether a reader that is given zeros is a sign (with one channel each, many are)."""
        weights = reader_weights(part)
        keeps = tensor_keeps(self.model, part, keep)
        dims = {member.tensor: member.dim for group in part for member in group.role("read")}
        kept = {name: keeps[name][dims[name]] for name in weights if dims[name] in keeps.get(name, {})}
        cut = Observed([], [])
        failure = self._cut(part, keep, keeps, cut)
        if failure is not None:
            return failure
        masked = observe_masked(self.model, part, keep, self.inputs)
        if look:
            self.dead |= any(_is_dead(x) for _, x, _ in masked.inputs)
        found = difference(masked, cut, kept, tolerance(self.model.parameters(), roundings=100))
        if found is None:
            return None
        exact = self._holds_in_double(part, keep, keeps, kept)
        if exact is None:
            exact = difference(masked, cut, kept, tolerance(self.model.parameters())) is None
        return None if exact else Failure(f"cut and masked differ at {found.where}: {found.what}", found.weight)

    def _holds_in_double(
        self, part: Groups, keep: dict[str, Tensor], keeps: Keeps, kept: Mapping[str, Tensor]
    ) -> bool | None:
        """Whether cut and masked are equal in float64; None where the code holds another dtype.

        A LayerNorm left with two nearly equal channels magnifies rounding, and one after a factor hides the factor.
        """
        tensors = [tensor for tensor in named_tensors(self.model).values() if tensor.is_floating_point()]
        before = [(tensor, tensor.data) for tensor in tensors]
        inputs = map_tensors(self.inputs, lambda x: x.double() if x.is_floating_point() else x)
        wide, cut = replace(self, inputs=inputs), Observed([], [])
        try:
            for tensor in tensors:
                tensor.data = tensor.data.double()
            masked = observe_masked(self.model, part, keep, inputs)
            if wide._cut(part, keep, keeps, cut) is not None:
                return False
            return difference(masked, cut, kept, tolerance(self.model.parameters())) is None
        except Exception:
            return None
        finally:
            for tensor, data in before:
                tensor.data = data

    def bad(self, first: Failure) -> dict[str, str]:
        """``{group name: reason}`` of groups that fail; all others hold together.

        Args:
            first: how all groups together failed.
        """
        rest = list(self.groups)
        aside: list[ChannelGroup] = []
        failure: Failure | None = first
        while failure is not None and self._tests < MOST_TESTS:
            met = [group for group in rest if any(m.tensor == failure.weight for m in group.members)]
            kinds = {kind for group in met for kind in self._kinds(group)}
            suspects = [group for group in rest if group in met or kinds & self._kinds(group)]
            if not suspects or len(suspects) == len(rest):
                break
            aside += suspects
            rest = [group for group in rest if group not in suspects]
            failure = self.failure(rest)
        if failure is None:
            self._good = rest
        else:
            self._settle(rest, failure)
        for group in aside:
            self._settle([group], None)
        return self._bad

    def _kinds(self, group: ChannelGroup) -> set[type]:
        """The classes whose code counts the units of ``group``: where it fails for one module, it does for all."""
        return {type(self.model.get_submodule(number.module)) for number in group.numbers}

    def _settle(self, candidates: list[ChannelGroup], failure: Failure | None) -> None:
        """Take in those of ``candidates`` that hold together with the good ones. ``failure``: theirs, if it's known."""
        known = {group.name: self._bad_kinds.keys() & self._kinds(group) for group in candidates}
        for name, kinds in known.items():
            if kinds:
                self._bad[name] = self._bad_kinds[next(iter(kinds))]
        if any(known.values()):
            candidates, failure = [group for group in candidates if not known[group.name]], None
        if not candidates:
            return
        if failure is None and self._tests >= MOST_TESTS:
            self._bad.update((group.name, f"not proved: {MOST_TESTS} tests weren't enough") for group in candidates)
            return
        failure = failure or self.failure([*self._good, *candidates])
        if failure is None:
            self._good.extend(candidates)
        elif len(candidates) == 1:
            self._bad[candidates[0].name] = failure.text
            self._bad_kinds.update(dict.fromkeys(self._kinds(candidates[0]), failure.text))
        else:
            middle = len(candidates) // 2
            self._settle(candidates[:middle], None)
            self._settle(candidates[middle:], None)


def _is_dead(x: Tensor) -> bool:
    return x.numel() > 0 and not bool(x.any())


def _where(error: Exception) -> str:
    """The error's first line and the innermost line of code that is neither torch's nor this package's."""
    text = (str(error).strip().splitlines() or [""])[0]
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith((HERE, TORCH, "<")):
            return f"{type(error).__name__}: {text} ({os.path.basename(frame.filename)}:{frame.lineno})"
    return f"{type(error).__name__}: {text}"


def prove(model: nn.Module, groups: Groups, inputs: Inputs, train_too: bool) -> dict[str, str]:
    """Which groups must not be offered, and why.

    Args:
        model: a copy of the traced model; its parameters are replaced.
        groups: what the trace found.
        inputs: ``(args, kwargs)``, not changed.
        train_too: also compare in train mode, for it does something else.

    Returns:
        ``{group name: reason}``; empty where every group holds.
    """
    if not groups.groups:
        return {}
    generator = torch.Generator().manual_seed(0)
    original = [(tensor, tensor.data) for tensor in named_tensors(model).values()]
    keep = random_keep(groups, generator)
    modes = (False, True) if train_too else (False,)
    first = _first_example(inputs)
    if first is not None:
        randomise(model, groups, first, generator)
        proof = Proof(model, groups, first, keep, modes)
        if proof.failure(list(groups)) is None and not proof.dead:
            return {}
        for tensor, data in original:  # perhaps the model just doesn't take one example
            tensor.data = data
    randomise(model, groups, inputs, generator)
    proof = Proof(model, groups, inputs, keep, modes)
    failure = proof.failure(list(groups))
    usable = failure is None or _finite(model, groups, inputs)
    bad = proof.bad(failure) if failure is not None and usable else {}
    if usable and not proof.dead:
        return bad
    # at any values some models give nothing: at values near their own they give what they were made for
    for tensor, data in original:
        tensor.data = data
    jitter(model, generator)
    if not usable and not _finite(model, groups, inputs):
        return dict.fromkeys(groups.sizes(), "can't be proved: the outputs of the model are not finite")
    rest = replace(groups, groups=tuple(group for group in groups if group.name not in bad))
    again = Proof(model, rest, inputs, keep, modes)
    failure = again.failure(list(rest)) if rest.groups else None
    return bad if failure is None else {**bad, **again.bad(failure)}


def _first_example(inputs: Inputs) -> Inputs | None:
    """The inputs with the first of their examples alone, where they have several: what holds for it is proved."""
    sizes = {tensor.shape[0] for tensor in leaves(inputs) if tensor.dim()}
    if len(sizes) != 1 or sizes == {1}:
        return None
    first: Inputs = map_tensors(inputs, lambda tensor: tensor[:1].clone() if tensor.dim() else tensor)
    return first


def _finite(model: nn.Module, groups: Groups, inputs: Inputs) -> bool:
    set_mode(model, False)
    observed = observe_masked(model, groups, {}, inputs)
    tensors = [*(x for _, x, _ in observed.inputs), *observed.outputs]
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
