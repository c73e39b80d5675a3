"""What ``trace`` leaves as it was, what it calls things, what it refuses, and the MACs it counts."""

from __future__ import annotations

import copy
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from taylor_cuda.errors import InputError
from taylor_cuda.graph.tracer import trace
from tests.graph.base import Net, conv, image
from tests.graph.checks import cut_error, places
from tests.graph.nets import NETS, ConvBN, Residual
from tests.graph.odd_nets import SecondOutput, Shared


def fingerprint(model: nn.Module) -> dict[str, object]:
    hooks = [name for name in vars(model) if name.endswith("hooks")]
    return {
        "tensors": {name: (id(t), t._version, t.clone()) for name, t in model.state_dict(keep_vars=True).items()},
        "attributes": {name: set(vars(t)) for name, t in model.state_dict(keep_vars=True).items()},
        "grads": {name: p.grad for name, p in model.named_parameters()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "training": {name: module.training for name, module in model.named_modules()},
        "hooks": {name: [len(vars(m)[h]) for h in hooks] for name, m in model.named_modules()},
        "vars": {name: set(vars(module)) for name, module in model.named_modules()},
    }


def same(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training):
    model = Residual().train(training)
    model.bn1.eval()
    model.one.weight.requires_grad_(False)
    model(image()).sum().backward()
    x = image().requires_grad_()
    value = x.detach().clone()
    before = fingerprint(model)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    with torch.enable_grad():
        trace(model, x)
        assert torch.is_grad_enabled()
    assert same(before, fingerprint(model))
    assert torch.equal(x, value)
    assert x.grad is None
    assert torch.equal(states[0], torch.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1])
    assert states[2] == random.getstate()
    assert torch.backends.mha.get_fastpath_enabled()


class Drawing(ConvBN):
    """Draws from every generator, and writes into its input."""

    def forward(self, x: Tensor) -> Tensor:
        x += torch.rand(1) + float(np.random.rand()) + random.random()
        return super().forward(x)


def test_random_states_and_inputs_are_left_as_they_were():
    x, model = image(), Drawing()
    value = x.clone()
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), np.random.get_state()[2], random.getstate()
    groups = trace(model, x, prove=False)
    assert torch.equal(states[0], torch.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1])
    assert states[2] == np.random.get_state()[2]
    assert states[3] == random.getstate()
    assert torch.equal(x, value)
    assert torch.equal(groups.example_inputs[0][0], value)


@pytest.mark.parametrize("name", ["residual", "c2f", "layer_norm", "grouped", "functional"])
def test_copies_have_the_same_groups_in_the_same_order(name):
    torch.manual_seed(0)
    make, inputs = NETS[name]
    first, second = make(), make()
    results = [
        [
            (group.name, group.size, places(group), [m.index.tolist() for m in group.members])
            for group in trace(m, inputs())
        ]
        for m in (first, second, copy.deepcopy(first).train())
    ]
    assert results[0] == results[1] == results[2]
    order = {tensor: at for at, (tensor, _) in enumerate([*first.named_parameters(), *first.named_buffers()])}
    firsts = [order[group.members[0].tensor] for group in trace(first, inputs())]
    assert firsts == sorted(firsts)


