from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
import time
from fnmatch import fnmatchcase
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import taylor_cuda as tc
from taylor_cuda.bench.coverage import __main__ as command
from taylor_cuda.bench.coverage import compare, ours, peer
from taylor_cuda.bench.coverage.networks import NETWORKS, SHORT, Encoder, Network
from taylor_cuda.bench.coverage.outcome import Outcome, shortcomings
from taylor_cuda.bench.coverage.table import append, markdown
from taylor_cuda.bench.environment import environment
from taylor_cuda.bench.rows import read_rows
from taylor_cuda.bench.suites.networks import images
from taylor_cuda.graph.groups import Frozen, named_tensors

BY_NAME = {network.name: network for network in SHORT}
# parameters that no unit lies in: the biases of the outputs, what attention holds together, what a shuffle does
LEAST_SHARE = {
    "resnet18": 0.9999,
    "mobilenet_v2": 0.999,
    "shufflenet_v2_x1_0": 0.96,
    "encoder": 0.99,
    "unet": 0.9999,
    "signal_net": 0.9999,
}


def own(make, size=16, heads=("head",)):
    """A row for a network of this file."""
    return Network("own", "own", make, partial(images, 2, size), heads, f"3x{size}x{size}")


class TinyNet(nn.Module):
    """Two convolutions and a head; ``through`` is what the channels of the first go through."""

    def __init__(self, through=F.relu):
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3)
        self.head, self.through = nn.Linear(16, 5), through

    def forward(self, x):
        x = self.second(self.through(self.norm(self.first(x))))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("network", SHORT, ids=lambda network: network.name)
def test_the_short_table(network):
    """Traced, in budget, right: the promise of the long one."""
    if network.source != "own":
        pytest.importorskip(network.source)
    outcome = ours.examine(network)
    assert shortcomings(outcome) == []
    assert outcome.verdict == "ok"
    assert outcome.share >= LEAST_SHARE[network.name]
    assert 0.588 <= outcome.macs <= 0.6
    assert outcome.difference <= 1e-4
    assert outcome.verified <= 1e-4
    assert outcome.effect > 0.05
    assert outcome.groups > 0


def test_the_issues_networks_are_all_there():
    asked = """resnet18 resnet50 resnext50_32x4d mobilenet_v2 mobilenet_v3_large efficientnet_b0 densenet121 densenet201
        vgg16_bn googlenet squeezenet1_1 shufflenet_v2_x1_0 regnet_x_400mf regnet_y_400mf convnext_tiny vit_b_16 swin_t
        inception_v3 fcn_resnet50 resnet18_fpn vit_tiny_patch16_224 coatnet_0_rw_224 mixer_s32_224 hrnet_w18 encoder
        unet signal_net"""
    names = [network.name for network in NETWORKS]
    assert len(set(names)) == len(names)
    assert set(asked.split()) <= set(names)
    assert set(BY_NAME) <= set(names)


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.name)
def test_what_a_peer_is_told_to_leave_are_layers_of_the_network(network):
    if network.source != "own":
        pytest.importorskip(network.source)
    # regnet computes its widths with tensors
    with torch.device("cpu" if "regnet" in network.name else "meta"):
        modules = dict(network.make().named_modules())
    for head in network.heads:
        found = [module for name, module in modules.items() if fnmatchcase(name, head)]
        assert found
        assert all(isinstance(module, nn.Linear | nn.Conv2d) for module in found)


@pytest.mark.parametrize("role", ["write", "read", "norm"])
@pytest.mark.parametrize("name", ["unet", "signal_net"])
def test_a_member_that_points_to_other_channels_is_wrong(name, role, monkeypatch):
    trace = tc.trace

    def broken(model, x):
        groups = trace(model, x)
        number, group = next((n, g) for n, g in enumerate(groups) if g.role(role) and g.size > 8)
        member = group.role(role)[0]
        turned = dataclasses.replace(member, index=member.index.roll(1, 0))
        members = tuple(turned if one is member else one for one in group.members)
        mended = dataclasses.replace(group, members=members)
        groups.groups = (*groups.groups[:number], mended, *groups.groups[number + 1 :])
        return groups

    monkeypatch.setattr(tc, "trace", broken)
    outcome = ours.examine(BY_NAME[name])
    assert outcome.verdict == "wrong"
    assert outcome.difference > 100 * compare.ALLOWED
    assert shortcomings(outcome)


