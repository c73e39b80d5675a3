"""In Torch-Pruning's pruners: as a drop-in, over several batches, against the oracle, and what is refused."""

from __future__ import annotations

import importlib
import inspect
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import taylor_cuda as tc
from taylor_cuda.study.correlation import spearman
from taylor_cuda.train.data import TensorData, load_digits
from tests.graph.base import image
from tests.integrations import nets
from tests.integrations.theirs import close, groups_of, in_their_order, scattered

tp: Any = pytest.importorskip("torch_pruning")

TaylorImportance = tc.integrations.torch_pruning.TaylorImportance


def backward(model: nn.Module, x: Tensor) -> None:
    model.zero_grad()
    nets.loss_of(model(x)).backward()


# -- a drop-in ----------------------------------------------------------------------


def test_it_takes_the_arguments_of_the_peer():
    peer = tp.importance.GroupTaylorImportance
    theirs, ours = inspect.signature(peer.__init__), inspect.signature(TaylorImportance.__init__)
    assert list(ours.parameters) == list(theirs.parameters)
    imp = TaylorImportance("mean", "max", True, True, [*theirs.parameters["target_types"].default, nn.GroupNorm])
    assert isinstance(imp, peer)


@pytest.mark.parametrize("everywhere", [False, True])
def test_a_pruner_removes_the_least_important_channels(everywhere):
    model, x = nets.Mobile(), image(4)
    imp = TaylorImportance()
    pruner = tp.pruner.BasePruner(
        model, x, importance=imp, pruning_ratio=0.5, global_pruning=everywhere, ignored_layers=[model.fc]
    )
    model.train()
    backward(model, x)
    scores = {name: imp(group) for name, group in groups_of(model, x, [model.fc]).items()}
    pruner.step()
    removed = {name: sorted(idxs) for name, _, idxs in pruner.pruning_history()}
    ranked = torch.cat([scores[name] for name in removed]).sort().values
    assert len(removed) == 4
    for name, idxs in removed.items():
        limit = (ranked if everywhere else scores[name].sort().values)[
            -1 + (len(ranked) if everywhere else len(scores[name])) // 2
        ]
        assert idxs == (scores[name] <= limit).nonzero().flatten().tolist(), name
    assert model(x).shape == (4, 5)


def test_reduction_and_normalisation():
    model, x = scattered(nets.Mobile()), image(4).double()
    group = groups_of(model, x, [model.fc])["wider.0"]  # read by two.up and fc
    backward(model, x)
    scores = TaylorImportance()(group)
    assert close(TaylorImportance(group_reduction="mean")(group), scores / 4)
    assert close(TaylorImportance(normalizer="sum")(group), scores / scores.sum())
    assert close(TaylorImportance(normalizer=torch.sqrt)(group), scores.sqrt())
    assert TaylorImportance(normalizer="sentinel_0.5")(group).shape == scores.shape


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"group_reduction": "max"}, r"group_reduction: wanted 'sum' or 'mean', got 'max'"),
        ({"group_reduction": None}, "group_reduction"),
        ({"normalizer": "softmax"}, "normalizer: wanted None, a function, .*got 'softmax'"),
        ({"normalizer": 3}, "normalizer"),
        ({"multivariable": False}, "multivariable: wanted True"),
        ({"bias": False}, "bias: wanted True"),
        ({"target_types": [nn.BatchNorm2d]}, "target_types: .*without _ConvNd, Linear, _BatchNorm, LayerNorm"),
    ],
)
def test_an_option_that_cannot_be_honoured_is_refused(option, message):
    with pytest.raises(tc.InputError, match=message):
        TaylorImportance(**option)


# -- several batches -----------------------------------------------------------------


def test_the_mean_of_the_squares_over_batches():
    model = scattered(nets.Mobile())
    batches = [torch.randn(4, 3, 8, 8, dtype=torch.float64) for _ in range(3)]
    groups = groups_of(model, batches[0], [model.fc])
    imp, each = TaylorImportance(), []
    for x in batches:
        backward(model, x)
        imp.update(model)
        each.append({name: TaylorImportance()(group) for name, group in groups.items()})
        for name, group in groups.items():
            assert close(imp(group), torch.stack([one[name] for one in each]).mean(0)), name
    imp.reset()
    assert all(close(imp(group), each[-1][name]) for name, group in groups.items())