class Parts(Net):
    """Three blocks of one stem are read by different layers: units of one writer with different readers."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 6), b=conv(3, 6), c=conv(6, 3), d=conv(12, 3), fc=nn.Linear(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)
        return self.fc((self.c(F.relu(a)) + self.d(torch.cat([a, b], 1))).mean((2, 3)))


def test_names_are_unique_and_named_after_the_writer():
    groups = trace(Parts(), image())
    assert list(groups.sizes()) == ["a", "b", "c"]
    shared = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(256, 2))
    assert list(trace(shared, image()).sizes()) == ["0", "2"]


def test_ignored_outputs_stay():
    free = trace(Residual(), image())
    assert set(free.sizes()) == {"stem", "one"}
    groups = trace(Residual(), image(), ignore=["on?"])
    assert set(groups.sizes()) == {"stem"}
    entry = next(entry for entry in groups.frozen if entry.name == "one")
    assert (entry.size, entry.reason.split(" ")[0]) == (6, "ignored")
    assert set(trace(Residual(), image(), ignore=["bn2"]).sizes()) == {"one"}
    with pytest.raises(InputError, match=r"ignore: 'layer9\.\*' matches no module"):
        trace(Residual(), image(), ignore=["stem", "layer9.*"])


def test_ignoring_a_list_that_is_never_called_is_an_error():
    class Listed(Net):
        def __init__(self) -> None:
            super().__init__(blocks=nn.ModuleList([conv(3, 4), conv(4, 5)]), fc=nn.Linear(5, 2))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = F.relu(block(x))
            return self.fc(x.mean((2, 3)))

    with pytest.raises(InputError, match="calls no module that 'blocks' matches"):
        trace(Listed(), image(), ignore=["blocks"])
    assert set(trace(Listed(), image(), ignore=["blocks.0"]).sizes()) == {"blocks.1"}


class Wrapped(nn.Module):
    """An output in an object, behind a namedtuple and an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.net = SecondOutput()

    def forward(self, x: Tensor) -> SimpleNamespace:
        out = self.net(x)
        return SimpleNamespace(logits=out["logits"], extra=(out["inner"], None, 3))


def test_outputs_are_found_in_any_container():
    assert set(trace(Wrapped(), image()).sizes()) == {"net.a", "net.c"}


def test_example_inputs_of_every_form_and_the_batch_size():
    model = ConvBN()
    x = image(3)
    for given in (x, (x,), [x], {"x": x}):
        groups = trace(model, given)
        assert groups.batch_size == 3
        assert groups.sizes() == {"a": 8, "b": 4}
    kept = groups.example_inputs[1]["x"]
    assert torch.equal(kept, x)
    assert kept is not x
    with pytest.raises(InputError, match="example_inputs: wanted a tensor, a tuple"):
        trace(model, 3)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(), "has no parameters"),
        (nn.Sequential(nn.ReLU()), "has no parameters"),
        (3, "wanted a torch.nn.Module, got int"),
        (nn.DataParallel(nn.Conv2d(3, 4, 1)), "wrapped in DataParallel"),
        (nn.Sequential(nn.Conv2d(3, 4, 1, device="meta")), "meta device"),
        (nn.Sequential(nn.LazyConv2d(4, 1)), "has no shape yet"),
        (nn.Conv2d(3, 4, 1), "nothing to prune.*4 .an output of the network"),
        (
            nn.Sequential(nn.Conv2d(3, 4, 1), nn.Softmax(1), nn.Conv2d(4, 4, 1)),
            "nothing to prune.*softmax over channels",
        ),
        (nn.Sequential(nn.Conv2d(9, 4, 1)), "forward pass raises with them: RuntimeError: .*channels"),
    ],
)
def test_models_that_cannot_be_traced(model, message):
    with pytest.raises(InputError, match=message):
        trace(model, image())


def test_a_compiled_model_is_refused():
    compiled = torch.compile(ConvBN(), backend="eager")
    with pytest.raises(InputError, match=r"was compiled by torch\.compile.*; give the original module"):
        trace(compiled, image())
    with pytest.raises(InputError, match=r"compiled by torch.compile \(at 0\)"):
        trace(nn.Sequential(compiled), image())


