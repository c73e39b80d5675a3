"""Normalisations over the last dimension whose statistics are those of some of its channels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["normalised"]


def normalised(func: Any, x: Tensor, vectors: tuple[Tensor | None, ...], eps: float | None, kept: Tensor) -> Tensor:
    """LayerNorm or RMSNorm over the kept channels of the last dimension; zeros elsewhere.

    Args:
        func: the function that was called.
        x: ``[…, C]``, or ``[K, …, C]`` with copies.
        vectors: weight, and bias of a LayerNorm.
        eps: as given; ``None`` is that of x's dtype.
        kept: bool, broadcasts with x.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    count = kept.sum(-1, keepdim=True).clamp(min=1)
    if func is F.layer_norm:
        wide = wide - torch.where(kept, wide, 0.0).sum(-1, keepdim=True) / count
    wide = torch.where(kept, wide, 0.0)
    floor = torch.finfo(x.dtype).eps if eps is None else eps
    scale = torch.rsqrt(wide.square().sum(-1, keepdim=True) / count + floor)
    weight, bias = (*vectors, None)[:2]
    y = wide * scale if weight is None else wide * scale * weight
    return (y if bias is None else y + torch.where(kept, bias, 0.0)).to(x.dtype)
