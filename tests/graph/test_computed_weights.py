"""Layers whose weight is computed from parameters: its rows can go where they still are rows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.flop_counter import FlopCounterMode

import taylor_cuda as tc
from tests.graph.base import Net, conv

OLD = pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm.*")


class Normed(Net):
    """A convolution and a linear layer under a parametrization, and plain layers that read them."""

    def __init__(self, normed) -> None:
        super().__init__(
            a=normed(conv(3, 8)), b=conv(8, 6), l=normed(nn.Linear(6, 7)), t=normed(nn.ConvTranspose1d(7, 5, 2))
        )
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.b(F.relu(self.a(x)))).mean((2, 3))
        return self.head(F.relu(self.t(F.relu(self.l(x)).unsqueeze(2))).mean(2))


class Read(Net):
    """A weight-normalised linear layer between plain ones."""

    def __init__(self) -> None:
        super().__init__(
            a=nn.Linear(4, 6), w=parametrizations.weight_norm(nn.Linear(6, 7)), b=nn.Linear(7, 5), head=nn.Linear(5, 2)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.b(F.relu(self.w(F.relu(self.a(x)))))))


@OLD
@pytest.mark.parametrize("normed", [parametrizations.weight_norm, nn.utils.weight_norm])
def test_outputs_go_and_sizes_follow(normed, tmp_path):
    torch.manual_seed(0)
    model, x = Normed(normed).eval(), torch.randn(2, 3, 6, 6)
    groups = tc.trace(model, x)
    assert groups.sizes() == {"a": 8}  # what a normalised layer reads stays: its rows would be normalised over less
    tc.cut(model, groups, {"a": torch.tensor([0, 3, 4])})
    assert groups.verified < 1e-5
    assert model.a.out_channels == 3
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(x)
    assert tc.planning.cost.model_cost(model, groups).macs == counter.get_total_flops() / 4
    tc.save(model, tmp_path / "small.safetensors")
    again = tc.load(Normed(normed), tmp_path / "small.safetensors").eval()
    assert torch.equal(again(x), model(x))


def test_what_a_normalised_layer_reads_stays():
    groups = tc.trace(Read(), torch.randn(3, 4))
    assert groups.sizes() == {"w": 7, "b": 5}
    assert {entry.name: entry.size for entry in groups.frozen} == {"a": 6, "head": 2}


def test_the_norm_of_another_dimension_and_spectral_norm_stay():
    for normed in (lambda layer: parametrizations.weight_norm(layer, dim=1), parametrizations.spectral_norm):
        with pytest.raises(tc.InputError, match="nothing to prune"):
            tc.trace(nn.Sequential(normed(conv(3, 8)), nn.ReLU(), conv(8, 2)), torch.randn(2, 3, 6, 6))
