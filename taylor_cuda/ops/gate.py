"""The gate: identity in the forward pass, one fused reduction of activation and gradient in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from taylor_cuda.errors import InputError
from taylor_cuda.ops import checks, library, reference


class _ScoreGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sums: Tensor) -> Tensor:
        # sums is no saved tensor: gates may share it, and each one's backward pass changes it.
        ctx.save_for_backward(x)
        ctx.sums = sums
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        (x,) = ctx.saved_tensors
        library.accumulate_channel_sums(x.detach(), gradient.detach(), ctx.sums)
        return gradient, None


def score_gate(x: Tensor, sums: Tensor) -> Tensor:
    """Identity whose backward pass adds Σ_l x·dE/dy into ``sums``: the gradient of a gate of 1 on every channel.

    With y = z·x and z = 1, dE/dz_c = Σ_{n,l} x·dE/dy, and its square is the Taylor-FO importance (arXiv:1906.10771).
    No multiplication happens in the forward pass and x is not copied: the backward pass reads x and the gradient once.

    Every pass of autograd through the gate adds the products with the gradient that arrives in that pass; so does the
    second pass of a double backward. Clear ``sums`` between steps. Where x needs no gradient, nothing arrives and
    nothing is added. ``sums`` may be shared by several gates. Works under ``torch.compile(fullgraph=True)``.

    Args:
        x: ``[N, C, *spatial]``, float32, float16, bfloat16 (float64 on the CPU), any strides. It may not be
            changed in place afterwards, and neither may the result: an in-place ReLU behind the gate raises.
        sums: ``[C]`` (summed over the batch as well) or ``[N, C]``, contiguous, float32 (float64 for float64 x), on
            x's device.

    Returns:
        x, as a view that autograd sends through the gate.

    Raises:
        InputError: a wrong dtype, shape or device, or sums that require grad.
    """
    checks.check_tensor(x, "x")
    if x.dim() < 2:
        raise InputError(f"x: wanted [N, C, *spatial], got shape {tuple(x.shape)}")
    checks.check_sums(x, sums, "x")
    result: Tensor = _ScoreGate.apply(x, sums)
    return result


class ScoreGate(nn.Module):
    """``score_gate`` as a module that owns its sums.

    The sums are no buffer, for DistributedDataParallel would overwrite them with those of rank 0; they follow the
    module to another device, and stay float32 in a 16-bit model.

    Args:
        num_channels: size of dimension 1 of the input.
        dtype: float32, or float64 for float64 inputs.
        device: where the inputs are.

    Attributes:
        sums: ``[num_channels]``: Σ_{n,l} a·g of every backward pass since ``reset``.
    """

    sums: Tensor

    def __init__(
        self, num_channels: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.sums = torch.zeros(num_channels, dtype=dtype, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """Return x, ``[N, num_channels, *spatial]``."""
        return score_gate(x, self.sums)

    def reset(self) -> None:
        """Set the sums to 0."""
        self.sums.zero_()

    def extra_repr(self) -> str:
        """Return the number of channels."""
        return str(self.sums.shape[0])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ScoreGate:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        moved = fn(self.sums)
        self.sums = moved.to(reference.result_dtype(moved.dtype))
        return self
