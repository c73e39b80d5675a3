"""What second order costs: a backward pass without scores, with those of first order, and with curvature."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from taylor_cuda.bench.race import Entry, Key, Options, Provider, Race
from taylor_cuda.bench.suites.networks import images, labels, make
from taylor_cuda.graph import trace
from taylor_cuda.graph.groups import Groups
from taylor_cuda.importance import Importance
from taylor_cuda.importance import unit_gates as exact

OP = "backward"
SECOND_PASS = "torch:second pass"
"""A backward pass to the activations only, and then the loss's own: the least that any probe can cost."""

CRITERIA = ("taylor_fo", "taylor_so", "taylor_fo_fisher")
ROWS = (1, 2)
"""Rows of the exact Hessian whose times tell what one row takes: all of them would take hours."""

ROUNDS = 5

ON_A_CPU = "resnet50 batch 4 at 128"


def named(criterion: str) -> str:
    """The provider that scores by a criterion."""
    return f"ours:{criterion}"


def rows_of_hessian(count: int) -> str:
    """The provider that takes a gradient's graph and this many rows of the Hessian."""
    return f"ours:taylor_so_hessian:{count}_rows"


def names() -> tuple[str, ...]:
    """Everybody in the race."""
    return "torch", *map(named, CRITERIA), SECOND_PASS, *map(rows_of_hessian, ROWS)


class Backward:
    """One network whose forward pass is outside the clock and whose backward pass is inside.

    Args:
        network: torchvision's name.
        batch: examples.
        size: of the square images.
        groups: of this network.
        options: of the run; on a GPU bfloat16 autocast and channels_last.
    """

    def __init__(self, network: str, batch: int, size: int, groups: Groups, options: Options) -> None:
        memory_format = torch.channels_last if options.cuda else torch.contiguous_format
        self.model = make(network).to(device=options.device).to(memory_format=memory_format)
        self.groups, self.options = groups, options
        self.x = images(batch, size, options.device).contiguous(memory_format=memory_format)
        self.y = labels(batch, options.device)
        self.first: Tensor | None = None
        self._graph: tuple[Tensor, Tensor] | None = None

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Make the graph of one backward pass; afterwards nothing of it is left."""
        self._graph = self._made()
        if self.options.cuda:
            torch.cuda.synchronize()
        try:
            yield
        finally:
            self._graph = self.first = None

    def _made(self) -> tuple[Tensor, Tensor]:
        self.model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=self.options.cuda):
            outputs = self.model(self.x)
            return functional.cross_entropy(outputs, self.y), outputs

    def taken(self) -> tuple[Tensor, Tensor]:
        """The loss and the outputs, for one use.

        Where a call is over before the clock has ticked, as on a quick run, more are timed together, and the others
        have to make theirs.
        """
        graph, self._graph = self._graph or self._made(), None
        return graph

    def gradients(self) -> Tensor:
        """All gradients as one vector."""
        return torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None])


def build(key: Key, network: str, batch: int, size: int, options: Options) -> Race:
    """The race of backward passes, each of a network of its own."""
    groups = trace(make(network), images(1, size))
    made = partial(Backward, network, batch, size, groups, options)
    plain = made()
    plain.taken()[0].backward()
    expected = plain.gradients()
    # The passes before it may not move the loss's own gradient. On a CPU it is the same, bit for bit.
    allowed = (0.05 if options.cuda else 1e-6) * float(expected.norm())

    def provider(name: str, one: Backward, run: Callable[[Backward], object], note: str) -> Provider:
        def timed(_input: object) -> Backward:
            run(one)
            return one

        def check(result: Backward, _index: int) -> float:
            return float((result.gradients() - expected).norm()) / allowed

        context: Callable[[], AbstractContextManager[None]] = one.forward
        return Provider(name, timed, check, note, context=context)

    found = [provider("torch", plain, lambda one: one.taken()[0].backward(), "the plain backward pass")]
    for criterion in CRITERIA:
        found.append(provider(named(criterion), *_scored(made(), criterion)))
    found.append(provider(SECOND_PASS, *_second_pass(made())))
    units = sum(groups.sizes().values())
    for count in ROWS:
        found.append(provider(rows_of_hessian(count), *_exact(made(), count, units)))
    return Race(key, found, peer="torch", rounds=ROUNDS, least=ROUNDS)


def _scored(one: Backward, criterion: str) -> tuple[Backward, Callable[[Backward], object], str]:
    estimator = Importance(one.model, one.groups, criterion)
    return one, lambda one: estimator.backward(*one.taken()), "backward pass and scores"


def _second_pass(one: Backward) -> tuple[Backward, Callable[[Backward], object], str]:
    """Back to the first activation, past the gradients of all weights."""

    def keep(_module: object, _args: object, output: Tensor) -> None:
        one.first = output

    one.model.get_submodule("conv1").register_forward_hook(keep)
    signs = torch.sign(torch.randn(1, 1000, generator=torch.Generator().manual_seed(0))).to(one.x.device)

    def run(one: Backward) -> None:
        loss, outputs = one.taken()
        assert one.first is not None
        torch.autograd.grad(outputs, one.first, signs.expand_as(outputs).to(outputs), retain_graph=True)
        loss.backward()

    return one, run, "a pass to the activations and the plain one, no scores"


def _exact(one: Backward, count: int, units: int) -> tuple[Backward, Callable[[Backward], object], str]:
    gates = exact.UnitGates(one.model, list(one.groups))
    gates.lay_out(list(one.groups))

    def run(one: Backward) -> None:
        loss, _ = one.taken()
        gates.slope_and_curve(loss, count)
        loss.backward()
        gates.clear()

    return one, run, f"{count} of {units} rows of the exact Hessian, and the plain pass"


def entries(options: Options) -> list[Entry]:
    """ResNet-50, on a CPU at a size that takes seconds."""
    network, batch, size = ("resnet50", 256, 224) if options.cuda else ("resnet50", 4, 128)
    if options.quick:
        network, batch, size = "tiny", 2, 64
    dtype, layout = ("bfloat16", "channels_last") if options.cuda else ("float32", "nchw")
    key = Key("curvature", OP, f"{network} batch {batch} at {size}", dtype, layout)
    made = partial(build, network=network, batch=batch, size=size, options=options)
    return [Entry(key, made, names(), 9 if options.cuda else 45, 1.0 if options.quick else 120.0)]
