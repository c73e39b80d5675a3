"""Models and inputs that can't be traced, or only for the example: every one is named, and nothing is touched."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import taylor_cuda as tc
from taylor_cuda.errors import InputError
from taylor_cuda.graph.tracer import trace
from tests.graph.base import Net, conv, image
from tests.graph.nets import ConvBN
from tests.graph.odd_nets import SecondOutput

# -- the forward pass raises ----------------------------------------------------------------------------------------


class Raising(ConvBN):
    """Raises in a layer of its own, in both modes."""

    def forward(self, x: Tensor) -> Tensor:
        super().forward(x)
        raise LookupError("no such table")


def test_a_forward_that_raises_is_an_input_error_with_its_cause():
    model = Raising()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match="forward pass raises with them: LookupError: no such table") as caught:
        trace(model, image())
    assert isinstance(caught.value.__cause__, LookupError)
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((), "TypeError: .*missing 1 required positional argument: 'x'"),
        ({"pixels": image()}, "TypeError: .*unexpected keyword argument 'pixels'"),
        ((image(), image()), "TypeError: .*takes 2 positional arguments but 3 were given"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.int64), "RuntimeError: .*Long"),
        (torch.zeros(2, 3), "RuntimeError: .*"),
        (image().to("meta"), "forward pass raises"),
    ],
    ids=["none", "wrong name", "too many", "integers", "two dimensions", "another device"],
)
def test_wrong_example_inputs_are_named_as_such(inputs, message):
    with pytest.raises(InputError, match=f"example_inputs: .*{message}"):
        trace(ConvBN(), inputs)


# -- where the model lies, and what was made of it --------------------------------------------------------------------


def test_a_model_on_two_devices_is_refused():
    model = ConvBN()
    model.b.to("meta")
    with pytest.raises(InputError, match="has tensors on the meta device, which hold no values"):
        trace(model, image())


@pytest.fixture
def process_group() -> Iterator[None]:
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_a_model_in_ddp_is_refused():
    wrapped = nn.parallel.DistributedDataParallel(ConvBN())
    with pytest.raises(InputError, match=r"wrapped in DistributedDataParallel; give the module inside, model\.module"):
        trace(wrapped, image())
    with pytest.raises(InputError, match=r"wrapped in DistributedDataParallel \(at 0\)"):
        trace(nn.Sequential(wrapped, nn.Linear(2, 2)), image())
    assert trace(wrapped.module, image()).sizes() == {"a": 8, "b": 4}


def test_a_sharded_model_is_refused():
    class FullyShardedDataParallel(nn.Module):
        """Of the same name as torch's, which wants a process group and a device."""

        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, x: Tensor) -> Tensor:
            return self.module(x)

    with pytest.raises(InputError, match=r"trace: model is sharded by FSDP; .* train with DistributedDataParallel"):
        trace(FullyShardedDataParallel(ConvBN()), image())
    with pytest.raises(InputError, match=r"sharded by FSDP \(at 0\)"):
        trace(nn.Sequential(FullyShardedDataParallel(ConvBN())), image())


# -- control flow that depends on the data ----------------------------------------------------------------------------


class Deciding(Net):
    """``decide(self, input)`` comes between the layers."""

    def __init__(self, decide: Callable[[nn.Module, Tensor], object]) -> None:
        super().__init__(a=conv(3, 8), bn=nn.BatchNorm2d(8), b=conv(8, 2))
        self.decide = decide
        self.register_buffer("threshold", torch.tensor(0.5))
        self.register_buffer("seen", torch.zeros(()))
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        taken = self.decide(self, x)
        y = F.relu(self.bn(self.a(x)))
        return self.b(y if taken else y + y).mean((2, 3))


def remember(net: nn.Module, x: Tensor) -> float:
    net.seen.copy_(x.mean())
    return net.seen.item()


