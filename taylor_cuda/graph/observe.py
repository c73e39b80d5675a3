"""What the readers of a model are given and what it returns: of a model that is masked, and of one that was cut."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from taylor_cuda.graph.groups import ChannelGroup, Groups, layer_of, named_tensors
from taylor_cuda.graph.mask import MaskedForward
from taylor_cuda.graph.recorder import DROPOUT, copied, leaves
from taylor_cuda.graph.sites import ReaderInputs, active_in_forward

__all__ = [
    "Difference",
    "Observed",
    "difference",
    "observe_cut",
    "observe_masked",
    "reader_weights",
    "rounds_products",
    "tolerance",
]

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class Observed:
    """What readers were given in one forward pass, as ``(weight, input, channel dimension)``, and what came out."""

    inputs: list[tuple[str, Tensor, int]]
    outputs: list[Tensor]


@dataclass(frozen=True)
class Difference:
    """The first place where a cut model isn't the masked one; ``weight``: the reader there or before it."""

    weight: str
    where: str
    what: str


def reader_weights(groups: Groups | Iterable[ChannelGroup]) -> list[str]:
    """Names of the weights at which units of ``groups`` end, each once."""
    return list(dict.fromkeys(member.tensor for group in groups for member in group.role("read")))


def tolerance(tensors: Iterable[Tensor], roundings: float = 1e3) -> float:
    """The difference, relative to a tensor's greatest value, that rounding alone may cause between cut and masked.

    Sums of thousands of terms in another order, through a hundred layers: a thousand roundings are ample, and a hundred
    are more than usual (in fp32 6e-6 was seen).
    """
    floats = [tensor for tensor in tensors if tensor.is_floating_point()]
    eps = max((torch.finfo(tensor.dtype).eps for tensor in floats), default=1e-7)
    if floats and rounds_products(floats[0].device):
        eps = max(eps, 2e-5)
    return min(roundings * eps, 0.1)


def rounds_products(device: torch.device) -> bool:
    """Whether fp32 products may be rounded to TF32 or bfloat16."""
    backends: Any = torch.backends
    on_cuda = (backends.cudnn.conv, backends.cuda.matmul)
    settings = on_cuda if device.type == "cuda" else (backends.mkldnn.conv, backends.mkldnn.matmul)
    return any(setting.fp32_precision in ("tf32", "bf16") for setting in settings)


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

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Dropout would draw other noise for other shapes."""
        return (args[0] if args else kwargs["input"]) if func in DROPOUT else super().call(func, args, kwargs)


class _Recording(ReaderInputs):
    """Meets the same calls in a model that was cut."""

    def __init__(self, model: nn.Module, weights: Iterable[str], observed: Observed) -> None:
        super().__init__(model, weights, self._note)
        self._observed = observed

    def _note(self, name: str, x: Tensor, dim: int) -> Tensor:
        self._observed.inputs.append((name, x, dim))
        return x

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Dropout would draw other noise for other shapes."""
        return (args[0] if args else kwargs["input"]) if func in DROPOUT else super().call(func, args, kwargs)


def _run(model: nn.Module, mode: ReaderInputs, inputs: Inputs, observed: Observed) -> None:
    handles = active_in_forward(model, mode)
    args, kwargs = copied(inputs)
    try:
        with torch.no_grad(), torch.random.fork_rng([]):
            torch.manual_seed(0)
            observed.outputs = list(leaves(model(*args, **kwargs)))
    finally:
        for handle in handles:
            handle.remove()


def observe_masked(model: nn.Module, groups: Groups, keep: Mapping[str, Tensor], inputs: Inputs) -> Observed:
    """One forward pass with the units not in ``keep`` masked. Random numbers are the same in every pass."""
    observed = Observed([], [])
    _run(model, _RecordingMasked(model, groups, keep, observed), inputs, observed)
    return observed


def observe_cut(model: nn.Module, weights: Iterable[str], inputs: Inputs, observed: Observed) -> None:
    """One forward pass of a model that was cut, into ``observed`` (also what came before an exception).

    Args:
        model: the model.
        weights: the readers to observe.
        inputs: ``(args, kwargs)``, not changed.
        observed: filled.
    """
    _run(model, _Recording(model, weights, observed), inputs, observed)


def _differs(masked: Tensor, cut: Tensor, bound: float) -> str | None:
    if masked.shape != cut.shape:
        return f"shape {tuple(cut.shape)} instead of {tuple(masked.shape)}"
    if not (masked.is_floating_point() or masked.is_complex()):
        return None if masked.equal(cut) else "other values"
    scale = float(masked.abs().max()) if masked.numel() else 0.0
    error = float((masked - cut).abs().max()) if masked.numel() else 0.0
    return None if error <= bound * scale else f"relative difference {error / max(scale, 1e-30):.1e}"


def difference(masked: Observed, cut: Observed, kept: Mapping[str, Tensor], bound: float) -> Difference | None:
    """The first place where a cut model isn't the masked one; None where all is equal.

    Args:
        masked: the model before, units masked.
        cut: the model after.
        kept: for weights of which positions were dropped, the int64 positions kept along what they read.
        bound: relative to the greatest absolute value of each tensor.
    """
    name = ""
    for (name, x, dim), (other, y, _) in zip(masked.inputs, cut.inputs, strict=False):
        layer = layer_of(name)
        if name != other:
            return Difference(name, layer, f"{other} is called instead")
        expected = x.index_select(dim, kept[name].to(x.device)) if name in kept else x
        found = _differs(expected, y, bound)
        if found:
            return Difference(name, f"the input of {layer}", found)
    if (len(masked.inputs), len(masked.outputs)) != (len(cut.inputs), len(cut.outputs)):
        return Difference(name, "the calls of layers", "their number isn't the same")
    for x, y in zip(masked.outputs, cut.outputs, strict=True):
        found = _differs(x, y, bound)
        if found:
            return Difference(name, "an output of the network", found)
    return None
