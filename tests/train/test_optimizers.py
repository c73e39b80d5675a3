import pytest
import torch
from torch import nn

from taylor_cuda.errors import InputError
from taylor_cuda.train.optimizers import new_optimizer, shrink_filters


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 4))


def test_the_two_of_torch():
    sgd = new_optimizer("sgd", net(), 0.1, 0.01)
    assert type(sgd) is torch.optim.SGD
    assert (sgd.defaults["lr"], sgd.defaults["momentum"], sgd.defaults["weight_decay"]) == (0.1, 0.9, 0.01)
    adamw = new_optimizer("adamw", net(), 0.1, 0.01)
    assert type(adamw) is torch.optim.AdamW
    assert adamw.defaults["weight_decay"] == 0.01


@pytest.mark.parametrize("name", ["lamb", "lars", "lion"])
def test_others_are_those_of_timm(name):
    model = net()
    optimizer = new_optimizer(name, model, 0.1, 0.01)
    assert type(optimizer).__module__.startswith("timm")
    owned = {id(value) for group in optimizer.param_groups for value in group["params"]}
    assert owned == {id(value) for value in model.parameters()}
    before = model[3].weight.detach().clone()
    model(torch.randn(5, 2, 4, 4)).square().mean().backward()
    optimizer.step()
    assert not torch.equal(model[3].weight, before)


def test_an_unknown_name_is_refused_with_its_neighbours():
    with pytest.raises(InputError, match=r"'adamv' here; the nearest are .*adam"):
        new_optimizer("adamv", net(), 0.1, 0.0)


def test_filters_lose_the_same_from_their_norms():
    weight = torch.randn(4, 2, 3, 3, dtype=torch.float64)
    weight[2] = 0
    weight[3] *= 1e-7
    before = weight.clone()
    shrink_filters([weight], 0.25)
    norms, then = (torch.linalg.vector_norm(w.flatten(1), dim=1) for w in (weight, before))
    torch.testing.assert_close(norms[:2], then[:2] - 0.25, rtol=1e-10, atol=0)
    torch.testing.assert_close(weight[:2] / norms[:2].view(-1, 1, 1, 1), before[:2] / then[:2].view(-1, 1, 1, 1))
    assert torch.equal(weight[2:], before[2:])  # too small to have a direction
