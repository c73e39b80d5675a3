"""EMA copies follow a cut."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from taylor_cuda.errors import InputError
from taylor_cuda.surgery import cut, load, save
from tests.surgery.nets import ConvBN, Depthwise, Residual, Tied, make, random_keep, train_steps
from tests.surgery.state import all_tensors, differences, fingerprint, kept_positions, pick


def averaged(model):
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))


def moved_away(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))


@pytest.mark.parametrize("net", [ConvBN, Residual, Depthwise, Tied])
def test_an_averaged_model_is_sliced_with_its_own_values_and_goes_on(net):
    model, x, groups = make(net)
    ema = averaged(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    moved_away(model)
    ema.update_parameters(model)
    keep = random_keep(groups, 6)
    kept = kept_positions(groups, keep, all_tensors(model))
    before = {name: tensor.clone() for name, tensor in all_tensors(ema.module).items()}
    cut(model, groups, keep, optimizer, ema)
    for name, tensor in all_tensors(ema.module).items():
        assert torch.equal(tensor, pick(before[name], kept.get(name, {}))), name
    train_steps(model, x, optimizer, 1)
    expected = {
        name: 0.9 * p.detach() + 0.1 * dict(model.named_parameters())[name] for name, p in ema.module.named_parameters()
    }
    ema.update_parameters(model)
    for name, p in ema.module.named_parameters():
        torch.testing.assert_close(p, expected[name], rtol=1e-6, atol=1e-7)
    assert ema(x).shape == (2, 4)


def test_layer_sizes_and_recipe_of_the_copy_follow(tmp_path):
    model, x, groups = make(Residual)
    ema = averaged(model)
    cut(model, groups, random_keep(groups), ema=ema)
    for a, b in zip(model.modules(), ema.module.modules(), strict=True):
        assert repr(a) == repr(b)
    save(ema.module, tmp_path / "ema.safetensors")
    fresh = load(make(Residual, seed=9)[0], tmp_path / "ema.safetensors")
    assert torch.equal(fresh.eval()(x), ema.module.eval()(x))


def test_plain_modules_dictionaries_and_several_at_once():
    model, _, groups = make(Tied)
    copies = [
        copy.deepcopy(model),
        {name: p.detach().clone() for name, p in model.named_parameters()},
        model.state_dict(),
    ]
    copies[2] = {name: tensor.clone() for name, tensor in copies[2].items()}
    cut(model, groups, {"stem": torch.tensor([0, 3])}, ema=copies)
    for name, tensor in model.state_dict().items():
        assert torch.equal(copies[0].state_dict()[name], tensor), name
        assert torch.equal(copies[2][name], tensor), name
        if name in copies[1]:
            assert torch.equal(copies[1][name], tensor), name
    assert "also_scale" in copies[2]
    assert "again.weight" in copies[2]


def test_timm_averages():
    utils = pytest.importorskip("timm.utils")
    for kind in (utils.ModelEmaV2, utils.ModelEmaV3):
        model, x, groups = make(ConvBN)
        ema = kind(model, decay=0.9)
        cut(model, groups, random_keep(groups), ema=ema)
        ema.update(model)
        # 0.9 a + 0.1 a rounds
        torch.testing.assert_close(ema.module.eval()(x), model.eval()(x), rtol=1e-5, atol=1e-6)


def test_a_copy_in_another_dtype_keeps_it():
    model, _, groups = make(ConvBN)
    ema = copy.deepcopy(model).double()
    cut(model, groups, random_keep(groups), ema=ema)
    assert all(p.dtype == torch.float64 for p in ema.parameters())
    assert torch.equal(ema.conv2.weight, model.conv2.weight.double())


def test_what_is_no_copy_is_refused():
    model, _, groups = make(ConvBN)
    keep = random_keep(groups)
    smaller = copy.deepcopy(model)
    smaller.conv2.weight.data = smaller.conv2.weight.data[:, :4]
    cases = [
        (model, "is the model itself"),
        (dict(model.named_parameters()), "the model's own tensor"),
        (nn.Linear(2, 2), "no copy of the model in Linear"),
        ({"weight": torch.zeros(1)}, r"no tensor named conv1\.weight in it; it has weight"),
        (smaller, r"conv2\.weight has shape \(5, 4, 3, 3\) in it and \(5, 6, 3, 3\)"),
        (3, "no copy of the model in int"),
    ]
    for ema, message in cases:
        before = fingerprint(model, groups=groups)
        with pytest.raises(InputError, match=message):
            cut(model, groups, keep, ema=ema)
        assert not differences(before, fingerprint(model, groups=groups))
