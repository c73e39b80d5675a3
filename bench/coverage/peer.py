"""The same network by Torch-Pruning, in a process of its own that may be stopped."""

from __future__ import annotations

import contextlib
import copy
import json
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from taylor_cuda.bench.coverage import compare
from taylor_cuda.bench.coverage.networks import Network
from taylor_cuda.bench.coverage.ours import build, describe
from taylor_cuda.bench.coverage.outcome import Outcome
from taylor_cuda.bench.environment import ROOT
from taylor_cuda.bench.suites.peers import installed

LIMIT = 60
RATIO = 0.25


def examine_apart(network: Network) -> Outcome:
    """``examine`` in another process: it may run for ever, or take the interpreter down with it."""
    outcome = Outcome(network.name, network.source, network.shape, "torch-pruning")
    command = [sys.executable, "-m", "taylor_cuda.bench.coverage", "--peer", network.name]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=4 * LIMIT, check=False)
    except subprocess.TimeoutExpired:
        outcome.verdict, outcome.note = f"over {LIMIT} s", "and could not be stopped"
        return outcome
    try:
        return Outcome(**json.loads(done.stdout.splitlines()[-1]))
    except (ValueError, IndexError):
        last = (done.stderr.strip().splitlines() or [""])[-1]
        outcome.note = f"the process ended with {done.returncode}: {last}"
        return outcome


def examine(network: Network) -> Outcome:
    """The whole row; what a child process prints as JSON."""
    outcome = Outcome(network.name, network.source, network.shape, "torch-pruning")
    peer: Any = installed("torch_pruning")
    if peer is None:
        outcome.note = "not installed"
        return outcome
    model, x = build(network)
    compare.enliven(model, x)
    small = copy.deepcopy(model)
    number_columns(small)
    try:
        seeded = torch.random.fork_rng(devices=[])
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr), seeded:
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            prune(peer, small, x, network.heads, outcome)
    except _TooSlowError as error:
        outcome.verdict, outcome.note = f"over {LIMIT} s", str(error)
    except Exception as error:
        outcome.verdict, outcome.note = "error", describe(error)
    else:
        judge(model, small, x, outcome)
    return outcome


def prune(peer: Any, model: nn.Module, x: Tensor, heads: tuple[str, ...], outcome: Outcome) -> None:
    """Find the groups, on the clock, then prune the network as its documentation does."""
    ignored = [module for name, module in model.named_modules() if any(fnmatchcase(name, head) for head in heads)]
    with _at_most(LIMIT, "finding groups"):
        start, cpu = time.perf_counter(), time.process_time()
        graph = peer.DependencyGraph().build_dependency(model, example_inputs=x, verbose=False)
        found = list(graph.get_all_groups(ignored_layers=ignored))
        outcome.seconds, outcome.cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    outcome.groups = len(found)
    outcome.units = sum(len(group[0].idxs) for group in found)
    # how many heads a joint projection holds is for the user to say
    num_heads = {m.qkv: m.num_heads for m in model.modules() if hasattr(m, "qkv") and hasattr(m, "num_heads")}
    with _at_most(LIMIT, "pruning"):
        chosen = peer.importance.RandomImportance()
        pruner = peer.pruner.BasePruner(
            model, x, chosen, pruning_ratio=RATIO, ignored_layers=ignored, num_heads=num_heads
        )
        pruner.step()


def judge(model: nn.Module, small: nn.Module, x: Tensor, outcome: Outcome) -> None:
    """Compare the pruned network with the one before, in which what went is zero."""
    shapes = {name: parameter.shape for name, parameter in small.named_parameters()}
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    changed = [name for name, parameter in model.named_parameters() if shapes.get(name) != parameter.shape]
    outcome.share = sum(sizes[name] for name in changed) / sum(sizes.values())
    if not changed:
        outcome.verdict = "nothing"
        return
    outcome.verdict, difference, effect = "wrong", 0.0, 0.0
    expected = compare.Zeroed(model, *read_back(model, small))
    for training in compare.modes(model, x):
        try:
            actual = compare.outputs(small, x, training)
        except Exception as error:
            outcome.note = f"the pruned network raises in {'train' if training else 'eval'} mode: {describe(error)}"
            return
        difference = max(difference, compare.furthest(expected.outputs(x, training), actual))
        effect = max(effect, compare.furthest(compare.outputs(copy.deepcopy(model), x, training), actual))
    outcome.difference, outcome.effect = difference, effect
    outcome.macs = compare.count_macs(small, x) / compare.count_macs(model, x)
    outcome.verdict = "ok" if difference <= compare.ALLOWED else "wrong"


def reader_dims(model: nn.Module) -> dict[str, int]:
    """The dimension of input channels, for the weight of every layer that contracts them."""
    found = {}
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, _ConvTransposeNd):
            found[f"{prefix}weight"] = 0
        elif isinstance(module, _ConvNd | nn.Linear):
            found[f"{prefix}weight"] = 1
        elif isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            found[f"{prefix}in_proj_weight"] = 1
    return found


def norm_weights(model: nn.Module) -> list[str]:
    """The weights of LayerNorms."""
    return [
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.LayerNorm) and module.weight is not None
    ]


def number_columns(model: nn.Module) -> None:
    """Gradients that hold positions: a gradient is sliced like its parameter, so they tell afterwards what went."""
    parameters = dict(model.named_parameters())
    for name, dim in (reader_dims(model) | dict.fromkeys(norm_weights(model), 0)).items():
        weight = parameters[name]
        shape = [-1 if d == dim else 1 for d in range(weight.dim())]
        weight.grad = torch.arange(weight.shape[dim], dtype=weight.dtype).view(shape).expand_as(weight).clone()


def read_back(model: nn.Module, small: nn.Module) -> tuple[dict[tuple[str, int], Tensor], dict[str, Tensor]]:
    """What the gradients of a pruned network say: input positions that went, and positions that norms kept."""
    whole, pruned = dict(model.named_parameters()), dict(small.named_parameters())

    def kept(name: str, dim: int) -> Tensor:
        gradient = pruned[name].grad
        if gradient is None or gradient.shape != pruned[name].shape:
            raise RuntimeError(f"what was removed from {name} can't be told")
        if dim >= gradient.dim() or not gradient.numel():
            return torch.zeros(0, dtype=torch.int64)
        return gradient.movedim(dim, 0).reshape(gradient.shape[dim], -1)[:, 0].long()

    columns = {}
    for name, dim in reader_dims(model).items():
        gone = torch.ones(whole[name].shape[dim], dtype=torch.bool)
        gone[kept(name, dim)] = False
        if bool(gone.any()):
            columns[name, dim] = gone.nonzero().flatten()
    norms = {name: kept(name, 0) for name in norm_weights(model) if pruned[name].shape != whole[name].shape}
    return columns, norms


class _TooSlowError(Exception):
    """The time is up."""


@contextlib.contextmanager
def _at_most(seconds: int, what: str) -> Iterator[None]:
    def stop(_signal: int, _frame: Any) -> None:
        raise _TooSlowError(what)

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def as_json(outcome: Outcome) -> str:
    """One line."""
    return json.dumps(asdict(outcome), ensure_ascii=False)
