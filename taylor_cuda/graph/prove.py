"""Proof of groups: on a copy with random parameters, a cut of some units of every group must equal their masking.

A rule can be wrong, and Python code can hold a number that the cut doesn't change (``x[:, :8]``). What the comparison
doesn't confirm isn't offered.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from taylor_cuda.graph.flow import _HERE, _TORCH
from taylor_cuda.graph.groups import ChannelGroup, Groups, named_tensors
from taylor_cuda.graph.mask import MaskedForward
from taylor_cuda.graph.recorder import copied, leaves
from taylor_cuda.graph.sites import ReaderInputs, active_in_forward
from taylor_cuda.graph.slicing import slice_model, tensor_keeps

__all__ = [
    "Observed",
    "difference",
    "observe_cut",
    "observe_masked",
    "prove",
    "random_keep",
    "reader_weights",
    "tolerance",
]

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class Observed:
    """What the readers of a model were given in one forward pass, in order, and what the model returned."""

    inputs: list[tuple[str, Tensor, int]]
    outputs: list[Tensor]


def reader_weights(groups: Groups | Iterable[ChannelGroup]) -> list[str]:
    """Names of the weights at which units of ``groups`` end, each once."""
    return list(dict.fromkeys(member.tensor for group in groups for member in group.role("read")))


def tolerance(tensors: Iterable[Tensor]) -> float:
    """The relative difference that rounding alone may cause between a masked model and a cut one (coarsest dtype)."""
    eps = max((torch.finfo(tensor.dtype).eps for tensor in tensors if tensor.is_floating_point()), default=1e-7)
    # sums of thousands of terms in another order, through a hundred layers: about a thousand roundings, 7e-7 seen in
    # fp32
    return min(1e3 * eps, 0.06)


class _RecordingMasked(MaskedForward):
    """:class:`MaskedForward` that also meets readers of which everything is kept."""

    def __init__(self, model: nn.Module, groups: Groups, keep: Mapping[str, Tensor], observed: Observed) -> None:
        super().__init__(model, groups, keep)
        tensors = named_tensors(model)
        self._name_of = {id(tensors[name]): name for name in reader_weights(groups)}
        self._observed = observed

    def _zero_dropped(self, name: str, x: Tensor, dim: int) -> Tensor:
        if name in self._read:
            x = super()._zero_dropped(name, x, dim)
        self._observed.inputs.append((name, x, dim))
        return x


def _run(model: nn.Module, mode: Any, inputs: Inputs, observed: Observed) -> Observed:
    handles = active_in_forward(model, mode)
    args, kwargs = copied(inputs)
    try:
        with torch.no_grad():
            observed.outputs = list(leaves(model(*args, **kwargs)))
    finally:
        for handle in handles:
            handle.remove()
    return observed


def observe_masked(model: nn.Module, groups: Groups, keep: Mapping[str, Tensor], inputs: Inputs) -> Observed:
    """One forward pass with the units not in ``keep`` masked."""
    observed = Observed([], [])
    return _run(model, _RecordingMasked(model, groups, keep, observed), inputs, observed)


def observe_cut(model: nn.Module, weights: Iterable[str], inputs: Inputs) -> Observed:
    """One forward pass of a model that was cut; ``weights``: the readers to observe."""
    observed = Observed([], [])

    def note(name: str, x: Tensor, dim: int) -> Tensor:
        observed.inputs.append((name, x, dim))
        return x

    return _run(model, ReaderInputs(model, weights, note), inputs, observed)


def _differs(masked: Tensor, cut: Tensor, bound: float) -> str | None:
    if masked.shape != cut.shape:
        return f"shape {tuple(cut.shape)} instead of {tuple(masked.shape)}"
    if not (masked.is_floating_point() or masked.is_complex()):
        return None if masked.equal(cut) else "other values"
    scale = float(masked.abs().max()) if masked.numel() else 0.0
    error = float((masked - cut).abs().max()) if masked.numel() else 0.0
    return None if error <= bound * scale else f"relative difference {error / max(scale, 1e-30):.1e}"


def difference(masked: Observed, cut: Observed, kept: Mapping[str, Tensor], bound: float) -> tuple[str, str] | None:
    """The first place where a cut model isn't the masked one.

    Args:
        masked: the model before, units masked.
        cut: the model after.
        kept: for weights of which positions were dropped, the int64 positions kept along what they read.
        bound: relative to the greatest absolute value of each tensor.

    Returns:
        ``(where, what)``, None where all is equal.
    """
    names = [name for name, _, _ in masked.inputs], [name for name, _, _ in cut.inputs]
    if names[0] != names[1]:
        return "the order of layers", "other layers are called"
    for (name, x, dim), (_, y, _) in zip(masked.inputs, cut.inputs, strict=True):
        expected = x.index_select(dim, kept[name].to(x.device)) if name in kept else x
        found = _differs(expected, y, bound)
        if found:
            return f"the input of {name.rpartition('.')[0] or name}", found
    if len(masked.outputs) != len(cut.outputs):
        return "the outputs", "another number of tensors"
    for x, y in zip(masked.outputs, cut.outputs, strict=True):
        found = _differs(x, y, bound)
        if found:
            return "an output of the network", found
    return None


def random_keep(groups: Iterable[ChannelGroup], generator: torch.Generator, share: float = 1 / 3) -> dict[str, Tensor]:
    """Units to keep when about ``share`` of every group is dropped at random: at least one dropped and one kept."""
    keep = {}
    for group in groups:
        dropped = min(max(1, round(group.size * share)), group.size - 1)
        keep[group.name] = torch.randperm(group.size, generator=generator)[dropped:].sort().values
    return keep


class _Noise:
    """Normal numbers from a pool, so that millions of weights cost a copy. Its prime length fits no layer's width."""

    def __init__(self, generator: torch.Generator) -> None:
        self._pool = torch.randn(65_537, generator=generator)
        self._at = 0

    def like(self, tensor: Tensor) -> Tensor:
        """Numbers of the shape, dtype and device of ``tensor``."""
        count, size = tensor.numel(), self._pool.numel()
        start, self._at = self._at, (self._at + count) % size
        values = self._pool
        if start + count > size:
            values = values.repeat(-(-(start + count) // size))
        return values[start : start + count].view(tensor.shape).to(tensor, copy=True)


def _fan_in(weight: Tensor, transposed: bool) -> int:
    return max(1, weight.numel() // max(1, weight.shape[1 if transposed else 0]))


def randomise(model: nn.Module, groups: Groups, inputs: Inputs, generator: torch.Generator) -> None:
    """Random parameters at which no unit is without effect: nothing zero, constant or tiny; activations of order 1.

    ``model`` is a copy; its tensors are replaced, not written into. Statistics of batch normalisations become those of
    ``inputs`` where a forward pass in train mode is possible.
    """
    noise = _Noise(generator)
    weights = {call.weight for call in groups.calls}
    norms = {member.tensor for group in groups for member in group.role("norm")}
    members = {member.tensor for group in groups for member in group.members}
    flipped = {
        f"{name}.weight" if name else "weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.conv._ConvNd) and module.transposed and module.groups == 1
    }
    buffers = dict(model.named_buffers())
    for name, tensor in named_tensors(model).items():
        if not tensor.is_floating_point() or not tensor.numel() or (name in buffers and name not in members):
            continue
        values = noise.like(tensor)
        last = name.rpartition(".")[2]
        if name in weights:
            tensor.data = values * (2.0 / _fan_in(tensor, name in flipped)) ** 0.5
        elif name in norms:
            tensor.data = values * 0.2 + (1.0 if last in ("weight", "running_var") else 0.0)
            if last == "running_var":
                tensor.data = tensor.data.abs() + 0.1
        elif last == "bias":
            tensor.data = values * 0.1
        elif float(tensor.detach().abs().max()) < 0.1 or name in members:
            # layer scales near zero, positions, heads at zero: of order one, away from zero
            tensor.data = (values * 0.2 + 1.0).abs() + 0.1
    _recalibrate(model, inputs, noise)


def _recalibrate(model: nn.Module, inputs: Inputs, noise: _Noise) -> None:
    layers = [
        module for module in model.modules() if isinstance(module, _BatchNorm) and module.running_mean is not None
    ]
    if not layers:
        return
    momenta = [layer.momentum for layer in layers]
    modes = [(module, module.training) for module in model.modules()]
    before = [(layer.running_mean, layer.running_var) for layer in layers]
    saved = [(mean.clone(), var.clone()) for mean, var in before if mean is not None and var is not None]
    try:
        for layer in layers:
            layer.momentum = 1.0
        model.eval()
        for layer in layers:
            layer.train()
        args, kwargs = copied(inputs)
        with torch.no_grad():
            model(*args, **kwargs)
        usable = True
    except Exception:  # one value per channel, …: the random statistics stay
        usable = False
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        for module, training in modes:
            module.training = training
    for (mean, var), (old_mean, old_var) in zip(before, saved, strict=True):
        assert mean is not None
        assert var is not None
        good = usable and bool(torch.isfinite(mean).all()) and bool(torch.isfinite(var).all())
        new_mean = mean + 0.1 * noise.like(mean) * var.clamp_min(0).sqrt() if good else old_mean
        new_var = var * (0.2 * noise.like(var)).exp() + 1e-3 if good else old_var
        mean.data, var.data = new_mean, new_var


@dataclass
class Proof:
    """Tests sets of groups on one randomised copy."""

    model: nn.Module
    groups: Groups
    inputs: Inputs
    keep: dict[str, Tensor]
    modes: tuple[bool, ...]

    def failure(self, chosen: list[ChannelGroup]) -> str | None:
        """Why cutting the drawn units of these groups together isn't masking them; None where it is."""
        part = replace(self.groups, groups=tuple(chosen))
        keep = {group.name: self.keep[group.name] for group in chosen}
        for training in self.modes:
            self.model.train(training)
            found = self._failure_in_mode(part, keep)
            if found:
                return found
        return None

    def _failure_in_mode(self, part: Groups, keep: dict[str, Tensor]) -> str | None:
        weights = reader_weights(part)
        keeps = tensor_keeps(self.model, part, keep)
        dims = {member.tensor: member.dim for group in part for member in group.role("read")}
        kept = {name: keeps[name][dims[name]] for name in weights if dims[name] in keeps.get(name, {})}
        bound = tolerance(self.model.parameters())
        try:
            with torch.random.fork_rng([]):
                torch.manual_seed(0)
                masked = observe_masked(self.model, part, keep, self.inputs)
        except Exception as error:
            return f"the masked model fails: {_where(error)}"
        done = slice_model(self.model, part, keep, keeps)
        try:
            with torch.random.fork_rng([]):
                torch.manual_seed(0)
                cut = observe_cut(self.model, weights, self.inputs)
        except Exception as error:
            return f"the code can't run with fewer channels: {_where(error)}"
        finally:
            done.restore()
        found = difference(masked, cut, kept, bound)
        return None if found is None else f"cut and masked differ at {found[0]}: {found[1]}"

    def bad(self) -> dict[str, str]:
        """``{group name: reason}`` of the groups that fail; all others hold together."""
        good: list[ChannelGroup] = []
        bad: dict[str, str] = {}

        def settle(candidates: list[ChannelGroup]) -> None:
            failure = self.failure([*good, *candidates])
            if failure is None:
                good.extend(candidates)
            elif len(candidates) == 1:
                bad[candidates[0].name] = failure
            else:
                middle = len(candidates) // 2
                settle(candidates[:middle])
                settle(candidates[middle:])

        if self.groups.groups:
            settle(list(self.groups.groups))
        return bad


def _where(error: Exception) -> str:
    """The error's first line and the innermost line of code that is neither torch's nor this package's."""
    text = (str(error).strip().splitlines() or [""])[0]
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith((_HERE, _TORCH, "<")):
            return f"{type(error).__name__}: {text} ({os.path.basename(frame.filename)}:{frame.lineno})"
    return f"{type(error).__name__}: {text}"


def prove(model: nn.Module, groups: Groups, inputs: Inputs, train_too: bool) -> dict[str, str]:
    """Which groups must not be offered, and why.

    Args:
        model: a copy of the traced model; its parameters are overwritten.
        groups: what the trace found.
        inputs: ``(args, kwargs)``, not changed.
        train_too: also compare in train mode (some readers run only there).

    Returns:
        ``{group name: reason}``; empty where every group holds.
    """
    generator = torch.Generator().manual_seed(0)
    model.eval()
    original = [(tensor, tensor.data) for tensor in named_tensors(model).values()]
    randomise(model, groups, inputs, generator)
    keep = random_keep(groups, generator)
    proof = Proof(model, groups, inputs, keep, (False, True) if train_too else (False,))
    if proof.failure(list(groups)) is None:
        return {}
    if not _finite(model, groups, inputs):
        # a parameter that must be positive, an exponent: near the model's own values then
        noise = _Noise(generator)
        for tensor, data in original:
            tensor.data = data * (1 + 0.2 * noise.like(data)) if data.is_floating_point() else data
        if not _finite(model, groups, inputs):
            return dict.fromkeys(groups.sizes(), "can't be proved: the outputs of the model are not finite")
    return proof.bad()


def _finite(model: nn.Module, groups: Groups, inputs: Inputs) -> bool:
    try:
        observed = observe_masked(model, groups, {}, inputs)
    except Exception:
        return False
    tensors = [*(x for _, x, _ in observed.inputs), *observed.outputs]
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