DEPENDING = {
    "if": lambda net, x: bool(x.mean() > 0),
    "item": lambda net, x: x.amax().item(),
    "int": lambda net, x: int((x > 0).sum()) % 3,
    "any": lambda net, x: bool(torch.any(x.flatten() > 9)),
    "equal": lambda net, x: torch.equal(x, x.abs()),
    "tolist": lambda net, x: x.amax((1, 2, 3)).tolist()[0],
    "numpy": lambda net, x: float(x.sum().numpy()),
    "array": lambda net, x: float(np.asarray(x.sum())),
    "nonzero": lambda net, x: len((x.mean((1, 2, 3)) > 0).nonzero()),
    "through a buffer": remember,
    "with a weight": lambda net, x: bool((x * net.scale).sum() > net.threshold),
}

CONSTANT = {
    "shape": lambda net, x: x.shape[0] > 1,
    "buffer": lambda net, x: bool(net.threshold > 0),
    "counter": lambda net, x: int(net.bn.num_batches_tracked) > 5,
    "parameter": lambda net, x: net.scale.item() > 0,
    "new": lambda net, x: bool(torch.ones_like(x).sum() > 0) and bool(x.new_zeros(3).sum() > 1),
    "chance": lambda net, x: torch.rand(()).item() < 2,
    "values that no code reads": lambda net, x: torch.where(x > 0, x, -x).sum() is None,
}


@pytest.mark.parametrize("decide", DEPENDING.values(), ids=DEPENDING)
def test_code_that_depends_on_the_input_is_traced_for_the_example_and_said(decide):
    groups = trace(Deciding(decide), image())
    assert groups.sizes() == {"a": 8}
    (note,) = groups.notes
    assert "depends on values of the input" in note
    assert "only what it does for the example is traced" in note
    assert f"test_bad_input.py:{decide.__code__.co_firstlineno + (2 if decide is remember else 0)}" in note


@pytest.mark.parametrize("decide", CONSTANT.values(), ids=CONSTANT)
def test_code_that_depends_on_the_model_alone_is_not_noted(decide):
    groups = trace(Deciding(decide), image())
    assert groups.sizes() == {"a": 8}
    assert groups.notes == []


class Gate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.mean() > 100 else -x


def test_a_note_names_the_module_and_stands_there_once():
    first = nn.Sequential(Gate(), nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1), Gate())
    line = Gate.forward.__code__.co_firstlineno + 1
    notes = trace(first, image()).notes
    assert [note.rpartition("traced ")[2] for note in notes] == [
        f"(0, test_bad_input.py:{line})",
        f"(4, test_bad_input.py:{line})",
    ]


# -- what else a user can give that doesn't fit -----------------------------------------------------------------------


def test_an_inner_feature_that_is_an_output_keeps_its_channels_through_the_cut():
    model = SecondOutput()
    groups = trace(model, image())
    stays = {entry.name: (entry.size, entry.reason) for entry in groups.frozen}
    assert stays["b"] == (6, "an output of the network")
    before = model(image())
    tc.cut(model, groups, {"c": torch.tensor([0, 2])})
    assert torch.equal(model(image())["inner"][0], before["inner"][0])


def some_plan(model: nn.Module, groups: tc.Groups) -> tc.Plan:
    return tc.plan(model, groups, {group.name: torch.rand(group.size) for group in groups}, {"macs": 0.6})


def test_a_plan_of_another_model_is_refused():
    class Wider(Net):
        def __init__(self) -> None:
            super().__init__(a=conv(3, 16), b=conv(16, 4), fc=nn.Linear(4, 2))

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(F.relu(self.b(F.relu(self.a(x)))).mean((2, 3)))

    wider, model = Wider(), ConvBN()
    plan, groups = some_plan(wider, trace(wider, image())), trace(model, image())
    assert plan.keep.keys() == groups.sizes().keys()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match="before another cut, or for other groups; plan again"):
        tc.cut(model, groups, plan)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
