"""What scoring adds to a training step: the same step, plain and with every way of scoring, in turns."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from taylor_cuda.bench.race import Entry, Key, Options, Provider, Race
from taylor_cuda.bench.suites.networks import images, labels, make
from taylor_cuda.graph import trace
from taylor_cuda.graph.groups import Groups
from taylor_cuda.importance import Importance

RATE = 1e-3
COMPILED = "training_step:compiled"


class TrainingStep:
    """One network with its optimizer; calling it makes one step on always the same batch.

    Args:
        network: torchvision's name.
        batch: examples in a step.
        size: of the square images.
        options: of the run. On a GPU the step is the usual one there: bfloat16 autocast, channels_last.
        groups: of this network.
        compile_model: run the forward and backward pass compiled.
    """

    def __init__(
        self, network: str, batch: int, size: int, options: Options, groups: Groups, *, compile_model: bool
    ) -> None:
        self.model = make(network)
        self.cuda = options.cuda
        self.groups = groups
        memory_format = torch.channels_last if options.cuda else torch.contiguous_format
        self.model.to(device=options.device).to(memory_format=memory_format)
        self.optimizer = torch.optim.SGD(self.model.parameters(), RATE, momentum=0.9, foreach=True)
        self.x = images(batch, size, options.device).contiguous(memory_format=memory_format)
        self.y = labels(batch, options.device)
        self.forward: Callable[[Tensor], Tensor] = torch.compile(self.model) if compile_model else self.model
        self.estimator: Importance | None = None
        self.gates: list[nn.Parameter] = []

    def score(self, criterion: str) -> TrainingStep:
        """Take this criterion's scores at every step."""
        self.estimator = Importance(self.model, self.groups, criterion)
        return self

    def gate(self) -> TrainingStep:
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

    def flat_parameters(self) -> Tensor:
        """All parameters of the network as one vector of their own."""
        return torch.cat([parameter.detach().flatten() for parameter in self.model.parameters()])

    def __call__(self) -> Tensor:
        """One step; the loss before it."""
        self.optimizer.zero_grad()
        for gate in self.gates:
            gate.grad = None
        with torch.autocast("cuda", torch.bfloat16, enabled=self.cuda):
            loss = nn.functional.cross_entropy(self.forward(self.x), self.y)
        if self.estimator is None:
            loss.backward()
        else:
            self.estimator.backward(loss)
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


def build(key: Key, network: str, batch: int, size: int, options: Options) -> Race:
    """The race of whole steps.

    Every network starts from the same weights; the first step of each has to move them as the plain one does. On a GPU,
    16-bit rounding in another order may turn a fifth of that movement; on a CPU a thousandth.
    """
    groups = trace(make(network), images(1, size))
    reference = TrainingStep(network, batch, size, options, groups, compile_model=False)
    start = reference.flat_parameters()
    reference()
    moved = reference.flat_parameters()
    allowed = (0.2 if options.cuda else 1e-3) * float((moved - start).norm())
    del reference, start

    def provider(name: str, step: TrainingStep, note: str = "") -> Provider:
        def check(_loss: Tensor, _index: int) -> float:
            if step.estimator is not None:
                scores = torch.cat(list(step.estimator.scores().values()))
                if not bool(scores.isfinite().all() and (scores > 0).any()):
                    return float("nan")
            return float((step.flat_parameters() - moved).norm()) / allowed

        return Provider(name, lambda _: step(), check, note)

    compile_model = key.op == COMPILED

    def fresh() -> TrainingStep:
        return TrainingStep(network, batch, size, options, groups, compile_model=compile_model)

    plain = "torch.compile" if compile_model else "torch"
    providers = [provider(plain, fresh(), "the plain step"), provider("ours:taylor_fo", fresh().score("taylor_fo"))]
    if not compile_model:
        note = "a gate parameter after both inner norms and after every block"
        providers.append(provider("ours:taylor_fg", fresh().score("taylor_fg")))
        providers.append(provider("nvlabs-style", fresh().gate(), note))
    rounds, seconds = (200, 75.0) if options.cuda else (20, None if options.quick else 15.0)
    return Race(key, providers, peer=plain, rounds=rounds, seconds=seconds)


def entries(options: Options) -> list[Entry]:
    """ResNet-50 as it is trained on a GPU; something small where there is none."""
    network, batch, size = ("resnet50", 256, 224) if options.cuda else ("resnet18", 16, 112)
    if options.quick:
        network, batch, size = "resnet18", 2, 64
    dtype, layout = ("bfloat16", "channels_last") if options.cuda else ("float32", "nchw")
    made = partial(build, network=network, batch=batch, size=size, options=options)
    case = f"{network} batch {batch} at {size}"
    plain = Entry(
        Key("step", "training_step", case, dtype, layout),
        made,
        ("torch", "ours:taylor_fo", "ours:taylor_fg", "nvlabs-style"),
        20 if options.cuda else 60,
        120.0 if options.cuda else 30.0,
    )
    if not options.cuda:
        return [plain]
    compiled = Entry(Key("step", COMPILED, case, dtype, layout), made, ("torch.compile", "ours:taylor_fo"), 70, 180.0)
    return [plain, compiled]
