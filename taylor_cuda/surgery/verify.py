"""Is the cut model the masked one? Both forward passes, compared at every reader and at the outputs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from taylor_cuda.errors import CutError, InputError
from taylor_cuda.graph.groups import Groups, named_tensors
from taylor_cuda.graph.mask import MaskedForward, position_masks
from taylor_cuda.graph.observe import rounds_products
from taylor_cuda.graph.sites import ReaderInputs

__all__ = [
    "DifferenceError",
    "MaskedReference",
    "device_of",
    "floating_leaves",
    "quiet",
    "relative_difference",
    "run_example",
    "tolerance_of",
]


class DifferenceError(CutError):
    """Cut and masked differ by more than the tolerance of their dtype."""


_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 0.03, torch.bfloat16: 0.12}
"""Relative to the largest magnitude of the compared tensor. Cut and masked sum the same terms in another order: at most
22 eps in fp64, 11 in fp32 and 4 in 16 bits on eight networks, resnet18 to vit_b_16. A wrong position is of order 1."""

_REDUCED_FP32 = 0.02
"""For fp32 where products are rounded to TF32 or bfloat16 (eps 2^-10 to 2^-8, independent from product to product)."""


def relative_difference(expected: Tensor, actual: Tensor) -> float:
    """``max |actual - expected| / max |expected|`` of two tensors of any floating or complex dtype.

    Equal infinities and NaN in the same place count as no difference; a value that is finite in one tensor only, or
    another shape, as an infinite one.
    """
    if expected.shape != actual.shape:
        return float("inf")
    if expected.is_complex():
        expected, actual = torch.view_as_real(expected), torch.view_as_real(actual)
    expected, actual = expected.double(), actual.double()
    same = (expected == actual) | (expected.isnan() & actual.isnan())
    if bool(same.all()):
        return 0.0
    scale = float(torch.where(expected.isfinite(), expected, 0.0).abs().max())
    difference = torch.where(same, 0.0, actual - expected).abs()
    greatest = float(difference.max()) if bool(difference.isfinite().all()) else float("inf")
    return greatest / scale if scale > 0 else float("inf")


@contextlib.contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, no autocast; training flags, buffers and the random state are put back afterwards.

    Training flags are set one by one, because ``train()`` and ``eval()`` may be overridden to do more than that.
    """
    flags = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.clone(), buffer._version)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and not buffer.is_inference()
    ]
    device = device_of(model)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
        for kind in {"cpu", device.type}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        try:
            for module, _ in flags:
                module.training = False
            yield
        finally:
            for module, training in flags:
                module.training = training
            for module, name, buffer, value, version in buffers:
                module._buffers[name] = buffer
                if buffer._version != version:
                    buffer.copy_(value)


