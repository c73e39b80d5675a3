"""From a model to its groups."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from taylor_cuda.bench.race import Entry, Key, Options, Provider, Race
from taylor_cuda.bench.suites.networks import images, make
from taylor_cuda.bench.suites.peers import installed
from taylor_cuda.graph import trace
from taylor_cuda.graph.groups import Groups

# (groups, units), counted by hand from the architectures; the classifier's outputs stay.
# ResNet-50: the stem, two inner widths a block (7,552 channels), a residual stream a stage. ResNet-18: the stem is in
# the first stream. DenseNet-201: the stem, for each of 98 layers 128 inner and 32 new channels, three transitions.
COUNTS = {
    "resnet18": (8 + 4, 1_920 + 960),
    "resnet50": (1 + 32 + 4, 64 + 7_552 + 3_840),
    "densenet201": (1 + 2 * 98 + 3, 64 + 98 * (128 + 32) + 128 + 256 + 896),
}


def build(key: Key, size: int) -> Race:
    """The race for one network."""
    x, model = images(1, size), make(key.case)

    def off(groups: int, units: int) -> float:
        return 0.0 if (groups, units) == COUNTS[key.case] else float("inf")

    def check(result: Groups, _index: int) -> float:
        return off(len(result), sum(result.sizes().values()))

    providers = [Provider("ours", lambda _: trace(model, x), check, "tc.trace, with the proof of every group")]
    peer: Any = installed("torch_pruning")
    if peer is None:
        return Race(key, providers, skipped=[("torch-pruning", "not installed")], rounds=10)
    theirs = make(key.case)

    def check_theirs(result: list[Any], _index: int) -> float:
        return off(len(result), sum(len(group[0].idxs) for group in result))

    note = "DependencyGraph and get_all_groups; proves nothing"
    providers.append(Provider("torch-pruning", lambda _: torch_pruning_groups(peer, theirs, x), check_theirs, note))
    return Race(key, providers, peer="torch-pruning", rounds=10)


def torch_pruning_groups(peer: Any, model: nn.Module, x: torch.Tensor) -> list[Any]:
    """Torch-Pruning's groups of everything but the classifier."""
    graph = peer.DependencyGraph().build_dependency(model, example_inputs=x)
    classifier = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    return list(graph.get_all_groups(ignored_layers=[classifier]))


def entries(options: Options) -> list[Entry]:
    """Tracing runs on the host, so a CPU run is where it is measured."""
    if options.cuda:
        return []
    wanted = [("resnet18", 64, 5)] if options.quick else [("resnet50", 224, 6), ("densenet201", 224, 90)]
    return [
        Entry(Key("graph", "trace", network), partial(build, size=size), ("ours", "torch-pruning"), priority)
        for network, size, priority in wanted
    ]