class Picky(Net):
    """Raises in train mode, after it used one layer more."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 8), b=conv(8, 6), aux=conv(8, 2), fc=nn.Linear(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        if self.training:
            self.aux(x)
            raise ValueError("not ready")
        return self.fc(F.relu(self.b(x)).mean((2, 3)))


def test_a_failing_train_pass_is_noted_and_what_it_did_still_couples():
    groups = trace(Picky(), image())
    assert len(groups.notes) == 1
    assert "ValueError: not ready" in groups.notes[0]
    assert "aux.weight" in {member.tensor for member in groups["a"].members}


def test_one_value_a_channel_is_no_obstacle_in_train_mode():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    groups = trace(model, image(1))
    assert groups.sizes() == {"1": 8}
    assert groups.notes == []


@pytest.mark.parametrize(
    "name", ["conv_bn", "grouped", "transposed", "squeeze_excite", "layer_norm", "shared", "one_d", "three_d"]
)
def test_macs_are_those_that_torch_counts(name):
    make, inputs = NETS[name]
    model = make().eval()
    groups = trace(model, inputs())
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(inputs())
    assert 2 * groups.original_macs == counter.get_total_flops() > 0
    parameters = dict(model.named_parameters())
    assert groups.original_macs == sum(c.macs_per_weight * parameters[c.weight].numel() for c in groups.calls)


def test_each_use_of_a_shared_module_is_a_call():
    groups = trace(Shared(), image())
    calls = [(call.weight, call.module, call.op, call.macs_per_weight) for call in groups.calls]
    assert calls.count(("s.weight", "s", "convolution", 2 * 64)) == 2
    assert calls[-1] == ("fc.weight", "fc", "addmm", 2)


class Attention(Net):
    """A product of activations costs MACs that no weight stands for."""

    def __init__(self) -> None:
        super().__init__(qkv=nn.Linear(6, 24), up=nn.Linear(8, 12), down=nn.Linear(12, 2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + torch.bmm(torch.bmm(x, x.transpose(1, 2)).softmax(-1), x)
        return self.down(F.gelu(self.up(x)))


def test_products_of_activations_are_constant_macs():
    x = torch.randn(2, 5, 6)
    groups = trace(Attention(), x)
    assert groups.sizes() == {"up": 12}
    constant = [call.macs_per_weight for call in groups.calls if not call.weight]
    attention = 2 * 2 * (5 * 5 * 4) * 2  # batch, heads, two products of 5x4x5
    assert sorted(constant) == sorted([attention, 2 * 5 * 5 * 8, 2 * 5 * 5 * 8])


def test_old_weight_norm_and_kept_results_can_be_copied():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 5, 1), nn.ReLU(), nn.Conv2d(5, 2, 1))
    model.feature = model(image())
    assert model.feature.grad_fn is not None
    assert trace(model, image()).sizes() == {"0": 4, "2": 5}


def test_inner_autocast_keeps_the_weights_known():
    class Cast(ConvBN):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return super().forward(x)

    assert trace(Cast(), image(), prove=False).sizes() == {"a": 8, "b": 4}


@pytest.mark.parametrize("name", ["conv_bn", "mlp", "layer_norm", "group_norm", "c2f", "three_d", "transposed"])
def test_a_forward_pass_in_inference_mode(name):
    make, inputs = NETS[name]

    class Inference(make):
        @torch.inference_mode()
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    expected = {group.name: places(group) for group in trace(make(), inputs())}
    assert {group.name: places(group) for group in trace(Inference(), inputs())} == expected


class Words(Net):
    """A table of vectors, summed; the table's rows stay."""

    def __init__(self) -> None:
        super().__init__(table=nn.Embedding(9, 6), norm=nn.LayerNorm(6), up=nn.Linear(6, 5), down=nn.Linear(5, 2))

    def forward(self, index: Tensor) -> Tensor:
        return self.down(F.relu(self.up(self.norm(self.table(index).mean(1)))))


def test_embeddings():
    model = Words()
    groups = trace(model, torch.randint(0, 9, (3, 4)))
    table = "table.weight:1w norm.weight:0n norm.bias:0n up.weight:1r"
    assert {group.name: (group.size, places(group)) for group in groups} == {
        "table": (6, table),
        "up": (5, "up.weight:0w up.bias:0o down.weight:1r"),
    }
    assert cut_error(model, groups, {"table": torch.tensor([1, 2, 5]), "up": torch.tensor([0, 3])}) < 1e-5


def test_sixteen_bit_models():
    assert trace(ConvBN().to(torch.bfloat16), image().to(torch.bfloat16)).sizes() == {"a": 8, "b": 4}
