"""``tc.cut`` on networks whose groups are stated by hand."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taylor_cuda.errors import CutError
from taylor_cuda.graph.groups import ChannelGroup, Member
from taylor_cuda.graph.mask import masked
from taylor_cuda.surgery import cut
from tests.surgery.nets import NETS, ConvBN, Depthwise, Grouped, Linears, Residual, Tied, make, random_keep
from tests.surgery.state import all_tensors, differences, fingerprint, kept_positions, pick, rebuilt

cut_module = importlib.import_module("taylor_cuda.surgery.cut")

# cut and masked sum the same terms, with zeros between them, at most 100 of them a value and six layers deep
TOLERANCE = {torch.float64: 64 * torch.finfo(torch.float64).eps, torch.float32: 64 * torch.finfo(torch.float32).eps}


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("net", NETS)
def test_cut_computes_what_masked_computes(net, seed, dtype):
    model, x, groups = make(net, seed, dtype)
    keep = random_keep(groups, seed)
    model.eval()
    with masked(model, groups, keep):
        expected = model(x)
    returned = cut(model, groups, keep)
    actual = model(x)
    assert returned is groups
    assert (actual - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()
    assert 0 <= groups.verified <= TOLERANCE[dtype]
    assert groups.sizes() == {name: kept.numel() for name, kept in keep.items()}


@pytest.mark.parametrize("net", NETS)
def test_every_tensor_keeps_exactly_the_positions_of_the_kept_units(net):
    model, _, groups = make(net)
    keep = random_keep(groups, 3)
    before = {name: tensor.detach().clone() for name, tensor in all_tensors(model).items()}
    objects = {name: id(tensor) for name, tensor in all_tensors(model).items()}
    kept = kept_positions(groups, keep, before)
    cut(model, groups, keep)
    after = all_tensors(model)
    assert kept
    assert {name: id(tensor) for name, tensor in after.items()} == objects
    for name, tensor in after.items():
        assert torch.equal(tensor.detach(), pick(before[name], kept.get(name, {}))), name


def test_layers_say_their_new_sizes():
    model, _, groups = make(Residual)
    cut(model, groups, {"stem": torch.tensor([0, 2, 5]), "a1": torch.tensor([1, 2])})
    assert (model.a1.in_channels, model.a1.out_channels) == (3, 2)
    assert (model.bn.num_features, model.abn1.num_features, model.head.in_features) == (3, 2, 3)
    model, _, groups = make(Depthwise)
    cut(model, groups, {"expand": torch.tensor([0, 4])})
    assert (model.depthwise.groups, model.depthwise.in_channels, model.depthwise.out_channels) == (2, 2, 2)
    model, _, groups = make(Grouped)
    cut(model, groups, {"expand": torch.tensor([0, 1, 3])})
    assert (model.grouped.groups, model.grouped.in_channels, model.grouped.out_channels) == (3, 6, 9)
    model, _, groups = make(Linears)
    cut(model, groups, {"fc1": torch.tensor([7])})
    assert model.norm.normalized_shape == (1,)
    assert repr(model.fc1) == "Linear(in_features=9, out_features=1, bias=True)"


def test_groups_follow_and_a_second_cut_composes():
    model, x, groups = make(Residual, dtype=torch.float64)
    once, same_model = copy.deepcopy(model), model
    cut(model, groups, {"stem": torch.tensor([0, 2, 3, 5]), "a1": torch.tensor([1, 2, 3])})
    cut(model, groups, {"stem": torch.tensor([1, 3]), "a1": torch.tensor([0, 2])})
    assert groups["stem"].kept.tolist() == [2, 5]
    assert groups["stem"].original_size == 6
    assert groups["a1"].kept.tolist() == [1, 3]
    cut(once, once.groups(x), {"stem": torch.tensor([2, 5]), "a1": torch.tensor([1, 3])})
    for (name, a), b in zip(all_tensors(same_model).items(), all_tensors(once).values(), strict=True):
        assert torch.equal(a, b), name
    assert model.taylor_cuda_recipe == once.taylor_cuda_recipe


def test_gradients_are_sliced_with_their_parameters():
    model, x, groups = make(ConvBN)
    model(x).square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    keep = random_keep(groups, 5)
    kept = kept_positions(groups, keep, all_tensors(model))
    model.head.bias.grad = None
    cut(model, groups, keep)
    for name, p in model.named_parameters():
        if name == "head.bias":
            assert p.grad is None
        else:
            assert torch.equal(p.grad, pick(gradients[name], kept.get(name, {}))), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_training_goes_on_while_an_old_output_is_held(dtype):
    """The old output keeps the nodes alive that accumulate gradients, and those insist on the old shapes."""
    model, x, groups = make(ConvBN, dtype=dtype)
    held = model(x).sum()
    cut(model, groups, random_keep(groups))
    fresh = copy.deepcopy(model)
    model.zero_grad()
    model(x).square().sum().backward()
    fresh(x).square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), fresh.parameters(), strict=True):
        assert p.grad.shape == p.shape
        assert torch.equal(p.grad, q.grad), name
    with pytest.raises(RuntimeError):
        held.backward()  # its activations are those of the larger model: an error, not a wrong gradient


def test_an_output_computed_before_a_failed_cut_still_has_its_gradients(monkeypatch):
    model, x, groups = make(ConvBN)
    model.eval()
    expected = copy.deepcopy(model)
    expected(x).square().sum().backward()
    held = model(x).square().sum()
    monkeypatch.setattr(cut_module.MaskedReference, "compare", _raise(CutError("no")))
    with pytest.raises(CutError):
        cut(model, groups, random_keep(groups))
    held.backward()
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def _raise(error: BaseException):
    def raising(*_args, **_kwargs):
        raise error

    return raising


@pytest.mark.parametrize("net", [ConvBN, Depthwise, Residual])
def test_channels_last_stays(net):
    model, x, groups = make(net)
    model = model.to(memory_format=torch.channels_last)
    x = x.to(memory_format=torch.channels_last)
    model(x).sum().backward()
    keep = random_keep(groups)
    cut(model, groups, keep)
    for name, p in model.named_parameters():
        if p.dim() == 4:
            # strides and not is_contiguous, which can't tell the formats of a 1x1 or a depthwise weight apart
            wanted = torch.empty(p.shape).to(memory_format=torch.channels_last).stride()
            assert p.stride() == wanted, name
            assert p.is_contiguous(memory_format=torch.channels_last), name
            assert p.grad.is_contiguous(memory_format=torch.channels_last), name


def test_contiguous_stays():
    model, _, groups = make(ConvBN)
    cut(model, groups, random_keep(groups))
    for p in model.parameters():
        assert p.is_contiguous()
        assert p.stride() == torch.empty(p.shape).stride()


def test_frozen_stays_frozen_and_modes_stay():
    model, _, groups = make(Residual)
    for p in model.a1.parameters():
        p.requires_grad_(False)
    model.train()
    model.abn1.eval()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    random_state = torch.get_rng_state()
    cut(model, groups, random_keep(groups), optimizer)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_verification_leaves_no_trace_in_buffers_random_state_or_grad_mode():
    class Counting(ConvBN):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("last", torch.zeros(2, 4))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.last = super().forward(x) + 0 * torch.rand(())
            return self.last

    model, _, groups = make(Counting)
    model.train()
    last, stats = model.last, model.bn1.running_mean.clone()
    keep = {"conv2": torch.tensor([0, 1])}
    random_state = torch.get_rng_state()
    with torch.enable_grad():
        cut(model, groups, keep)
        assert torch.is_grad_enabled()
    assert model.calls == 0
    assert model.last is last
    assert torch.equal(model.bn1.running_mean, stats)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_shared_parameters_are_sliced_once():
    model, x, groups = make(Tied, dtype=torch.float64)
    model.eval()
    cut(model, groups, {"stem": torch.tensor([1, 2])})
    assert model.block is model.again
    assert model.block.weight.shape == (2, 2, 3, 3)
    assert model.scale is model.also_scale
    assert model.scale.shape == (2, 1, 1)
    model(x).sum().backward()


def test_a_cut_under_inference_mode_leaves_a_model_that_trains():
    model, x, groups = make(ConvBN)
    with torch.inference_mode():
        cut(model, groups, random_keep(groups))
    model(x).sum().backward()
    assert not model.conv1.weight.is_inference()


def test_verification_runs_where_the_model_is_now():
    """Traced in fp32 and converted after: the example inputs follow."""
    model, _, groups = make(ConvBN)
    model.to(torch.float64)
    cut(model, groups, random_keep(groups))
    assert groups.verified <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits_verify(dtype):
    model, _, groups = make(Residual, dtype=dtype)
    cut(model, groups, random_keep(groups))
    assert groups.verified <= 16 * torch.finfo(dtype).eps
    assert all(p.dtype == dtype for p in model.parameters())


def test_verification_ignores_an_outer_autocast():
    model, _, groups = make(Residual)
    with torch.autocast("cpu", torch.bfloat16):
        cut(model, groups, random_keep(groups))
    assert groups.verified <= TOLERANCE[torch.float32]


def test_dictionaries_go_in_and_come_out():
    class Wrapped(ConvBN):
        def forward(self, image: Tensor, scale: float) -> dict[str, object]:
            return {"logits": super().forward(image) * scale, "name": "x", "labels": torch.arange(3)}

    model, x, groups = make(Wrapped)
    groups.example_inputs = ((), {"image": x, "scale": 2.0})
    cut(model, groups, random_keep(groups))
    assert 0 < groups.verified < 1e-5


def test_without_verification_nothing_is_run():
    model, _, groups = make(ConvBN)
    model.forward = _raise(AssertionError("ran"))
    cut(model, groups, random_keep(groups), verify=False)
    assert groups.verified is None
    assert model.conv1.weight.shape[0] == groups["conv1"].size


def test_a_plan_that_keeps_everything_changes_nothing():
    model, _, groups = make(ConvBN)
    before = fingerprint(model, groups=groups)
    cut(model, groups, {"conv1": torch.arange(6)})
    cut(model, groups, {})
    assert not differences(before, fingerprint(model, groups=groups))


class Misgrouped(ConvBN):
    """The two convolutions' own channels are coupled by the forward pass, which the groups don't know."""

    def channel_groups(self) -> list[ChannelGroup]:
        first, second = super().channel_groups()
        swapped = tuple(
            Member(m.tensor, m.dim, m.index.flip(0), m.role) if m.tensor == "bn1.running_mean" else m
            for m in first.members
        )
        return [ChannelGroup(first.name, swapped, first.kept, first.original_size), second]


def test_a_wrong_cut_is_found_and_undone():
    model, _, groups = make(Misgrouped)
    before = fingerprint(model, groups=groups)
    with pytest.raises(CutError, match=r"differ by .* at conv2\.weight"):
        cut(model, groups, {"conv1": torch.tensor([0, 1, 2])})
    assert not differences(before, fingerprint(model, groups=groups))


def test_a_wrong_cut_behind_zeros_is_found_at_the_reader():
    """Zero-initialised heads hide everything from the outputs."""
    model, _, groups = make(Misgrouped)
    nn.init.zeros_(model.head.weight)
    with pytest.raises(CutError):
        cut(model, groups, {"conv1": torch.tensor([0, 1, 2])})


def test_a_forward_pass_with_its_own_constants_is_named_and_undone():
    class Constant(ConvBN):
        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.bn1(self.conv1(x)))
            return self.head(F.relu(self.bn2(self.conv2(x.view(-1, 6, 6, 6)))).mean((2, 3)))

    model, _, groups = make(Constant)
    before = fingerprint(model, groups=groups)
    with pytest.raises(CutError, match="forward pass raised RuntimeError: Given groups=1"):
        cut(model, groups, {"conv1": torch.tensor([0, 1, 2])})
    assert not differences(before, fingerprint(model, groups=groups))


def test_a_model_that_goes_another_way_once_cut_is_found():
    class Branching(ConvBN):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y if self.conv1.out_channels == 6 else self.head(y.new_ones(1, self.head.in_features))

    model, _, groups = make(Branching)
    with pytest.raises(CutError, match="cut"):
        cut(model, groups, {"conv1": torch.tensor([0, 1, 2])})
    assert model.conv1.out_channels == 6


def test_the_reference_of_the_optimizer_tests_is_itself_a_right_cut():
    for net in NETS:
        model, x, groups = make(net)
        keep = random_keep(groups, 2)
        small = rebuilt(model, kept_positions(groups, keep, all_tensors(model)))
        cut(model, groups, keep)
        assert torch.equal(model.eval()(x), small.eval()(x)), net


def test_a_model_without_a_finite_output_is_not_called_verified():
    model, _, groups = make(ConvBN)
    with torch.no_grad():
        model.head.bias.fill_(float("nan"))
    with pytest.raises(CutError, match="all NaN or infinite"):
        cut(model, groups, random_keep(groups))
