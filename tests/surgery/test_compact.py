"""``tc.compact``: the cut network, run from dense masters."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import taylor_cuda as tc
from taylor_cuda.errors import CutError, InputError
from taylor_cuda.graph.groups import Groups
from taylor_cuda.surgery.compact import Compacted
from tests.surgery import nets
from tests.surgery.nets import NETS, ConvBN, Depthwise, Grouped, Linears, Residual, Tied, random_keep
from tests.surgery.state import SIZES, all_tensors, kept_positions, pick

EPS = torch.finfo(torch.float64).eps
ROUND = [1, 4]


def make(net: type[nets.Net], dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor, Groups]:
    return nets.make(net, 0, dtype)


def loss_of(output: Tensor) -> Tensor:
    return (output * torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view_as(output)).sum()


def cut_twin(model: nn.Module, groups: Groups, keep: dict[str, Tensor]) -> nn.Module:
    twin, its_groups = copy.deepcopy(model), copy.copy(groups)
    tc.cut(twin, its_groups, keep)
    return twin


def close(actual: Tensor, expected: Tensor, roundings: int = 256, scale: Tensor | None = None) -> bool:
    """Zeros between the terms change the order of sums, nothing else."""
    scale = expected.abs().max() if scale is None else scale
    return bool(((actual - expected).abs() <= roundings * EPS * scale).all())


def spread(value: Tensor, shape: torch.Size, kept: dict[int, list[int]]) -> Tensor:
    """Zeros of ``shape`` with ``value`` at the kept positions."""
    result = torch.zeros(shape, dtype=value.dtype)
    places = [torch.tensor(kept.get(dim, range(size))) for dim, size in enumerate(shape)]
    result[torch.meshgrid(*places, indexing="ij")] = value
    return result


@pytest.mark.parametrize("round_to", ROUND)
@pytest.mark.parametrize("net", NETS)
def test_compact_computes_what_the_cut_model_computes(net, round_to):
    model, x, groups = make(net)
    keep = random_keep(groups, 0)
    small = cut_twin(model, groups, keep)
    with tc.compact(model, groups, keep, round_to=round_to) as compacted:
        assert compacted.verified <= 256 * EPS
        for training in (True, False):
            model.train(training), small.train(training)
            assert close(model(x), small(x))


@pytest.mark.parametrize("round_to", ROUND)
@pytest.mark.parametrize("net", NETS)
def test_gradients_are_those_of_the_cut_model_and_0_where_dropped(net, round_to):
    model, x, groups = make(net)
    keep = random_keep(groups, 1)
    kept = kept_positions(groups, keep, all_tensors(model))
    small = cut_twin(model, groups, keep)
    loss_of(small.train()(x)).backward()
    with tc.compact(model, groups, keep, round_to=round_to):
        loss_of(model.train()(x)).backward()
    expected, dropped = dict(small.named_parameters()), 0
    # of all of them, for that of a bias before a BatchNorm is 0, and what is left of its terms is their rounding
    scale = torch.stack([p.grad.abs().max() for p in small.parameters() if p.grad is not None]).max()
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            assert expected[name].grad is None, name
            continue
        assert parameter.grad.shape == parameter.shape
        whole = spread(expected[name].grad, parameter.shape, kept.get(name, {}))
        assert close(parameter.grad, whole, scale=scale), name
        assert torch.equal(parameter.grad != 0, whole != 0) or name == "merge.bias", name
        dropped += name in kept
    assert dropped


@pytest.mark.parametrize("net", NETS)
def test_statistics_of_kept_channels_move_and_others_stand_still(net):
    model, x, groups = make(net)
    keep = random_keep(groups, 2)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    kept = kept_positions(groups, keep, all_tensors(model))
    small = cut_twin(model, groups, keep)
    with tc.compact(model, groups, keep, round_to=4):
        model.train()(x), small.train()(x)
        model.eval()(x), small.eval()(x)
    after = dict(small.named_buffers())
    for name, buffer in model.named_buffers():
        assert close(pick(buffer, kept.get(name, {})), after[name]), name
        for dim, positions in kept.get(name, {}).items():
            rest = torch.tensor([i for i in range(buffer.shape[dim]) if i not in positions])
            assert torch.equal(buffer.index_select(dim, rest), before[name].index_select(dim, rest)), name


@pytest.mark.parametrize("net", [Residual, Linears, Depthwise, Grouped, Tied])
def test_masks_that_change_agree_with_the_masked_dense_run(net):
    """50 steps of drop and grow: losses, and every weight at the end. BatchNorm in eval mode, where alone a masked
    network has the statistics of dropped channels that a compact one has."""
    generator = torch.Generator().manual_seed(0)
    model, x, groups = make(net)
    other, other_groups = copy.deepcopy(model), copy.copy(groups)
    model.eval(), other.eval()
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-2) for m in (model, other)]
    compacted = tc.compact(model, groups, random_keep(groups, 0))
    for step in range(50):
        keep = random_keep(groups, step % 7) if step % 11 else {}
        inputs = torch.randn(x.shape, generator=generator, dtype=x.dtype) if x.is_floating_point() else x
        compacted.update(keep)
        losses = [loss_of(model(inputs)).square()]
        losses[0].backward()
        with tc.masked(other, other_groups, keep):
            losses.append(loss_of(other(inputs)).square())
            losses[1].backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        assert close(losses[0], losses[1], 10_000), step
    compacted.close()
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        assert close(one, two, 10_000), name


def test_turning_it_off_gives_the_dense_model_back_bit_for_bit():
    model, x, groups = make(Residual)
    before = {name: (id(t), t.clone()) for name, t in all_tensors(model).items()}
    sizes = {n: {k: v for k, v in vars(m).items() if k in SIZES} for n, m in model.named_modules()}
    hooks = [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()]
    expected = model.eval()(x)
    compacted = tc.compact(model, groups, random_keep(groups, 0))
    model(x)
    assert not torch.equal(model(x), expected)
    compacted.close(), compacted.close()
    assert {name: id(t) for name, t in all_tensors(model).items()} == {name: i for name, (i, _) in before.items()}
    assert all(torch.equal(t, before[name][1]) for name, t in all_tensors(model).items())
    assert sizes == {n: {k: v for k, v in vars(m).items() if k in SIZES} for n, m in model.named_modules()}
    assert hooks == [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()]
    assert torch.equal(model(x), expected)
    assert "forward" not in vars(model)


def test_growth_brings_the_old_weights_back():
    model, x, groups = make(ConvBN)
    expected = model.eval()(x)
    compacted = tc.compact(model, groups, {"conv1": torch.tensor([0, 3])})
    loss_of(model(x)).backward()
    compacted.update({})
    assert torch.equal(model(x), expected)
    assert compacted.keep["conv1"].tolist() == list(range(6))


def test_parameters_are_dense_outside_of_the_forward_pass_and_compact_within():
    model, x, groups = make(ConvBN)
    seen: list[tuple[int, int]] = []
    model.conv1.register_forward_hook(lambda m, _, y: seen.append((m.weight.shape[0], m.out_channels)))
    with tc.compact(model, groups, {"conv1": torch.tensor([1, 4])}):
        model(x)
        assert (model.conv1.weight.shape[0], model.conv1.out_channels) == (6, 6)
        assert isinstance(model.conv1.weight, nn.Parameter)
        assert model.state_dict()["conv1.weight"].shape[0] == 6
    assert seen[-1] == (2, 2)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_in_the_forward_pass_leaves_the_dense_model(error):
    model, x, groups = make(ConvBN)
    before = {name: id(t) for name, t in all_tensors(model).items()}

    def stop(*_):
        raise error

    with tc.compact(model, groups, {"conv1": torch.tensor([1, 4])}):
        handle = model.bn2.register_forward_pre_hook(stop)
        with pytest.raises(error):
            model(x)
        assert {name: id(t) for name, t in all_tensors(model).items()} == before
        assert model.conv1.out_channels == 6
        handle.remove()
        assert model(x).isfinite().all()


def test_a_part_that_is_called_alone_is_compact_too():
    model, x, groups = make(ConvBN)
    model.eval()
    with tc.compact(model, groups, {"conv1": torch.tensor([1, 4])}):
        y = model.bn1(model.conv1(x))
        assert y.shape[1] == 2
        assert model.conv1.weight.shape[0] == 6
    assert close(y, model.bn1(model.conv1(x))[:, [1, 4]])


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # of the pass that verifies
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    class Checkpointed(ConvBN):
        def forward(self, x: Tensor) -> Tensor:
            y = checkpoint(self.first, x, use_reentrant=reentrant)
            return self.head(F.relu(self.bn2(self.conv2(y))).mean((2, 3)))

        def first(self, x: Tensor) -> Tensor:
            return F.relu(self.bn1(self.conv1(x)))

    model, x, groups = make(Checkpointed)
    plain, _, plain_groups = make(ConvBN)
    plain.load_state_dict(model.state_dict())
    keep = {"conv1": torch.tensor([1, 2, 4]), "conv2": torch.tensor([0, 3])}
    x.requires_grad_()
    for one, its_groups in ((model, groups), (plain, plain_groups)):
        tc.compact(one.eval(), its_groups, keep)
        loss_of(one(x)).backward()
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name


def test_a_model_that_calls_itself():
    class Twice(ConvBN):
        def forward(self, x: Tensor, again: bool = True) -> Tensor:
            first = self(x, again=False) if again else 0
            return first + super().forward(x)

    model, x, groups = make(Twice)
    keep = random_keep(groups, 0)
    small = cut_twin(model.eval(), groups, keep)
    with tc.compact(model, groups, keep):
        assert close(model(x), small(x))
    assert model.conv1.out_channels == 6


def test_a_forward_of_the_instance_runs_and_comes_back():
    model, x, groups = make(ConvBN)
    model.eval()

    def twice(inputs: Tensor) -> Tensor:
        return 2 * ConvBN.forward(model, inputs)

    model.forward = twice
    expected = model(x)
    with tc.compact(model, groups, {"conv1": torch.tensor([1, 4])}):
        assert close(model(x), 2 * ConvBN.forward(cut_twin_of(ConvBN, {"conv1": torch.tensor([1, 4])}), x))
    assert model.forward is twice
    assert torch.equal(model(x), expected)


def cut_twin_of(net: type[nets.Net], keep: dict[str, Tensor]) -> nn.Module:
    model, _, groups = make(net)
    return cut_twin(model.eval(), groups, keep)


def test_a_copy_is_compact_by_itself():
    model, x, groups = make(Residual)
    model.eval()
    compacted = tc.compact(model, groups, random_keep(groups, 0))
    model(x)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x))
    compacted.update({})
    assert not torch.equal(twin(x), model(x))
    with torch.no_grad():
        model.stem.weight.zero_()
    assert twin.stem.weight.any()


@pytest.mark.parametrize("first", [True, False])
def test_compiled_before_or_after(first):
    model, x, groups = make(ConvBN)
    model.eval()
    compiled = torch.compile(model, backend="eager")
    if first:
        compiled(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compacted = tc.compact(model, groups, random_keep(groups, 0))
        for seed in (0, 1):
            compacted.update(random_keep(groups, seed))
            expected = cut_twin_of_compact(model, groups, random_keep(groups, seed))(x)
            assert close(compiled(x), expected)
        compacted.close()
        assert torch.equal(compiled(x), model(x))


def cut_twin_of_compact(model: nn.Module, groups: Groups, keep: dict[str, Tensor]) -> nn.Module:
    """A copy, which is compact like the model, and stops being so as it is cut."""
    return cut_twin(model, groups, keep)


def test_autocast_reads_weights_in_its_dtype_and_norms_in_theirs():
    model, x, groups = make(ConvBN, dtype=torch.float32)
    seen: dict[str, torch.dtype] = {}
    for name in ("conv2", "bn1"):
        getattr(model, name).register_forward_pre_hook(lambda m, _, name=name: seen.update({name: m.weight.dtype}))
    keep = random_keep(groups, 0)
    small = cut_twin(model, groups, keep)
    for cast, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        with tc.compact(model, groups, keep, cast=cast), torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(x)
        assert seen == {"conv2": dtype, "bn1": torch.float32}
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(output, small(x))
        loss_of(output).backward()
        assert model.conv2.weight.grad.dtype == torch.float32


def test_frozen_parameters_stay_frozen():
    model, x, groups = make(ConvBN)
    model.conv1.weight.requires_grad_(False)
    seen = []
    model.conv1.register_forward_pre_hook(lambda m, _: seen.append(m.weight.requires_grad))
    with tc.compact(model, groups, random_keep(groups, 0)):
        loss_of(model(x)).backward()
    assert model.conv1.weight.grad is None
    assert model.conv2.weight.grad is not None
    assert not any(seen)


def test_second_derivatives():
    model, x, groups = make(ConvBN)
    model.eval()
    keep = random_keep(groups, 0)
    small = cut_twin(model, groups, keep)

    def norm_of_gradient(one: nn.Module) -> Tensor:
        parameters = list(one.parameters())
        gradients = torch.autograd.grad(loss_of(one(x)).square(), parameters, create_graph=True)
        total = sum(g.square().sum() for g in gradients)
        return torch.cat([g.flatten() for g in torch.autograd.grad(total, parameters)]).abs().sum()

    with tc.compact(model, groups, keep):
        assert close(norm_of_gradient(model), norm_of_gradient(small), 10_000)


def test_two_backward_passes_of_one_forward_pass():
    model, x, groups = make(ConvBN)
    with tc.compact(model.eval(), groups, random_keep(groups, 0)):
        loss = loss_of(model(x))
        loss.backward(retain_graph=True)
        once = model.conv1.weight.grad.clone()
        loss.backward()
    assert torch.equal(model.conv1.weight.grad, 2 * once)


def test_cut_makes_it_permanent():
    model, x, groups = make(Residual)
    model.eval()
    keep = random_keep(groups, 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    compacted = tc.compact(model, groups, keep)
    expected = model(x)
    tc.cut(model, groups, keep, optimizer)
    assert close(model(x), expected)
    assert model.stem.weight.shape[0] == keep["stem"].numel()
    with pytest.raises(InputError, match="closed, or the model was cut"):
        compacted.update({})


def test_a_cut_that_fails_leaves_it_compact(monkeypatch):
    model, x, groups = make(Residual)
    model.eval()
    compacted = tc.compact(model, groups, random_keep(groups, 0))
    expected = model(x)
    with pytest.raises(InputError, match="plan"):
        tc.cut(model, groups, {"nothing": torch.tensor([0])})
    assert torch.equal(model(x), expected)
    compacted.close()


def test_zeros_run_beside_kept_channels_up_to_the_multiple():
    model, x, groups = make(ConvBN)
    widths = []
    model.conv1.register_forward_hook(
        lambda m, _, y: widths.append((y.shape[1], int((y != 0).any(0).any(1).any(1).sum())))
    )
    with tc.compact(model, groups, {"conv1": torch.tensor([1, 4, 5])}, round_to=4):
        model(x)
    assert widths[-1] == (4, 3)
    with tc.compact(model, groups, {"conv1": torch.tensor([1, 2, 3, 4, 5])}, round_to=4):
        model(x)
    assert widths[-1] == (6, 5)  # there are no more than 6


def test_a_layer_norm_is_never_filled_up():
    model, x, groups = make(Linears)
    with tc.compact(model, groups, {"fc1": torch.tensor([1, 4, 5])}, round_to=4):
        shapes = []
        model.norm.register_forward_hook(lambda m, _, y: shapes.append(y.shape[-1]))
        model(x)
    assert shapes == [3]


def test_a_compact_model_that_computes_something_else_is_refused():
    class Counting(ConvBN):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.conv1.out_channels

    model, x, groups = make(Counting)
    expected = model.eval()(x)
    with pytest.raises(CutError, match="compact and masked model differ by"):
        tc.compact(model, groups, {"conv1": torch.tensor([1, 4])})
    assert torch.equal(model(x), expected)
    assert "forward" not in vars(model)
    compacted = tc.compact(model, groups, {"conv1": torch.tensor([1, 4])}, verify=False)
    wrong = model(x)
    with pytest.raises(CutError, match="differ"):
        compacted.update({"conv1": torch.tensor([1, 2])}, verify=True)
    assert torch.equal(model(x), wrong)
    assert compacted.keep["conv1"].tolist() == [1, 4]


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"conv1": torch.tensor([4, 1])}, "sorted"),
        ({"conv1": torch.tensor([1, 1])}, "sorted"),
        ({"conv1": torch.tensor([1, 6])}, "below 6"),
        ({"conv1": torch.tensor([], dtype=torch.int64)}, "not empty"),
        ({"conv1": torch.tensor([True] * 6)}, "int64"),
        ({"conv9": torch.tensor([0])}, "no group named 'conv9'"),
        ([1], "wanted a tc.Plan or a dict"),
    ],
)
def test_plans_that_do_not_fit(keep, message):
    model, x, groups = make(ConvBN)
    expected = model.eval()(x)
    with pytest.raises(InputError, match=message):
        tc.compact(model, groups, keep)
    with tc.compact(model, groups, {"conv1": torch.tensor([1, 4])}) as compacted:
        compact = model(x)
        with pytest.raises(InputError, match=message):
            compacted.update(keep)
        assert torch.equal(model(x), compact)
    assert torch.equal(model(x), expected)


def test_other_bad_input():
    model, x, groups = make(ConvBN)
    with pytest.raises(InputError, match="round_to"):
        tc.compact(model, groups, {}, round_to=0)
    with pytest.raises(InputError, match="compiled"):
        tc.compact(torch.compile(model), groups, {})
    other, _, _ = make(Linears)
    with pytest.raises(InputError, match="made for another model"):
        tc.compact(other, groups, {})
    compacted = tc.compact(model, groups, {"conv1": torch.tensor([1, 4])})
    for call in (
        lambda: tc.compact(model, groups, {}),
        lambda: tc.trace(model, x),
        lambda: tc.masked(model, groups, {}).__enter__(),
        lambda: tc.fuse_scoring(model, groups).__enter__(),
    ):
        with pytest.raises(InputError, match="runs compact"):
            call()
    compacted.close()
    with pytest.raises(InputError, match="closed"):
        compacted.verify()


def test_a_model_whose_shapes_changed_meanwhile_is_refused():
    model, x, groups = make(ConvBN)
    with tc.compact(model, groups, {"conv1": torch.tensor([1, 4])}):
        model.conv1.weight = nn.Parameter(torch.zeros(9, 3, 3, 3, dtype=x.dtype))
        with pytest.raises(InputError, match=r"conv1.weight has shape \(9, 3, 3, 3\), and had \(6, 3, 3, 3\)"):
            model(x)
    assert isinstance(model.bn1.weight, nn.Parameter)


def test_the_package_says_compact_of_a_model_that_is():
    model, _, groups = make(ConvBN)
    assert isinstance(tc.compact(model, groups, {}), Compacted)
