import pytest
import torch
from torch import nn

from taylor_cuda.errors import InputError
from taylor_cuda.train.batch_norm import recalibrate_batch_norm
from tests.train.test_loop import norm_net


def test_recalibration_is_the_plain_average_over_batches():
    net = norm_net().double()
    generator = torch.Generator().manual_seed(2)
    batches = [3.0 + torch.randn(5, 2, 4, 4, generator=generator, dtype=torch.float64) for _ in range(4)]
    assert recalibrate_batch_norm(net, [(x, torch.zeros(5)) for x in batches], limit=3) == 3
    with torch.no_grad():
        outputs = [net[0](x) for x in batches[:3]]
    mean = sum(y.mean((0, 2, 3)) for y in outputs) / 3
    variance = sum(y.var((0, 2, 3)) for y in outputs) / 3
    torch.testing.assert_close(net[1].running_mean, mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(net[1].running_var, variance, rtol=1e-12, atol=1e-12)


def test_recalibration_restores_everything_else():
    net = norm_net()
    net.train()
    net[1].eval()
    weights = {name: value.clone() for name, value in net.named_parameters()}
    recalibrate_batch_norm(net, [torch.randn(4, 2, 4, 4)])
    assert [module.training for module in net] == [True, False, True, True, True, True]
    assert net[1].momentum == 0.3
    assert all(torch.equal(weights[name], value) for name, value in net.named_parameters())
    assert all(value.grad is None for value in net.parameters())


def test_recalibration_without_batches_or_on_failure_keeps_the_old_statistics():
    net = norm_net()
    net(torch.randn(4, 2, 4, 4))
    before = {name: value.clone() for name, value in net.named_buffers()}

    def interrupted():
        yield torch.randn(4, 2, 4, 4)
        raise KeyboardInterrupt

    for batches, error in (([], InputError), (interrupted(), KeyboardInterrupt)):
        with pytest.raises(error):
            recalibrate_batch_norm(net, batches)
        assert all(torch.equal(before[name], value) for name, value in net.named_buffers())
        assert net[1].momentum == 0.3
        assert net.training


def test_recalibration_of_a_model_without_batch_norm_does_nothing():
    assert recalibrate_batch_norm(nn.Linear(2, 2), [torch.zeros(3, 2)]) == 0
