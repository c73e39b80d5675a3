"""BatchNorm, an optional addition and ReLU as one op, whose backward pass leaves the gate sums of every example."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from taylor_cuda.errors import InputError
from taylor_cuda.ops import checks, library


class _BatchNormReLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
        sums: Tensor | None,
        relu: bool,
    ) -> Tensor:
        y: Tensor
        y, mean, invstd = library.batch_norm_relu_forward(
            x, running_mean, running_var, weight, bias, residual, training, momentum, eps, relu
        )
        # Without a residual the backward pass knows from x where y > 0, and y need not be kept. sums is no saved
        # tensor: ops may share it, and each one's backward pass changes it.
        ctx.save_for_backward(x, y if relu and residual is not None else None, mean, invstd, weight, bias)
        ctx.sums, ctx.training, ctx.relu = sums, training, relu
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise InputError("create_graph: wanted False, for batch_norm_relu has no second derivative, got True")
        (gradient,) = gradients
        x, y, mean, invstd, weight, bias = ctx.saved_tensors
        needs_x, needs_residual, needs_weight, needs_bias = ctx.needs_input_grad[:4]
        needs = [needs_x, needs_residual and ctx.relu, needs_weight, needs_bias]
        results = library.batch_norm_relu_backward(
            gradient, x, y, mean, invstd, weight, bias, ctx.sums, ctx.training, ctx.relu, needs
        )
        found = [result if needed else None for result, needed in zip(results, needs, strict=True)]
        if needs_residual and not ctx.relu:
            found[1] = gradient
        return (*found, *(None,) * 7)


def batch_norm_relu(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    sums: Tensor | None = None,
    relu: bool = True,
) -> Tensor:
    """``relu(F.batch_norm(x, ...) + residual)`` in one op, whose backward pass can leave the gradient of a gate.

    With b = γ·x̂ + β the output of the normalisation and gx' the gradient in it, the backward pass adds Σ_l b·gx' to
    ``sums``: dE/dz of a gate z = 1 on every channel of b, for every example (arXiv:1906.10771). Without a residual it
    is also that of a gate behind the ReLU, Σ_l y·dE/dy. Summed over the examples it is γ·dγ + β·dβ.

    A GPU reads x twice and writes y, and on the way back reads x and the gradient twice and writes gx: 8 passes over
    the tensors, and 11 with a residual, where separate ops take 13 and 16. Kept for the backward pass are x, with a
    residual y, and vectors ``[C]``. There is no second derivative (``create_graph=True`` raises). Two runs are
    bit-equal, and a NaN stays in its channel. Works under ``torch.compile(fullgraph=True)``. Each pass of autograd adds
    to ``sums`` again; clear it between steps.

    Args:
        x: ``[N, C, *spatial]``, float32, float16, bfloat16 (float64 on the CPU), any strides; fastest in channels_last.
        running_mean: ``[C]``, float32 (float64 for float64 x) or x's dtype; updated in place with ``training``, and may
            be None with it, together with running_var.
        running_var: the same; moves towards the batch's unbiased variance.
        weight: γ, ``[C]``, dtypes as running_mean; None for 1.
        bias: β, the same; None for 0.
        training: normalise by the batch's statistics instead of the running ones.
        momentum: the batch's share in new running statistics.
        eps: added to the variance.
        residual: what is added before the ReLU; of x's shape, dtype and device, any strides.
        sums: ``[C]`` (summed over the batch as well) or ``[N, C]``, contiguous, float32 (float64 for float64 x), on
            x's device.
        relu: False leaves the ReLU out.

    Returns:
        y, of x's shape and dtype, laid out as ``torch.empty_like(x)``.

    Raises:
        InputError: a wrong dtype, shape or device, one running statistic without the other or none without
            ``training``, a single value per channel with it, or sums that require grad.
    """
    checks.check_batch_norm(x, running_mean, running_var, weight, bias, training, momentum, residual)
    if sums is not None:
        checks.check_sums(x, sums, "x")
    y: Tensor = _BatchNormReLU.apply(
        x, residual, weight, bias, running_mean, running_var, training, momentum, eps, sums, relu
    )
    return y


class BatchNormReLU(nn.BatchNorm2d):
    """``nn.BatchNorm2d``, an optional addition and ReLU as one op. A checkpoint of either loads into the other.

    ``nn.SyncBatchNorm.convert_sync_batchnorm`` takes it for a BatchNorm and would lose the ReLU.

    Attributes:
        sums: ``[C]`` or ``[N, C]`` to which backward passes add gate gradients (see ``batch_norm_relu``), or None.
    """

    sums: Tensor | None = None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return relu(norm(x) + residual), ``[N, C, H, W]``."""
        self._check_input_dim(x)
        updates = self.training and self.track_running_stats
        if updates and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        momentum = self.momentum
        if momentum is None:  # the mean of all batches so far
            momentum = 1 / float(self.num_batches_tracked) if updates and self.num_batches_tracked is not None else 0.0
        known = updates or not self.training
        mean, variance = (self.running_mean, self.running_var) if known else (None, None)
        training = self.training or mean is None
        return batch_norm_relu(
            x, mean, variance, self.weight, self.bias, training, momentum, self.eps, residual, self.sums
        )
