"""Random parameters for a copy, at which no channel is without effect on what comes after it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from taylor_cuda.graph.groups import Groups, named_tensors
from taylor_cuda.graph.observe import Inputs
from taylor_cuda.graph.recorder import copied, set_mode

__all__ = ["Noise", "jitter", "randomise"]


class Noise:
    """Normal numbers from a pool, so that millions of weights cost a copy. Its prime length fits no layer's width."""

    def __init__(self, generator: torch.Generator) -> None:
        self._pool = torch.randn(65_537, generator=generator)
        self._at = 0

    def like(self, tensor: Tensor) -> Tensor:
        """Numbers of the shape, dtype and device of ``tensor``."""
        values = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        flat, done = values.view(-1), 0
        while done < flat.numel():  # a stretch at a time, which stays in the cache
            stretch = self._pool[self._at : self._at + flat.numel() - done]
            flat[done : done + stretch.numel()].copy_(stretch)
            done += stretch.numel()
            self._at = (self._at + stretch.numel()) % self._pool.numel()
        return values


def _fan_in(weight: Tensor, transposed: bool) -> int:
    return max(1, weight.numel() // max(1, weight.shape[1 if transposed else 0]))


def randomise(model: nn.Module, groups: Groups, inputs: Inputs, generator: torch.Generator) -> None:
    """Random parameters at which no unit is without effect: nothing zero, constant or tiny; activations of order 1.

    ``model`` is a copy; its tensors are replaced, not written into. Statistics of batch normalisations become those of
    ``inputs`` where a forward pass in train mode is possible.
    """
    noise = Noise(generator)
    weights = {call.weight for call in groups.calls}
    norms = {member.tensor for group in groups for member in group.role("norm")}
    members = {member.tensor for group in groups for member in group.members}
    flipped = {
        f"{name}.weight" if name else "weight"
        for name, module in model.named_modules()
        if isinstance(module, _ConvNd) and module.transposed and module.groups == 1
    }
    buffers = dict(model.named_buffers())
    for name, tensor in named_tensors(model).items():
        if not tensor.is_floating_point() or not tensor.numel() or (name in buffers and name not in members):
            continue
        values = noise.like(tensor)
        last = name.rpartition(".")[2]
        if name in weights:
            tensor.data = values.mul_((2.0 / _fan_in(tensor, name in flipped)) ** 0.5)
        elif name in norms:
            scales = last in ("weight", "running_var") or float(tensor.detach().mean()) > 0.5
            tensor.data = values * 0.2 + (1.0 if scales else 0.0)
            if last == "running_var":
                tensor.data = tensor.data.abs() + 0.1
        elif last == "bias":
            tensor.data = values * 0.1
        elif float(tensor.detach().abs().max()) < 0.1:
            # layer scales near zero, positions, heads at zero: of order one, away from zero
            tensor.data = (values * 0.2 + 1.0).abs() + 0.1
        elif name in members:
            tensor.data = tensor.data * (1 + 0.2 * values)
    _recalibrate(model, inputs, noise)


def _recalibrate(model: nn.Module, inputs: Inputs, noise: Noise) -> None:
    layers = [
        module for module in model.modules() if isinstance(module, _BatchNorm) and module.running_mean is not None
    ]
    if not layers:
        return
    momenta = [layer.momentum for layer in layers]
    before = [(layer.running_mean, layer.running_var) for layer in layers]
    saved = [(mean.clone(), var.clone()) for mean, var in before if mean is not None and var is not None]
    try:
        for layer in layers:
            layer.momentum = 1.0
        set_mode(model, False)
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
        set_mode(model, False)
    for (mean, var), (old_mean, old_var) in zip(before, saved, strict=True):
        assert mean is not None
        assert var is not None
        good = usable and bool(torch.isfinite(mean).all()) and bool(torch.isfinite(var).all())
        new_mean = mean + 0.1 * noise.like(mean) * var.clamp_min(0).sqrt() if good else old_mean
        new_var = var * (0.2 * noise.like(var)).exp() + 1e-3 if good else old_var
        mean.data, var.data = new_mean, new_var


def jitter(model: nn.Module, generator: torch.Generator) -> None:
    """Every floating value times 1 ± 0.2: for models whose parameters can't be just any numbers."""
    noise = Noise(generator)
    for tensor in named_tensors(model).values():
        if tensor.is_floating_point():
            tensor.data = tensor.data * (1 + 0.2 * noise.like(tensor))