def test_a_cut_that_changes_nothing_is_not_ok(monkeypatch):
    """Where the outputs hold anyway, nothing was compared."""
    everything = {group.name: torch.arange(group.size) for group in tc.trace(*ours.build(BY_NAME["signal_net"]))}
    monkeypatch.setattr(ours, "thinned", lambda groups: everything)
    monkeypatch.setattr(ours, "planned", lambda model, groups, outcome: everything)
    outcome = ours.examine(BY_NAME["signal_net"])
    assert outcome.difference <= compare.ALLOWED
    assert outcome.effect == 0
    assert outcome.verdict == "wrong"


def test_masking_that_forgets_a_channel_is_wrong(monkeypatch):
    """``tc.masked`` is compared too, not only what was zeroed by hand."""
    masked = tc.masked

    def forgetful(model, groups, keep):
        first = next(iter(keep))
        return masked(model, groups, keep | {first: torch.arange(groups[first].size)})

    monkeypatch.setattr(tc, "masked", forgetful)
    assert ours.examine(BY_NAME["signal_net"]).verdict == "wrong"


def test_cut_and_masked_that_agree_on_something_else_are_wrong(monkeypatch):
    """Here on doing nothing. What was zeroed by hand is the judge of both."""
    monkeypatch.setattr(tc, "cut", lambda model, groups, keep, verify=True: groups)
    monkeypatch.setattr(tc, "masked", lambda model, groups, keep: contextlib.nullcontext())
    outcome = ours.examine(BY_NAME["signal_net"])
    assert outcome.verdict == "wrong"
    assert outcome.difference > 100 * compare.ALLOWED


def test_what_raises_is_an_error_with_its_text(monkeypatch):
    def raising(*_arguments):
        raise RuntimeError("no such luck")

    monkeypatch.setattr(tc, "trace", raising)
    outcome = ours.examine(BY_NAME["signal_net"])
    assert (outcome.verdict, outcome.note) == ("error", "RuntimeError: no such luck")
    assert outcome.seconds is not None
    assert shortcomings(outcome) == ["error RuntimeError: no such luck"]


def test_a_budget_out_of_reach_is_said_and_the_groups_are_judged_anyway():
    class MostlyOutput(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer, self.direct = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 64, 3), nn.Conv2d(3, 64, 5)

        def forward(self, x):
            return self.outer(F.relu(self.inner(x))) + self.direct(x)

    outcome = ours.examine(own(MostlyOutput))
    assert outcome.verdict == "ok"
    assert "can't be met" in outcome.note
    assert not outcome.in_budget
    assert "not reached" in shortcomings(outcome)[0]


def test_reasons_of_blocks_at_one_line_are_one_reason():
    model, x = ours.build(own(TinyNet))
    frozen = [(8, "no rule (f) (blocks.0, net.py:3)"), (9, "no rule (f) (blocks.1, net.py:3)"), (5, ours.OUTPUT)]
    frozen += [(2, "no rule (f) (blocks.1, net.py:4)"), (20, "a buffer")]
    groups = dataclasses.replace(tc.trace(model, x), frozen=tuple(Frozen("layer", *one) for one in frozen))
    outcome = Outcome("own", "own", "", "ours")
    ours.account(model, groups, outcome)
    assert outcome.frozen == (("a buffer", 20), ("no rule (f) (net.py:3)", 17), ("no rule (f) (net.py:4)", 2))


def test_heads_and_scales_at_constants_become_random():
    model = Encoder(vocabulary=50, length=8, width=64, layers=1)
    nn.init.zeros_(model.classifier.weight)
    tokens = torch.randint(50, (2, 8))
    compare.enliven(model, tokens)
    for name, tensor in named_tensors(model).items():
        if tensor.numel() > 1:
            assert float(tensor.detach().std()) > 1e-3, name
    again = Encoder(vocabulary=50, length=8, width=64, layers=1)
    again.load_state_dict(model.state_dict())
    compare.enliven(again, tokens)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), again.parameters(), strict=True))


def test_batch_norm_gets_the_statistics_of_the_data_and_more():
    model, x = TinyNet(), 5 + images(2, 16)
    compare.enliven(model, x)
    y = model.first(x)
    off = (model.norm.running_mean - y.mean((0, 2, 3))) / y.std((0, 2, 3))
    assert 0.01 < float(off.detach().abs().max()) < 0.5
    assert not model.training
    assert model.norm.momentum == 0.1


