import pytest
import torch
import torch._dynamo.config as dynamo
import torch._functorch.config as functorch
from torch import nn

from taylor_cuda.train.modes import compiler_for, eval_mode, uncompiled


def counted():
    """A network that is compiled in place, and how often the compiler was asked."""
    seen = []

    def backend(graph, _inputs):
        seen.append(1)
        return graph.forward

    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    model.compile(backend=backend)
    return model, seen


def test_a_compiled_network_runs_as_written_for_a_while():
    model, seen = counted()
    with uncompiled(model):
        model(torch.zeros(2, 3))
    with eval_mode(model):
        model(torch.zeros(2, 3))
    assert seen == []
    model(torch.zeros(2, 3))
    assert seen == [1]


def test_eval_mode_is_put_back_module_by_module():
    model = nn.Sequential(nn.Dropout(), nn.Dropout())
    model[1].eval()

    def fails():
        with eval_mode(model):
            assert not model[0].training
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert [module.training for module in model] == [True, False]


@pytest.fixture
def limited():
    """Torch's default, which imports of other tests change."""
    with dynamo.patch(recompile_limit=8):
        yield


@pytest.mark.usefixtures("limited")
def test_a_network_with_many_widths_stays_compiled():
    """Beyond the limit torch goes on uncompiled."""
    counts = {}
    for name, steps in (("alone", 0), ("for a run", 20)):
        _, seen = counted()
        with compiler_for(steps, probed=False):
            for width in range(3, 24):
                model = nn.Linear(width, width)
                model.compile(backend=lambda graph, _inputs, seen=seen: seen.append(1) or graph.forward, dynamic=False)
                model(torch.zeros(2, width))
        counts[name] = len(seen)
    assert counts["alone"] < counts["for a run"] == 21


@pytest.mark.usefixtures("limited")
def test_settings_of_the_compiler_are_put_back():
    before = dynamo.recompile_limit, functorch.donated_buffer
    with compiler_for(100, probed=True):
        assert dynamo.recompile_limit == 204
        assert not functorch.donated_buffer
    assert (dynamo.recompile_limit, functorch.donated_buffer) == before
