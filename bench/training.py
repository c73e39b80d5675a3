"""A training step: plain, scored by this package in every way, and with gate parameters."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from taylor_cuda.bench.race import Options
from taylor_cuda.bench.suites.networks import images, labels, make
from taylor_cuda.graph.groups import Groups
from taylor_cuda.importance import Importance

RATE = 1e-3


class TrainingStep:
    """One network with its optimizer; calling it makes one step on always the same batch.

    Args:
        network: torchvision's name.
        batch: examples in a step.
        size: of the square images.
        options: of the run. On a GPU the step is the usual one there: bfloat16 autocast, channels_last.
        groups: of this network.
    """

    def __init__(self, network: str, batch: int, size: int, options: Options, groups: Groups) -> None:
        self.model = make(network)
        self.options, self.groups = options, groups
        memory_format = torch.channels_last if options.cuda else torch.contiguous_format
        self.model.to(device=options.device).to(memory_format=memory_format)
        self.optimizer = torch.optim.SGD(self.model.parameters(), RATE, momentum=0.9, foreach=True)
        self.precise = False
        """In float32 throughout, to be compared: in 16 bits, rounding alone turns the gradients of a deep network."""
        self.x = images(batch, size, options.device).contiguous(memory_format=memory_format)
        self.y = labels(batch, options.device)
        self.forward: Callable[[Tensor], Tensor] = self.model
        self.gates: list[nn.Parameter] = []
        self._start = [tensor.clone() for tensor in self._state()]

    def compiled(self) -> TrainingStep:
        """Run the forward and backward pass compiled; a quick run leaves the code generation out, which takes long."""
        self.forward = torch.compile(self.model, backend="aot_eager" if self.options.quick else "inductor")
        return self

    def gated(self) -> TrainingStep:
        """Multiply a gate parameter in after both inner norms and after every block, as the paper's own code does."""
        for name, module in self.model.named_modules():
            inner = name.rpartition(".")[2] in ("bn1", "bn2") and name.startswith("layer")
            if inner or type(module).__name__ in ("Bottleneck", "BasicBlock"):
                module.register_forward_hook(self._gate_hook(module))
        self.window = [torch.zeros_like(gate) for gate in self.gates]
        return self

    def _gate_hook(self, module: nn.Module) -> Callable[..., Tensor]:
        width: int = module.num_features if isinstance(module, nn.BatchNorm2d) else _last_norm(module).num_features
        gate = nn.Parameter(torch.ones(1, width, 1, 1, device=self.x.device))
        self.gates.append(gate)
        return lambda _module, _args, output: output * gate.to(output.dtype)

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
        return torch.cat([parameter.detach().flatten() for parameter in self.model.parameters()])

    def __call__(self, estimator: Importance | None = None) -> Tensor:
        """One step, scored by ``estimator`` if there is one; the loss before it."""
        self.optimizer.zero_grad()
        for gate in self.gates:
            gate.grad = None
        exact = torch.backends.cudnn.flags(allow_tf32=False) if self.precise else nullcontext()
        with exact:
            with torch.autocast("cuda", torch.bfloat16, enabled=self.options.cuda and not self.precise):
                loss = nn.functional.cross_entropy(self.forward(self.x), self.y)
            loss.backward()
        if estimator is not None:
            with torch.profiler.record_function("scoring"):
                estimator.update()
                if not estimator.criterion.gradient:
                    estimator.scores()  # its update has nothing to do
        if self.gates:
            torch._foreach_add_(self.window, [gate.grad.square() for gate in self.gates if gate.grad is not None])
        self.optimizer.step()
        return loss.detach()


def _last_norm(block: nn.Module) -> nn.BatchNorm2d:
    return [
        module
        for name, module in block.named_children()
        if isinstance(module, nn.BatchNorm2d) and name.startswith("bn")
    ][-1]
