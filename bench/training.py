"""A training step made again and again: plain, scored by this package in every way, and with gate parameters."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import cast

import torch
from torch import Tensor, nn

from taylor_cuda.bench.race import Options
from taylor_cuda.bench.suites.networks import images, labels
from taylor_cuda.importance import Importance
from taylor_cuda.train.step import Backward, Precision, TrainingStep, Updates

RATE = 1e-3


def memory_format(options: Options) -> torch.memory_format:
    """Of networks and images: what is usual on the device."""
    return torch.channels_last if options.cuda else torch.contiguous_format


def examples(batch: int, size: int, options: Options) -> tuple[Tensor, Tensor]:
    """Images ``[batch, 3, size, size]`` and their labels, on the device."""
    x = images(batch, size, options.device).contiguous(memory_format=memory_format(options))
    return x, labels(batch, options.device)


def allocated(options: Options) -> int:
    """Bytes of a GPU that tensors hold; 0 on a CPU."""
    return torch.cuda.memory_allocated() if options.cuda else 0


def flat(model: nn.Module) -> Tensor:
    """All parameters of a network as one vector of their own, whatever their order in memory."""
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


class RepeatedStep:
    """One network with its optimizer; calling it makes one step on always the same batch.

    Args:
        model: in training mode; moved to the device.
        batch: images and labels there.
        options: of the run. On a GPU the step is the usual one there: bfloat16 autocast, channels_last.
    """

    def __init__(self, model: nn.Module, batch: tuple[Tensor, Tensor], options: Options) -> None:
        self.model, self.options = model, options
        self.model.to(device=options.device).to(memory_format=memory_format(options))
        self.optimizer = torch.optim.SGD(self.model.parameters(), RATE, momentum=0.9, foreach=True)
        self.precise = False
        """In float32 throughout, to be compared: in 16 bits, rounding alone turns the gradients of a deep network."""
        self.x, self.y = batch
        self.backward: Backward | None = None
        """Runs the backward passes in place of ``loss.backward()``."""
        self.forward = self.model
        self.gates: _Gates | None = None
        # On the host: what a network takes of a GPU's memory is measured, and this is no part of it.
        self._start = [tensor.to("cpu", copy=True) for tensor in self._state()]

    def compiled(self) -> RepeatedStep:
        """Run the forward and backward pass compiled; a quick run leaves the code generation out, which takes long."""
        compiled = torch.compile(self.model, backend="aot_eager" if self.options.quick else "inductor")
        self.forward = cast(nn.Module, compiled)
        return self

    def gated(self) -> RepeatedStep:
        """Multiply a gate parameter in after both inner norms and after every block, as the paper's own code does."""
        self.gates = _Gates(self.model, self.x.device)
        return self

    def restart(self) -> None:
        """Back to the weights and the optimizer of the beginning."""
        self.optimizer.state.clear()
        with torch.no_grad():
            for tensor, start in zip(self._state(), self._start, strict=True):
                tensor.copy_(start)

    def _state(self) -> list[Tensor]:
        return [tensor.detach() for tensor in (*self.model.parameters(), *self.model.buffers())]

    def flat_parameters(self) -> Tensor:
        """All parameters of the network as one vector of their own."""
        return flat(self.model)

    def __call__(self, estimator: Importance | None = None) -> Tensor:
        """One step, scored by ``estimator`` if there is one; the loss before it."""
        watchers: list[Updates] = [] if estimator is None else [_Scoring(estimator)]
        if self.gates is not None:
            watchers.append(self.gates)
        narrow = self.options.cuda and not self.precise
        precision = Precision("bf16" if narrow else "off", self.x.device)
        step = TrainingStep(self.forward, self.optimizer, self.backward, watchers, precision=precision)
        exact = torch.backends.cudnn.flags(allow_tf32=False) if self.precise else nullcontext()
        with exact:
            loss, _ = step(self.x, self.y)
        return loss


class _Scoring:
    """Scores a step between its backward pass and its optimizer's turn, under a name that a profile shows."""

    def __init__(self, estimator: Importance) -> None:
        self._estimator = estimator

    def update(self) -> None:
        """Take the scores of this step."""
        with torch.profiler.record_function("scoring"):
            self._estimator.update()
            if not self._estimator.criterion.gradient:
                self._estimator.scores()  # its update has nothing to do


class _Gates:
    """Gate parameters of a bottleneck or basic ResNet, and the sums of their squared gradients."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._gates: list[nn.Parameter] = []
        for name, module in model.named_modules():
            inner = name.rpartition(".")[2] in ("bn1", "bn2") and name.startswith("layer")
            if inner or type(module).__name__ in ("Bottleneck", "BasicBlock"):
                module.register_forward_hook(self._hook(module, device))
        self.window = [torch.zeros_like(gate) for gate in self._gates]

    def _hook(self, module: nn.Module, device: torch.device) -> Callable[..., Tensor]:
        width: int = module.num_features if isinstance(module, nn.BatchNorm2d) else _last_norm(module).num_features
        gate = nn.Parameter(torch.ones(1, width, 1, 1, device=device))
        self._gates.append(gate)
        return lambda _module, _args, output: output * gate.to(output.dtype)

    def update(self) -> None:
        """Add the squares of this step's gradients, which no optimizer clears."""
        torch._foreach_add_(self.window, [gate.grad.square() for gate in self._gates if gate.grad is not None])
        for gate in self._gates:
            gate.grad = None


def _last_norm(block: nn.Module) -> nn.BatchNorm2d:
    return [
        module
        for name, module in block.named_children()
        if isinstance(module, nn.BatchNorm2d) and name.startswith("bn")
    ][-1]
