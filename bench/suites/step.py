"""What scoring adds to a training step: the same step, plain and with every way of scoring, in turns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import torch
from torch import Tensor

from taylor_cuda.bench.profile import split
from taylor_cuda.bench.race import Entry, Key, Options, Provider, Race
from taylor_cuda.bench.suites.networks import images, make
from taylor_cuda.bench.training import RepeatedStep, allocated, examples
from taylor_cuda.graph import trace
from taylor_cuda.graph.groups import Groups
from taylor_cuda.importance import Importance

PAIRS = 200
"""Rounds on a GPU, each with one step of everybody: what makes a ratio of 1.005 visible."""

ON_A_GPU = "resnet50 batch 256 at 224"
"""The step there; on a CPU it is smaller."""

GATES = "nvlabs-style"
ACTIVATIONS = ("taylor_fg", "taylor_output")
"""Criteria that put something into the network, which a compiled one has to be compiled with."""

# One race each, as a row says what it was beside, and as the most important one has to fit into any time limit.
CRITERIA = {
    "training_step": ("taylor_fo", "taylor_fg", GATES),
    "training_step:more": ("taylor_weight", "taylor_output", "magnitude"),
    "training_step:compiled": ("taylor_fo", "taylor_weight", "magnitude"),
    "training_step:compiled_activations": ACTIVATIONS,
    "split": ("taylor_fo", "taylor_fg"),
}


def named(criterion: str) -> str:
    """The provider that scores by a criterion."""
    return criterion if criterion == GATES else f"ours:{criterion}"


class Steps:
    """The providers of one race of whole steps.

    Every network starts from the same weights; the first step of each has to move them as the plain one does. On a GPU,
    16-bit rounding in another order may turn a fifth of that movement; on a CPU a thousandth.

    Args:
        key: of the race.
        fresh: makes a network with its optimizer.
        groups: of the network.
        options: of the run.
    """

    def __init__(self, key: Key, fresh: Callable[[], RepeatedStep], groups: Groups, options: Options) -> None:
        self.key, self.fresh, self.groups, self.options = key, fresh, groups, options
        self.compiled = ":compiled" in key.op
        # Also makes what libraries allocate once, which would otherwise count as the first provider's.
        reference = fresh()
        start = reference.flat_parameters()
        reference()
        self.moved = reference.flat_parameters()
        self.allowed = (0.2 if options.cuda else 1e-3) * float((self.moved - start).norm())
        self.shared: RepeatedStep | None = None

    def provider(self, criterion: str | None) -> Provider:
        """The plain step, or one that is scored by ``criterion``."""
        before = allocated(self.options)
        step, estimator = self._made(criterion)
        run = partial(step, estimator)

        def check(_loss: Tensor, _index: int) -> float:
            if estimator is not None:
                scores = torch.cat(list(estimator.scores().values()))
                if not bool(scores.isfinite().all() and (scores > 0).any()):
                    return float("nan")
            return float((step.flat_parameters() - self.moved).norm()) / self.allowed

        plain = "torch.compile" if self.compiled else "torch"
        notes = {None: "the plain step", GATES: "a gate parameter after both inner norms and after every block"}
        return Provider(
            plain if criterion is None else named(criterion),
            lambda _: run(),
            check,
            notes.get(criterion, ""),
            context=_restarting_once(step),
            built_bytes=allocated(self.options) - before,
            split=partial(split, run, self.options) if self.key.suite == "profile" else None,
        )

    def _made(self, criterion: str | None) -> tuple[RepeatedStep, Importance | None]:
        apart = not self.compiled or criterion in ACTIVATIONS
        # Compiling takes a minute, and scores from parameters leave what is compiled alone.
        step = self.fresh() if apart or self.shared is None else self.shared
        if criterion == GATES:
            step.gated()
        plain = criterion is None or criterion == GATES
        estimator = None if plain else Importance(step.model, self.groups, str(criterion))
        if self.compiled and step is not self.shared:
            step.compiled()
        if not apart:
            self.shared = step
        return step, estimator


def _restarting_once(step: RepeatedStep) -> Callable[[], AbstractContextManager[None]]:
    """A context that restarts the network the first time it is entered: the first step is the one that is checked."""
    waiting = [step]

    @contextmanager
    def context() -> Iterator[None]:
        while waiting:
            waiting.pop().restart()
        yield

    return context


def build(key: Key, network: str, batch: int, size: int, options: Options) -> Race:
    """The race of whole steps."""
    groups = trace(make(network), images(1, size))
    data = examples(batch, size, options)
    steps = Steps(key, lambda: RepeatedStep(make(network), data, options), groups, options)
    providers = [steps.provider(criterion) for criterion in (None, *CRITERIA[key.op])]
    peer = providers[0].name
    if key.suite == "profile":
        return Race(key, providers, peer=peer, rounds=10, seconds=5.0)
    if options.cuda:
        return Race(key, providers, peer=peer, rounds=PAIRS, least=PAIRS)
    return Race(key, providers, peer=peer, rounds=20, seconds=None if options.quick else 15.0)


def entries(options: Options) -> list[Entry]:
    """ResNet-50 as it is trained on a GPU; something small where there is none."""
    network, batch, size = ("resnet50", 256, 224) if options.cuda else ("resnet18", 16, 112)
    if options.quick:
        network, batch, size = "tiny", 2, 64
    dtype, layout = ("bfloat16", "channels_last") if options.cuda else ("float32", "nchw")
    case = f"{network} batch {batch} at {size}"
    assert case == ON_A_GPU or options.quick or not options.cuda
    # (suite, op, priority, seconds): on a CPU a whole run is for figures that mean something there.
    wanted = [("step", "training_step", 8 if options.cuda else 60, 55.0 if options.cuda else 30.0)]
    if options.cuda or options.quick:
        wanted += [
            ("profile", "split", 9, 20.0),
            ("step", "training_step:more", 42, 55.0),
            ("step", "training_step:compiled", 44, 130.0),
            ("step", "training_step:compiled_activations", 90, 160.0),
        ]
    found = []
    for suite, op, priority, seconds in wanted:
        plain = "torch.compile" if ":compiled" in op else "torch"
        names = (plain, *(named(criterion) for criterion in CRITERIA[op]))
        made = partial(build, network=network, batch=batch, size=size, options=options)
        found.append(
            Entry(Key(suite, op, case, dtype, layout), made, names, priority, 1.0 if options.quick else seconds)
        )
    return found