def test_a_layer_norm_in_a_group_is_taken_over_what_stays():
    """Without that, the same zeros give another network."""
    network = BY_NAME["encoder"]
    model, x = ours.build(network)
    groups = list(tc.trace(model, x))
    compare.enliven(model, x)
    keep = {group.name: torch.arange(0, group.size, 2) for group in groups}
    columns, norms = compare.dropped_columns(groups, keep), compare.kept_in_norms(model, groups, keep)
    assert norms
    right = compare.Zeroed(model, columns, norms).outputs(x, False)
    plain = compare.Zeroed(model, columns, {}).outputs(x, False)
    assert compare.furthest(right, plain) > 0.01


@pytest.mark.parametrize(
    ("expected", "actual", "difference"),
    [
        ([1.0, -4.0], [1.0, -3.0], 0.25),
        ([1.0, 2.0], [1.0, math.nan], math.inf),
        ([1.0, 2.0], [1.0, 2.0, 3.0], math.inf),
        ([0.0, 0.0], [0.0, 0.0], math.inf),  # says nothing
    ],
)
def test_the_greatest_relative_difference(expected, actual, difference):
    assert compare.furthest([torch.tensor(expected)], [torch.tensor(actual)]) == difference


def test_the_greatest_of_several_and_their_number():
    one, other = torch.ones(3), torch.full((3,), 1.5)
    assert compare.furthest([one, one], [one, other]) == 0.5
    assert compare.furthest([one, one], [one]) == math.inf


def test_train_mode_is_compared_where_it_returns_more():
    class Auxiliary(TinyNet):
        def forward(self, x):
            y = super().forward(x)
            return (y, y + 1) if self.training else y

    x = images(2, 16)
    assert compare.modes(Auxiliary(), x) == (False, True)
    assert compare.modes(TinyNet(), x) == (False,)


def test_macs_are_those_of_the_layers():
    x = images(2, 16)
    expected = 2 * (14 * 14 * 16 * 3 * 9 + 12 * 12 * 16 * 16 * 9 + 16 * 5)
    assert compare.count_macs(TinyNet(), x) == expected


def test_torch_pruning_is_right_where_it_is():
    pytest.importorskip("torch_pruning")
    outcome = peer.examine(own(TinyNet))
    assert outcome.verdict == "ok", outcome.note
    assert outcome.difference <= compare.ALLOWED
    assert outcome.effect > 0.05
    assert 0.4 < outcome.macs < 0.75
    assert outcome.share > 0.9


def test_torch_pruning_is_wrong_where_a_function_sees_all_channels():
    pytest.importorskip("torch_pruning")
    outcome = peer.examine(own(partial(TinyNet, lambda x: F.softmax(x, 1))))
    assert outcome.verdict == "wrong"
    assert outcome.difference > 100 * compare.ALLOWED


def test_torch_pruning_is_wrong_where_what_it_pruned_no_longer_runs():
    pytest.importorskip("torch_pruning")
    outcome = peer.examine(own(partial(TinyNet, lambda x: x * torch.ones(1, 16, 1, 1))))
    assert outcome.verdict == "wrong"
    assert "the pruned network raises in eval mode" in outcome.note


def test_torch_pruning_that_raises_is_an_error(monkeypatch):
    torch_pruning = pytest.importorskip("torch_pruning")

    def raising(*_arguments, **_options):
        raise RecursionError("too deep")

    monkeypatch.setattr(torch_pruning.DependencyGraph, "build_dependency", raising)
    outcome = peer.examine(own(TinyNet))
    assert (outcome.verdict, outcome.note) == ("error", "RecursionError: too deep")


def test_torch_pruning_is_stopped_when_its_time_is_up(monkeypatch):
    torch_pruning = pytest.importorskip("torch_pruning")
    monkeypatch.setattr(peer, "LIMIT", 1)
    monkeypatch.setattr(torch_pruning.DependencyGraph, "build_dependency", lambda *_, **__: time.sleep(30))
    outcome = peer.examine(own(TinyNet))
    assert (outcome.verdict, outcome.note) == ("over 1 s", "finding groups")


def test_a_process_that_dies_is_an_error_of_the_peer(monkeypatch):
    monkeypatch.setattr(peer.sys, "executable", "/bin/false")
    outcome = peer.examine_apart(BY_NAME["signal_net"])
    assert outcome.verdict == "error"
    assert "the process ended with 1" in outcome.note


