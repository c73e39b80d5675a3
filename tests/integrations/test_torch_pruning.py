"""The scores of Torch-Pruning's groups are (dE/dz)² of a gate on what is removed, whatever lies in the group."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import taylor_cuda as tc
from tests.graph.base import conv, image
from tests.integrations import nets
from tests.integrations.theirs import close, groups_of, in_their_order, scattered

tp: Any = pytest.importorskip("torch_pruning")

TaylorImportance = tc.integrations.torch_pruning.TaylorImportance
ROOT = Path(__file__).parent.parent.parent


# -- what is right ----------------------------------------------------------------


def test_a_channel_worked_out_by_hand():
    """x = 2 through a = [3, -1] and b = [[4, 5]]: y = 24 - 10 = 14, E = y² / 2, dE/dz = y · (24, -10)."""
    model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.Linear(2, 1, bias=False))
    model[0].weight.data = torch.tensor([[3.0], [-1.0]])
    model[1].weight.data = torch.tensor([[4.0, 5.0]])
    group = groups_of(model, torch.tensor([[2.0]]), [model[1]])["0"]
    (model(torch.tensor([[2.0]])) ** 2 / 2).sum().backward()
    assert TaylorImportance()(group).tolist() == [(14 * 24) ** 2, (14 * -10) ** 2]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", nets.NETS)
def test_equal_to_taylor_fo_of_the_traced_groups(name, training):
    make, inputs = nets.NETS[name]
    model, x = scattered(make()).train(training), inputs().double()
    groups = tc.trace(model, x)
    theirs = groups_of(model, x, [model.fc])
    est = tc.Importance(model, groups)
    est.backward(nets.loss_of(model(x)))
    different = {id(group): group for group in theirs.values()}.values()
    assert sum(len(group[0].idxs) for group in different) >= sum(group.size for group in groups)
    for group in different:
        found = TaylorImportance()(group)
        assert found.dtype == torch.float64
        assert close(found, in_their_order(model, groups, group, est.scores()), 1e-5), group


def test_some_channels_of_a_group_have_their_scores_in_the_order_asked():
    model, x = nets.Mobile(), image(4)
    theirs = groups_of(model, x, [model.fc])
    nets.loss_of(model(x)).backward()
    whole = TaylorImportance()(theirs["stem.0"])
    some = theirs["stem.0"]._DG.get_pruning_group(model.stem[0], tp.prune_conv_out_channels, [6, 2, 3])
    assert torch.equal(TaylorImportance()(some), whole[[6, 2, 3]])


def test_equal_parts_of_a_grouped_convolution_are_one_unit():
    """Torch-Pruning removes channel j of every part, so that is where the gate is."""
    model, x = scattered(nets.Grouped()), image(4).double()
    theirs = groups_of(model, x, [model.fc])
    true = nets.gates(model, x, {"g": ("a", 2), "b": ("g", 3)})
    for root, parts in (("a", 4), ("g", 4)):
        assert close(TaylorImportance()(theirs[root]), true[root].square().repeat(parts)), root


def test_equal_parts_of_a_group_norm_are_one_unit():
    model, x = scattered(nets.GroupNormed()), image(4).double()
    theirs = groups_of(model, x, [model.fc])
    true = nets.gates(model, x, {"b": ("a", 3)})["a"]
    assert close(TaylorImportance()(theirs["a"]), true.square().repeat(4))


def test_attention_loses_inner_dimensions_too():
    """With channel c go c of the queries and keys, whose product has one gate, and c of the values."""
    model, x = scattered(nets.Attention()), nets.tokens().double()
    theirs = groups_of(model, x, [model.fc])
    z = torch.ones(8, dtype=torch.float64, requires_grad=True)
    query = torch.cat([z, torch.ones(16, dtype=torch.float64)])
    gated = {
        "mha.in_proj_weight": model.mha.in_proj_weight * z * query[:, None],
        "mha.in_proj_bias": model.mha.in_proj_bias * query,
        "mha.out_proj.weight": model.mha.out_proj.weight * z,
        "fc.weight": model.fc.weight * z,
    }
    nets.loss_of(torch.func.functional_call(model, gated, (x,))).backward()
    model.zero_grad()
    nets.loss_of(model(x)).backward()
    assert close(TaylorImportance()(theirs["embed"]), z.grad.square())
    model.fc.requires_grad_(False)
    assert close(TaylorImportance()(theirs["embed"]), z.grad.square())


# -- where readers can't tell --------------------------------------------------------


def depthwise(bias: bool = True) -> nn.Module:
    return conv(6, 6, groups=6, bias=bias)


CHAINS: dict[str, Callable[[], list[nn.Module]]] = {
    "the layer that writes": lambda: [nn.ReLU()],
    "BatchNorm": lambda: [nn.BatchNorm2d(6), nn.ReLU()],
    "InstanceNorm": lambda: [nn.InstanceNorm2d(6, affine=True), nn.ReLU()],
    "depthwise": lambda: [nn.SiLU(), depthwise(), nn.MaxPool2d(2)],
    "depthwise without a bias": lambda: [nn.SiLU(), depthwise(bias=False)],
    "the last of several": lambda: [nn.BatchNorm2d(6), nn.SiLU(), depthwise(), nn.BatchNorm2d(6), nn.ReLU()],
    "a transposed convolution": lambda: [],
}


@pytest.mark.parametrize("name", CHAINS)
def test_behind_the_last_layer_where_readers_are_frozen(name):
    model = nets.Chain(*CHAINS[name]())
    if name == "a transposed convolution":
        model.a = nn.ConvTranspose2d(3, 6, 3)
    model, x = scattered(model), image(4).double()
    model.reader.requires_grad_(False)
    theirs = groups_of(model, x, [model.reader])
    true = nets.gates(model, x, {"reader": ("a", 6)})["a"]
    assert close(TaylorImportance()(theirs["a"]), true.square())


def test_behind_both_norms_of_a_residual_stream_where_one_reader_is_frozen():
    model, x = scattered(nets.Mobile()), image(4).double()
    model.fc.requires_grad_(False)
    theirs = groups_of(model, x, [model.fc])
    true = nets.gates(model, x, {"two.up": ("stream", 16), "fc": ("stream", 16)})["stream"]
    assert close(TaylorImportance()(theirs["wider.0"]), true.square())


def test_a_scale_is_no_second_gate_and_a_position_is_one():
    model, x = scattered(nets.Stream()), nets.tokens().double()
    model.fc.requires_grad_(False)
    theirs = groups_of(model, x, [model.fc])
    true = nets.gates(model, x, {"up": ("stream", 8), "fc": ("stream", 8)})["stream"]
    assert close(TaylorImportance()(theirs["embed"]), true.square())


def test_in_front_of_the_outputs_of_the_network():
    model = scattered(nets.Chain(nn.BatchNorm2d(6), nn.ReLU(), depthwise(), reader=nn.BatchNorm2d(6)))
    x = image(4).double()
    z = torch.ones(6, dtype=torch.float64, requires_grad=True)
    nets.loss_of(model(x) * z).backward()
    assert close(TaylorImportance()(groups_of(model, x)["a"]), z.grad.square())


def test_the_last_layer_writes_outputs_itself():
    model, x = scattered(nets.Twice()), torch.randn(4, 6, dtype=torch.float64)
    z = torch.ones(3, dtype=torch.float64, requires_grad=True)
    nets.loss_of(model(x) * z).backward()
    assert close(TaylorImportance()(groups_of(model, x)["fc"]), z.grad.square())


class Features(nn.Module):
    """Returns what its head reads as well."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.fc = conv(3, 6), nn.BatchNorm2d(6), nn.Linear(6, 2)

    def forward(self, x: Tensor, z: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = F.relu(self.norm(self.a(x)))
        x = x if z is None else x * z[:, None, None]
        return x, self.fc(x.mean((2, 3)))


def test_an_output_that_is_read_as_well():
    model, x = scattered(Features()), image(4).double()
    group = groups_of(model, x, [model.fc])["a"]
    z = torch.ones(6, dtype=torch.float64, requires_grad=True)
    sum(map(torch.Tensor.square, map(torch.Tensor.sum, model(x, z)))).backward()
    assert close(TaylorImportance()(group), z.grad.square())


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        return (x.movedim(1, -1) @ self.matrix).movedim(-1, 1)


class PrunesCustom(tp.pruner.function.BasePruningFunc):
    def prune_out_channels(self, layer, idxs):
        raise NotImplementedError

    def prune_in_channels(self, layer, idxs):
        raise NotImplementedError

    def get_out_channels(self, layer):
        return layer.matrix.shape[1]

    def get_in_channels(self, layer):
        return layer.matrix.shape[0]


def test_behind_the_norm_where_a_layer_with_its_own_pruner_reads():
    model, x = scattered(nets.Chain(nn.BatchNorm2d(6), nn.ReLU(), reader=Custom())), image(4).double()
    pruner = tp.pruner.BasePruner(
        model, x, importance=None, customized_pruners={Custom: PrunesCustom()}, root_module_types=[nn.Conv2d]
    )
    (group,) = pruner.DG.get_all_groups(root_module_types=pruner.root_module_types)
    true = nets.gates(model, x, {"reader": ("a", 6)})["a"]
    assert close(TaylorImportance()(group), true.square())
