"""Whole training steps with half of all channels dropped: in each mode of execution, and the dense step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from taylor_cuda.bench.race import Entry, Key, Options, Provider, Race
from taylor_cuda.bench.suites.networks import images, make
from taylor_cuda.bench.training import RepeatedStep, allocated, examples
from taylor_cuda.graph import masked, trace
from taylor_cuda.graph.groups import Groups
from taylor_cuda.surgery import compact, cut

OP = "training_step:50%"
MODES = ("dense", "mask", "cut", "compact")
ON_A_GPU = "resnet50 batch 256 at 224"
"""The step that a promise is about."""

Keep = dict[str, Tensor]
"""The units to keep of each group."""


def half_of(groups: Groups, seed: int = 0) -> Keep:
    """Half of every group at random."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randperm(size, generator=generator)[: max(1, size // 2)].sort().values
        for name, size in groups.sizes().items()
    }


class Modes:
    """The providers of one race.

    Every network starts from the same weights and has the same masks. The first step of each mode has to move what is
    kept as the masked network's does and to leave the rest alone; a cut network is compared with the masked one, cut
    after its step. That step is made in float32 on a GPU too. How far rounding in another order turns the movement is
    measured: by the same step of inputs that differ in their last bits. Four times of that is allowed, or a hundredth.

    Args:
        fresh: makes a network with its optimizer.
        groups: of the network.
        options: of the run.
    """

    def __init__(self, fresh: Callable[[], RepeatedStep], groups: Groups, options: Options) -> None:
        self.fresh, self.groups, self.options = fresh, groups, options
        reference = self._precise()
        self.keep = half_of(groups)
        start = reference.flat_parameters()
        with masked(reference.model, groups, self.keep):
            reference()
        masked_end = reference.flat_parameters()
        other = self._precise()
        other.x = other.x * (1 + torch.finfo(other.x.dtype).eps)
        with masked(other.model, groups, self.keep):
            other()
        self.turned = float((other.flat_parameters() - masked_end).norm())
        if self.turned > 0.05 * float((masked_end - start).norm()):
            raise ValueError("the last bits of the inputs turn the step of this network too far to compare steps")
        begin, dense = fresh(), self._precise()
        dense()
        for step in (begin, reference):
            cut(step.model, self._own_groups(), self.keep, verify=False)
        self.moved = {
            "dense": (start, dense.flat_parameters()),
            "mask": (start, masked_end),
            "compact": (start, masked_end),
            "cut": (begin.flat_parameters(), reference.flat_parameters()),
        }

    def _own_groups(self) -> Groups:
        return copy.deepcopy(self.groups)  # a cut changes those that it is made with

    def _precise(self) -> RepeatedStep:
        step = self.fresh()
        step.precise = True
        return step

    def provider(self, mode: str) -> Provider:
        """The step of one mode, or the ``"dense"`` one."""
        before = allocated(self.options)
        step = self._precise()
        context: Callable[[], AbstractContextManager[None]] = nullcontext
        if mode == "mask":
            context = partial(masked, step.model, self.groups, self.keep)
        elif mode == "cut":
            cut(step.model, self._own_groups(), self.keep, step.optimizer, verify=False)
        elif mode == "compact":
            compact(step.model, self._own_groups(), self.keep)
        start, moved = self.moved[mode]
        allowed = max(1e-2 * float((moved - start).norm()), 4 * self.turned)

        def check(_loss: Tensor, _index: int) -> float:
            error = float((step.flat_parameters() - moved).norm()) / allowed
            step.precise = False  # from here on as it is timed
            step()  # cuDNN looks for the fastest convolutions of 16 bits
            return error

        note = "all channels" if mode == "dense" else "half of every group"
        built = allocated(self.options) - before
        return Provider(named(mode), lambda _: step(), check, note, context, built_bytes=built)


def named(mode: str) -> str:
    """The provider that runs in a mode."""
    return "torch" if mode == "dense" else f"ours:{mode}"


def keep_all(model: nn.Module) -> None:
    """No dropout: its random numbers would tell every two steps apart."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def build(key: Key, network: str, batch: int, size: int, options: Options) -> Race:
    """The race of whole steps."""
    groups = trace(make(network), images(1, size))
    data = examples(batch, size, options)

    def fresh() -> RepeatedStep:
        step = RepeatedStep(make(network), data, options)
        keep_all(step.model)
        return step

    modes = Modes(fresh, groups, options)
    providers = [modes.provider(mode) for mode in MODES]
    seconds = None if options.quick else 20.0 if options.cuda else 8.0
    # No loop waits for the device after every step.
    calls = 8 if options.cuda and not options.quick else 1
    return Race(key, providers, peer=named("dense"), rounds=100, seconds=seconds, calls=calls)


def entries(options: Options) -> list[Entry]:
    """ResNet-50 and MobileNetV2 as they are trained on a GPU; something smaller where there is none."""
    if options.quick:
        wanted = [("tiny", 2, 64, 27)]
    elif options.cuda:
        wanted = [("resnet50", 256, 224, 11), ("mobilenet_v2", 256, 224, 41)]
    else:
        wanted = [("resnet18", 16, 112, 65), ("mobilenet_v2", 16, 112, 66)]
    dtype, layout = ("bfloat16", "channels_last") if options.cuda else ("float32", "nchw")
    found = []
    for network, batch, size, priority in wanted:
        key = Key("modes", OP, f"{network} batch {batch} at {size}", dtype, layout)
        made = partial(build, network=network, batch=batch, size=size, options=options)
        seconds = 1.0 if options.quick else 40.0 if options.cuda else 15.0
        found.append(Entry(key, made, [named(mode) for mode in MODES], priority, seconds))
    return found
