"""Costs: by hand, against the model really cut, and layer by layer."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from taylor_cuda.errors import InputError
from taylor_cuda.graph.groups import Call, Groups
from taylor_cuda.graph.slicing import slice_model
from taylor_cuda.planning import Cost, layer_costs, model_cost, original_cost
from taylor_cuda.planning.cost import Lengths, compile_cost
from tests.planning.nets import NETS, chain, concat, grouped


def measured(model: nn.Module, groups: Groups) -> tuple[int, int]:
    """MACs of one example and parameters, counted by torch on the model itself."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(*groups.example_inputs[0])
    macs, rest = divmod(counter.get_total_flops(), 2 * groups.batch_size)
    assert rest == 0
    return macs, sum(parameter.numel() for parameter in model.parameters())


def test_chain_by_hand() -> None:
    model, groups = chain()
    # conv1 64·(6·3·9), conv2 64·(4·6), fc 5·16; params: 162 + 12 (BatchNorm) + 24 + 4 + 80 + 5
    assert model_cost(model, groups) == Cost(macs=10368 + 1536 + 80, params=287, channels=10) == original_cost(groups)
    # 3 and 2 units: conv1 64·81, conv2 64·6, fc 5·8; params: 81 + 6 + 6 + 2 + 40 + 5
    assert model_cost(model, groups, {"conv1": 3, "conv2": 2}) == Cost(macs=5184 + 384 + 40, params=140, channels=5)
    # only conv2 shrinks: conv1 stays, conv2 64·12, fc 5·8
    assert model_cost(model, groups, {"conv2": 2}).macs == 10368 + 768 + 40


@pytest.mark.parametrize("net", NETS)
def test_cost_is_that_of_the_model_when_it_is_cut(net: str) -> None:
    torch.manual_seed(0)
    model, groups = NETS[net]()
    assert model_cost(model, groups) == original_cost(groups)
    for _ in range(6):
        keep = {g.name: torch.randperm(g.size)[: int(torch.randint(1, g.size + 1, ()))].sort().values for g in groups}
        sizes = {name: kept.numel() for name, kept in keep.items()}
        expected = model_cost(model, groups, sizes)
        smaller = copy.deepcopy(model)
        slice_model(smaller, groups, keep)
        assert (expected.macs, expected.params) == measured(smaller, groups)
        assert expected.channels == sum(sizes.values())
        rows = layer_costs(model, groups, sizes)
        after = [sum(parts) for parts in zip(*((row.macs[1], row.params[1]) for row in rows), strict=True)]
        assert after == [expected.macs, expected.params]
        before = model_cost(model, groups)
        assert [sum(row.macs[0] for row in rows), sum(row.params[0] for row in rows)] == [before.macs, before.params]


def test_equal_factors_are_merged() -> None:
    """Twelve tensors of the concatenation lie in only four lengths, and in a handful of terms."""
    model, groups = concat()
    terms = compile_cost(Lengths(model, groups), groups)
    assert len(terms.factors) == 4
    assert len(set(terms.products)) == len(terms.products) <= 7


def test_layer_table() -> None:
    model, groups = chain()
    rows = {row.module: row for row in layer_costs(model, groups, {"conv1": 3, "conv2": 2})}
    assert list(rows) == ["conv1", "bn", "conv2", "fc"]
    assert rows["conv1"].kind == "Conv2d"
    assert [row.width for row in rows.values()] == [(6, 3), (6, 3), (4, 2), (5, 5)]
    assert rows["conv2"].macs == (1536, 384)
    assert rows["conv2"].params == (28, 8)
    assert rows["bn"].macs == (0, 0)


def test_layer_table_of_transposed_convolutions_and_products() -> None:
    model = nn.ConvTranspose2d(3, 7, 2)
    call = Call("", "attention", "bmm", 10)
    groups = Groups(
        (), (), (call,), ((torch.randn(2, 3, 4, 4),), {}), 2, 10, sum(p.numel() for p in model.parameters())
    )
    rows = layer_costs(model, groups)
    assert [(row.module, row.kind, row.width, row.macs) for row in rows] == [
        ("", "ConvTranspose2d", (7, 7), (0, 0)),
        ("attention", "", (0, 0), (5, 5)),
    ]


def test_macs_of_one_example_are_rounded_to_the_nearest() -> None:
    model, groups = grouped()
    groups.calls, groups.batch_size = (Call("", "", "bmm", 11),), 4
    assert model_cost(model, groups).macs == 3
    groups.calls = (Call("", "", "bmm", 9),)
    assert model_cost(model, groups).macs == 2


def test_refuses_sizes_and_groups_that_do_not_fit() -> None:
    model, groups = chain()
    with pytest.raises(InputError, match="no group named 'conv9'"):
        model_cost(model, groups, {"conv9": 1})
    with pytest.raises(InputError, match=r"'conv2' has 4 units, so 0 to 4 can be kept, got 5"):
        model_cost(model, groups, {"conv2": 5})
    with pytest.raises(InputError, match=r"no tensor 'conv1.weight'"):
        model_cost(nn.Sequential(model), groups)
    with pytest.raises(InputError, match=r"no tensor 'gone.weight'"):
        model_cost(model, replace(groups, calls=(Call("gone.weight", "gone", "mm", 1),)))
    slice_model(model, groups, {"conv1": torch.arange(3)})
    with pytest.raises(InputError, match=r"'conv1.weight' is 3 long, 3 less than its groups say"):
        model_cost(model, groups)