def run_example(model: nn.Module, inputs: tuple[tuple[Any, ...], dict[str, Any]], *modes: Any) -> Any:
    """What the model returns for its example inputs, within ``quiet`` and ``modes``.

    Args:
        model: in the dtype and on the device in which it computes.
        inputs: ``(args, kwargs)``; floating ones are taken in the dtype of the model's parameters.
        modes: contexts to be active meanwhile.
    """
    device = device_of(model)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)

    def place(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.detach().to(device, dtype if value.is_floating_point() else None, copy=True)

    args, kwargs = pytree.tree_map(place, inputs)
    with contextlib.ExitStack() as stack:
        stack.enter_context(quiet(model))
        for mode in modes:
            stack.enter_context(mode)
        # forward() and not a call of the module: hooks on the whole model belong to whoever watches it train
        return model.forward(*args, **kwargs)


class MaskedReference:
    """The masked forward pass of a model, remembered, to be compared with the forward pass of the cut model.

    Args:
        model: as it is before the cut.
        groups: its groups.
        keep: ``{group name: int64 indices of the units to keep}``.

    Raises:
        InputError: the model can't run its example inputs.
    """

    def __init__(self, model: nn.Module, groups: Groups, keep: Mapping[str, Tensor]) -> None:
        self._model, self._inputs = model, groups.example_inputs
        tensors = named_tensors(model)
        readers = {member.tensor for group in groups for member in group.role("read")}
        self._readers = sorted(readers.union(call.weight for call in groups.calls) & tensors.keys())
        masks = position_masks(model, groups, keep, "read")
        self._shrinking = {
            member.tensor: tensors[member.tensor].shape[1]
            for group in groups
            if group.name in keep and keep[group.name].numel() < group.size
            for member in group.members
            if tensors[member.tensor].dim() > 1
        }
        self._kept = {name: mask.nonzero().flatten() for name, mask in masks.items()}
        self._tolerance = max((tolerance_of(p.dtype, p.device) for p in tensors.values()), default=0.0)
        self._expected: list[tuple[str, Tensor]] = []
        # weights of grouped convolutions: what they take is compared where it is read, behind them
        self._grouped: set[str] = set()
        try:
            outputs = self._forward(self._remember, MaskedForward(model, groups, keep))
        except Exception as error:
            raise InputError(
                f"groups: the model's forward pass with its example inputs raised {type(error).__name__}: {error}"
            ) from error
        self._expected += floating_leaves(outputs)

    def compare(self) -> float:
        """Run the model as it is now; return the greatest ``relative_difference``.

        Raises:
            CutError: it is above the tolerance, or the model no longer runs.
        """
        self._greatest, self._where, self._seen = 0.0, "nothing", 0
        try:
            outputs = self._forward(self._compare_reader)
        except CutError:
            raise
        except Exception as error:
            raise CutError(f"the cut model's forward pass raised {type(error).__name__}: {error}") from error
        results = floating_leaves(outputs)
        for name, value in results:
            self._compare(name, value)
        if results and not any(bool(value.isfinite().any()) for _, value in results):
            raise CutError(
                "the model's outputs for its example inputs are all NaN or infinite: nothing can be compared"
            )
        if self._seen != len(self._expected) or not self._seen:
            raise CutError(
                f"the cut model computes {self._seen} values that can be compared, the masked one {len(self._expected)}"
            )
        if not self._greatest <= self._tolerance:
            raise DifferenceError(
                f"cut and masked differ by {self._greatest:.2g} at {self._where} (relative to the largest value there; "
                f"{self._tolerance:.1g} allowed)"
            )
        return self._greatest

    def _forward(self, at_reader: Any, *modes: Any) -> Any:
        return run_example(self._model, self._inputs, ReaderInputs(self._model, self._readers, at_reader), *modes)

    def _remember(self, name: str, x: Tensor, dim: int) -> Tensor:
        kept = self._kept.get(name)
        self._note_precision(x)
        if kept is None and name in self._shrinking and x.shape[dim] != self._shrinking[name]:
            self._grouped.add(name)
        else:
            self._expected.append((name, x.clone() if kept is None else x.index_select(dim, kept.to(x.device))))
        return x

    def _compare_reader(self, name: str, x: Tensor, dim: int) -> Tensor:
        self._note_precision(x)
        if name not in self._grouped:
            self._compare(name, x)
        return x

    def _compare(self, name: str, actual: Tensor) -> None:
        if self._seen >= len(self._expected):
            raise CutError("the cut model computes more values than the masked one")
        expected_name, expected = self._expected[self._seen]
        self._seen += 1
        if name != expected_name:
            raise CutError(
                f"the cut model goes another way: it comes to {name} where the masked one came to {expected_name}"
            )
        difference = relative_difference(expected, actual)
        if difference > self._greatest:
            self._greatest, self._where = difference, name

    def _note_precision(self, x: Tensor) -> None:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        self._tolerance = max(self._tolerance, tolerance_of(dtype, x.device))


def floating_leaves(outputs: Any) -> list[tuple[str, Tensor]]:
    """The floating and complex tensors in what a model returned, by name."""
    leaves = [x for x in pytree.tree_leaves(outputs) if isinstance(x, Tensor)]
    return [(f"output {i}", x) for i, x in enumerate(leaves) if x.is_floating_point() or x.is_complex()]


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's first tensor."""
    return next((tensor.device for tensor in named_tensors(model).values()), torch.device("cpu"))


def tolerance_of(dtype: torch.dtype, device: torch.device) -> float:
    """The difference, relative to the largest value, that rounding alone may cause."""
    if dtype == torch.float32 and rounds_products(device):
        return _REDUCED_FP32
    return _TOLERANCE.get(dtype, 0.0)