def test_a_grouped_convolution_over_batches():
    model, x = scattered(nets.Grouped()), image(4).double()
    groups = groups_of(model, x, [model.fc])
    imp = TaylorImportance()
    backward(model, x)
    imp.update(model)
    assert all(close(imp(group), TaylorImportance()(group)) for group in groups.values())


def test_a_batch_that_overflowed_is_left_out():
    model, x = nets.Mobile(), image(4)
    group = groups_of(model, x, [model.fc])["stem.0"]
    imp = TaylorImportance()
    backward(model, x)
    imp.update(model)
    expected = imp(group)
    model.fc.weight.grad[0, 0] = float("inf")
    imp.update(model)
    assert torch.equal(imp(group), expected)


def test_a_cut_ends_what_was_taken():
    model, x = nets.Mobile(), image(4)
    imp = TaylorImportance()
    pruner = tp.pruner.BasePruner(
        model, x, importance=imp, pruning_ratio=0.5, iterative_steps=2, ignored_layers=[model.fc]
    )

    def first() -> Any:
        return next(iter(pruner.DG.get_all_groups([model.fc])))

    for _ in range(2):
        backward(model, torch.randn_like(x))
        imp.update(model)
    pruner.step()
    with pytest.raises(tc.InputError, match=r"pruned since update\(\): call update\(model\)"):
        imp(first())
    backward(model, x)
    imp.update(model)
    assert close(imp(first()), TaylorImportance()(first()), 1e-6)
    pruner.step()
    assert model.one.up[0].out_channels == 12


# -- errors -----------------------------------------------------------------------------


def test_without_a_gradient():
    model, x = nets.Mobile(), image(4)
    imp = TaylorImportance()
    pruner = tp.pruner.BasePruner(model, x, importance=imp, ignored_layers=[model.fc])
    with pytest.raises(tc.InputError, match=r"no gradient yet .*call loss.backward\(\) before pruner.step\(\)"):
        pruner.step()
    with pytest.raises(tc.InputError, match=r"update: no parameter of the model has a gradient yet"):
        imp.update(model)
    assert model.stem[0].out_channels == 8


def test_gradients_that_are_not_finite():
    model, x = nets.Mobile(), image(4)
    group = groups_of(model, x, [model.fc])["stem.0"]
    backward(model, x)
    model.one.up[0].weight.grad[0, 0] = float("nan")
    with pytest.raises(tc.InputError, match="wanted finite gradients"):
        TaylorImportance()(group)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(6, affine=False), nn.BatchNorm2d(6)])
def test_nothing_trained_behind_a_norm(norm):
    """What a convolution writes into a BatchNorm in train mode would add up to 0, whatever it is worth."""
    norm.requires_grad_(False)
    model, x = nets.Chain(norm, nn.ReLU()), image(4)
    model.reader.requires_grad_(False)
    group = groups_of(model, x, [model.reader])["a"]
    backward(model, x)
    with pytest.raises(tc.InputError, match=r"between.0 .*no trained scale, and its readers .*ignored_layers"):
        TaylorImportance()(group)


def test_nothing_trained_at_all():
    model, x = nets.Chain(nn.ReLU()), image(4)
    group = groups_of(model, x, [model.reader])["a"]
    model.requires_grad_(False)
    with pytest.raises(tc.InputError, match=r"a \(Conv2d.*what it writes with isn't trained"):
        TaylorImportance()(group)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm, self.fc = nn.Linear(6, 8), nn.LSTM(8, 7, batch_first=True), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.lstm(self.embed(x))[0].mean(1))