def test_what_went_is_read_off_sliced_gradients():
    model = nn.Sequential(
        nn.Conv2d(2, 6, 1), nn.ConvTranspose2d(6, 4, 1), nn.Flatten(), nn.LayerNorm(4), nn.Linear(4, 3)
    )
    small = copy.deepcopy(model)
    peer.number_columns(small)
    for layer, dim, kept in ((1, 0, [0, 2, 5]), (3, 0, [1, 3]), (4, 1, [1, 3])):
        weight = small[layer].weight
        sliced = nn.Parameter(weight.detach().index_select(dim, torch.tensor(kept)))
        sliced.grad = weight.grad.index_select(dim, torch.tensor(kept))
        small[layer].weight = sliced
    columns, norms = peer.read_back(model, small)
    assert {place: gone.tolist() for place, gone in columns.items()} == {
        ("1.weight", 0): [1, 3, 4],
        ("4.weight", 1): [0, 2],
    }
    assert {name: kept.tolist() for name, kept in norms.items()} == {"3.weight": [1, 3]}


def test_the_table_is_written_from_the_newest_rows(tmp_path):
    record = environment("cpu") | {"time": "2026-11-20T10:00:00+00:00"}
    later = record | {"time": "2026-11-21T10:00:00+00:00", "run_id": "later"}
    ok = {"verdict": "ok", "seconds": 0.5, "share": 0.75, "macs": 0.599, "difference": 1.2e-7}
    mine = Outcome("unet", "own", "3x64x64", "ours", frozen=(("no rule for fft (own.py:3)", 12),), **ok)
    old = Outcome("unet", "own", "3x64x64", "ours", "wrong", 99.0)
    theirs = Outcome("unet", "own", "3x64x64", "torch-pruning", "error", note="RecursionError: too deep")
    append([old.row(record)], tmp_path)
    append([theirs.row(record), mine.row(later)], tmp_path)
    rows = read_rows(tmp_path)
    assert len(rows) == 3
    assert json.loads((tmp_path / "cpu" / "coverage.jsonl").read_text().splitlines()[0])["verdict"] == "wrong"
    text = markdown(rows, ["unet", "resnet18"])
    assert "| unet | 3x64x64 | 0.50 s | 75.0% | 0.599 | 1e-07 | ok | error |  |  |  |" in text
    assert "- unet: 12 channels, no rule for fft (own.py:3)" in text
    assert "- unet: RecursionError: too deep" in text
    assert "99.0" not in text
    busy = dataclasses.replace(mine, seconds=9.0, cpu_seconds=2.0)
    assert "| 9.00 s (2.00 s of processor) |" in markdown([busy.row(later)], ["unet"])
    assert "resnet18" not in text


def test_a_line_cut_short_costs_no_other_row(tmp_path):
    row = Outcome("unet", "own", "3x64x64", "ours", "ok").row(environment("cpu"))
    append([row], tmp_path)
    path = tmp_path / "cpu" / "coverage.jsonl"
    path.write_text(path.read_text() + '{"suite": "cov')
    append([row], tmp_path)
    assert len(read_rows(tmp_path)) == 2


def test_the_command_writes_rows_and_table_and_fails_on_a_wrong_row(tmp_path, monkeypatch, capsys):
    quick = ["--quick", "--networks", "signal_net", "--results", str(tmp_path)]
    assert command.main(quick) == 0
    assert "no row of ours falls short" in capsys.readouterr().out
    assert "| signal_net | 12x64 |" in (tmp_path / "coverage.md").read_text()
    wrong = Outcome("signal_net", "own", "12x64", "ours", "wrong", 0.1)
    monkeypatch.setattr(command.ours, "examine", lambda network: wrong)
    assert command.main(quick) == 1
    assert "signal_net: wrong" in capsys.readouterr().out


def test_a_slow_trace_falls_short():
    fast = Outcome("unet", "own", "3x64x64", "ours", "ok", 4.9, share=1.0, macs=0.6, difference=1e-7)
    assert shortcomings(fast) == []
    assert "5.1 s" in shortcomings(dataclasses.replace(fast, seconds=5.1))[0]
    assert shortcomings(dataclasses.replace(fast, seconds=5.1, cpu_seconds=4.9)) == []  # others had the processor
    assert shortcomings(dataclasses.replace(fast, seconds=5.1, cpu_seconds=9.9))
    assert shortcomings(dataclasses.replace(fast, macs=0.587))
    assert shortcomings(dataclasses.replace(fast, macs=0.601))


def test_without_its_package_a_network_is_left_out(monkeypatch, capsys):
    monkeypatch.setattr(command, "installed", lambda _name: None)
    assert command.main(["--quick", "--networks", "resnet18"]) == 0
    assert "left out: torchvision isn't installed" in capsys.readouterr().out
