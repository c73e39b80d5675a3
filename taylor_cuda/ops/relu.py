"""The scoring ReLU: PyTorch's own results, and a backward pass that leaves the gate sums of its output.

The backward pass of any ReLU reads its output and the gradient, which are the factors of those sums.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from taylor_cuda.errors import InputError
from taylor_cuda.ops import checks, library, reference


class _ScoreReLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, skip: Tensor | None, sums: Tensor, skip_sums: Tensor | None, inplace: bool
    ) -> Tensor:
        if inplace:
            ctx.mark_dirty(x)
            output = torch.relu_(x if skip is None else x.add_(skip))
        elif skip is None or torch.compiler.is_compiling():
            # torch.compile of PyTorch 2.11 loses the backward pass of a function that changes what it has just made.
            output = torch.relu(x if skip is None else torch.add(x, skip))
        else:
            output = torch.relu_(torch.add(x, skip))
        # The sums are no saved tensors: layers may share them, and each one's backward pass changes them.
        ctx.save_for_backward(output, None if skip_sums is None else skip)
        ctx.sums, ctx.skip_sums = sums, skip_sums
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        (gradient,) = gradients
        output, skip = ctx.saved_tensors
        output, skip = output.detach(), None if skip is None else skip.detach()
        gx = library.score_relu_backward(output, gradient.detach(), ctx.sums, skip, ctx.skip_sums)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # Somebody will differentiate the gradient: PyTorch's own op, which can be, gives the same bits.
            gx = torch.ops.aten.threshold_backward(gradient, output, 0)
        return gx, gx if ctx.needs_input_grad[1] else None, None, None, None


def score_relu(
    x: Tensor, sums: Tensor, skip: Tensor | None = None, skip_sums: Tensor | None = None, inplace: bool = False
) -> Tensor:
    """relu(x), or relu(x + skip), whose backward pass adds Σ_l y·dE/dy into ``sums``: the gradient of a gate behind it.

    Output and gradients are those of ``torch.relu(x)`` and ``torch.add(x, skip).relu_()``, bit by bit. A ReLU passes
    the sum unchanged, so it is that of a gate in front of it as well: Σ y·dE/dy = Σ (x + skip)·dE/d(x + skip). Of
    that, ``skip_sums`` gets Σ_l skip·dE/dskip of this sum, the part that flows on along the skip connection; the branch
    x has the rest.

    The backward pass reads y and its gradient and writes that of x, as PyTorch's does, and reads ``skip`` where
    ``skip_sums`` is given. Nothing else is saved. The gradient of x is strided as ``torch.empty_like(y)``; a gradient
    that lies otherwise is taken as it is, at the price of narrower loads or a copy.

    Every pass of autograd adds its products; so does the second pass of a double backward, for which the first one
    runs PyTorch's op besides. Clear the sums between steps; several layers may share them. Autocast leaves the dtype
    of x alone, as it does for a ReLU. Works under ``torch.compile(fullgraph=True)``.

    Args:
        x: ``[N, C, *spatial]``, float32, float16, bfloat16 (float64 on the CPU), any strides.
        sums: ``[C]`` (summed over the batch as well) or ``[N, C]``, contiguous, float32 (float64 for float64 results),
            on x's device.
        skip: added to x first, of the same shape and device; two dtypes are promoted as ``torch.add`` does.
        skip_sums: a tensor like ``sums``, or None if nobody asks. ``skip`` may then not be changed in place before the
            backward pass.
        inplace: write the result over x.

    Returns:
        The result, which may not be changed in place before the backward pass. x itself if ``inplace``.

    Raises:
        InputError: a wrong dtype, shape or device, sums that require grad, ``skip_sums`` without ``skip``, or
            ``inplace`` over an x that can't hold the result, or that is the skip.
    """
    checks.check_tensor(x, "x")
    if x.dim() < 2:
        raise InputError(f"x: wanted [N, C, *spatial], got shape {tuple(x.shape)}")
    if skip is not None:
        x, skip = _promoted(x, skip, inplace)
    checks.check_sums(x, sums, "x")
    checks.check_skip(x, sums, skip, skip_sums, "x")
    if not torch.compiler.is_compiling():
        if inplace and skip is not None and skip_sums is not None and _is_same_memory(x, skip):
            raise InputError("skip: wanted memory of its own where x is overwritten and skip_sums is given")
        result: Tensor = _ScoreReLU.apply(x, skip, sums, skip_sums, inplace)
        return result
    # Not every compiler that is supported knows of functions that overwrite their inputs; all of them know copy_.
    result = _ScoreReLU.apply(x, skip, sums, skip_sums, False)
    return x.copy_(result) if inplace else result


def _is_same_memory(x: Tensor, skip: Tensor) -> bool:
    """Whether writing x writes skip; PyTorch itself refuses tensors that overlap in part."""
    shared: bool = torch._C._is_alias_of(x, skip)  # type: ignore[attr-defined]
    return shared and bool(x.storage_offset() == skip.storage_offset())


def _promoted(x: Tensor, skip: Tensor, inplace: bool) -> tuple[Tensor, Tensor]:
    checks.check_tensor(skip, "skip")
    dtype = torch.promote_types(x.dtype, skip.dtype)
    if inplace and dtype != x.dtype:
        raise InputError(f"skip: wanted a dtype that {x.dtype}, which x is overwritten in, holds, got {skip.dtype}")
    return x.to(dtype), skip.to(dtype)


class ScoreReLU(nn.Module):
    """``score_relu`` as a module that owns its sums.

    The sums are no buffers, for DistributedDataParallel would overwrite them with those of rank 0; they follow the
    module to another device, and stay float32 in a 16-bit model.

    Args:
        num_channels: size of dimension 1 of the input.
        inplace: write the result over the input.
        skip: whether the products of the skip connection are summed as well.
        dtype: float32, or float64 for float64 inputs.
        device: where the inputs are.

    Attributes:
        sums: ``[num_channels]``: Σ_{n,l} y·dE/dy of every backward pass since ``reset``.
        skip_sums: ``[num_channels]``: of those, what flows on along the skip connection. None without ``skip``.
    """

    sums: Tensor
    skip_sums: Tensor | None

    def __init__(
        self,
        num_channels: int,
        *,
        inplace: bool = False,
        skip: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.inplace = inplace
        self.sums = torch.zeros(num_channels, dtype=dtype, device=device)
        self.skip_sums = torch.zeros_like(self.sums) if skip else None

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """Return relu(x) or relu(x + skip), ``[N, num_channels, *spatial]``."""
        return score_relu(x, self.sums, skip, None if skip is None else self.skip_sums, self.inplace)

    def reset(self) -> None:
        """Set the sums to 0."""
        self.sums.zero_()
        if self.skip_sums is not None:
            self.skip_sums.zero_()

    def extra_repr(self) -> str:
        """Return the number of channels, and what differs from the defaults."""
        parts = [str(self.sums.shape[0]), *(["inplace=True"] if self.inplace else [])]
        return ", ".join([*parts, *(["skip=True"] if self.skip_sums is not None else [])])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ScoreReLU:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name in ("sums", "skip_sums"):
            if getattr(self, name) is not None:
                moved = fn(getattr(self, name))
                setattr(self, name, moved.to(reference.result_dtype(moved.dtype)))
        return self