def test_a_recurrent_layer_is_read_in_front_of_it_and_not_inside():
    model, x = Recurrent(), nets.tokens()
    groups = groups_of(model, x, [model.fc])
    true = nets.gates(model, x, {"lstm": ("embed", 8)})["embed"]
    assert close(TaylorImportance()(groups["embed"]), true.square(), 1e-4)
    with pytest.raises(tc.InputError, match="lstm"):
        TaylorImportance()(groups["lstm"])


class Split(nn.Module):
    """Torch-Pruning takes the parts of this split in the wrong order."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(5, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        one, other = self.a(x).split([3, 5], 1)
        return (self.b(one) + self.c(other)).mean((2, 3))


def test_a_group_that_names_channels_which_are_not_there():
    model, x = Split(), image(4)
    group = groups_of(model, x, [model.b, model.c])["a"]
    backward(model, x)
    with pytest.raises(tc.InputError, match="Torch-Pruning's group doesn't say which of its channels"):
        TaylorImportance()(group)


# -- importing -----------------------------------------------------------------------------


def test_it_is_imported_when_it_is_asked_for(monkeypatch):
    """That ``import taylor_cuda`` imports no torch_pruning is in tests/test_structure.py."""
    monkeypatch.delattr(tc.integrations, "torch_pruning")
    assert tc.integrations.torch_pruning is sys.modules["taylor_cuda.integrations.torch_pruning"]
    with pytest.raises(AttributeError, match="no attribute 'nothing'; it has torch_pruning"):
        tc.integrations.nothing  # noqa: B018


def test_without_torch_pruning(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    monkeypatch.delitem(sys.modules, "taylor_cuda.integrations.torch_pruning")
    with pytest.raises(tc.InputError, match=r"needs Torch-Pruning .*pip install 'torch-pruning>=1.6.1'"):
        importlib.import_module("taylor_cuda.integrations.torch_pruning")


def test_the_example_runs(capsys):
    example = Path(__file__).parent.parent.parent / "examples" / "torch_pruning_taylor.py"
    runpy.run_path(str(example))["main"](1)
    assert re.search(r"trained: [\d,]+ MACs.*\npruned: [\d,]+ MACs.*\ntrained on: accuracy", capsys.readouterr().out)


# -- against the truth -----------------------------------------------------------------------


def trained(data: TensorData, epochs: int) -> nn.Module:
    model = nets.Mobile(1, 16, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for epoch in range(epochs):
        for inputs, targets in data.train(epoch):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
    return model.eval()


@pytest.mark.parametrize(("epochs", "least", "ahead"), [(1, 0.95, 0.03), (2, 0.85, 0.0)])
def test_agrees_with_the_oracle_better_than_the_peer_does(epochs, least, ahead):
    """First order is exact for small changes of a loss that has a slope: clearly ahead before the network fits."""
    data = load_digits(64)
    x, y = data.train_set
    model = trained(data, epochs)
    groups, theirs = tc.trace(model, x[:2]), groups_of(model, x[:2], [model.fc])
    batches = list(zip(x[:256].split(64), y[:256].split(64), strict=True))
    truth = tc.oracle(model, groups, F.cross_entropy, batches, form="squared", per="batch")
    different = list({id(group): group for group in theirs.values()}.values())
    expected = torch.cat([in_their_order(model, groups, group, truth) for group in different])
    ours = TaylorImportance()
    # as it comes, and as it agrees best; each over the same batches
    peers = [
        tp.importance.GroupTaylorImportance(),
        tp.importance.GroupTaylorImportance(normalizer=None),
        tp.importance.GroupTaylorImportance(normalizer=None, multivariable=True, bias=True),
    ]
    sums = [torch.zeros(len(expected)) for _ in peers]
    for inputs, targets in batches:
        model.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        ours.update(model)
        for peer, total in zip(peers, sums, strict=True):
            total += torch.cat([peer(group) for group in different])
    agreement = spearman(torch.cat([ours(group) for group in different]), expected)
    default, plain, signed = (spearman(total, expected) for total in sums)
    assert agreement > least
    assert agreement > default + 0.2
    assert agreement > max(plain, signed) + ahead
